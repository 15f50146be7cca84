"""AuxK from a sample of the rows: the same on every mesh, right on average, and all dead latents take part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import mesh as meshes
from sae_jax.ops import auxk, reference
from tests.ops.test_encode_decode import ROLES, on_mesh

D, F, K = 8, 256, 3
STRIDE = {16: 1, 40: 4, 128: 16, F: 16}  # one of how many rows is looked at, by the number of dead


def inputs(n_rows: int, n_dead: int, n_latents: int = F):
    """x, weights, error, dead: devices own more of these, and fewer."""
    rng = np.random.default_rng(0)
    shapes = ((n_rows, D), (n_latents, D), (n_latents,), (D,), (n_latents, D), (n_rows, D))
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    dead = np.zeros(n_latents, bool)
    dead[rng.permutation(n_latents)[:n_dead]] = True
    return (*arrays, dead)


def weighted(fn):
    """The weighted error and its gradients, of what ops.unexplained is given; a key, if any, comes last."""

    def loss(x, w_enc, b_enc, b_pre, w_dec, error, dead, *key):
        return fn(x, error, w_enc, b_enc, b_pre, w_dec, dead, jnp.float32(0.7), *(key or (None,)), K, jnp.float32)

    return jax.value_and_grad(loss, argnums=(1, 2, 3, 4))


plain = jax.jit(weighted(reference.unexplained))


def drawn(key, n_rows: int, stride: int) -> np.ndarray:
    """Of each group of neighbours one row."""
    draws = np.asarray(jax.random.uniform(key, (n_rows,)))[: -(-n_rows // stride)]
    rows = np.arange(len(draws)) * stride + np.int64(draws * stride)
    return rows[rows < n_rows]


@pytest.mark.parametrize(
    ("n_rows", "shape"), [(61, None), (56, (1, 8)), (56, (2, 4)), (56, (8, 1)), (256, (2, 4))], ids=str
)
def test_each_mesh_looks_at_the_rows_that_the_key_draws(n_rows, shape, monkeypatch):
    """And at all dead latents in them, also where neighbours lie on several devices: 7 rows each in groups of 16."""
    monkeypatch.setattr(auxk, "LEAST_ROWS", 3)
    key = jax.random.key(3)
    sampled = jax.jit(lambda *arrays: weighted(auxk.unexplained)(*arrays, key))
    for n_dead, stride in STRIDE.items():
        x, *weights, error, dead = inputs(n_rows, n_dead)
        rows = drawn(key, n_rows, stride)
        assert len(rows) >= n_rows // stride
        value, gradients = plain(x[rows], *weights, error[rows], dead)
        expected = stride * value, jax.tree.map(lambda g, stride=stride: stride * g, gradients)
        got = on_mesh(shape, sampled, (x, *weights, error, dead), (*ROLES, meshes.ROWS, meshes.DICT))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-3), got, expected)


def test_the_gradient_is_right_on_average(monkeypatch):
    """Over 10,000 draws, within 5 standard errors of that over all rows; the last group may have fewer rows."""
    monkeypatch.setattr(auxk, "LEAST_ROWS", 4)
    arrays = tuple(map(jnp.asarray, inputs(61, 24, n_latents=32)))
    keys = jax.random.split(jax.random.key(0), 10_000)
    sampled = jax.jit(jax.vmap(lambda key: weighted(auxk.unexplained)(*arrays, key)))(keys)
    whole = jax.jit(weighted(auxk.unexplained))(*arrays)
    for draws, mean in zip(jax.tree.leaves(sampled), jax.tree.leaves(whole), strict=True):
        draws, mean = np.float64(draws), np.float64(mean)
        standard_error = draws.std(0) / len(draws) ** 0.5
        assert (np.abs(draws.mean(0) - mean) <= 5 * standard_error + 1e-5).all()
        assert draws.std(0).max() > 0.1 * np.abs(mean).max()  # rows do differ


def test_small_batches_and_few_dead_are_looked_at_whole():
    key = jax.random.key(0)
    for n_rows, n_dead in ((255, F), (512, F // 16)):
        arrays = inputs(n_rows, n_dead)
        got, expected = (jax.jit(weighted(auxk.unexplained))(*arrays, *keys) for keys in ((key,), ()))
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_the_work_is_bounded():
    """A sixteenth of rows x latents, from 2048 rows on; below, 128 rows."""
    assert [auxk.most_work(n, sampled=True) for n in (100, 1024, 2048, 131072)] == [1, 1 / 8, 1 / 16, 1 / 16]
    assert auxk.most_work(131072, sampled=False) == 1


def test_what_is_not_finite_counts_nothing():
    x, *weights, error, dead = inputs(32, 128)
    value, gradients = jax.jit(weighted(auxk.unexplained))(1e30 * x, *weights, error, dead)
    assert value == 0
    assert all((np.asarray(g) == 0).all() for g in gradients)
