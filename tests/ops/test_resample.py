"""Weighted sampling of rows as they pass by, and the order of latents over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import mesh as meshes
from sae_jax.ops import resample

B, D, R = 16, 3, 5


def drawn(key, weights, rows):
    """The first of the rows kept after the stream [batches, B]."""
    kept = jnp.full(R, -jnp.inf), jnp.zeros((R, D))
    for n, (weight_B, rows_BD) in enumerate(zip(weights, rows, strict=True)):
        kept = resample.keep_rows(*kept, rows_BD, weight_B, jax.random.fold_in(key, n))
    return kept


def test_rows_are_drawn_in_proportion_to_their_weights_and_each_once():
    weights = np.random.default_rng(0).random((3, B)).astype(np.float32) ** 3
    weights[1, :4] = 0
    rows = np.zeros((3, B, D), np.float32)
    rows[:, :, 0] = np.arange(3 * B).reshape(3, B)
    rows = jnp.asarray(rows)
    keys = jax.random.split(jax.random.key(0), 20_000)
    number_NR = np.asarray(jax.jit(jax.vmap(lambda key: drawn(key, weights, rows)[1][:, 0]))(keys))
    share = np.bincount(number_NR[:, 0].astype(int), minlength=3 * B) / len(keys)
    np.testing.assert_allclose(share, weights.ravel() / weights.sum(), atol=5 * np.sqrt(0.08 / len(keys)))
    assert all(len(set(row)) == R for row in number_NR[:100])
    assert not np.isin(number_NR, np.arange(B, B + 4)).any()


@pytest.mark.parametrize("shape", [(1, 8), (2, 4)], ids=str)
def test_every_mesh_keeps_the_same_rows_and_counts_alike(shape):
    rng = np.random.default_rng(1)
    weights, rows = rng.random((2, B)).astype(np.float32), rng.standard_normal((2, B, D)).astype(np.float32)
    wanted = rng.random(40) < 0.4
    want = drawn(jax.random.key(3), weights, rows)
    np.testing.assert_array_equal(resample.ranks(jnp.asarray(wanted))[wanted], np.arange(wanted.sum()))
    mesh = meshes.make_mesh(meshes.MeshConfig(*shape))
    with jax.set_mesh(mesh):
        place = lambda a, role: jax.device_put(a, meshes.sharding(mesh, role))  # noqa: E731
        split = ([place(a, meshes.ROWS) for a in side] for side in (weights, rows))
        got = jax.jit(drawn)(jax.random.key(3), *split)
        ranks = jax.jit(resample.ranks)(place(wanted, meshes.DICT))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    np.testing.assert_array_equal(np.asarray(ranks)[wanted], np.arange(wanted.sum()))
