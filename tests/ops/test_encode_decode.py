"""Encoding and sparse decoding against their dense references, values and gradients, on every mesh."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import mesh as meshes
from sae_jax.ops import auxk, encode, reference, sparse, tuning
from sae_jax.types import UsageError
from tests.meshes import MESHES
from tests.oracles import topk as oracle

B, D, F, K = 16, 8, 64, 5
# As many pieces as the sizes here allow: exchanged rows, pairs, slots, rows and latents of a product; the last of each
# uneven.
PIECES = tuning.Tuning(
    *(1, 3),
    latent_major=False,
    in_stages=False,
    exchange_bytes=7 * 4 * D,
    pair_bytes=3 * 4 * D,
    decoded_slots=3,
    scattered_slots=3,
)
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


def loss_with(encode_fn, decode_fn, k):
    def loss(x, w_enc, b_enc, b_pre, w_dec):
        code, _ = encode_fn(x, w_enc, b_enc, b_pre, k, jnp.float32)
        return ((decode_fn(code, w_dec)[0] + b_pre[None] - x) ** 2).mean()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4)))


def on_mesh(shape, fn, arrays, roles=ROLES, devices=8):
    if shape is None:
        return fn(*arrays)
    mesh = meshes.make_mesh(meshes.MeshConfig(*shape), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, meshes.sharding(mesh, role)) for a, role in zip(arrays, roles, strict=True)]
        return fn(*placed)


@pytest.mark.parametrize("shape", [None, *MESHES], ids=str)
@pytest.mark.parametrize("k", [K, 20, F])
@pytest.mark.parametrize("is_skewed", [False, True])
def test_value_and_gradients_equal_dense_autodiff(arrays, shape, k, is_skewed):
    """Also where all that wins lies on the first shard, which has many times its share."""
    if is_skewed:
        arrays = (*arrays[:2], arrays[2] + 20 * (np.arange(F) < F // 8).astype(np.float32), *arrays[3:])
    expected = loss_with(reference.encode_topk, reference.decode, k)(*arrays)
    got = on_mesh(shape, loss_with(encode.encode_topk, sparse.decode, k), arrays)
    if shape is not None:
        mesh = meshes.make_mesh(meshes.MeshConfig(*shape))
        for gradient, role in zip(got[1], ROLES, strict=True):
            assert gradient.sharding.is_equivalent_to(meshes.sharding(mesh, role), gradient.ndim)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


@pytest.mark.parametrize("shape", [None, *MESHES], ids=str)
@pytest.mark.parametrize("latent_major", [False, True])
def test_pieces_do_not_change_the_result(arrays, shape, latent_major, monkeypatch):
    monkeypatch.setattr(tuning, "MIN_TILE", 32)
    expected = loss_with(reference.encode_topk, reference.decode, K)(*arrays)
    with tuning.using(replace(PIECES, latent_major=latent_major)):
        got = on_mesh(shape, loss_with(encode.encode_topk, sparse.decode, K), arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


@pytest.mark.parametrize("shape", [None, *MESHES], ids=str)
@pytest.mark.parametrize(("n_allowed", "k"), [(0, 3), (2, 3), (30, 3), (F, 40), (F, F)])
def test_explaining_equals_dense_autodiff(arrays, shape, n_allowed, k):
    """None, few and many latents; fewer, as many and more than k."""
    allowed = np.zeros(F, bool)
    allowed[np.random.default_rng(3).permutation(F)[:n_allowed]] = True
    error = np.random.default_rng(4).standard_normal((B, D)).astype(np.float32)

    def loss_with(fn):
        def loss(x, w_enc, b_enc, b_pre, w_dec, error, allowed):
            return 0.5 * fn(x, error, w_enc, b_enc, b_pre, w_dec, allowed, 0.7, None, k, jnp.float32)

        return jax.jit(jax.value_and_grad(loss, argnums=(1, 2, 3, 4)))

    rows = (*arrays, error, allowed)
    if n_allowed:
        expected = loss_with(reference.unexplained)(*rows)
    else:
        expected = 0.0, tuple(np.zeros_like(a) for a in arrays[1:])
    for cut in (tuning.current(), PIECES):
        with tuning.using(cut):
            got = on_mesh(shape, loss_with(auxk.unexplained), rows, (*ROLES, meshes.ROWS, meshes.DICT))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)


def test_gradients_of_several_uses_gather_in_one(arrays):
    """Weights handed on from op to op have the gradient of all their uses."""
    x, w_enc, b_enc, b_pre, w_dec = map(jnp.asarray, arrays)

    def loss(encode_fn, decode_fn, w_enc, w_dec):
        code, w_enc = encode_fn(x, w_enc, b_enc, b_pre, K, jnp.float32)
        again, w_enc = encode_fn(2 * x, w_enc, b_enc, b_pre, 2 * K, jnp.float32)
        x_hat, w_dec = decode_fn(code, w_dec)
        again_hat, w_dec = decode_fn(again, w_dec)
        return ((x_hat - x) ** 2).sum() + 0.3 * (again_hat**2).sum() + (w_enc * w_dec).sum()

    got = jax.grad(lambda *w: loss(encode.encode_topk, sparse.decode, *w), argnums=(0, 1))(w_enc, w_dec)
    expected = jax.grad(lambda *w: loss(reference.encode_topk, reference.decode, *w), argnums=(0, 1))(w_enc, w_dec)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)


@pytest.mark.parametrize("shape", [None, (1, 8), (2, 4)], ids=str)
def test_a_narrowed_code_is_that_of_the_smaller_k(arrays, shape):
    def both(x, w_enc, b_enc, b_pre, w_dec):
        wide, _ = encode.encode_topk(x, w_enc, b_enc, b_pre, 4 * K, jnp.float32)
        direct, _ = encode.encode_topk(x, w_enc, b_enc, b_pre, K, jnp.float32)
        return [sparse.decode(code, w_dec)[0] for code in (encode.narrow(wide, K), direct)]

    narrowed, direct = on_mesh(shape, jax.jit(both), arrays)
    np.testing.assert_allclose(narrowed, direct, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 8), (1, 2)], ids=str)
def test_a_device_decodes_its_share(arrays, shape):
    """Decoding goes through as many pairs as a device's share has room for or twice its own, not through all slots."""
    taken = []  # of each chunk: its pairs, and how many of them are active
    original = sparse._Pairs

    class Counting(original):
        def __init__(self, nth_P, *counts):
            super().__init__(nth_P, *counts)
            jax.debug.callback(lambda n: taken.append((len(nth_P), int(n))), self.is_one.sum())

    def counted(*arrays):
        code, _ = encode.encode_topk(*arrays[:4], K, jnp.float32)
        return code.values, sparse.decode(code, arrays[4])[0]

    with pytest.MonkeyPatch.context() as patch, tuning.using(replace(PIECES, exchange_bytes=2**20)):
        patch.setattr(sparse, "_Pairs", Counting)
        values, _ = on_mesh(shape, jax.jit(counted), arrays, devices=shape[1])
        jax.effects_barrier()
    # All devices together go through about B*k pairs, not B*k*S; each may waste less than a chunk.
    sizes, active = map(sum, zip(*taken, strict=True))
    assert active == (np.asarray(values) > 0).sum()
    assert sizes < 2 * active + sparse.ROOM * B * K + shape[1] * taken[0][0]
    assert sizes < B * K * shape[1]


