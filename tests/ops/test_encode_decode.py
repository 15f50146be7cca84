"""Encoding and sparse decoding against their dense references, values and gradients, on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import mesh as meshes
from sae_jax.ops import encode, reference, sparse

B, D, F, K = 16, 8, 64, 5
ROLES = (meshes.ROWS, meshes.DICT, meshes.DICT, meshes.REPLICATED, meshes.DICT)


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    w_enc = rng.standard_normal((F, D))
    w_enc[40] = w_enc[3]  # equal latents in different shards: ties across the mesh
    shapes = {"x": (B, D), "b_enc": (F,), "b_pre": (D,), "w_dec": (F, D)}
    rest = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    order = (rest["x"], w_enc, 0.1 * rest["b_enc"], rest["b_pre"], rest["w_dec"])
    return tuple(np.float32(a) for a in order)


def loss_with(encode_fn, decode_fn, k, allowed):
    def loss(x, w_enc, b_enc, b_pre, w_dec):
        code = encode_fn(x, w_enc, b_enc, b_pre, allowed, k, jnp.float32)
        return ((decode_fn(code, w_dec) + b_pre[None] - x) ** 2).mean()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4)))


@pytest.mark.parametrize("shape", [None, (1, 8), (2, 4), (8, 1)], ids=str)
@pytest.mark.parametrize(("k", "masked"), [(K, False), (20, True), (F, False)])
def test_value_and_gradients_equal_dense_autodiff(arrays, shape, k, masked):
    allowed = np.arange(F) % 3 == 0 if masked else None
    expected = loss_with(reference.encode_topk, reference.decode, k, allowed)(*arrays)
    if shape is None:
        got = loss_with(encode.encode_topk, sparse.decode, k, allowed)(*arrays)
    else:
        mesh = meshes.make_mesh(meshes.MeshConfig(*shape))
        with jax.set_mesh(mesh):
            placed = [jax.device_put(a, meshes.sharding(mesh, role)) for a, role in zip(arrays, ROLES, strict=True)]
            if masked:
                allowed = jax.device_put(allowed, meshes.sharding(mesh, meshes.DICT))
            got = loss_with(encode.encode_topk, sparse.decode, k, allowed)(*placed)
            for gradient, role in zip(got[1], ROLES, strict=True):
                assert gradient.sharding.is_equivalent_to(meshes.sharding(mesh, role), gradient.ndim)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


def test_row_blocks_do_not_change_the_result(arrays, monkeypatch):
    whole = encode.encode_topk(*arrays[:4], None, K, jnp.float32)
    monkeypatch.setattr(encode, "PRE_BYTES", 4 * F * 4)
    blocked = encode.encode_topk(*arrays[:4], None, K, jnp.float32)
    np.testing.assert_array_equal(whole.indices, blocked.indices)
    np.testing.assert_allclose(whole.values, blocked.values, rtol=1e-6)


def test_code_is_descending_and_never_negative(arrays):
    code = encode.encode_topk(*arrays[:4], None, F, jnp.float32)
    assert (np.diff(code.values, axis=1) <= 0).all()
    assert (np.asarray(code.values) >= 0).all()
    assert (np.asarray(code.indices) >= 0).all()


def test_fired_sees_each_active_latent(arrays):
    code = encode.encode_topk(*arrays[:4], None, K, jnp.float32)
    dense = np.asarray(reference.to_dense(code, F))
    np.testing.assert_array_equal(sparse.fired(code, F, 1e-3), (dense > 1e-3).any(0))
