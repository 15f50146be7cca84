"""Transcoders against their float64 oracle, how they begin, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import mesh as meshes
from sae_jax.saes import base, init, normalise, topk, transcoder
from sae_jax.types import UsageError, Widths
from tests.oracles import transcoder as oracle
from tests.saes.contexts import context_of
from tests.saes.oracle_checks import learnt

B, X, Y, F, K = 16, 8, 12, 48, 4
NAMES = ("w_enc", "b_enc", "w_dec", "b_dec", "w_skip")


def make(**settings) -> transcoder.Transcoder:
    rng = np.random.default_rng(0)
    config = transcoder.Config(
        **{"n_latents": F, "k": K, "skip": True, "l1_coefficient": 0.7, "sparsity_warmup": 0.0, "dtype": "float32"}
        | settings
    )
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in ((F, X), (F,), (F, Y), (Y,), (Y, X))]
    w_enc, b_enc, w_dec, b_dec, w_skip = map(jnp.asarray, arrays)
    return transcoder.Transcoder(w_enc, b_enc, init.unit_rows(w_dec), b_dec, w_skip, config)


def batch() -> base.Batch:
    rng = np.random.default_rng(5)
    return base.Batch(*(rng.standard_normal((B, width)).astype(np.float32) for width in (X, Y)))


def value_and_gradient(sae, rows, place=lambda a, role: a):
    scale = normalise.Scale(jnp.ones(X), jnp.ones(Y))
    silent, coefficients = place(jnp.zeros(F, jnp.int32), meshes.DICT), sae.config.coefficients
    stats = context_of(silent, jnp.int32(100), jnp.float32(0.7), scale, {}, coefficients)

    def objective(sae):
        return sae.objective(rows, stats)

    return jax.jit(learnt(objective))(sae)


def expected(sae, rows) -> oracle.Result:
    weights = [np.asarray(getattr(sae, name), np.float64) for name in NAMES]
    k = K if sae.config.activation == "topk" else 0
    return oracle.objective(np.float64(rows.x), np.float64(rows.y), *weights, k, 0.7, 0.7)


@pytest.mark.parametrize(
    ("activation", "shape"),
    [
        *(("topk", shape) for shape in (None, (2, 4))),
        *(("relu", shape) for shape in (None, (2, 4))),
        *(pytest.param("topk", shape, marks=pytest.mark.long) for shape in ((1, 8), (8, 1))),
    ],
    ids=str,
)
def test_objective_and_gradients_are_the_oracle_on_every_mesh(activation, shape):
    sae, rows = make(activation=activation), batch()
    want = expected(sae, rows)
    if shape is None:
        (loss, outcome), gradients = value_and_gradient(sae, rows)
    else:
        mesh = meshes.make_mesh(meshes.MeshConfig(*shape))
        with jax.set_mesh(mesh):
            place = lambda a, role: jax.device_put(a, meshes.sharding(mesh, role))  # noqa: E731
            roles = dict(zip(NAMES, (*(meshes.DICT,) * 3, *(meshes.REPLICATED,) * 2), strict=True))
            split = sae.replace(**{name: place(getattr(sae, name), role) for name, role in roles.items()})
            rows = jax.tree.map(lambda a: place(a, meshes.ROWS), rows)
            (loss, outcome), gradients = value_and_gradient(split, rows, place)
    np.testing.assert_allclose(loss, want.loss, rtol=1e-5)
    np.testing.assert_allclose(outcome.y_hat, want.y_hat_BY, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outcome.l0, (want.z_BF > 0).sum(1).mean(), rtol=1e-6)
    for name, gradient in want.gradients.items():
        np.testing.assert_allclose(getattr(gradients, name), gradient, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_the_oracle_gradients_are_finite_differences(activation):
    sae, rows = make(activation=activation), batch()
    weights = {name: np.asarray(getattr(sae, name), np.float64) for name in NAMES}

    def result(weights):
        k = K if activation == "topk" else 0
        return oracle.objective(np.float64(rows.x), np.float64(rows.y), *weights.values(), k, 0.7, 0.7)

    gradients, rng = result(weights).gradients, np.random.default_rng(2)
    for name, value in weights.items():
        step = 1e-6 * rng.standard_normal(value.shape)
        if name == "w_dec":  # the oracle's gradient has no component along the rows: neither may the step
            step -= (step * value).sum(1, keepdims=True) * value
        up, down = (result({**weights, name: value + sign * step}).loss for sign in (1, -1))
        np.testing.assert_allclose((up - down) / 2, (gradients[name] * step).sum(), rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_used_on_rows_it_is_the_oracle_and_folds(activation):
    sae, rows = make(activation=activation), batch()
    want = expected(sae, rows)
    np.testing.assert_allclose(sae(rows.x), want.y_hat_BY, rtol=1e-4, atol=1e-5)
    skipped = np.float64(rows.x) @ np.float64(sae.w_skip).T
    np.testing.assert_allclose(sae.decode(sae.encode(rows.x)) + skipped, want.y_hat_BY, rtol=1e-4, atol=1e-5)
    folded = sae.folded(normalise.Scale(jnp.full(X, 4.0), jnp.linspace(0.5, 2, Y)))
    np.testing.assert_allclose(folded(rows.x / 4), want.y_hat_BY / np.linspace(0.5, 2, Y), rtol=1e-4, atol=1e-5)


def test_initialisation():
    rng = np.random.default_rng(0)
    x, noise, map_YX = (rng.standard_normal(shape) for shape in ((500, 32), (500, 48), (48, 32)))
    x[:, 0], y = 7, x @ map_YX.T + noise + 3  # a direction that does not vary says nothing
    config = transcoder.Config(n_latents=256, k=8, skip=True, dtype="float32")
    sae = config.init(jax.random.key(0), init.sample_statistics(x, "none", y))
    np.testing.assert_allclose(jnp.linalg.norm(sae.w_dec, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(sae.b_dec, y.mean(0), rtol=1e-4)
    of_y = topk.Config(n_latents=256, k=8, dtype="float32").init(jax.random.key(0), init.sample_statistics(y, "none"))
    centred = x - x.mean(0)
    ridge = 0.01 * (centred**2).sum() / 32
    a_YX = np.linalg.solve(centred.T @ centred + ridge * np.eye(32), centred.T @ y).T
    np.testing.assert_allclose(sae.w_dec, of_y.w_dec)
    np.testing.assert_allclose(sae.w_enc, of_y.w_enc @ a_YX, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sae.w_enc @ init.geometric_median(x), -sae.b_enc, rtol=1e-3, atol=1e-3)
    far = config.init(jax.random.key(0), init.sample_statistics(100 * x, "none", y))
    np.testing.assert_allclose(far(100 * x), sae(x), rtol=1e-3, atol=1e-3)
    error = [np.square(y - y_hat).sum() for y_hat in (np.asarray(sae(x)), y.mean(0))]
    assert error[0] < error[1]
    assert sae.w_skip.shape == (48, 32)
    assert not sae.w_skip.any()


def test_thresholds_in_place_of_the_selection():
    sae, rows = make(skip=False).replace(w_skip=None), batch()
    jump = sae.to_jumprelu(rows.x)
    assert (np.asarray(jump.encode(rows.x).values) > 0).sum() == B * K
    assert jump(rows.x).shape == (B, Y)
    with pytest.raises(UsageError, match=r"sae\.skip"):
        make().to_jumprelu(rows.x)


def test_what_it_cannot_work_on_is_refused():
    config = transcoder.Config(n_latents=F, k=K)
    config.check(Widths((8,), (8, 8)), same=False)
    with pytest.raises(UsageError, match="reconstruct"):
        config.check(Widths.one(8), same=True)
    with pytest.raises(UsageError, match="not 2"):
        config.check(Widths((8, 8), (8,)), same=False)
    with pytest.raises(UsageError, match=r"sae\.l1_coefficient=-1"):
        transcoder.Config(l1_coefficient=-1.0)
