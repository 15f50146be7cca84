"""Selection: exact, with its tie rule, on one device and over every split of the dictionary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_jax import mesh as meshes
from sae_jax.ops import spmd, topk
from sae_jax.planning import hlo
from tests.oracles import topk as oracle

MESHES = [(1, 8), (2, 4), (4, 2), (8, 1)]


def pre_activations(seed: int, n_rows: int, width: int, kind: str) -> np.ndarray:
    rng = np.random.default_rng(seed)
    pre = rng.standard_normal((n_rows, width)).astype(np.float32)
    if kind == "ties":
        pre = rng.integers(-3, 3, (n_rows, width)).astype(np.float32)
        pre[pre == 0] = rng.choice(np.float32([0.0, -0.0]), (pre == 0).sum())
    if kind == "negative":
        pre = -np.abs(pre)
    return pre


@given(st.integers(0, 10_000), st.sampled_from([1, 7, 64, 2048]), st.sampled_from(["normal", "ties", "negative"]))
@settings(max_examples=15)
def test_top_k_is_the_oracle(seed, width, kind):
    pre = pre_activations(seed, 4, width, kind)
    for k in {1, min(5, width), min(width, 64)}:
        values, indices = topk.top_k(jnp.asarray(pre), k)
        expected = oracle.select(pre, k)
        np.testing.assert_array_equal(indices, expected)
        np.testing.assert_array_equal(values, np.take_along_axis(pre, expected, 1))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_selection_in_stages_is_used_and_agrees(k, monkeypatch):
    """2048 latents: three stages for 3, two for 5."""
    pre = pre_activations(0, 16, 2048, "ties")
    in_stages = topk.top_k(jnp.asarray(pre), k)
    monkeypatch.setattr(topk, "STAGES_FROM", 10**9)
    whole = topk.top_k(jnp.asarray(pre), k)
    jax.tree.map(np.testing.assert_array_equal, in_stages, whole)


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize(("kind", "k"), [("normal", 5), ("ties", 5), ("negative", 3), ("ties", 64), ("normal", 9)])
def test_sharded_selection_is_the_oracle(shape, kind, k):
    """Given equal pre-activations, every mesh chooses the latents that the oracle chooses."""
    pre = pre_activations(1, 16, 64, kind)
    mesh = meshes.make_mesh(meshes.MeshConfig(*shape))
    n_local = 64 // shape[1]

    def local(pre_bf):
        values, indices = topk.top_k(pre_bf, min(k, n_local))
        wins = jnp.arange(values.shape[1])[None] < topk.n_winners(values, k)[:, None]
        return jnp.where(wins, indices + spmd.first_latent(n_local), -1)

    with jax.set_mesh(mesh):
        placed = jax.device_put(pre, meshes.sharding(mesh, meshes.CODE))
        chosen = np.asarray(jax.jit(spmd.per_device(local, (meshes.CODE,), meshes.CODE))(placed))
    for row, expected in zip(chosen, oracle.select(pre, k), strict=True):
        assert sorted(row[row >= 0]) == sorted(expected)


@pytest.mark.parametrize("shape", [None, (1, 8), (2, 4)], ids=str)
@pytest.mark.parametrize("k", [1, 7, 64])
def test_threshold_is_the_kth_largest_positive_value(shape, k):
    pre = pre_activations(2, 16, 64, "ties") + pre_activations(3, 16, 64, "normal") * np.float32([[1e-20], [1.0]] * 8)

    def local(pre_bf):
        return topk.threshold(pre_bf, k)

    if shape is None:
        got = jax.jit(local)(pre)
    else:
        mesh = meshes.make_mesh(meshes.MeshConfig(*shape))
        with jax.set_mesh(mesh):
            placed = jax.device_put(pre, meshes.sharding(mesh, meshes.CODE))
            got = jax.jit(spmd.per_device(local, (meshes.CODE,), jax.P("data")))(placed)
    kth = np.sort(np.maximum(pre, 0), axis=1)[:, -k]
    np.testing.assert_array_equal(got, kth)


def test_a_threshold_reads_the_values_few_times_and_ignores_what_is_no_number():
    values = np.float32([[np.nan, -np.nan, np.inf, 1e-30, 3, -1, 0, 2]])
    got = [float(topk.threshold(jnp.asarray(values), k)[0]) for k in range(1, 6)]
    assert got == [np.inf, 3, 2, np.float32(1e-30), 0]
    rows = jax.ShapeDtypeStruct((64, 4096), jnp.float32)
    text = jax.jit(lambda values: topk.threshold(values, 99)).lower(rows).compile().as_text()
    assert hlo.analyse(text).moved_bytes < 12 * 4 * 64 * 4096


@pytest.mark.parametrize("kind", ["normal", "ties", "negative"])
def test_latent_major_selection_is_the_oracle(kind):
    pre = pre_activations(4, 8, 2048, kind)
    for k in (3, 5, 200):
        values, indices = topk.top_k_latent_major(jnp.asarray(pre.T), k)
        np.testing.assert_array_equal(indices, oracle.select(pre, k))
        np.testing.assert_array_equal(values, np.take_along_axis(pre, np.asarray(indices), 1))
