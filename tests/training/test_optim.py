"""Adam and averages against float64 numpy, in every form that they can be kept in; the forms themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_jax import mesh as meshes
from sae_jax.saes import base, init, normalise, topk
from sae_jax.training import optim, quantise
from sae_jax.training.settings import TrainConfig, hyperparameters
from sae_jax.training.state import abstract, initial
from sae_jax.training.step import Step
from sae_jax.types import Widths
from tests.oracles.adam import adam

FORMS = ("float32", "bfloat16", "int8")
# Neighbours are this far apart, relative to the number: 7 and 3 mantissa bits.
SPACING = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "int8": 2.0**-3}
MESHES = ((1, 8), (2, 4), (8, 1))
TINY = float(np.finfo(np.float32).tiny)


def optimiser(**settings) -> optax.GradientTransformationExtraArgs:
    config = TrainConfig(**settings)
    return optim.optimiser(config, hyperparameters(config, SAE), SAE.ADAM)


def steps_of_adam(form: str, gradients: np.ndarray, clip: float = 0.0) -> tuple[np.ndarray, optim.AdamState]:
    """Weights that began at zero and the state after these gradients f32[steps, rows, columns], at rate 1."""
    tx = optimiser(lr=1.0, clip=clip, moments=form)
    weights = jnp.zeros(gradients.shape[1:])

    def step(carry, gradient):
        weights, state = carry
        updates, state = tx.update(gradient, state, norm=optax.tree.norm(gradient))
        return (optax.apply_updates(weights, updates), state), None

    (weights, state), _ = jax.jit(lambda c, g: jax.lax.scan(step, c, g))((weights, tx.init(weights)), gradients)
    return np.asarray(weights), state


def oracle_adam(gradients: np.ndarray, clip: float = 0.0):
    """(weights, mean, square) of the same in float64."""
    weights, mean, square = (np.zeros(gradients.shape[1:]) for _ in range(3))
    for t, gradient in enumerate(np.float64(gradients), start=1):
        factor = min(1.0, clip / np.linalg.norm(gradient)) if clip else 1.0
        weights, mean, square = adam(weights, gradient * factor, mean, square, t, 1.0)
    return weights, mean, square


@pytest.mark.parametrize("clip", [0.0, 5.0])
def test_f32_is_adam(clip):
    rng = np.random.default_rng(0)
    gradients = np.float32(rng.standard_normal((40, 16, 24)) * 10.0 ** rng.integers(-6, 2, (1, 16, 1)))
    gradients *= rng.random((40, 16, 1)) < 0.5  # latents that are silent for steps on end
    weights, state = steps_of_adam("float32", gradients, clip)
    want_weights, want_mean, want_square = oracle_adam(gradients, clip)
    # Forty roundings, and the norm; a sum that cancels is as exact as its largest term.
    largest = np.abs(gradients).max(0)
    assert (np.abs(state.mean - want_mean) <= 40 * 2.0**-23 * largest + 1e-30).all()
    np.testing.assert_allclose(state.square, want_square, rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(weights, want_weights, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [None, *MESHES], ids=str)
def test_gradients_of_unit_rows_lie_along_their_sphere(shape):
    """And their norm is that of what is left, also of rows whose gradient is nearly all along them."""
    rng = np.random.default_rng(0)
    w_enc, w_dec, g_enc, g_dec = (np.float32(rng.standard_normal((64, 24))) for _ in range(4))
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    g_dec[:8] += 30 * w_dec[:8]
    roles = topk.TopK(meshes.DICT, meshes.DICT, meshes.DICT, meshes.REPLICATED, SAE)
    weights, gradients = (
        topk.TopK(enc, np.float32(rng.standard_normal(64)), dec, np.float32(rng.standard_normal(24)), SAE)
        for enc, dec in ((w_enc, w_dec), (g_enc, g_dec))
    )
    if shape is None:
        left, norm = optim.along_sphere(gradients, weights)
    else:
        mesh = meshes.make_mesh(meshes.MeshConfig(*shape))
        with jax.set_mesh(mesh):
            placed = (
                jax.tree.map(lambda a, r: jax.device_put(a, meshes.sharding(mesh, r)), t, roles)
                for t in (gradients, weights)
            )
            left, norm = jax.jit(optim.along_sphere)(*placed)
    g, w = np.float64(g_dec), np.float64(w_dec)
    want = gradients.replace(w_dec=g - (g * w).sum(1, keepdims=True) * w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), left, want)
    squares = (np.square(np.float64(leaf)).sum() for leaf in jax.tree.leaves(want))
    np.testing.assert_allclose(norm, np.sqrt(sum(squares)), rtol=1e-5)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize(("warmup", "decay"), [(0, 0), (0.1, 0), (0.1, 0.2), (0.3, 0.7), (0, 1)])
def test_the_rate_rises_stays_and_falls(shape, warmup, decay):
    """What the optimiser does of a gradient that is always 1 is the rate itself."""
    settings = {"steps": 100, "warmup": warmup, "decay": decay, "decay_shape": shape}
    tx = optimiser(lr=1.0, clip=0.0, decay_to=0.1, **settings)
    weights = jnp.zeros(1)

    def step(state, _):
        update, state = tx.update(jnp.ones(1), state, norm=1.0)
        return state, update[0]

    with jax.numpy_dtype_promotion("standard"):  # optax
        rates = -np.asarray(jax.lax.scan(step, tx.init(weights), None, 100)[1])
    t = np.arange(1, 101)
    fallen = np.clip((t - 100 + 100 * decay) / max(100 * decay, 1), 0, 1) * (decay > 0)
    left = 1 - fallen if shape == "linear" else (1 + np.cos(np.pi * fallen)) / 2
    np.testing.assert_allclose(rates, np.minimum(t / max(100 * warmup, 1), 1) * (0.1 + 0.9 * left), rtol=1e-4)


@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_fewer_bytes_are_adam_on_average(form):
    """512 columns with the same gradients: each is within its rounding, their mean that of f32 but for chance."""
    rng = np.random.default_rng(0)
    gradients = np.float32(rng.standard_normal((100, 8, 1)) * 10.0 ** rng.integers(-6, 2, (1, 8, 1)))
    gradients[:, 4:] *= rng.random((100, 4, 1)) < 0.1
    gradients[50:, 7] = 0
    weights, state = steps_of_adam(form, np.broadcast_to(gradients, (100, 8, 512)))
    want_weights, want_mean, want_square = oracle_adam(gradients)
    mean, square = (np.asarray(quantise.dequantise(kept), np.float64) for kept in (state.mean, state.square))
    # A rounding moves a number by less than the distance of its neighbours and is forgotten as the average forgets:
    # its variance is at most a quarter of the square of that, summed over b^2t.
    spacing, largest = SPACING[form], np.abs(gradients).max(0)
    sigma = spacing / 2 * largest / np.sqrt(1 - 0.9**2)
    assert (np.abs(mean - want_mean) <= 6 * sigma).all()
    assert (np.abs(mean.mean(1, keepdims=True) - want_mean) <= 5 * sigma / np.sqrt(512)).all()
    np.testing.assert_allclose(square.mean(1, keepdims=True), want_square, rtol=spacing / 4, atol=1e-30)
    scale = np.abs(weights).max(1, keepdims=True) + 1
    assert (np.abs(weights.mean(1, keepdims=True) - want_weights) <= spacing * scale).all()


@pytest.mark.parametrize("form", FORMS)
def test_averages_follow(form):
    """A decay of 0.999 moves a number by less than half the distance to its neighbour in every step."""
    weights = jnp.broadcast_to(jnp.float32([[1.0], [-0.3], [1e-4]]), (3, 500))
    average = jax.jit(
        lambda kept, target, first: jax.lax.fori_loop(
            first, first + 1000, lambda t, kept: optim.ema_update(kept, target, 0.999, t), kept
        )
    )
    there = average(quantise.zeros_like_moments(weights, form, quantise.WEIGHT), weights, jnp.int32(1))
    np.testing.assert_allclose(quantise.dequantise(there), weights, rtol=SPACING[form] + 1e-4)
    back = quantise.dequantise(average(there, jnp.zeros_like(weights), jnp.int32(1001)))
    want = weights * (0.999**1000 - 0.999**2000) / (1 - 0.999**2000)
    # 1000 roundings, each up with probability 0.001 x / distance: their variances add up to one distance times x.
    sigma = np.sqrt(SPACING[form] / 500)
    np.testing.assert_allclose(back.mean(1), want[:, 0], rtol=5 * sigma + 1e-3)


FOLLOW = jax.jit(lambda kept, x, step: quantise.update_moment(kept, x, 0.0, step, salt=1))


def kept(x: np.ndarray, form: str, code: quantise.Codebook = quantise.MEAN, step: int = 0):
    """What is kept of x itself."""
    return FOLLOW(quantise.zeros_like_moments(jnp.asarray(x), form, code), x, jnp.int32(step))


@st.composite
def rows(draw):
    """f32[4, D] over many magnitudes, with zeros and numbers below the normal ones."""
    d = draw(st.sampled_from([1, 5, 256, 300]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low, high = sorted(draw(st.tuples(st.integers(-44, 37), st.integers(-44, 37))))
    x = rng.standard_normal((4, d)) * 10.0 ** rng.uniform(low, high, (4, d))
    return np.float32(x * (rng.random((4, d)) < draw(st.sampled_from([0.0, 0.3, 1.0]))))


@settings(max_examples=60)
@given(rows(), st.sampled_from([quantise.MEAN, quantise.SQUARE, quantise.WEIGHT]), st.integers(0, 10**6))
def test_what_is_kept_in_8_bits(x, code, step):
    x = x if code.signed else np.abs(x)
    blocks = kept(x, "int8", code, step)
    length = -(-x.shape[1] // -(-x.shape[1] // 256))
    assert blocks.scales.shape == (4, -(-x.shape[1] // length))
    got = np.asarray(quantise.dequantise(blocks), np.float64)
    largest = np.repeat([np.abs(x[:, i : i + length]).max(1) for i in range(0, x.shape[1], length)], length, axis=0)
    largest = np.float64(largest.T[:, : x.shape[1]])
    allowed = (np.abs(x) + 2.0**-code.octaves * largest) / 2**code.mantissa * 1.0001
    flushed = largest < TINY * 2.0**34  # the product of a code and a scale may fall below the normal numbers
    assert (np.abs(got - x) <= np.where(flushed, allowed + TINY, allowed)).all()
    assert (got[x == 0] == 0).all()
    assert (got * x >= 0).all()
    if not code.signed:
        assert (got[(x >= TINY) & ~flushed] > 0).all()


@settings(max_examples=30)
@given(rows(), st.integers(0, 10**6))
def test_what_is_kept_in_bf16(x, step):
    got = np.asarray(quantise.dequantise(kept(x, "bfloat16", step=step)), np.float64)
    assert (np.abs(got - x) <= np.abs(x) * 2.0**-7 + TINY).all()
    assert (got[x == 0] == 0).all()


@pytest.mark.parametrize("code", [quantise.MEAN, quantise.SQUARE])
@pytest.mark.parametrize("bad", [np.nan, np.inf, np.uint32(0x7FFFFFFF).view(np.float32)])
def test_what_is_not_finite_stays_so(code, bad):
    x = np.ones((2, 512), np.float32)
    x[0, 300] = bad
    finite = np.isfinite(quantise.dequantise(kept(x, "int8", code)))
    assert not finite[0, 256:].any()
    assert finite[0, :256].all()
    assert finite[1].all()
    finite = np.isfinite(quantise.dequantise(kept(x, "bfloat16")))
    assert not finite[0, 300]
    assert finite.sum() == x.size - 1


@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_rounding_is_the_same_on_every_mesh_and_different_at_every_step(form):
    x = np.float32(np.random.default_rng(0).standard_normal((16, 300)))
    want = jax.tree.map(np.asarray, kept(x, form))
    assert (quantise.dequantise(want) != quantise.dequantise(kept(x, form, step=1))).any()
    for shape in MESHES:
        mesh = meshes.make_mesh(meshes.MeshConfig(*shape))
        with jax.set_mesh(mesh):
            got = kept(jax.device_put(x, meshes.sharding(mesh, meshes.DICT)), form)
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_f32_moves_no_more_memory_than_optax_and_fewer_bytes_move_less():
    weights = {name: jnp.ones((512, 256)) for name in ("w_enc", "w_dec")}

    def compiled(tx):
        def update(weights, state, gradients):
            updates, state = tx.update(gradients, state, norm=optax.tree.norm(gradients))
            return optax.apply_updates(weights, updates), state

        program = jax.jit(update, donate_argnums=(0, 1)).lower(weights, tx.init(weights), weights).compile()
        return program.cost_analysis()["bytes accessed"], program.memory_analysis().temp_size_in_bytes

    with jax.numpy_dtype_promotion("standard"):
        clip = optax.clip_by_global_norm(1.0)
        chain = optax.chain(clip, optax.scale_by_adam(0.9, 0.999, 6.25e-10), optax.scale(-1e-3))
        theirs, _ = compiled(optax.with_extra_args_support(chain))
    ours = {form: compiled(optimiser(moments=form)) for form in FORMS}
    assert ours["int8"][0] < ours["float32"][0] <= theirs
    assert ours["bfloat16"][0] < ours["float32"][0]
    one_copy = 4 * 2 * 512 * 256
    assert max(temporary for _, temporary in ours.values()) < one_copy / 2


WIDTHS = Widths.one(24)
ONES = np.ones(24, np.float32)
SAMPLE = init.Sample(0 * ONES, 0 * ONES, np.float32(1), normalise.Scale(ONES, ONES), WIDTHS)
SAE = topk.Config(n_latents=64, k=4, dtype="float32", aux_coefficient=0.0)


def sizes(array) -> tuple[int, int]:
    """(bytes, bytes on a device)."""
    shard = array.sharding.shard_shape(array.shape)
    return array.size * array.dtype.itemsize, int(np.prod(shard)) * array.dtype.itemsize


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("form", FORMS)
def test_state_is_split_over_all_devices(shape, form):
    mesh = meshes.make_mesh(meshes.MeshConfig(*shape))
    with jax.set_mesh(mesh):
        state = abstract(SAE, TrainConfig(moments=form, ema_dtype=form), WIDTHS, mesh)
    whole = [
        sizes(a) for a in jax.tree.leaves((state.sae, state.optimiser_state, state.average, state.counters.silent))
    ]
    split = [(total, part) for total, part in whole if part * 8 == total]
    assert (
        sum(total for total, part in whole if (total, part) not in split) == 4 * 24 * 4 + 4
    )  # b_dec four times, count
    matrix = {"float32": 4, "bfloat16": 2, "int8": 1}[form] * 24 * 64 + (4 * 64 if form == "int8" else 0)
    assert sum(total for total, _ in split) == 2 * (4 * 24 * 64 + 3 * matrix) + 5 * 4 * 64


def test_a_step_on_a_mesh_changes_no_type_and_no_place():
    config = TrainConfig(batch_size=16, moments="int8", ema_dtype="bfloat16")
    mesh = meshes.make_mesh(meshes.MeshConfig(2, 4))
    rows = np.float32(np.random.default_rng(0).standard_normal((16, 24)))
    with jax.set_mesh(mesh):
        want = abstract(SAE, config, WIDTHS, mesh)
        state = jax.jit(lambda s: initial(SAE, config, s))(SAMPLE)
        rows = jax.device_put(rows, meshes.sharding(mesh, meshes.ROWS))
        kinds = jax.tree.map(jax.typeof, state)
        after, _ = Step(SAE, config)(state, hyperparameters(config, SAE), base.Batch(rows, rows))
    assert jax.tree.map(jax.typeof, after) == kinds
    for array, expected in zip(jax.tree.leaves(after), jax.tree.leaves(want), strict=True):
        assert (array.shape, array.dtype) == (expected.shape, expected.dtype)
        assert array.sharding.is_equivalent_to(expected.sharding, array.ndim)
    np.testing.assert_allclose(quantise.dequantise(after.average).w_enc, after.sae.w_enc, rtol=2.0**-7, atol=1e-6)
