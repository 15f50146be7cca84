"""One optimiser step against numpy: objective, clip, Adam, unit rows, running average."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import mesh as meshes
from sae_jax.saes import base, init, relu, topk
from sae_jax.training import step as step_module
from sae_jax.training.settings import TrainConfig, hyperparameters, learning_rate
from sae_jax.training.state import initial
from sae_jax.training.step import Step, densities, lowest_density
from sae_jax.types import UsageError
from tests.oracles import topk as oracle
from tests.oracles.adam import adam

B, D, F, K = 16, 8, 32, 4
NAMES = ("w_enc", "b_enc", "w_dec", "b_dec")


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_steps_follow_the_oracle(clip):
    """Project the decoder's gradient, clip, Adam, renormalise, average: three steps, so that moments matter."""
    sae_config = topk.Config(n_latents=F, k=K, dtype="float32", k_aux=5)
    config = TrainConfig(batch_size=B, lr=0.01, clip=clip, ema=0.9, dead_after_tokens=10)
    rows = np.random.default_rng(0).standard_normal((3, B, D)).astype(np.float32)
    state = jax.jit(lambda s: initial(sae_config, config, s))(init.sample_statistics(rows.reshape(-1, D), "none"))
    weights = {name: np.asarray(getattr(state.sae, name), np.float64) for name in NAMES}
    moments = {name: (0.0, 0.0) for name in NAMES}
    average = {name: np.zeros_like(value) for name, value in weights.items()}
    scale, silent = float(state.constants.loss_scale), np.zeros(F, int)
    reached_aux = False
    with jax.numpy_dtype_promotion("standard"):
        step, hparams = Step(sae_config, config), hyperparameters(config, sae_config)
        for t, x in enumerate(rows, start=1):
            want = oracle.objective(np.float64(x), *weights.values(), K, scale, silent, 10, 1 / 32, 5)
            silent, gradients = want.silent_F, want.gradients
            norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
            for name in NAMES:
                gradient = gradients[name] * (clip / max(norm, clip) if clip else 1)
                weights[name], *moments[name] = adam(weights[name], gradient, *moments[name], t, 0.01)
            weights["w_dec"] /= np.linalg.norm(weights["w_dec"], axis=1, keepdims=True)
            average = {name: 0.9 * average[name] + 0.1 * weights[name] for name in NAMES}
            state, metrics = step(state, hparams, base.Batch(jnp.asarray(x), jnp.asarray(x)))
            np.testing.assert_allclose(metrics["loss"], want.loss, rtol=1e-4)
            np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
            centred = ((x - x.mean(0)) ** 2).sum()
            np.testing.assert_allclose(metrics["fvu"], ((x - want.x_hat_BD) ** 2).sum() / centred, rtol=1e-4)
            np.testing.assert_allclose(metrics["l0"], (want.z_BF > 0).sum(1).mean(), rtol=1e-6)
            np.testing.assert_allclose(metrics["dead_fraction"], (silent > 10).mean(), rtol=1e-6)
            reached_aux |= (silent > 10).any()
        assert reached_aux, "the case should reach AuxK"
    for name in NAMES:
        # Adam divides by the root of tiny second moments: rounding of f32 gradients shows in single entries.
        np.testing.assert_allclose(getattr(state.sae, name), weights[name], atol=2e-4, err_msg=name)
        np.testing.assert_allclose(getattr(state.average, name), average[name] / (1 - 0.9**3), atol=2e-4, err_msg=name)


@pytest.mark.long
def test_steps_with_many_dead_are_the_same_on_a_mesh():
    """AuxK looks at the same rows: those that the seed and the step say. With all rows the step is another."""

    def run(shape=None, seed=0, **settings):
        sae_config = topk.Config(n_latents=64, k=K, dtype="float32", **settings)
        config = TrainConfig(batch_size=512, lr=0.01, dead_after_tokens=10**6, seed=seed)
        rows = np.random.default_rng(0).standard_normal((2, 512, D)).astype(np.float32)
        sample, hparams = init.sample_statistics(rows[0], "none"), hyperparameters(config, sae_config)
        mesh = meshes.make_mesh(meshes.MeshConfig(*(shape or (1, 1))), jax.devices()[: 8 if shape else 1])
        with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
            state = jax.jit(lambda s: initial(sae_config, TrainConfig(batch_size=512), s))(sample)
            silent = jax.device_put(np.int32([10**6 + 1, 0] * 32), state.counters.silent.sharding)
            # Too weak to be among the strongest, so that they stay dead.
            scale = jax.device_put(np.float32([[0.01], [1]] * 32), meshes.sharding(mesh, meshes.DICT))
            state = state.replace(
                sae=state.sae.replace(w_enc=scale * state.sae.w_enc), counters=state.counters.replace(silent=silent)
            )
            step = Step(sae_config, config)
            for x in rows:
                x = jax.device_put(x, meshes.sharding(mesh, meshes.ROWS))
                state, metrics = step(state, hparams, base.Batch(x, x))
        assert metrics["dead_fraction"] > 0.25
        return {name: np.asarray(getattr(state.sae, name)) for name in NAMES}, float(metrics["aux_loss"])

    want, aux_loss = run()
    got, _ = run((2, 4))
    for name in NAMES:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-3, atol=2e-4, err_msg=name)
    assert len({aux_loss, run(seed=1)[1], run(aux_rows="all")[1]}) == 3


