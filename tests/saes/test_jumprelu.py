"""JumpReLU against its float64 oracle, its estimator of a step's gradient, and what it learns."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import mesh as meshes
from sae_jax.saes import base, init, jumprelu, normalise
from sae_jax.training.settings import TrainConfig, hyperparameters
from sae_jax.training.state import initial
from sae_jax.training.step import Step
from sae_jax.types import UsageError
from tests.oracles import jumprelu as oracle
from tests.saes.contexts import context_of
from tests.saes.oracle_checks import D, F, arrays, assert_finite_differences, assert_is_oracle, float64, rows

TANH = {"penalty": "tanh", "preactivation_coefficient": 0.1}
SQUARED = {"penalty": "squared", "target_l0": 5.0}
SCALE = normalise.Scale(jnp.ones(D), jnp.ones(D))
NAMES = ("w_enc", "b_enc", "w_dec", "b_dec", "log_threshold")


def make(**settings) -> jumprelu.JumpRelu:
    settings = {
        "n_latents": F,
        "l0_coefficient": 0.3,
        "sparsity_warmup": 0.0,
        "penalty": "l0",
        "bandwidth": 0.8,
        "dtype": "float32",
        **settings,
    }
    w_enc, b_enc, w_dec, b_dec, log_threshold = arrays(0, (F, D), (F,), (F, D), (D,), (F,))
    w_dec = w_dec if settings.get("penalty") == "tanh" else init.unit_rows(w_dec)
    return jumprelu.JumpRelu(w_enc, b_enc - 1, w_dec, b_dec, log_threshold - 1, jumprelu.Config(**settings))


def expected(sae, x, weights=None) -> oracle.Result:
    config = sae.config
    return oracle.objective(
        np.float64(x),
        **(weights or float64(sae, NAMES)),
        coefficient=config.l0_coefficient,
        bandwidth=config.bandwidth,
        pre_bias=config.pre_bias,
        target_l0=config.target_l0 if config.penalty == "squared" else None,
        frequency_scale=config.frequency_scale,
        tanh=config.penalty == "tanh",
        below_coefficient=config.preactivation_coefficient,
    )


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        (None, {"pre_bias": True}),
        (None, SQUARED),
        (None, TANH),
        ((1, 8), {**SQUARED, "pre_bias": True}),
        ((2, 4), {**TANH, "frequency_scale": 0.1}),
        ((8, 1), {"frequency_scale": 0.1}),
    ],
    ids=str,
)
def test_objective_and_gradients_are_the_oracle_on_every_mesh(shape, settings):
    sae = make(**settings)
    assert_is_oracle(sae, expected(sae, rows()), shape)


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        (None, SQUARED),
        (None, {**SQUARED, "error": "mean"}),
        ((2, 4), {**SQUARED, "pre_bias": True}),
    ],
    ids=str,
)
def test_a_batch_with_few_active_latents_is_the_oracle_too(shape, settings, monkeypatch):
    """As a sparse code; the gradient of thresholds is that of all rows on average over the rows it is counted from."""
    monkeypatch.setattr(jumprelu, "SPARSE_FROM", 6)
    sae, x = make(**settings), rows()
    sae = sae.replace(b_enc=sae.b_enc - 1.5)
    want = expected(sae, x)
    assert 0 < (want.z_BF > 0).sum() <= 2 * 5 * len(x)
    n_firsts = math.gcd(len(x) // math.prod(shape or (1,)), jumprelu.STRIDE)

    @jax.jit
    def gradients(sae, x, key):
        stats = context_of(jnp.zeros(F, jnp.int32), jnp.int32(100), 1.0, SCALE, {}, sae.config.coefficients)
        stats = stats.replace(key=key)
        return jax.value_and_grad(lambda sae: sae.objective(base.Batch(x, x), stats), has_aux=True)(sae)

    keys = {}
    for number in range(100):
        key = jax.random.key(number)
        keys.setdefault(int(jax.random.randint(jax.random.fold_in(key, jumprelu.ROWS), (), 0, n_firsts)), key)
    keys = [keys[first] for first in range(n_firsts)]
    if shape is None:
        found = [gradients(sae, x, key) for key in keys]
    else:
        mesh = meshes.make_mesh(meshes.MeshConfig(*shape))
        with jax.set_mesh(mesh):
            sae_there = jax.tree.map(
                lambda a: jax.device_put(a, meshes.sharding(mesh, meshes.DICT if len(a) == F else meshes.REPLICATED)),
                sae,
            )
            x_there = jax.device_put(x, meshes.sharding(mesh, meshes.ROWS))
            found = [gradients(sae_there, x_there, key) for key in keys]
    scale = 1 / D if settings.get("error") == "mean" else 1
    for (loss, outcome), _ in found:
        assert outcome.metrics["tiled"] == 0
        np.testing.assert_allclose(outcome.y_hat, want.x_hat_BD, rtol=1e-4, atol=1e-5)
        error = ((want.x_hat_BD - x) ** 2).sum() / len(x)
        np.testing.assert_allclose(loss, scale * error + 0.3 * want.sparsity, rtol=1e-5)
    if scale == 1:
        means = {name: np.mean([np.asarray(getattr(g, name)) for _, g in found], axis=0) for name in NAMES}
        along = (means["w_dec"] * sae.w_dec).sum(1, keepdims=True)
        means["w_dec"] = means["w_dec"] - along * sae.w_dec
        for name in NAMES:
            np.testing.assert_allclose(means[name], want.gradients[name], rtol=1e-4, atol=2e-5, err_msg=name)


def test_long_rows_are_looked_at_again_and_dense_batches_go_through_tiles(monkeypatch):
    """Whatever way a batch takes, its loss and its active latents are those of all its latents."""
    monkeypatch.setattr(jumprelu, "SPARSE_FROM", 6)
    x = np.random.default_rng(3).standard_normal((64, D)).astype(np.float32)
    x[7] *= 20
    sae, ways = make(penalty="squared", target_l0=4.0), set()
    objective = jax.jit(lambda sae, stats: sae.objective(base.Batch(x, x), stats))
    for shift in (0.0, -2.0, -3.0):
        shifted = sae.replace(b_enc=sae.b_enc + shift)
        whole = shifted.replace(config=dataclasses.replace(sae.config, threshold_rows="all"))
        stats = context_of(jnp.zeros(F, jnp.int32), jnp.int32(100), 1.0, SCALE, {}, sae.config.coefficients)
        (loss, got), (want_loss, want) = (objective(each, stats) for each in (shifted, whole))
        np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
        np.testing.assert_allclose(got.y_hat, want.y_hat, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(got.counters.silent, want.counters.silent)
        assert float(got.l0) == pytest.approx(float(want.l0), abs=1e-6)
        most = int((np.asarray(shifted.encode(x).values) > 0).sum(-1).max())
        ways.add((float(got.metrics["tiled"]), most > 16))
    assert ways == {(1.0, True), (0.0, True)}


@pytest.mark.parametrize("settings", [{"pre_bias": True, "frequency_scale": 0.1}, TANH], ids=str)
def test_the_oracle_gradients_are_finite_differences(settings):
    """Where no row crosses a threshold, which is all but a few of them, nothing is estimated."""
    sae, x = make(**settings), rows()
    sae = sae.replace(config=dataclasses.replace(sae.config, bandwidth=1e-12))
    tangent = () if sae.config.penalty == "tanh" else ("w_dec",)
    assert_finite_differences(lambda weights: expected(sae, x, weights), float64(sae, NAMES), tangent)


def test_the_estimated_gradient_of_l0_is_the_measured_one():
    """With the bandwidth as its step a central difference of L0 itself is the kernel estimate, row by row.

    With a smaller bandwidth it is the derivative that many rows show: minus their density at the threshold.
    """
    n_rows, theta = 40_000, 0.4
    x = np.random.default_rng(0).standard_normal((n_rows, D)).astype(np.float32)
    sae = make(pre_bias=False)
    sae = sae.replace(w_enc=init.unit_rows(sae.w_enc), b_enc=jnp.zeros(F), log_threshold=jnp.full(F, np.log(theta)))

    def l0(log_threshold, bandwidth):
        latents = {"b_enc": sae.b_enc, "threshold": jnp.exp(log_threshold)}
        activation = jumprelu._counting(bandwidth)
        tiles = sae._reconstruct(x, sae.w_dec, latents, activation)
        return tiles.penalty.sum() / n_rows, tiles.penalty / n_rows

    for bandwidth, tolerance in ((0.5, 1e-3), (0.05, 0.1)):
        estimate_F = np.asarray(jax.grad(l0, has_aux=True)(sae.log_threshold, bandwidth)[0]) / theta
        above, below = (l0(jnp.full(F, np.log(theta + sign * bandwidth / 2)), 1.0)[1] for sign in (1, -1))
        np.testing.assert_allclose(estimate_F, (above - below) / bandwidth, rtol=1e-3)
        density = np.exp(-(theta**2) / 2) / np.sqrt(2 * np.pi)
        np.testing.assert_allclose(estimate_F.mean(), -density, rtol=0.02)
        assert abs(estimate_F / -density - 1).max() < max(tolerance, 0.15)


def planted_run(n_steps=300, **settings):
    """(metrics of the last step, thresholds) after a short training on few directions a row."""
    rng = np.random.default_rng(0)
    directions = init.unit_rows(jnp.asarray(rng.standard_normal((40, 16)), jnp.float32))
    z = rng.random((4096, 40)) * (rng.random((4096, 40)) < 0.06)
    data = np.float32(z @ np.asarray(directions))
    settings = {"initial_threshold": 0.05, "bandwidth": 0.05, "input_norm": "dataset_rms", **settings}
    config = jumprelu.Config(n_latents=64, dtype="float32", **settings)
    train = TrainConfig(steps=n_steps, batch_size=64, lr=3e-3, dead_after_tokens=2000)
    with jax.numpy_dtype_promotion("standard"):
        state = jax.jit(lambda s: initial(config, train, s))(init.sample_statistics(data, config.input_norm))
        step, hparams = Step(config, train), hyperparameters(train, config)
        for t in range(n_steps):
            batch = data[np.random.default_rng(t).permutation(len(data))[:64]]
            state, metrics = step(state, hparams, base.Batch(batch, batch))
    return {name: float(value) for name, value in metrics.items()}, np.asarray(state.sae.threshold)


def test_thresholds_move_and_reach_the_l0_that_is_asked_for():
    loose, _ = planted_run(penalty="l0", l0_coefficient=1e-4)
    dense, thresholds = planted_run(penalty="l0", l0_coefficient=0.01)
    assert dense["l0"] < 0.8 * loose["l0"]
    assert np.abs(np.log(thresholds / 0.05)).mean() > 0.2
    for target in (8.0, 12.0):
        aimed, _ = planted_run(l0_coefficient=1.0, target_l0=target)
        assert aimed["l0"] == pytest.approx(target, rel=0.2)


def test_initialisation():
    sample = init.sample_statistics(np.random.default_rng(0).standard_normal((500, 32)) * 3 + 7, "dataset_rms")
    sae = jumprelu.Config(n_latents=256).init(jax.random.key(0), sample)
    np.testing.assert_allclose(jnp.linalg.norm(sae.w_dec, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(sae.w_enc, sae.w_dec)
    np.testing.assert_allclose(sae.threshold, 0.5, rtol=1e-5)
    np.testing.assert_allclose(sae.b_dec, sample.median)
    np.testing.assert_allclose(sae.w_enc @ sample.median + sae.b_enc, 0, atol=1e-4)
    np.testing.assert_allclose(jumprelu.Config(pre_bias=True).init(jax.random.key(0), sample).b_dec, sample.median)


def test_biases_of_the_tanh_let_every_latent_be_active_on_its_share_of_rows():
    x = np.random.default_rng(0).standard_normal((2000, 32)).astype(np.float32) + 7
    config = jumprelu.Config(n_latents=2**17, penalty="tanh", initial_threshold=0.1)
    sae = config.init(jax.random.key(0), init.sample_statistics(x, "none"))
    active = (x @ np.asarray(sae.w_enc[:500]).T + np.asarray(sae.b_enc[:500]) > 0.1).mean(0)
    assert active.mean() == pytest.approx(10_000 / 2**17, rel=0.1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"l0_coefficient": -1.0}, "sae.l0_coefficient=-1"),
        ({"bandwidth": 0.0}, "sae.bandwidth=0"),
        ({"initial_threshold": float("inf")}, "sae.initial_threshold=inf"),
        ({"target_l0": 0.0}, "sae.target_l0=0"),
        ({"frequency_scale": 0.1}, "sae.frequency_scale=0.1 is for .* sae.penalty=l0 or tanh"),
        ({"sparsity_warmup": -1.0}, "sae.sparsity_warmup=-1"),
    ],
)
def test_bad_settings_are_refused(setting, message):
    with pytest.raises(UsageError, match=message):
        jumprelu.Config(**setting)


def test_a_target_below_one_and_one_between_powers_of_two_have_codes():
    for target, usual in ((0.3, 1), (1.0, 1), (20.0, 32), (32.0, 32)):
        config = jumprelu.Config(n_latents=2048, target_l0=target)
        assert config.usual == usual
        assert config.program.usual == usual
        assert config.program.may_be_sparse == config.may_be_sparse
    sae = make(penalty="squared", target_l0=0.3).replace(b_enc=jnp.full(F, -9.0))
    sae = sae.replace(b_enc=sae.b_enc.at[0].set(0.0))
    assert not sae.config.may_be_sparse
    sae = sae.replace(config=dataclasses.replace(sae.config, n_latents=F, target_l0=0.3))
    stats = context_of(jnp.zeros(F, jnp.int32), jnp.int32(100), 1.0, SCALE, {}, sae.config.coefficients)
    ((loss, outcome), _) = jax.jit(lambda sae: sae._with_gradients(base.Batch(rows(), rows()), stats))(sae)
    assert np.isfinite(loss)
    assert outcome.metrics["tiled"] == 0
