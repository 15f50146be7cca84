"""The tiled path against its dense reference, on every mesh, in blocks that divide and in blocks that do not."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import mesh as meshes
from sae_jax.ops import reference, tiled, tuning
from tests.hlo import largest_array
from tests.meshes import MESHES

D = 6
UNEVEN = 43, 83  # rows and latents that no block and no tile divides
SPLIT = 88, 88  # the same for the 11 of each device
ABOVE = 0.5
LATENTS = {"b_gate": meshes.DICT, "b_size": meshes.DICT, "log_size": meshes.DICT}
DECODERS = (meshes.DICT, meshes.DICT)
ROLES = (meshes.ROWS, meshes.DICT, DECODERS, meshes.REPLICATED, LATENTS)


@jax.custom_jvp
def step(gate):
    return (gate > 0).astype(gate.dtype)


@step.defjvp
def _(primals, tangents):
    return step(*primals), jnp.where(abs(primals[0]) < 0.25, 2 * tangents[0], 0.0)


def gated(pre, latents):
    """As much as an activation may ask for: parameters, two codes, two penalties and a straight-through estimator."""
    gate = pre + latents["b_gate"][None]
    size = jnp.exp(latents["log_size"])[None] * pre + latents["b_size"][None]
    penalties = jax.nn.relu(gate) * latents["log_size"][None] ** 2, jnp.tanh(size)
    return (step(gate) * jax.nn.relu(size), jax.nn.relu(gate)), penalties


def draw_arrays(n_rows, n_latents):
    rng = np.random.default_rng(0)
    draw = lambda *shape: np.float32(rng.standard_normal(shape))  # noqa: E731
    latents = {name: 0.3 * draw(n_latents) for name in LATENTS}
    decoders = draw(n_latents, D), draw(n_latents, D - 2)
    return draw(n_rows, D), draw(n_latents, D), decoders, draw(D), latents


def value_and_gradients(reconstruct, target, arrays, frozen):
    """Of a loss that needs all that `reconstruct` returns; `frozen` keeps the second decoder from learning."""

    def loss(x, w_enc, w_dec, b_pre, latents):
        w_dec = (w_dec[0], jax.lax.stop_gradient(w_dec[1])) if frozen else w_dec
        out = reconstruct(x, w_enc, w_dec, b_pre, latents)
        value = sum(((x_hat - target[:, : x_hat.shape[1]]) ** 2).mean() for x_hat in out.x_hat)
        return value + sum((penalty**2).mean() for penalty in out.penalty), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))(*arrays)


def in_tiles(x, w_enc, w_dec, b_pre, latents):
    return tiled.reconstruct(x, w_enc, w_dec, b_pre, latents, gated, jnp.float32, ABOVE)


def whole(x, w_enc, w_dec, b_pre, latents):
    return reference.reconstruct(x, w_enc, w_dec, b_pre, latents, gated, ABOVE)


def mesh_of(shape):
    return meshes.make_mesh(meshes.MeshConfig(*shape), jax.devices()[: math.prod(shape)])


def pieces(elements):
    """Tiles of at most that many pre-activations."""
    return tuning.using(replace(tuning.current(), block_bytes=4 * elements))


@pytest.mark.parametrize("shape", [None, *MESHES], ids=str)
@pytest.mark.parametrize("elements", [25, 576])
def test_values_and_gradients_equal_dense_autodiff(shape, elements):
    arrays = draw_arrays(*(UNEVEN if shape is None else SPLIT))
    target = arrays[0] ** 2
    with jax.enable_x64(True):
        want = value_and_gradients(whole, *jax.tree.map(np.float64, (target, arrays)), frozen=False)
        want = jax.tree.map(np.asarray, want)
    with pieces(elements):
        if shape is None:
            got = value_and_gradients(in_tiles, target, arrays, frozen=False)
        else:
            with jax.set_mesh(mesh := mesh_of(shape)):
                place = lambda role, a: jax.device_put(a, meshes.sharding(mesh, role))  # noqa: E731
                placed = jax.tree.map(place, ROLES, arrays)
                got = value_and_gradients(in_tiles, place(meshes.ROWS, target), placed, frozen=False)
                assert jax.tree.map(jax.typeof, got[1]) == jax.tree.map(jax.typeof, placed)
    # Errors are those of float32 sums of terms as large as the largest of an array: at most 6e-7 of it were seen.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max()), got, want)


def test_what_is_frozen_gets_no_gradient_and_costs_no_product():
    arrays = draw_arrays(*UNEVEN)
    want = value_and_gradients(whole, arrays[0], arrays, frozen=True)
    got = value_and_gradients(in_tiles, arrays[0], arrays, frozen=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)

    def loss(w_enc):
        return in_tiles(arrays[0], w_enc, arrays[2], *arrays[3:]).x_hat[0].sum()

    # Nothing is wanted of x or the decoders: 3 products forward, 1 again, the 2 codes' gradients, W_enc's, b_pre's.
    assert str(jax.make_jaxpr(jax.grad(loss))(arrays[1])).count("dot_general") == 3 + 1 + 2 + 1 + 1


def test_rows_may_be_of_any_float_type():
    arrays = draw_arrays(*UNEVEN)
    x = jnp.asarray(arrays[0], jnp.bfloat16)
    got = value_and_gradients(in_tiles, arrays[0], (x, *arrays[1:]), frozen=False)
    want = value_and_gradients(whole, arrays[0], (x.astype(jnp.float32), *arrays[1:]), frozen=False)
    assert got[1][0].dtype == jnp.bfloat16
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got[1][1:], want[1][1:])


def relu(pre, bias):
    z = jax.nn.relu(pre + bias[None])
    return z, z


@pytest.mark.parametrize(
    ("shape", "n_rows", "n_latents"),
    [((1, 1), 512, 8192), ((2, 4), 512, 8192), ((2, 4), 8192, 64)],
)
def test_nothing_is_larger_than_a_devices_weights_its_own_rows_or_a_tile(shape, n_rows, n_latents):
    """Of the compiled forward and backward pass: no rows by latents, nor all rows of a data shard."""
    d_model, budget = 8, 2**13

    def loss(w_enc, w_dec, bias, b_pre, x):
        out = tiled.reconstruct(x, w_enc, w_dec, b_pre, bias, relu, jnp.dtype("bfloat16"), ABOVE)
        return ((out.x_hat - x) ** 2).sum() + out.penalty.sum(), (out.fired, out.n_active)

    with pieces(budget), jax.set_mesh(mesh := mesh_of(shape)):
        roles = (meshes.DICT, meshes.DICT, meshes.DICT, meshes.REPLICATED, meshes.ROWS)
        shapes = ((n_latents, d_model), (n_latents, d_model), (n_latents,), (d_model,), (n_rows, d_model))
        arguments = [
            jax.ShapeDtypeStruct(size, jnp.float32, sharding=meshes.sharding(mesh, role))
            for size, role in zip(shapes, roles, strict=True)
        ]
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)).lower(*arguments).compile()
    n_data, n_shards = shape
    largest = max(n_latents // n_shards * d_model, n_rows // (n_data * n_shards) * d_model, budget)
    assert largest < n_rows // n_data * max(n_latents // n_shards, d_model)
    assert largest_array(compiled.as_text()) <= largest


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("k", [8, 20])
def test_the_largest_of_each_row_are_those_of_the_dense_code(shape, k):
    x, w_enc, _, b_pre, latents = draw_arrays(*SPLIT)
    bias = latents["b_gate"]
    z = np.asarray(relu((x - b_pre) @ w_enc.T, bias)[0])
    with pieces(64), jax.set_mesh(mesh := mesh_of(shape)):
        roles = (meshes.ROWS, meshes.DICT, meshes.REPLICATED, meshes.DICT)
        placed = [
            jax.device_put(a, meshes.sharding(mesh, r)) for a, r in zip((x, w_enc, b_pre, bias), roles, strict=True)
        ]
        counts = jax.jit(lambda *a: tiled.n_active(*a, relu, jnp.float32))(*placed)
        code = jax.jit(lambda *a: tiled.encode_largest(*a, relu, jnp.float32, k))(*placed)
    n_shards = mesh.shape["latent_x"]
    shards = z.reshape(len(x), n_shards, -1)
    np.testing.assert_array_equal(counts, (shards > 0).sum(-1))
    values, indices = (np.asarray(a).reshape(len(x), n_shards, k) for a in (code.values, code.indices))
    want = -np.sort(-shards, axis=-1)[:, :, :k]
    np.testing.assert_allclose(values, want, rtol=1e-4, atol=1e-5)
    found = np.take_along_axis(z, indices.reshape(len(x), -1), 1).reshape(values.shape)
    np.testing.assert_allclose(np.where(values > 0, found, 0), values, rtol=1e-4, atol=1e-5)
