"""ReLU with an L1 penalty against its float64 oracle, what its initialisation promises, and its codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import mesh as meshes
from sae_jax.saes import base, init, normalise, penalty, relu
from sae_jax.training.quantise import dequantise
from sae_jax.training.settings import TrainConfig, hyperparameters
from sae_jax.training.state import initial
from sae_jax.training.step import Step
from sae_jax.types import UsageError, Widths
from tests.meshes import MESHES
from tests.oracles import relu as oracle
from tests.saes.contexts import context_of, with_silent
from tests.saes.oracle_checks import learnt

B, D, F, WINDOW = 16, 8, 48, 100


def make(seed: int = 0, **settings) -> relu.Relu:
    """Away from the initialisation, so that a missed bias or norm would show."""
    rng = np.random.default_rng(seed)
    config = relu.Config(
        **{"n_latents": F, "l1_coefficient": 0.7, "sparsity_warmup": 0.0, "dtype": "float32", **settings}
    )
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in ((F, D), (F,), (F, D), (D,))]
    w_enc, b_enc, w_dec, b_dec = map(jnp.asarray, arrays)
    return relu.Relu(w_enc, b_enc - 2, init.unit_rows(w_dec), b_dec, config)


def rows() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((B, D)).astype(np.float32)


def statistics(coefficient: float = 0.7) -> base.Context:
    silent = np.random.default_rng(1).integers(0, WINDOW, F).astype(np.int32)
    scale = normalise.Scale(jnp.ones(D), jnp.ones(D))
    coefficients = {"l1_coefficient": jnp.float32(coefficient)}
    return context_of(jnp.asarray(silent), jnp.int32(WINDOW), jnp.float32(0.7), scale, {}, coefficients)


def value_and_gradient(sae, x, stats):
    def objective(sae):
        return sae.objective(base.Batch(x, x), stats)

    return jax.jit(learnt(objective))(sae)


def expected(sae, x, stats) -> oracle.Result:
    weights = [np.asarray(w, np.float64) for w in (sae.w_enc, sae.b_enc, sae.w_dec, sae.b_dec)]
    return oracle.objective(
        np.float64(x), *weights, sae.config.l1_coefficient, np.asarray(stats.counters.silent), WINDOW
    )


@pytest.mark.parametrize("shape", [None, *MESHES], ids=str)
def test_objective_and_gradients_are_the_oracle_on_every_mesh(shape):
    sae, x, stats = make(), rows(), statistics()
    want = expected(sae, x, stats)
    if shape is None:
        (loss, outcome), gradients = value_and_gradient(sae, x, stats)
    else:
        mesh = meshes.make_mesh(meshes.MeshConfig(*shape))
        with jax.set_mesh(mesh):
            roles = relu.Relu(meshes.DICT, meshes.DICT, meshes.DICT, meshes.REPLICATED, sae.config)
            place = lambda a, role: jax.device_put(a, meshes.sharding(mesh, role))  # noqa: E731
            split = jax.tree.map(place, sae, roles)
            stats = with_silent(stats, place(stats.counters.silent, meshes.DICT))
            (loss, outcome), gradients = value_and_gradient(split, place(x, meshes.ROWS), stats)
            assert jax.typeof(gradients.w_enc) == jax.typeof(split.w_enc)
    np.testing.assert_allclose(loss, want.loss, rtol=1e-5)
    np.testing.assert_allclose(outcome.y_hat, want.x_hat_BD, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outcome.l0, (want.z_BF > 0).sum(1).mean(), rtol=1e-6)
    np.testing.assert_allclose(outcome.metrics["l1"], want.z_BF.sum(1).mean(), rtol=1e-5)
    np.testing.assert_array_equal(outcome.counters.silent, want.silent_F)
    for name, gradient in want.gradients.items():
        np.testing.assert_allclose(getattr(gradients, name), gradient, rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_oracle_gradients_are_finite_differences():
    sae, x = make(), rows()
    weights = {name: np.asarray(getattr(sae, name), np.float64) for name in ("w_enc", "b_enc", "w_dec", "b_dec")}

    def result(weights):
        return oracle.objective(np.float64(x), *weights.values(), 0.7, np.zeros(F), WINDOW)

    gradients = result(weights).gradients
    rng = np.random.default_rng(2)
    for name, value in weights.items():
        step = 1e-6 * rng.standard_normal(value.shape)
        if name == "w_dec":  # the oracle's gradient has no component along the rows: neither may the step
            step -= (step * value).sum(1, keepdims=True) * value
        up, down = (result({**weights, name: value + sign * step}).loss for sign in (1, -1))
        np.testing.assert_allclose((up - down) / 2, (gradients[name] * step).sum(), rtol=1e-4, err_msg=name)


def test_bfloat16_products_keep_float32_everywhere_else():
    (loss, outcome), gradients = value_and_gradient(make(dtype="bfloat16"), rows(), statistics())
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((gradients, outcome.y_hat)))
    want = expected(make(), rows(), statistics())
    np.testing.assert_allclose(loss, want.loss, rtol=0.02)
    assert np.linalg.norm(gradients.w_enc - want.gradients["w_enc"]) < 0.05 * np.linalg.norm(want.gradients["w_enc"])


def test_initialisation():
    sample = np.random.default_rng(0).standard_normal((500, 32)) * 3 + 7
    sae = relu.Config(n_latents=256).init(jax.random.key(0), init.sample_statistics(sample, "none"))
    np.testing.assert_allclose(jnp.linalg.norm(sae.w_dec, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(sae.b_dec, init.geometric_median(sample), rtol=1e-5)
    np.testing.assert_allclose(abs(sae.w_enc).max(), np.sqrt(6 / 32), rtol=0.01)
    cosine = (init.unit_rows(sae.w_enc) * sae.w_dec).sum(1)
    assert abs(cosine.mean()) < 0.05  # independent, not transposed


def test_a_code_holds_all_that_is_active_and_decodes_to_the_reconstruction():
    sae, x = make(), rows()
    z = expected(sae, x, statistics()).z_BF
    code = sae.encode(x.reshape(2, 8, D))
    most = int((z > 0).sum(1).max())
    assert code.values.shape == code.indices.shape == (2, 8, 1 << (most - 1).bit_length())
    assert (np.diff(code.values, axis=-1) <= 0).all()
    dense = np.zeros((B, F), np.float32)
    np.add.at(dense, (np.arange(B)[:, None], code.indices.reshape(B, -1)), code.values.reshape(B, -1))
    np.testing.assert_allclose(dense, z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sae.decode(code), sae(x.reshape(2, 8, D)), rtol=1e-4, atol=1e-5)
    nothing = sae.encode(x[:0])
    assert nothing.values.shape == (0, 1)
    assert sae.decode(nothing).shape == sae(x[:0]).shape == (0, D)
    silent = sae.replace(b_enc=sae.b_enc - 100).encode(x)
    assert silent.values.shape == (B, 1)
    assert not silent.values.any()


def test_the_coefficient_means_what_the_error_convention_says_and_warms_up():
    x, stats = rows(), statistics()
    batch, key = base.Batch(x, x), jax.random.key(0)
    loss = [make(**s).objective(batch, stats.replace(step=jnp.int32(1), key=key))[0] for s in ({}, {"error": "mean"})]
    summed, outcome = make().objective(batch, statistics(0.7 * D).replace(step=jnp.int32(1), key=key))
    np.testing.assert_allclose(loss[1], summed / D, rtol=1e-6)
    half, _ = make(sparsity_warmup=0.04).objective(batch, stats.replace(step=jnp.int32(1), key=key))
    np.testing.assert_allclose(loss[0] - half, 0.35 * outcome.metrics["l1"], rtol=1e-5)


@pytest.mark.long
def test_dead_latents_begin_anew_in_directions_that_are_reconstructed_badly():
    """On one device and on a mesh: rows, biases, moments in any form and counters of the dead, not of the others."""
    config = relu.Config(n_latents=F, l1_coefficient=0.1, dtype="float32", resample_steps=(3,), resample_inputs=2 * B)
    train = TrainConfig(batch_size=B, lr=0.01, ema=0, dead_after_tokens=B, moments="int8")
    x = np.random.default_rng(0).standard_normal((4, B, D)).astype(np.float32)
    buried = np.arange(F) % 5 == 0

    def run(mesh):
        placed = (lambda a, role: jax.device_put(a, meshes.sharding(mesh, role))) if mesh else (lambda a, role: a)
        state = jax.jit(lambda s: initial(config, train, s))(init.sample_statistics(x.reshape(-1, D), "none"))
        b_enc = placed(jnp.where(buried, -50.0, state.sae.b_enc), meshes.DICT)
        state = state.replace(sae=state.sae.replace(b_enc=b_enc))
        step, hparams, states = Step(config, train), hyperparameters(train, config), []
        for batch in x:
            batch = placed(batch, meshes.ROWS)
            state, _ = step(state, hparams, base.Batch(batch, batch))
            plain, adam = {"sae": state.sae, "counters": state.counters}, state.optimiser_state
            moments = {"mean": dequantise(adam.mean), "square": dequantise(adam.square)}
            states.append(jax.tree.map(np.asarray, plain | moments))
        return states

    with jax.numpy_dtype_promotion("standard"):
        _, before, after, later = run(None)
        mesh = meshes.make_mesh(meshes.MeshConfig(2, 4))
        with jax.set_mesh(mesh):
            on_mesh = run(mesh)[2]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), on_mesh["sae"], after["sae"])

    sae = after["sae"]
    assert (before["counters"].silent[buried] > B).all()
    assert not after["counters"].silent[buried].any()
    centred = x[1:3].reshape(-1, D) - sae.b_dec
    cosine = sae.w_dec[buried] @ (centred / np.linalg.norm(centred, axis=1, keepdims=True)).T
    np.testing.assert_allclose(cosine.max(1), 1, rtol=1e-5)
    assert len(set(cosine.argmax(1))) == buried.sum()
    alive = np.linalg.norm(sae.w_enc[~buried], axis=1).mean()
    np.testing.assert_allclose(sae.w_enc[buried], 0.2 * alive * sae.w_dec[buried], rtol=1e-4)
    assert not sae.b_enc[buried].any()
    for moments in (after["mean"], after["square"]):
        assert not any(getattr(moments, name)[buried].any() for name in ("w_enc", "b_enc", "w_dec"))
        assert moments.w_enc[~buried].any()
    assert (later["counters"].silent[buried] == 0).any(), "what begins anew should fire"
    assert np.isinf(after["counters"].extra["row_keys"]).all()


@pytest.mark.parametrize(
    "setting",
    [
        {"n_latents": 0},
        {"l1_coefficient": -1.0},
        {"l1_coefficient": float("nan")},
        {"resample_steps": (0,)},
        {"sparsity_warmup": -1.0},
        {"sparsity_warmup": 1.5},
        {"target_l0": 0.0},
    ],
)
def test_bad_settings_are_refused(setting):
    with pytest.raises(UsageError, match=f"sae.{next(iter(setting))}"):
        relu.Config(**setting)


@pytest.mark.parametrize("variant", ["relu", "crosscoder", "transcoder", "jumprelu"])
def test_a_penalty_is_not_led_to_more_latents_than_there_are(variant):
    same, own = variant != "transcoder", {"transcoder": {"activation": "relu", "k": 4}, "crosscoder": {"k": 4}}
    own = own.get(variant, {}) | ({"penalty": "l0"} if variant == "jumprelu" else {})
    config = base.config_class(variant)(n_latents=16, **own)  # as a container of arrays it may say so
    with pytest.raises(UsageError, match=r"sae.target_l0=32.0 must be at most sae.n_latents=16; .* sae.l[01]_coeff"):
        config.check(Widths.one(8), same)
    base.config_class(variant)(n_latents=16, target_l0=8.0, **own).check(Widths.one(8), same)


@pytest.mark.parametrize(
    ("variant", "settings", "cure"),
    [
        ("topk", {}, "lower sae.k"),
        ("relu", {}, "lower sae.target_l0"),
        ("jumprelu", {}, "lower sae.target_l0"),  # its square aims without being led
        ("jumprelu", {"l0_coefficient": 1.0}, "raise sae.l0_coefficient, or leave it out"),
        ("crosscoder", {"activation": "batch_topk"}, "lower sae.k"),
    ],
)
def test_too_many_active_latents_have_a_cure(variant, settings, cure):
    assert penalty.how_to_have_fewer(base.config_class(variant)(**settings)) == cure
