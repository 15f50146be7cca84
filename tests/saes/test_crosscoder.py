"""The crosscoder against its float64 oracle: several sources, masks, what folding and initialisation promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import mesh as meshes
from sae_jax.saes import base, crosscoder, init, normalise
from sae_jax.training.settings import TrainConfig, hyperparameters
from sae_jax.training.state import initial
from sae_jax.training.step import Step
from sae_jax.types import UsageError, Widths
from tests.oracles import crosscoder as oracle
from tests.saes.contexts import context_of, with_silent

B, F = 16, 48
TWO, THREE = Widths((3, 5), (3, 5)), Widths((2, 3, 3), (4, 1, 3))
EVEN = Widths((3, 3, 3), (2, 3, 3))
BATCH = {"activation": "batch_topk", "k": 3, "k_aux": 4}
NAMES = ("w_enc", "b_enc", "w_dec", "b_dec")


def allowed(config, widths):
    """(reads, writes), bool[F, X] and bool[F, Y]."""
    sides = oracle.allowed(config.mask, config.window, config.n_latents, len(widths.y))
    if config.mask == "acausal":
        sides = np.ones((config.n_latents, len(widths.x)), bool), np.ones((config.n_latents, len(widths.y)), bool)
    return sides


def make(widths=TWO, seed: int = 0, **settings) -> crosscoder.Crosscoder:
    """Away from the initialisation, so that a missed bias or norm would show."""
    rng = np.random.default_rng(seed)
    config = crosscoder.Config(
        **{"n_latents": F, "l1_coefficient": 0.7, "sparsity_warmup": 0.0, "dtype": "float32", **settings}
    )
    n_x, n_y = sum(widths.x), sum(widths.y)
    w_enc, b_enc, w_dec, b_dec = (rng.standard_normal(shape) for shape in ((F, n_x), (F,), (F, n_y), (n_y,)))
    reads, writes = (np.repeat(m, w, axis=1) for m, w in zip(allowed(config, widths), widths, strict=True))
    arrays = (w_enc * reads, b_enc - 1, w_dec * writes, b_dec)
    sae = crosscoder.Crosscoder(*(jnp.asarray(a, jnp.float32) for a in arrays), jnp.float32(0), config, widths)
    if config.activation == "batch_topk":
        sae = sae.replace(w_dec=sae.w_dec / crosscoder.row_norms(sae.w_dec, widths.y, config.decoder_norm)[:, None])
    return sae


def rows(widths) -> tuple[np.ndarray, np.ndarray]:
    x, y = (np.random.default_rng(5).standard_normal((B, sum(own))).astype(np.float32) for own in widths)
    return x, y


def statistics(widths) -> base.Context:
    scale = normalise.Scale(*(jnp.ones(sum(own)) for own in widths))
    silent = 200 * (np.arange(F) % 5 == 0).astype(np.int32)
    coefficients = {"l1_coefficient": jnp.float32(0.7)}
    return context_of(jnp.asarray(silent), jnp.int32(100), jnp.float32(0.7), scale, {}, coefficients)


def value_and_gradient(sae, batch, stats, step=0):
    def objective(sae):
        return sae.objective(batch, stats.replace(step=jnp.int32(step), key=jax.random.key(0)))

    return jax.jit(jax.value_and_grad(objective, has_aux=True))(sae)


def expected(sae, x, y, weights=None) -> oracle.Result:
    config = sae.config
    weights = weights or {name: np.asarray(getattr(sae, name), np.float64) for name in NAMES}
    root, sides = config.decoder_norm == "root", allowed(config, sae.widths)
    if config.activation == "batch_topk":
        silent = np.asarray(statistics(sae.widths).counters.silent)
        return oracle.batch_topk(
            np.float64(x), np.float64(y), **weights, widths_y=sae.widths.y, k=config.k, scale=0.7, root=root,
            reads=sides[0], writes=sides[1], silent_F=silent, dead_after=100, k_aux=config.k_aux,
        )  # fmt: skip
    return oracle.objective(
        np.float64(x), np.float64(y), **weights, widths_x=sae.widths.x, widths_y=sae.widths.y,
        coefficient=config.l1_coefficient, root=root, reads=sides[0], writes=sides[1],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "widths", "settings"),
    [
        (None, TWO, {}),
        (None, THREE, {"decoder_norm": "root", "mask": "weakly_causal"}),
        (None, THREE, {"mask": "strictly_causal"}),
        ((1, 8), THREE, {"mask": "window"}),
        ((2, 4), Widths((6,), (3, 5)), {"decoder_norm": "root"}),
        ((8, 1), THREE, {"mask": "weakly_causal"}),
        (None, TWO, {**BATCH, "decoder_norm": "root"}),
        (None, EVEN, {**BATCH, "mask": "weakly_causal"}),
        ((2, 4), EVEN, {**BATCH, "mask": "window"}),
    ],
    ids=str,
)
def test_objective_and_gradients_are_the_oracle_on_every_mesh(shape, widths, settings):
    sae, (x, y), stats = make(widths, **settings), rows(widths), statistics(widths)
    want = expected(sae, x, y)
    if shape is None:
        (loss, outcome), gradients = value_and_gradient(sae, base.Batch(x, y), stats)
    else:
        mesh = meshes.make_mesh(meshes.MeshConfig(*shape))
        with jax.set_mesh(mesh):
            split, wide = meshes.DICT, meshes.REPLICATED
            place = lambda a, role: jax.device_put(a, meshes.sharding(mesh, role))  # noqa: E731
            placed = jax.tree.map(
                place, sae, crosscoder.Crosscoder(split, split, split, wide, wide, sae.config, sae.widths)
            )
            stats = with_silent(stats, place(stats.counters.silent, split))
            batch = base.Batch(place(x, meshes.ROWS), place(y, meshes.ROWS))
            (loss, outcome), gradients = value_and_gradient(placed, batch, stats)
            assert jax.tree.map(jax.typeof, gradients) == jax.tree.map(jax.typeof, placed)
    np.testing.assert_allclose(loss, want.loss, rtol=1e-5)
    np.testing.assert_allclose(outcome.y_hat, np.concatenate(want.y_hat, 1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outcome.l0, (want.f_BF > 0).sum(1).mean(), rtol=1e-6)
    if sae.config.activation == "relu":
        np.testing.assert_allclose(outcome.metrics["l1"], want.l1, rtol=1e-5)
    assert float(gradients.threshold) == 0
    for name, gradient in want.gradients.items():
        np.testing.assert_allclose(getattr(gradients, name), gradient, rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("settings", [{}, {"decoder_norm": "root", "mask": "weakly_causal"}], ids=str)
def test_the_oracle_gradients_are_finite_differences(settings):
    sae, (x, y) = make(THREE, **settings), rows(THREE)
    weights = {name: np.asarray(getattr(sae, name), np.float64) for name in NAMES}
    gradients = expected(sae, x, y).gradients
    rng = np.random.default_rng(2)
    for name, value in weights.items():
        step = 1e-6 * rng.standard_normal(value.shape) * (value != 0)  # what a mask bars does not move
        up, down = (expected(sae, x, y, {**weights, name: value + sign * step}).loss for sign in (1, -1))
        np.testing.assert_allclose((up - down) / 2, (gradients[name] * step).sum(), rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(("mask", "settings"), [("strictly_causal", {}), ("window", BATCH)])
def test_what_a_mask_bars_stays_zero_from_the_start_through_training(mask, settings):
    config = crosscoder.Config(n_latents=F, mask=mask, dtype="float32", **settings)
    widths = Widths((3, 3, 3), (3, 3, 3))
    x = np.random.default_rng(0).standard_normal((4, B, 9)).astype(np.float32)
    train = TrainConfig(batch_size=B, lr=0.01, moments="int8")
    with jax.numpy_dtype_promotion("standard"):  # optax
        sample = init.sample_statistics(x.reshape(-1, 9), config.input_norm, widths=widths)
        state = jax.jit(lambda s: initial(config, train, s))(sample)
        step, hparams = Step(config, train), hyperparameters(train, config)
        begun = jax.tree.map(np.asarray, state.sae)
        for batch in x:
            state, _ = step(state, hparams, base.Batch(batch, batch))
    for name, side in zip(("w_enc", "w_dec"), allowed(config, widths), strict=True):
        for sae in (begun, state.sae):
            np.testing.assert_array_equal(np.asarray(getattr(sae, name)) != 0, np.repeat(side, 3, axis=1))
    if settings:
        np.testing.assert_allclose(crosscoder.row_norms(state.sae.w_dec, widths.y, "sum"), 1, rtol=1e-5)


def test_initialisation():
    widths, rng = Widths((6, 10), (6, 10)), np.random.default_rng(0)
    x = rng.standard_normal((500, 16)) * np.repeat([1, 30], [6, 10]) + 7
    config = crosscoder.Config(n_latents=4096, initial_norm=0.1)
    sample = init.sample_statistics(x, config.input_norm, widths=widths)
    sae = config.init(jax.random.key(0), sample)
    np.testing.assert_allclose(crosscoder.source_norms(sae.w_dec, widths.y), 0.1, rtol=1e-5)
    np.testing.assert_array_equal(sae.w_enc, sae.w_dec)
    a, b = (init.unit_rows(part[:, :6]) for part in (sae.w_dec[:, :6], sae.w_dec[:, 6:]))
    assert abs((a * b).sum(1).mean()) < 0.05, "sources begin independently"
    # Of one mean squared norm a dimension, whatever the units of a source are.
    np.testing.assert_allclose((x * np.asarray(sample.scale.x))[:, :6].var() + sae.b_dec[0] ** 2, 1, rtol=0.1)
    strongest = crosscoder.Config(n_latents=4096, activation="batch_topk").init(jax.random.key(0), sample)
    np.testing.assert_allclose(crosscoder.row_norms(strongest.w_dec, widths.y, "sum"), 1, rtol=1e-5)
    row = 3 * strongest.w_dec[:1]
    np.testing.assert_allclose((row @ strongest.w_enc[:1].T) @ strongest.w_dec[:1], row, rtol=1e-4)
    other = init.sample_statistics(x, config.input_norm, x[:, ::-1], Widths((6, 10), (10, 6)))
    sae = config.init(jax.random.key(0), other)
    assert abs((init.unit_rows(sae.w_enc) * init.unit_rows(sae.w_dec)).sum(1).mean()) < 0.05
    np.testing.assert_allclose(sae.b_dec, other.mean)


@pytest.mark.parametrize("settings", [{}, {"decoder_norm": "root"}, BATCH], ids=str)
def test_folding_is_exact_where_sources_have_different_scales(settings):
    sae, (x, _) = make(THREE, **settings), rows(THREE)
    if settings == BATCH:
        sae = sae.replace(threshold=jnp.float32(1.2))
    scale = normalise.Scale(
        jnp.asarray(np.repeat([0.3, 5.0, 1.0], THREE.x), jnp.float32),
        jnp.asarray(np.repeat([7.0, 0.1, 2.0], THREE.y), jnp.float32),
    )
    folded = sae.folded(scale)
    w_enc, b_enc, w_dec, b_dec = (np.asarray(getattr(sae, name), np.float64) for name in NAMES)
    pre = x @ w_enc.T + b_enc
    f = np.where(pre > float(sae.threshold), pre, 0)
    raw = x / np.asarray(scale.x)
    y_hat = np.asarray(folded(raw)) * np.asarray(scale.y)
    np.testing.assert_allclose(y_hat, f @ w_dec + b_dec, rtol=1e-4, atol=1e-4)
    code = folded.encode(raw)
    np.testing.assert_allclose(folded.decode(code), folded(raw), rtol=1e-4, atol=1e-4)
    norm = np.asarray(crosscoder.row_norms(sae.w_dec, THREE.y, sae.config.decoder_norm))
    np.testing.assert_allclose(code.values.sum(1), (f * norm).sum(1), rtol=1e-5)


def test_the_coefficient_warms_up():
    sae, (x, y), stats = make(sparsity_warmup=0.04), rows(TWO), statistics(TWO)
    (half, outcome), _ = value_and_gradient(sae, base.Batch(x, y), stats, step=1)
    np.testing.assert_allclose(expected(sae, x, y).loss - half, 0.35 * outcome.metrics["l1"], rtol=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"input_norm": "layer_norm"}, "sae.input_norm=layer_norm"),
        ({"l1_coefficient": -1.0}, "sae.l1_coefficient=-1"),
        ({"window": -1}, "sae.window=-1"),
        ({"initial_norm": 0.0}, "sae.initial_norm=0"),
    ],
)
def test_bad_settings_are_refused(setting, message):
    with pytest.raises(UsageError, match=message):
        crosscoder.Config(**setting)


@pytest.mark.parametrize(
    ("setting", "widths", "message"),
    [
        ({"mask": "weakly_causal"}, Widths.one(4), "at least two sources.* 1 and 1"),
        ({"mask": "window"}, Widths((4, 4), (4, 4, 4)), "2 and 3; use sae.mask=acausal"),
        ({"mask": "window", "n_latents": 2}, Widths((4,) * 3, (4,) * 3), "sae.n_latents=2"),
    ],
)
def test_sources_that_a_mask_cannot_work_on_are_refused(setting, widths, message):
    with pytest.raises(UsageError, match=message):
        crosscoder.Config(**setting).check(widths, same=False)
    crosscoder.Config().check(widths, same=False)
