"""Effects between latents of several places: known where what lies between is linear, else against runs by hand."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import lm
from sae_jax.evaluation.tree import causal_tree
from sae_jax.saes import topk
from sae_jax.types import UsageError, UserError
from tests.evaluation import in_model
from tests.lm.tiny import jit_run

pytestmark = pytest.mark.usefixtures("one_device")

TEXT = "def area(width, height):\n    return width"
HOOKS = {"early": lm.Hook(0, "resid_post"), "middle": lm.Hook(1, "resid_post"), "late": lm.Hook(2, "resid_post")}


@pytest.fixture(scope="module")
def subjects():
    """Dictionaries at three layers of the bundled model; of one each vector is normalised."""
    norms = {"early": "none", "middle": "none", "late": "layer_norm"}
    return {
        name: in_model.case(hook, topk.Config(n_latents=64, k=4, dtype="float32", input_norm=norms[name])).subject
        for name, hook in HOOKS.items()
    }


def strongest(subject, ids):
    """(latent, token) of the greatest value in a text."""
    ((latents, values),) = subject.codes([ids])
    t, k = np.unravel_index(values.argmax(), values.shape)
    return int(latents[t, k]), int(t)


@partial(jax.jit, static_argnames=("at", "hook"))
def edited(model, ids, at, edit, hook):
    edits = lm.intervene.edits({at: lm.intervene.add(edit)})
    return lm.run(model, ids, edits=edits, capture=(hook,), logits=False).acts[hook]


def rows(model, ids, hook, edit=None):
    if edit is None:
        acts = jit_run(model, jnp.asarray(ids[None]), capture=(hook,)).acts[hook]
    else:
        acts = edited(model, jnp.asarray(ids[None]), edit[0], jnp.asarray(edit[1][None], jnp.float32), hook)
    return np.asarray(acts[0], np.float64)


def part(subject, ids, latent):
    """What a latent adds to each token's reconstruction, f64[T, Y], by hand."""
    x = rows(subject.model, ids, subject.encoded[0])
    code = subject.sae.encode(np.float32(x))
    scale = x.std(1, ddof=1, keepdims=True) + 1e-5 if subject.sae.config.input_norm == "layer_norm" else 1.0
    value = np.where(np.asarray(code.indices) == latent, np.asarray(code.values, np.float64), 0).sum(1, keepdims=True)
    value[0] = 0  # the token that begins the text has no code
    return value * scale * np.asarray(subject.sae.w_dec[latent], np.float64)


def pre(subject, x, latent):
    if subject.sae.config.input_norm == "layer_norm":
        x = (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-5)
    return x @ np.asarray(subject.sae.w_enc[latent], np.float64)


def test_effects_are_those_of_runs_edited_by_hand(subjects):
    ids = subjects["middle"].ids(TEXT)
    latent, position = strongest(subjects["middle"], ids)
    tree = causal_tree(subjects, ids, "middle", latent, n=3)
    assert (tree.position, tree.hook) == (position, "resid_post.1")
    assert [level.dictionary for level in tree.upstream] == ["early"]
    assert [level.dictionary for level in tree.downstream] == ["late"]

    def fall(of, removed, at, hook, to, t, share):
        clean, without = (rows(of.model, ids, hook, (at, -s * removed)) for s in (0.0, share))
        return (pre(of, clean, to)[t] - pre(of, without, to)[t]) / share

    for link in tree.upstream[0].latents:
        removed = part(subjects["early"], ids, link.latent)
        args = subjects["middle"], removed, HOOKS["early"], HOOKS["middle"], latent, position
        assert link.measured == pytest.approx(fall(*args, 1.0), rel=1e-3, abs=1e-3)
        assert link.estimate == pytest.approx(fall(*args, 0.01), rel=0.05, abs=5e-2)
    removed = part(subjects["middle"], ids, latent)
    for link in tree.downstream[0].latents:
        args = subjects["late"], removed, HOOKS["middle"], HOOKS["late"], link.latent, link.position
        assert link.measured == pytest.approx(fall(*args, 1.0), rel=1e-3, abs=1e-3)
        assert link.estimate == pytest.approx(fall(*args, 0.01), rel=0.05, abs=5e-2)
    shown = str(tree)
    first = tree.upstream[0].latents[0]
    assert shown.startswith(f"latent {latent} of middle (resid_post.1): ")
    assert shown.index("what made it fire:") < shown.index("early (resid_post.0)") < shown.index("what it made fire:")
    assert f"{first.latent:<8}{first.estimate:+10.3f}{first.measured:+10.3f}" in shown
    sizes = [-abs(link.estimate) for link in tree.upstream[0].latents]
    assert sizes == sorted(sizes)


