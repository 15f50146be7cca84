"""What one latent's ablation moves: the measure where its value is known, and the run from a token on by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import lm, mesh
from sae_jax.evaluation import baselines, run_on
from sae_jax.evaluation.studies import ablation_sparsity
from sae_jax.evaluation.studies.ablation_sparsity import Study, effect_sparsity
from sae_jax.saes import topk
from sae_jax.types import UsageError
from tests.evaluation import in_model
from tests.lm.tiny import SPEC, random_model
from tests.oracles import gpt2

HOOK = lm.Hook(1, "resid_post")
SMALL = Study(n_sequences=3, n_tokens=2, n_positions=4)


def test_gaussian_effects_touch_two_over_pi_of_all_logits():
    v = np.random.default_rng(0).standard_normal((3, 16, 20_000)).astype(np.float32)
    np.testing.assert_allclose(effect_sparsity(jnp.asarray(v)), 2 / np.pi, atol=0.002)


@pytest.mark.parametrize("size", [1.0, 1e-25, 1e25])
def test_one_effect_touches_one_logit_and_a_shift_of_a_position_none(size):
    v = np.zeros((16, 50), np.float32)
    v[3, 7] = -size
    assert effect_sparsity(jnp.asarray(v)) == pytest.approx(1 / 800)
    shifted = v + size * np.arange(16, dtype=np.float32)[:, None]
    assert effect_sparsity(jnp.asarray(shifted)) == pytest.approx(1 / 800)
    assert effect_sparsity(jnp.ones((16, 50))) != effect_sparsity(jnp.ones((16, 50))), "nothing is left"


@pytest.mark.parametrize("point", ["attn_z", "mlp_out"])
def test_a_change_at_one_token_is_run_on_from_there(point):
    """Against a float64 model that runs whole sequences."""
    rng, model, hook = np.random.default_rng(1), random_model(SPEC), lm.Hook(1, point)
    ids = rng.integers(0, SPEC.n_vocab, (2, 10)).astype(np.int32)
    clean = run_on.read(model, jnp.asarray(ids), hook, hook)
    sequence, position = np.array([1, 0, 1]), np.array([0, 6, 3])
    changes = rng.standard_normal((3, 2, SPEC.d_model)).astype(np.float32)
    changes[:, 0] = 0
    got = jax.lax.map(lambda token: run_on.logits_after(clean, *token, n_positions=4), (sequence, position, changes))
    params = jax.tree.map(np.asarray, model.params)
    for p, (s, t) in enumerate(zip(sequence, position, strict=True)):
        for c in range(2):

            def edit(x, p=p, t=t, c=c):
                x = x.copy()
                x[:, t] += changes[p, c].reshape(x[:, t].shape)
                return x

            want = gpt2.forward(params, ids[s : s + 1], SPEC.n_heads, edits={hook: edit})[0]
            np.testing.assert_allclose(got[p, c], want[0, t : t + 4], atol=2e-5)


def test_the_change_of_a_latent_is_its_ablation():
    case = in_model.case(HOOK, topk.Config(n_latents=64, k=4, dtype="float32", input_norm="layer_norm"))
    at = run_on.place(case.subject)
    clean = run_on.read(at.model, jnp.asarray(case.text.sequences), HOOK, HOOK)
    tokens = np.array([0, 3]), np.array([5, 9])
    is_active, changes = ablation_sparsity._changes(at, clean, *tokens, np.zeros(128), np.random.default_rng(0))
    assert is_active.all()
    x = np.asarray(clean.x)[tokens]
    code, scale = at.sae.encode(x), (x.std(-1, ddof=1) + 1e-5)[:, None]
    rows = np.asarray(at.sae.w_dec)[np.asarray(code.indices)]
    parts = scale[..., None] * np.asarray(code.values)[..., None] * rows
    assert (np.abs(changes[:, None, 1] + parts).max(-1).min(-1) < 1e-4).all(), "one slot's part of the reconstruction"
    sizes = np.linalg.norm(changes, axis=-1)
    np.testing.assert_allclose(sizes[:, 3], sizes[:, 1], rtol=1e-4)
    (channels,) = {tuple(np.count_nonzero(changes[:, 2], axis=1))}
    assert channels == (1, 1)
    np.testing.assert_allclose((changes[:, 2] + np.asarray(clean.y)[tokens])[changes[:, 2] != 0], 0, atol=1e-5)


def test_nothing_of_the_last_layer_reaches_a_later_token():
    found = {metric.name: metric for metric in SMALL.metrics(in_model.case(lm.Hook(3, "resid_post")))}
    assert set(found) == set(Study.METRICS)
    assert found["n_ablations"].value == 6
    for name in set(found) - {"n_ablations"}:
        assert 0 < found[name].value <= 1 / 4
        low, high = found[name].interval
        assert low <= found[name].value <= high


def test_it_is_the_same_each_time_and_takes_bases_and_transcoders():
    case = in_model.case(HOOK)
    assert list(SMALL.metrics(case)) == list(SMALL.metrics(case))
    basis = dataclasses.replace(case, subject=dataclasses.replace(case.subject, sae=baselines.pca(case.text.rows())))
    assert [m.value for m in SMALL.metrics(basis)][-1] == 6
    assert [m.value for m in SMALL.metrics(in_model.case(lm.Hook(1, "mlp_in"), writes=lm.Hook(1, "mlp_out")))][-1] == 6


def test_a_model_split_over_devices_gives_the_same():
    case = in_model.case(HOOK)
    split = dataclasses.replace(case.subject, model=lm.load("bundled", mesh=mesh.one_copy(2)))
    for got, want in zip(SMALL.metrics(dataclasses.replace(case, subject=split)), SMALL.metrics(case), strict=True):
        assert got.value == pytest.approx(want.value, rel=1e-4)


def test_a_dictionary_without_active_latents_has_no_metrics():
    case = in_model.case(HOOK)
    silent = dataclasses.replace(case.subject.sae, b_enc=jnp.full(64, -1e6))
    assert not list(SMALL.metrics(dataclasses.replace(case, subject=dataclasses.replace(case.subject, sae=silent))))


def test_several_hooks_are_refused():
    case = in_model.case(HOOK)
    two = dataclasses.replace(case.subject, encoded=(HOOK, lm.Hook(2, "resid_post")))
    with pytest.raises(UsageError, match=r"of several hooks \(resid_post.1, resid_post.2\).*use one of each"):
        run_on.place(two)
    normed = in_model.case(
        lm.Hook(1, "mlp_in"),
        topk.Config(n_latents=64, k=4, dtype="float32", input_norm="layer_norm"),
        writes=lm.Hook(1, "mlp_out"),
    )
    with pytest.raises(UsageError, match="in units of each vector's layer_norm"):
        run_on.place(normed.subject)