@pytest.mark.parametrize("shape", [None, *MESHES], ids=str)
@pytest.mark.parametrize(("cut", "has_total"), [(PIECES, False), (tuning.TABLE["cpu"], True)], ids=["pieces", "whole"])
def test_parts_of_a_code_are_decoded_apart(arrays, shape, has_total, cut):
    """Ragged rows, three sums each: values and gradients are those of dense products."""
    x, w_enc, b_enc, b_pre, w_dec = arrays
    target = np.random.default_rng(5).standard_normal((B, 3, D)).astype(np.float32)

    def ragged(w_enc, x, b_enc, b_pre):
        return encode.encode_batch_topk(x, w_enc, b_enc, b_pre, K, jnp.float32, 4 * K, 4 * K)[:2]

    def sparsely(w_enc, w_dec, x, b_enc, b_pre, target):
        code, w_enc = ragged(w_enc, x, b_enc, b_pre)
        filling = sparse.Filling(K, B * K if has_total else None)
        parts, w_dec = sparse.decode_parts(code, code.indices % 3, w_dec, 3, jnp.float32, filling)
        return ((parts - target) ** 2).sum() + (w_enc**2).sum() + (w_dec**2).sum()

    def densely(w_enc, w_dec, x, b_enc, b_pre, target):
        pre = jnp.matmul(x - b_pre[None], w_enc.T, precision="highest") + b_enc[None]
        z = jnp.where(oracle.select_batch(np.float64(pre_of_all), K), pre, 0.0)
        in_part = jnp.arange(F)[None] % 3 == jnp.arange(3)[:, None]
        parts = jnp.einsum("bf,gf,fd->bgd", z, in_part.astype(jnp.float32), w_dec, precision="highest")
        return ((parts - target) ** 2).sum() + (w_enc**2).sum() + (w_dec**2).sum()

    pre_of_all = (np.float64(x) - b_pre) @ np.float64(w_enc).T + b_enc
    inputs = w_enc, w_dec, x, b_enc, b_pre, target
    expected = jax.value_and_grad(densely, argnums=(0, 1, 3, 4))(*map(jnp.asarray, inputs))
    roles = (meshes.DICT, meshes.DICT, meshes.ROWS, meshes.DICT, meshes.REPLICATED, meshes.ROWS)
    with tuning.using(cut):
        got = on_mesh(shape, jax.jit(jax.value_and_grad(sparsely, argnums=(0, 1, 3, 4))), inputs, roles)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), got, expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"block_mib": 0},
        {"block_rows": 0},
        {"exchange_mib": -1},
        {"block_mib": 1, "block_rows": 4096},
        {"kernels": True},
    ],
    ids=str,
)
def test_budgets_that_cannot_work_are_refused(settings):
    with pytest.raises(UsageError, match=r"engine\."):
        tuning.EngineConfig(**settings).on("cpu")


