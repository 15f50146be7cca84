"""Steps by tiles of latents against the steps of whole dictionaries; weights in bf16."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae_jax
from sae_jax import mesh as meshes
from sae_jax.ops import pairs, tuning
from sae_jax.saes import base, init, topk
from sae_jax.saes.base import Batch, Context
from sae_jax.training import quantise, tiles
from sae_jax.training.settings import TrainConfig, hyperparameters
from sae_jax.training.state import initial, step_key
from sae_jax.training.step import make_step
from sae_jax.types import UsageError
from tests.meshes import MESHES

D, F, B = 24, 136, 32
ROWS = np.float32(np.random.default_rng(0).standard_normal((4 * B, D)) + 0.5)
BY_PAIRS = [name for name in base.variants() if base.config_class(name).BY_PAIRS]
# Four latents a tile; seventeen on each of eight devices, so that a smaller tile is left over.
SMALL_TILES = replace(tuning.TABLE["cpu"], block_bytes=4 * D * 4, pair_bytes=4 * D * 10)


def configured(variant: str, **settings):
    known = {"n_latents": F, "k": 4, "k_aux": 6, "dtype": "float32", **settings}
    return base.config_class(variant)(**known)


@pytest.mark.parametrize(("variant", "rows"), [("topk", "all"), *((variant, "sampled") for variant in BY_PAIRS)])
def test_pairs_add_up_to_the_gradients(variant, rows):
    """Also with half of the latents dead: the auxiliary loss is differentiated too."""
    settings = {"multi_topk": 0.125} if variant == "topk" else {}
    sae_config, train = configured(variant, aux_rows=rows, **settings), TrainConfig(dead_after_tokens=50)
    hparams, batch = hyperparameters(train, sae_config), Batch(ROWS[:B], ROWS[:B])

    def both(sample):
        state = initial(sae_config, train, sample)
        counters = replace(state.counters, silent=jnp.where(jnp.arange(F) % 2 == 0, 51, 0).astype(jnp.int32))
        sae = replace(state.sae, b_enc=jnp.linspace(-0.1, 0.1, F))
        context = Context(state.step, step_key(hparams, state.step), counters, state.constants, hparams)
        want = jax.value_and_grad(lambda sae: sae.objective(batch, context), has_aux=True)(sae)
        (loss, aux), gradients, parts = pairs.value_and_pairs(lambda sae: sae.objective(batch, context), sae)
        matrices = {}
        for name, of_matrix in parts.items():
            matrices[name] = jnp.zeros((F, D))
            for part in of_matrix:
                matrices[name] = pairs.sort(part, F).add_up(matrices[name], 0)
        return want, ((loss, aux), replace(gradients, **matrices))

    with tuning.using(SMALL_TILES):
        want, got = tuning.jit(both)(init.sample_statistics(ROWS, "none"))
    assert float(want[0][1].metrics["aux_loss"]) > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6), want, got)


def after_steps(by_tiles: bool, shape=None, n_steps: int = 3, **settings):
    """State and metrics after a few steps, on one device or a mesh, in which some latents come to be dead."""
    sae_config = configured("topk")
    train = TrainConfig(**{"batch_size": B, "lr": 1e-2, "steps": 10, "dead_after_tokens": 40, **settings})
    hparams, sample = hyperparameters(train, sae_config), init.sample_statistics(ROWS, "none")
    step = tuning.jit(make_step(sae_config.program, train, by_tiles))

    def run(place):
        state, seen = tuning.jit(lambda s: initial(sae_config, train, s))(sample), []
        for t in range(n_steps):
            x = place(ROWS[t * B : (t + 1) * B])
            state, metrics = jax.block_until_ready(step(state, hparams, Batch(x, x)))
            seen.append(metrics)
        return jax.device_get((quantise.dequantise((state.sae, state.optimiser_state, state.average)), seen))

    with tuning.using(SMALL_TILES):
        if shape is None:
            return run(jnp.asarray)
        mesh = meshes.make_mesh(meshes.MeshConfig(*shape))
        with jax.set_mesh(mesh):
            return run(lambda x: jax.device_put(x, meshes.sharding(mesh, meshes.ROWS)))


SETTINGS = {"clip": 0.05, "moments": "int8", "ema_dtype": "bfloat16"}


@pytest.fixture(scope="module")
def plain():
    return after_steps(by_tiles=False, **SETTINGS)


@pytest.mark.parametrize("shape", [None, *MESHES], ids=str)
def test_a_step_by_tiles_is_the_step(plain, shape):
    """With clipping, averages and rounded moments, to the roundings of sums: on one device and on meshes."""
    got = after_steps(True, shape, **SETTINGS)
    assert plain[1][-1]["aux_loss"] > 0
    assert plain[1][-1]["grad_norm"] > 0.05
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-5), plain[1], got[1])
    # A sum in another order may round to the other neighbour: a few numbers of thousands.
    far = jax.tree.map(lambda a, b: (np.abs(a - b) > 1e-3 * np.abs(a) + 1e-5).mean(), plain[0], got[0])
    assert max(jax.tree.leaves(far)) < 0.01


def test_a_gradient_that_is_not_finite_moves_no_weight():
    bad = ROWS.copy()
    bad[0] = np.inf
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(__name__ + ".ROWS", bad)
        sample = init.sample_statistics(ROWS[1:], "none")
        patch.setattr(init, "sample_statistics", lambda *_: sample)
        (after, *_), metrics = after_steps(True, n_steps=1, **SETTINGS)
    assert not np.isfinite(metrics[0]["grad_norm"])
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(after))


def test_rows_in_bf16_stay_near_norm_1_and_those_of_silent_latents_stay_as_they_are():
    """A thousand steps along the sphere, each of less than half the distance of two bf16 numbers."""
    rng = np.random.default_rng(0)
    begin = jnp.asarray(rng.standard_normal((64, 256)), jnp.float32)
    begin = (begin / jnp.linalg.norm(begin, axis=1, keepdims=True)).astype(jnp.bfloat16)
    toward = np.float32(rng.standard_normal((64, 256)))
    toward *= 2e-5 * (np.arange(64) >= 16)[:, None]  # the first 16 are silent
    nothing = jnp.zeros(64)

    def as_sae(w):
        return topk.TopK(w, nothing, w, jnp.zeros(256), topk.Config(n_latents=64, k=4))

    def step(t, w):
        f32 = w.astype(jnp.float32)
        along = toward - (toward * f32).sum(1, keepdims=True) * f32
        kept = as_sae(w)
        return quantise.rounded_like(kept, tiles._with_unit_rows(as_sae(f32 + along), kept), t, salt=3).w_dec

    w = jax.jit(lambda w: jax.lax.fori_loop(1, 1001, step, w))(begin)
    np.testing.assert_array_equal(w[:16], begin[:16])
    norms = np.linalg.norm(np.float64(w), axis=1)
    assert np.abs(norms - 1).max() < 2 * tiles.SLACK
    assert abs(norms.mean() - 1) < tiles.SLACK / 2
    # Where exact steps would have gone: rounding is without bias, and its sum over the steps is small beside the way.
    exact = np.float64(begin[16:])
    for _ in range(1000):
        along = toward[16:] - (toward[16:] * exact).sum(1, keepdims=True) * exact
        exact = (exact + along) / np.linalg.norm(exact + along, axis=1, keepdims=True)
    way = exact - np.float64(begin[16:])
    went = np.float64(w[16:]) - np.float64(begin[16:])
    assert (went * way).sum() / (way * way).sum() == pytest.approx(1, abs=0.03)


def test_rounding_of_a_tile_is_that_of_the_whole():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((16, 40)), jnp.float32)
    like = x.astype(jnp.bfloat16)
    whole = quantise.rounded_like(like, x, jnp.int32(7), salt=3)
    part = quantise.rounded_like(like[10:], x[10:], jnp.int32(7), salt=3, first=jnp.int32(10))
    np.testing.assert_array_equal(part, whole[10:])
    assert (whole != quantise.rounded_like(like, x, jnp.int32(8), salt=3)).any()


@pytest.mark.long
def test_a_run_in_bf16_resumes_to_the_bit_and_is_loaded_with_unit_rows(tmp_path):
    settings = {"n_latents": 64, "k": 4, "batch_size": 32, "weights": "bfloat16", "moments": "int8", "decay": 0.0}
    rows = np.float32(np.random.default_rng(0).standard_normal((512, 16)))
    for name, steps in (("whole", 8), ("parts", 4), ("parts", 8)):
        sae_jax.train(rows, out=tmp_path / name, steps=steps, lr=1e-2, dead_after_tokens=10**6, **settings)
    whole, parts = sae_jax.load(tmp_path / "whole"), sae_jax.load(tmp_path / "parts")
    for name in ("w_enc", "b_enc", "w_dec", "b_dec"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
    assert whole.w_dec.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(np.float64(whole.w_dec), axis=1), 1, atol=1e-6)
    whole.save(tmp_path / "saved")
    average = sae_jax.load(tmp_path / "whole", ema=True)
    np.testing.assert_allclose(average.w_dec, whole.w_dec, atol=0.05)


def test_other_variants_are_refused_before_any_work(tmp_path):
    with pytest.raises(UsageError, match=r"train\.weights=bfloat16 is for .* not for sae\.variant=relu; use float32"):
        sae_jax.train(ROWS, variant="relu", n_latents=64, weights="bfloat16", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
