"""Latents of given texts, and text written with latents set: against the model run by hand, and planted activity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sae_jax
from sae_jax import lm
from sae_jax.evaluation import prompts, steering
from sae_jax.saes import gated, init, jumprelu, topk
from sae_jax.types import UsageError, UserError
from tests import runs

HOOK = lm.Hook(1, "resid_post")
TEXT = "def area(width, height):\n    return width"


@pytest.fixture(scope="module")
def model():
    return lm.load("bundled")


@pytest.fixture(scope="module")
def rows(model):
    ids = np.random.default_rng(0).integers(1, model.spec.n_vocab, (8, 32))
    acts = lm.run(model, jnp.asarray(ids), capture=[HOOK], logits=False).acts[HOOK]
    return np.asarray(acts, np.float32).reshape(-1, acts.shape[-1])


def of(model, rows, config=None):
    """A dictionary at the hook, at random."""
    config = config or topk.Config(n_latents=64, k=4, dtype="float32", input_norm="none")
    sae = config.init(jax.random.key(0), init.sample_statistics(rows, config.input_norm))
    tokenizer = lm.tokenizer("bundled")
    return prompts.Subject(sae, model, tokenizer, (HOOK,), (HOOK,), tokenizer.separator_id)


def test_latents_of_a_text_are_those_of_its_activations(model, rows):
    subject = of(model, rows)
    tokens, latents, values = prompts.active(subject, TEXT, 3)
    ids = subject.ids(TEXT)
    assert "".join(tokens[1:]) == TEXT
    acts = lm.run(model, jnp.asarray(ids[None]), capture=[HOOK], logits=False).acts[HOOK][0]
    code = subject.sae.encode(acts)
    np.testing.assert_array_equal(latents[1:], code.indices[1:, :3])
    np.testing.assert_allclose(values[1:], code.values[1:, :3], rtol=1e-5)
    assert (values[0] == 0).all(), "the token that begins it is special, and the set has no row of it"


def test_a_text_that_is_empty_or_too_long_is_refused(model, rows):
    subject = of(model, rows)
    with pytest.raises(UsageError, match="the text is empty"):
        subject.ids("")
    with pytest.raises(UsageError, match=r"tokens, and the model has room for"):
        subject.ids("word " * 5000)


def planted(active):
    """A subject whose texts are numbers: `active` gives {latent: value} of each."""

    class Planted:
        def ids(self, text):
            return int(text)

        def codes(self, ids):
            for number in ids:
                pairs = sorted(active(number).items())
                yield (
                    np.array([[latent for latent, _ in pairs], [0] * len(pairs)]),
                    np.array([[value for _, value in pairs], [0.0] * len(pairs)], np.float32),
                )

    return Planted()


def test_the_latent_that_tells_texts_apart_is_found_and_one_that_did_by_luck_is_told():
    """Positive texts are 0 to 19; 7 separates everywhere, 3 only in the half that latents are chosen by."""

    def active(number):
        is_positive, i = number < 20, number % 20
        latents = {5: 1.0}
        if is_positive:
            latents[7] = 2.0 + i
        if is_positive if i % 2 == 0 else i % 4 == 1:
            latents[3] = 1.0
        return latents

    texts = [str(i) for i in range(40)]
    found = {s.latent: s for s in prompts.separating(planted(active), texts[:20], texts[20:], 3)}
    assert set(found) == {3, 5, 7}
    assert found[7].auc == 1
    assert 0.8 < found[7].interval[0] < 1 == found[7].interval[1]
    assert (found[7].fires_in_positive, found[7].fires_in_negative) == (1, 0)
    assert found[7].positive == pytest.approx(2 + np.mean(range(1, 20, 2)))
    assert found[3].auc == found[5].auc == 0.5
    with pytest.raises(UsageError, match="3 positive texts are too few; give at least 4"):
        prompts.separating(planted(active), texts[:3], texts[20:], 3)
    with pytest.raises(UserError, match="no latent is active"):
        prompts.separating(planted(lambda _: {}), texts[:20], texts[20:], 3)


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9))
def test_auc_counts_pairs(seed, n, m):
    rng = np.random.default_rng(seed)
    p, q = rng.integers(0, 4, (n, 3)), rng.integers(0, 4, (m, 3))
    for u in range(3):
        pairs = [1 if a > b else 0.5 if a == b else 0 for a in p[:, u] for b in q[:, u]]
        value = prompts.auc(p, q)[u]
        assert value == pytest.approx(np.mean(pairs))
        low, high = prompts.auc_interval(float(value), n + 1, m + 1)
        assert 0 <= low <= value <= high <= 1
        assert high - low > 0.05


# ---- steering


@pytest.mark.parametrize("variant", ["topk", "layer_norm", "jumprelu", "gated"])
def test_clamping_changes_the_reconstruction_alone(model, rows, variant):
    """x' - x is the difference of two decodes, in the units of x."""
    config = {
        "topk": None,
        "layer_norm": topk.Config(n_latents=64, k=4, dtype="float32", input_norm="layer_norm"),
        "jumprelu": jumprelu.Config(n_latents=64, dtype="float32", input_norm="none"),
        "gated": gated.Config(n_latents=64, dtype="float32", input_norm="none"),
    }[variant]
    sae = of(model, rows, config).sae
    x = jnp.asarray(rows[:6].reshape(2, 3, -1))
    latents = jnp.asarray([int(sae.encode(x).indices[0, 0, 0]), 11])
    args = {"sae": sae, "latents": latents, "values": jnp.asarray([3.0, 1.5]), "keep": jnp.array([[False, True, True]])}
    args["rows"] = [sae.w_dec[latents]]
    changed = steering._clamped(x, args, at=0)
    code = sae.encode(x)
    scale = 1.0
    if variant == "layer_norm":
        scale = (x.std(-1, ddof=1) + 1e-5)[..., None]
    want = x + scale * (sae.decode(lm.intervene.set_latents(code, latents, args["values"])) - sae.decode(code))
    np.testing.assert_allclose(changed[:, 1:], want[:, 1:], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(changed[:, 0], x[:, 0], "a special token of the prompt stays")
    alone = steering._clamped(x[:, :1], args, at=0)
    np.testing.assert_allclose(alone, want[:, :1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
def test_adding_is_in_the_units_of_the_activations(model, rows, norm):
    sae = of(model, rows, topk.Config(n_latents=64, k=4, dtype="float32", input_norm=norm)).sae
    x = jnp.asarray(rows[:6].reshape(2, 3, -1))
    args = {"sae": sae, "latents": None, "values": jnp.asarray([3.0]), "keep": jnp.array([[False, True, True]])}
    args["rows"] = [sae.w_dec[jnp.asarray([7])]]
    changed = steering._added(x, args, at=0)
    scale = (x.std(-1, ddof=1) + 1e-5)[..., None] if norm == "layer_norm" else 1.0
    want = x + scale * 3 * sae.w_dec[7][None, None]
    np.testing.assert_allclose(changed[:, 1:], want[:, 1:], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(changed[:, 0], x[:, 0])


def test_an_edit_by_norm_is_as_long_as_it_says_along_the_latents(model, rows):
    sae = of(model, rows).sae
    x = jnp.asarray(rows[:6].reshape(2, 3, -1))
    latents, largest = jnp.asarray([7, 9]), jnp.asarray([3.0, 1.0])
    args = {"multiple": jnp.float32(-0.3), "largest": largest, "keep": jnp.array([[False, True, True]])}
    changed = steering._by_norm(x, {**args, "rows": [sae.w_dec[latents]]}, at=0)
    edit = np.asarray(changed - x, np.float64)
    np.testing.assert_allclose(np.linalg.norm(edit, axis=-1)[:, 1:], 0.3 * np.linalg.norm(x, axis=-1)[:, 1:], rtol=1e-4)
    along = 3 * np.asarray(sae.w_dec[7], np.float64) + np.asarray(sae.w_dec[9], np.float64)
    cosine = edit[:, 1:] @ along / np.linalg.norm(edit, axis=-1)[:, 1:] / np.linalg.norm(along)
    np.testing.assert_allclose(cosine, -1, rtol=1e-4)
    np.testing.assert_array_equal(changed[:, 0], x[:, 0])
    subject = of(model, rows)
    ids = subject.ids(TEXT)
    plain, nothing, much = steering.steer(subject, ids, [3], np.array([5.0], np.float32), (0.0, 4.0), "norm", n_new=8)
    assert plain.text == nothing.text != much.text


def test_clamping_at_the_value_a_latent_has_leaves_logits_as_they_are(model, rows):
    subject = of(model, rows)
    ids = subject.ids(TEXT)[None]
    acts = lm.run(model, jnp.asarray(ids), capture=[HOOK], logits=False).acts[HOOK]
    latent = int(subject.sae.encode(acts).indices[0, 4, 0])
    code = subject.sae.encode(acts[:, 4:5])
    args = {
        "sae": subject.sae,
        "latents": jnp.asarray([latent]),
        "values": code.values[0, 0, :1],
        "keep": jnp.arange(ids.shape[1])[None] == 4,
        "rows": [subject.sae.w_dec[jnp.asarray([latent])]],
    }
    edits = lm.intervene.edits({HOOK: lambda x: steering._clamped(x, args, at=0)})
    logits = lm.run(model, jnp.asarray(ids), edits=edits).logits
    np.testing.assert_allclose(logits, lm.run(model, jnp.asarray(ids)).logits, atol=1e-4)


def test_what_is_written_follows_the_scale(model, rows):
    subject = of(model, rows)
    ids = subject.ids(TEXT)
    largest = np.array([5.0], np.float32)
    plain, nothing, much = steering.steer(subject, ids, [3], largest, (0.0, 60.0), "add", n_new=8)
    assert (plain.scale, nothing.scale, much.scale) == (None, 0.0, 60.0)
    assert plain.text == nothing.text != much.text
    by_hand = lm.generate(model, jnp.asarray(ids[None]), 8, jax.random.key(0))
    assert plain.text == subject.tokenizer.decode(np.asarray(by_hand)[0, len(ids) :])


def test_prompts_of_one_length_are_continued_together(model, rows):
    subject = of(model, rows)
    ids = np.stack([subject.ids(TEXT)[:6], subject.ids("import os\nimport sys\nimport re")[:6]])
    together = steering.write(subject, ids, [3], np.array([5.0], np.float32), (60.0,), "add", n_new=4)
    alone = [
        steering.write(subject, row[None], [3], np.array([5.0], np.float32), (60.0,), "add", n_new=4) for row in ids
    ]
    for at, (scale, new) in enumerate(together):
        assert new.shape == (2, 4)
        assert scale == alone[0][at][0]
        np.testing.assert_array_equal(new, np.concatenate([one[at][1] for one in alone]))


def test_what_cannot_be_steered_is_refused(model, rows):
    subject = of(model, rows)
    for latents, message in (
        ((), "at least one"),
        ((64,), "latent 64 does not exist; choose 0 to 63"),
        ((2, 2), "twice"),
    ):
        with pytest.raises(UsageError, match=message):
            steering.check(subject, latents, "add")
    other = dataclasses.replace(subject, encoded=(lm.Hook(1, "mlp_in"),))
    with pytest.raises(UsageError, match="reads another place than it writes, or several; use --how add"):
        steering.check(other, (1,), "clamp")
    steering.check(other, (1,), "add")
    normed = of(model, rows, topk.Config(n_latents=64, k=4, dtype="float32", input_norm="layer_norm"))
    with pytest.raises(UsageError, match="in units of each vector's layer_norm"):
        steering.check(dataclasses.replace(normed, encoded=(lm.Hook(1, "mlp_in"),)), (1,), "add")


def test_few_programs_serve_texts_of_all_lengths():
    rooms = [prompts.room(n, 5000) for n in range(1, 5000)]
    assert all(room >= n for n, room in enumerate(rooms, 1))
    assert all(room <= max(1.25 * n, 32 * -(-n // 32)) for n, room in enumerate(rooms, 1))
    assert len(set(rooms)) == 4 + 4 * 5 + 1  # up to 128; a power of two each up to 4096; then 5000 itself
    assert prompts.room(100, 110) == 110


def test_a_stream_is_what_is_written_whole(model, rows):
    """Though its prompt is filled up, and latents that change nothing are added to those that do."""
    subject = of(model, rows)
    ids, largest = subject.ids(TEXT), np.array([5.0, 9.0], np.float32)
    options = {"n_new": 6, "temperature": 0.7, "seed": 3}
    plain, steered = steering.write(subject, ids[None], [3, 7], largest, [2.0], "clamp", **options)
    assert list(steering.stream(subject, ids, **options)) == plain[1][0].tolist()
    assert list(steering.stream(subject, ids, [3, 7], largest, 2.0, "clamp", **options)) == steered[1][0].tolist()


@pytest.mark.slow
def test_a_model_that_is_split_is_steered_as_a_whole_one(tmp_path):
    text = str(runs.ROOT / "sae_jax" / "lm" / "block.py")
    sae_jax.harvest(tmp_path / "set", model="bundled", hooks=["resid_post.1"], text=text, tokens=512, context=64)
    d = sae_jax.train(tmp_path / "set", n_latents=32, k=4, steps=2, batch_size=64)
    activations = sae_jax.open_activations(tmp_path / "set")
    found = []
    for split in (1, 2):
        subject = prompts.subject(d.sae, d.record, activations, split=split)
        ids = subject.ids(TEXT)
        found.append(list(steering.stream(subject, ids, [3], [9.0], 1.0, "clamp", n_new=5)))
        written = steering.write(subject, ids[None], [3], np.array([9.0], np.float32), [1.0], n_new=5)
        assert written[1][1][0].tolist() == found[-1]
    assert found[0] == found[1]