def test_where_all_between_is_linear_estimates_are_exact_and_add_up(subjects):
    """What an MLP writes is added to the stream: its latents, error and bias make up its part of the pre-activation."""
    hook = lm.Hook(1, "mlp_out")
    mlp = in_model.case(hook, topk.Config(n_latents=64, k=4, dtype="float32", input_norm="none")).subject
    middle = subjects["middle"]
    ids = middle.ids(TEXT)
    latent, position = strongest(middle, ids)
    (level,) = causal_tree({"mlp": mlp, "middle": middle}, ids, "middle", latent, n=4).upstream
    w_enc = np.asarray(middle.sae.w_enc[latent], np.float64)
    for link in level.latents:
        known = part(mlp, ids, link.latent)[position] @ w_enc
        assert link.estimate == pytest.approx(known, rel=1e-4, abs=1e-4)
        assert link.measured == pytest.approx(known, rel=1e-3, abs=1e-3)
    total = sum(link.estimate for link in level.latents) + level.others + level.error
    bias = np.asarray(mlp.sae.b_dec, np.float64) @ w_enc
    assert total + bias == pytest.approx(rows(mlp.model, ids, hook)[position] @ w_enc, rel=1e-4)


def test_a_planted_chain_is_found(subjects):
    """With blocks that write nothing the stream stays as it is: a latent acts on those that read its direction."""
    model = subjects["early"].model
    silent = ("o.w", "o.b", "down.w", "down.b")
    layers = {key: jnp.zeros_like(w) if key in silent else w for key, w in model.params["layers"].items()}
    still = dataclasses.replace(model, params={**model.params, "layers": layers}, digest="still")
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.standard_normal((128, 128)))[0][:8].astype(np.float32)
    config = topk.Config(n_latents=8, k=8, dtype="float32", input_norm="none")

    def dictionary(hook, order):
        w = jnp.asarray(directions[order])
        sae = topk.TopK(w, jnp.full(8, 100.0), w, jnp.zeros(128), config)
        subject = dataclasses.replace(subjects["early"], sae=sae, model=still)
        return dataclasses.replace(subject, encoded=(hook,), reconstructed=(hook,))

    order = rng.permutation(8)
    chain = {"a": dictionary(HOOKS["early"], np.arange(8)), "b": dictionary(HOOKS["middle"], order)}
    ids = chain["a"].ids(TEXT)
    target = 3
    up = causal_tree(chain, ids, "b", target, n=8).upstream[0]
    value = {link.latent: link for link in up.latents}
    cause = int(order[target])
    assert up.latents[0].latent == cause
    ((latents, values),) = chain["a"].codes([ids])
    position = causal_tree(chain, ids, "b", target, n=1).position
    amount = values[position][latents[position] == cause].item()
    assert value[cause].estimate == pytest.approx(amount, rel=1e-4)
    assert value[cause].measured == pytest.approx(amount, rel=1e-3)
    assert all(abs(link.measured) < 1e-2 for link in up.latents[1:]), "the others are at right angles"
    down = causal_tree(chain, ids, "a", cause, n=1).downstream[0]
    assert down.latents[0].latent == target
    assert down.others is None


def test_what_has_no_tree_is_refused(subjects):
    ids = subjects["middle"].ids(TEXT)
    with pytest.raises(UsageError, match="name two or more"):
        causal_tree({"middle": subjects["middle"]}, ids, "middle", 0)
    with pytest.raises(UsageError, match="'x' is none of early, middle, late"):
        causal_tree(subjects, ids, "x", 0)
    with pytest.raises(UsageError, match="latent 64 does not exist; choose 0 to 63"):
        causal_tree(subjects, ids, "middle", 64)
    with pytest.raises(UsageError, match="neither before nor after middle"):
        causal_tree({**subjects, "twin": subjects["middle"]}, ids, "middle", 0)
    other = dataclasses.replace(subjects["late"], model=dataclasses.replace(subjects["late"].model, digest="x"))
    with pytest.raises(UsageError, match="several language models"):
        causal_tree({**subjects, "late": other}, ids, "middle", 0)
    sae = dataclasses.replace(subjects["middle"].sae, b_enc=jnp.full(64, -1e6))
    silent = dataclasses.replace(subjects["middle"], sae=sae)
    with pytest.raises(UserError, match="latent 0 of middle is active at no token"):
        causal_tree({**subjects, "middle": silent}, ids, "middle", 0)