def test_code_is_descending_and_never_negative(arrays):
    code, _ = encode.encode_topk(*arrays[:4], F, jnp.float32)
    assert (np.diff(code.values, axis=1) <= 0).all()
    assert (np.asarray(code.values) >= 0).all()
    assert (np.asarray(code.indices) >= 0).all()


def test_fired_sees_each_active_latent(arrays):
    code, _ = encode.encode_topk(*arrays[:4], K, jnp.float32)
    dense = np.asarray(reference.to_dense(code, F))
    np.testing.assert_array_equal(sparse.fired(code, F, 1e-3), (dense > 1e-3).any(0))


@pytest.mark.parametrize("shape", [None, *MESHES], ids=str)
@pytest.mark.parametrize("kind", ["normal", "ties", "negative", "saturated"])
def test_batch_selection_is_the_oracle(arrays, shape, kind):
    """The B*k largest of the batch over all devices, ties to the lower row and latent; too short lists are counted."""
    x, w_enc, b_enc, b_pre, w_dec = arrays
    width = 4 * K
    if kind == "ties":
        x, w_enc, b_enc, b_pre = (np.round(a) for a in (x, w_enc, b_enc, b_pre))
    if kind == "negative":
        b_enc = b_enc - 5
    if kind == "saturated":
        x, width = x * np.linspace(0.1, 9, B, dtype=np.float32)[:, None], 2

    def encode_and_check(x, w_enc, b_enc, b_pre, w_dec):
        code, _, found = encode.encode_batch_topk(x, w_enc, b_enc, b_pre, K, jnp.float32, width, width)
        return code, found

    code, found = on_mesh(shape, jax.jit(encode_and_check), (x, w_enc, b_enc, b_pre, w_dec))
    pre = (np.float64(x) - b_pre) @ np.float64(w_enc).T + b_enc
    got = np.asarray(reference.to_dense(jax.tree.map(np.asarray, code), F))
    if kind == "saturated":
        assert int(found.n_saturated) > 0
        return
    expected = oracle.select_batch(pre, K)
    np.testing.assert_array_equal(got > 0, expected)
    np.testing.assert_allclose(got, np.where(expected, pre, 0), rtol=1e-4, atol=1e-5)
    if kind == "negative":
        assert float(found.threshold) == 0
    else:
        assert float(found.threshold) == pytest.approx(pre[expected].min(), rel=1e-4)


def test_batch_selection_has_the_gradient_of_what_it_keeps(arrays):
    def loss(keep):
        def fn(w_enc, b_enc, w_dec):
            x, b_pre = jnp.asarray(arrays[0]), jnp.asarray(arrays[3])
            if keep is None:
                code, *_ = encode.encode_batch_topk(x, w_enc, b_enc, b_pre, K, jnp.float32, 4 * K, 4 * K)
                x_hat, _ = sparse.decode(code, w_dec)
            else:
                pre = jnp.matmul(x - b_pre[None], w_enc.T, precision="highest") + b_enc[None]
                x_hat = jnp.matmul(jnp.where(keep, pre, 0.0), w_dec, precision="highest")
            return ((x_hat - x) ** 2).mean()

        return jax.grad(fn, argnums=(0, 1, 2))(*(jnp.asarray(arrays[i]) for i in (1, 2, 4)))

    pre = (np.float64(arrays[0]) - arrays[3]) @ np.float64(arrays[1]).T + arrays[2]
    expected = loss(oracle.select_batch(pre, K))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), loss(None), expected)