def test_learning_rate_rule():
    long, short = TrainConfig(steps=10**6), TrainConfig(steps=1000)
    assert learning_rate(long, topk.Config(n_latents=2**14)) == pytest.approx(2e-4)
    assert learning_rate(long, topk.Config(n_latents=2**20)) == pytest.approx(2e-4 / 8)
    # Of a short run: the cube root of the width and the root of its length.
    narrow, wide = (learning_rate(short, topk.Config(n_latents=n)) for n in (2**9, 2**12))
    assert 2e-4 < narrow / 2 == pytest.approx(wide)
    assert learning_rate(TrainConfig(steps=4000), topk.Config(n_latents=2**9)) == pytest.approx(narrow / 2)
    # It does not go on rising below a hundred steps, where ten would get a rate at which nothing is learnt.
    tiny, hundred = (learning_rate(TrainConfig(steps=n), topk.Config(n_latents=2**9)) for n in (10, 100))
    assert tiny == hundred == pytest.approx(narrow * math.sqrt(10))
    # Beyond the widths that were measured as the paper's, so that its own runs have its own rate.
    widest = [learning_rate(short, topk.Config(n_latents=n)) for n in (2**20, 2**22)]
    assert widest[0] == pytest.approx(2 * widest[1])
    assert learning_rate(TrainConfig(steps=300_000), topk.Config(n_latents=2**24)) == pytest.approx(2e-4 / 32)
    # Each family has its authors' rate at their width.
    for variant, n_latents, lr in (("relu_norm", 2**17, 5e-5), ("gated", 2**17, 3e-4), ("tied", 2048, 1e-3)):
        assert learning_rate(long, base.config_class(variant)(n_latents=n_latents)) == pytest.approx(lr)
    assert learning_rate(TrainConfig(lr=1e-3), topk.Config(n_latents=2**20)) == 1e-3


@pytest.mark.parametrize(
    "setting",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"lr": 0.0},
        {"warmup": -0.1},
        {"warmup": 0.9},
        {"decay": 1.1},
        {"decay_to": 2.0},
        {"clip": -1.0},
        {"ema": 1.0},
        {"dead_after_tokens": 2**31},
        {"moments": "float16"},
        {"ema_dtype": "int4"},
    ],
)
def test_bad_settings_are_refused(setting):
    with pytest.raises(UsageError, match=f"train.{next(iter(setting))}"):
        TrainConfig(**setting)


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
@pytest.mark.parametrize("config", [topk.Config(n_latents=64, k=K), relu.Config(n_latents=64)], ids=["topk", "relu"])
def test_densities_are_those_of_the_code(config, shape, monkeypatch):
    config = dataclasses.replace(config, dtype="float32")
    x = np.random.default_rng(0).standard_normal((64, D)).astype(np.float32) + 1
    sample = init.sample_statistics(x, "none")
    mesh = meshes.make_mesh(meshes.MeshConfig(*shape), jax.devices()[: shape[0] * shape[1]])
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        state = jax.jit(lambda s: initial(config, TrainConfig(batch_size=64), s))(sample)
        # Some never fire, one always does.
        bias = np.float32([-100] * 8 + [100] + [-0.5] * 55)
        state = state.replace(sae=state.sae.replace(b_enc=jax.device_put(bias, state.sae.b_enc.sharding)))
        rows = jax.device_put(x, meshes.sharding(mesh, meshes.ROWS))
        found = jax.device_get(densities(state, base.Batch(rows, rows)))
        monkeypatch.setattr(step_module, "MOST_SLOTS", 64)
        assert densities(state, base.Batch(rows, rows)) is None, "its code would be too large"
    w_enc, b_enc, b_dec = (np.asarray(getattr(state.sae, name)) for name in ("w_enc", "b_enc", "b_dec"))
    z = np.maximum((x * float(state.constants.scale.x[0]) - b_dec) @ w_enc.T + b_enc, 0)
    if isinstance(config, topk.Config):
        z = np.where(z >= np.sort(z, axis=1)[:, -K][:, None], z, 0)
    counts = (z > 0).sum(0)
    assert 0 < (counts == 0).sum() < 63
    assert counts[8] == 64
    expected, _ = np.histogram(np.log10(counts[counts > 0] / 64), bins=40, range=(lowest_density(64), 0.0))
    assert found["counts"].tolist() == expected.tolist()
    assert found["silent"] == pytest.approx((counts == 0).mean())
