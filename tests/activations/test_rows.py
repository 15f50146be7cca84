"""int8 rows: within half a scale of what was given, the same on host and device, and read by everything."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import sae_jax
from sae_jax import mesh as meshes
from sae_jax.activations import rows
from sae_jax.activations.harvest import HarvestConfig, harvest
from sae_jax.activations.source import place_rows
from sae_jax.activations.spec import SetSpec, SourceSpec
from sae_jax.activations.store import create, open_activations
from sae_jax.types import Sites, UserError
from tests.meshes import MESHES
from tests.oracles import rows as oracle

F32 = np.finfo(np.float32)
FINITE = st.floats(float(-F32.max), float(F32.max), width=32)
SMALL = np.random.default_rng(0).standard_normal((300, 12)).astype(np.float32)


@given(arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 5)), elements=FINITE))
def test_any_row_comes_back_to_half_a_scale(given_ND):
    stored = rows.encode(given_ND, "int8")
    assert stored.shape == (given_ND.shape[0], given_ND.shape[1] + 4)
    found = rows.decode(stored).astype(np.float64)
    scale_N = np.maximum(abs(given_ND).max(axis=1).astype(np.float64) / 127, F32.tiny)
    assert np.isfinite(found).all()
    assert (abs(found - given_ND) <= scale_N[:, None] * 0.500_01).all()
    assert not found[~given_ND.any(axis=1)].any()


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float64])
def test_numbers_and_scales_are_those_of_the_oracle(dtype):
    given_ND = np.concatenate([SMALL, SMALL[:9] * 1e30, SMALL[:9] * 1e-30, SMALL[:2] * 0]).astype(dtype)
    stored = rows.encode(given_ND, "int8")
    numbers_ND, scale_N = oracle.encode(given_ND)
    # A quotient in float32 may fall on the other side of a tie.
    assert (stored[:, :-4] != numbers_ND).mean() < 1e-3
    np.testing.assert_array_max_ulp(stored[:, -4:].copy().view(np.float32)[:, 0], scale_N)
    expected = [oracle.read(row.tobytes(), 12) for row in stored]
    np.testing.assert_allclose(rows.decode(stored), expected, rtol=1e-7)


def test_a_device_stores_and_reads_the_same():
    given_ND = np.concatenate([SMALL, SMALL[:9] * 1e36, SMALL[:9] * 1e-37, SMALL[:2] * 0])
    stored = np.asarray(jax.jit(rows.encode_on_device, static_argnums=1)(jnp.asarray(given_ND), "int8"))
    ours = rows.encode(given_ND, "int8")
    assert (abs(stored[:, :-4].astype(int) - ours[:, :-4]) <= 1).all()
    assert (stored != ours).mean() < 1e-2
    np.testing.assert_array_equal(jax.jit(rows.decode_on_device)(jnp.asarray(stored)), rows.decode(stored))
    half = jax.jit(rows.encode_on_device, static_argnums=1)(jnp.asarray(given_ND, jnp.bfloat16), "int8")
    np.testing.assert_allclose(rows.decode(np.asarray(half)), given_ND, atol=0.02 * abs(given_ND).max(), rtol=0.1)


def test_the_smallest_and_the_largest_rows():
    given_ND = np.array([[F32.max, -F32.max], [1e-45, 0], [F32.tiny, -F32.tiny], [0, 0]], np.float32)
    found = rows.decode(rows.encode(given_ND, "int8"))
    np.testing.assert_allclose(found[0], given_ND[0], rtol=1e-6)
    np.testing.assert_array_equal(found[1:], [[0, 0], [F32.tiny, -F32.tiny], [0, 0]])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_a_row_that_is_not_finite_is_refused(tmp_path, bad):
    given_ND = SMALL.astype(np.float64)
    given_ND[7, 3] = bad
    with pytest.raises(UserError, match=r"row 7 .* is not finite in int8"):
        sae_jax.write_activations(tmp_path / "set", given_ND, dtype="int8")
    with np.errstate(over="ignore"):
        given_ND = given_ND.astype(np.float32)
    on_device = jax.jit(rows.encode_on_device, static_argnums=1)(jnp.asarray(given_ND), "int8")
    assert np.isfinite(rows.decode(np.asarray(on_device))).all(axis=1).tolist() == [n != 7 for n in range(300)]


def test_a_set_is_a_byte_a_number_and_reads_as_float32(tmp_path):
    tokens = np.arange(300, dtype=np.int32).reshape(25, 12)
    wide = np.random.default_rng(1).standard_normal((25, 12, 64))
    sizes = {}
    for dtype in ("int8", "bfloat16"):
        made = sae_jax.write_activations(tmp_path / dtype, wide, tokens=tokens, tokenizer="bundled", dtype=dtype)
        sizes[dtype] = sum(path.stat().st_size for path in (tmp_path / dtype / "acts").rglob("c/*/0"))
    assert 68 / 128 <= sizes["int8"] / sizes["bfloat16"] < 0.6  # chunks are filled up
    made = open_activations(tmp_path / "int8")
    found = {}
    for chunk in range(made.n_chunks):
        part = made.read_chunk("acts", chunk)
        assert part.dtype == np.float32
        found |= dict(zip(made.read_index(chunk)["token"].tolist(), part, strict=True))
    found_ND = np.stack([found[token] for token in range(300)])
    np.testing.assert_array_equal(found_ND, rows.decode(rows.encode(wide.reshape(300, 64), "int8")))
    np.testing.assert_allclose(made.stats("acts").mean, found_ND.astype(np.float64).mean(0), rtol=1e-12)
    again = sae_jax.write_activations(tmp_path / "blocks", iter(wide[:, None, 0]), dtype="int8")  # of a row each
    assert (again.n_rows, again.source("acts").d) == (25, 64)


def mixed_set(path):
    """Three sources of 300 rows in three dtypes."""
    sources = (SourceSpec("a", 12, "int8"), SourceSpec("b", 12), SourceSpec("c", 12, "float32"))
    writer = create(path, SetSpec(sources, n_shards=1, shard_rows=320, chunk_rows=8))
    writer.write_shard(0, {"a": SMALL, "b": SMALL, "c": SMALL})
    writer.finish()
    return open_activations(path)


@pytest.mark.parametrize("shape", MESHES)
def test_sources_of_any_dtypes_stand_side_by_side_on_a_mesh(shape):
    mesh = meshes.make_mesh(meshes.MeshConfig(*shape))
    parts = {name: rows.encode(SMALL[:64], dtype) for name, dtype in zip("abc", rows.DTYPES, strict=False)}
    parts["i"] = rows.encode(SMALL[:64], "int8")
    with jax.set_mesh(mesh):
        batch = place_rows(parts, Sites(("i", "a", "b", "c", "i"), ("i",)), mesh)
    assert batch.y is not None
    for placed in (batch.x, batch.y):
        assert placed.dtype == jnp.float32
        assert placed.sharding.is_equivalent_to(meshes.sharding(mesh, meshes.ROWS), 2)
    decoded = [rows.decode(parts[name]).astype(np.float32) for name in "iabci"]
    np.testing.assert_array_equal(batch.x, np.concatenate(decoded, axis=1))
    np.testing.assert_array_equal(batch.y, decoded[0])


@pytest.mark.long
def test_a_set_of_three_dtypes_is_trained_on_and_measured(tmp_path, one_device):
    made = mixed_set(tmp_path / "set")
    settings = {"n_latents": 32, "k": 4, "steps": 3, "batch_size": 64, "dtype": "float32", "lr": 1e-3}
    sae_jax.train(made, site="a", out=tmp_path / "run", **settings)
    assert 0 < sae_jax.evaluate(tmp_path / "run", tokens=256)[str(tmp_path / "run")]["fvu"] < 2
    for name in "abc":
        np.testing.assert_allclose(made.stats(name).mean, SMALL.mean(0), atol=0.005)


def test_a_harvest_and_live_data_in_int8(tmp_path, one_device):
    """Rows are within half a scale of those in float32; live ones are the same to the bit."""
    (tmp_path / "text.txt").write_text("import os\nprint(os.getcwd())\n" * 80)
    (tmp_path / "other.txt").write_text("def other():\n    return 1\n" * 40)
    settings = {"text": str(tmp_path / "text.txt"), "heldout": str(tmp_path / "other.txt"), "context": 16}
    settings |= {"batch_tokens": 64, "hooks": ("resid_post.1",)}
    for dtype in ("int8", "float32"):
        harvest(HarvestConfig(dtype=dtype, **settings), str(tmp_path / dtype))
    found, exact = (open_activations(tmp_path / dtype) for dtype in ("int8", "float32"))
    of_token = {}
    for which, each in (("int8", found), ("float32", exact)):
        parts = [(each.read_index(i), each.read_chunk("resid_post.1", i)) for i in range(each.n_chunks)]
        keys = [np.stack([index["seq"], index["pos"]], 1) for index, _ in parts]
        order = np.lexsort(np.concatenate(keys).T)
        of_token[which] = np.concatenate([x_ND for _, x_ND in parts])[order]
    half = abs(of_token["float32"]).max(axis=1, keepdims=True) / 254
    assert (abs(of_token["int8"] - of_token["float32"]) <= half * 1.001).all()

    live = sae_jax.live(dtype="int8", **settings)
    assert live.mean_square("resid_post.1") == pytest.approx(found.stats("resid_post.1").mean_square, rel=1e-6)
    mesh = meshes.make_mesh(meshes.MeshConfig(), jax.devices()[:1])
    with live.open(Sites.one("resid_post.1"), 64, 0, mesh) as batches, jax.set_mesh(mesh):
        part = batches.batch(3)
        x_BD = batches.place(part, mesh).x
    stored = {row.tobytes() for i in range(found.n_chunks) for row in found.read_chunk("resid_post.1", i)}
    assert {row.tobytes() for row in np.asarray(x_BD)} <= stored
