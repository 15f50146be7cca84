"""The signs of mixed features against plain numpy, on one device and with a dictionary that is split."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import mesh as meshes
from sae_jax.ops import mixing
from tests.meshes import MESHES

RNG = np.random.default_rng(0)


def rows(n, d):
    return jnp.asarray(RNG.standard_normal((n, d)) + 0.5, jnp.float32)


def unit(w):
    w = np.float64(w)
    return w / np.linalg.norm(w, axis=1, keepdims=True)


@pytest.mark.parametrize("n_latents", [3, 40, 512])
def test_the_nth_projection_is_that_of_sorted_rows(n_latents):
    y, w, b = rows(24, 8), 3 * rows(n_latents, 8), rows(1, 8)[0]
    z = (np.float64(y) - np.float64(b)) @ unit(w).T
    want = -np.sort(-z, axis=1)[:, n_latents // 4]
    np.testing.assert_allclose(jax.jit(mixing.nth_projections)(y, w, b), want, rtol=1e-5, atol=1e-5)


def test_rows_of_a_large_batch_are_taken_from_all_of_it():
    y, w, b = rows(1000, 8), rows(40, 8), jnp.zeros(8)
    want = mixing.nth_projections(y[: 64 * 15 : 15], w, b)
    np.testing.assert_array_equal(mixing.nth_projections(y, w, b), want)


@pytest.mark.parametrize("n_latents", [1, 3, 100])
def test_the_cosine_is_the_mean_over_pairs(n_latents):
    w = 3 * rows(n_latents, 8)
    pairs = np.abs(unit(w) @ unit(w).T)[np.triu_indices(n_latents, 1)]
    want = pairs.mean() if n_latents > 1 else 0.0
    assert jax.jit(mixing.pairwise_cosine)(w) == pytest.approx(want, rel=1e-5, abs=1e-6)


def test_the_cosine_of_many_latents_is_that_of_a_sample():
    w = rows(5000, 8)
    pairs = np.abs(unit(w) @ unit(w).T)
    assert mixing.pairwise_cosine(w) == pytest.approx((pairs.sum() - 5000) / (5000 * 4999), rel=0.02)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_a_split_dictionary_has_the_same(shape):
    y, w, b = rows(128, 8), rows(96, 8), rows(1, 8)[0]
    want = mixing.nth_projections(y, w, b), mixing.pairwise_cosine(w)
    mesh = meshes.make_mesh(meshes.MeshConfig(*shape), jax.devices()[: math.prod(shape)])
    with jax.set_mesh(mesh):
        roles = meshes.ROWS, meshes.DICT, meshes.REPLICATED
        y, w, b = (jax.device_put(x, meshes.sharding(mesh, role)) for x, role in zip((y, w, b), roles, strict=True))
        got = jax.jit(lambda y, w, b: (mixing.nth_projections(y, w, b), mixing.pairwise_cosine(w)))(y, w, b)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
