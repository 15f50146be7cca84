"""Test beds keep what their heads promise, in the rows and on disk."""

import dataclasses

import jax
import numpy as np
import pytest

from sae_jax import testbeds
from sae_jax.types import UsageError

N = 20_000
BEDS = [
    testbeds.SparseFeatures(d_model=16, n_features=40, mean_active=3, decay=0.95),
    testbeds.SparseFeatures(d_model=16, n_features=40, mean_active=3, decay=0.95, correlation_rank=4),
    testbeds.Tree(d_model=32, branching=(4, 3), rates=(0.3, 0.2)),
    testbeds.Pairs(d_model=16, n_pairs=12),
    testbeds.PlantedChange(d_model=16, n_shared=10, n_exclusive=4),
]


def drawn(bed, seed=0):
    return bed.draw(N, np.random.default_rng(seed))


@pytest.mark.parametrize("bed", BEDS, ids=lambda bed: type(bed).__name__)
def test_rows_are_codes_of_unit_directions_and_follow_from_seeds(bed):
    draw = drawn(bed)
    np.testing.assert_allclose(np.linalg.norm(bed.directions, axis=1), 1, rtol=1e-5)
    assert (draw.codes >= 0).all()
    parts = {"": draw.rows} if isinstance(draw.rows, np.ndarray) else draw.rows
    for name, rows in parts.items():
        assert rows.dtype == draw.codes.dtype == np.float32
        codes = draw.codes * np.isin(bed.side, ["both", name]) if name else draw.codes
        np.testing.assert_allclose(rows, codes @ bed.directions, atol=1e-5)
    again = drawn(dataclasses.replace(bed))
    assert (again.codes == draw.codes).all()
    assert (drawn(bed, seed=1).codes != draw.codes).any()
    other = dataclasses.replace(bed, seed=1)
    assert (other.directions != bed.directions).any()
    noisy = drawn(dataclasses.replace(bed, noise=0.1))
    clean = noisy.codes * np.isin(bed.side, ["both", "a"]) if hasattr(bed, "side") else noisy.codes
    left = (noisy.rows if isinstance(noisy.rows, np.ndarray) else noisy.rows["a"]) - clean @ bed.directions
    assert left.std() == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("bed", BEDS[:2], ids=["independent", "correlated"])
def test_sparse_features_fire_at_their_rates(bed):
    fires = drawn(bed).codes > 0
    assert fires.any(1).all()
    assert bed.rates.sum() == pytest.approx(3)
    empty = 0.25 if bed.correlation_rank else 0.06  # of rows that got one feature more
    assert (fires.mean(0) - bed.rates > -0.015).all()
    assert fires.mean(0) - bed.rates == pytest.approx(0, abs=0.015 + empty * bed.rates.max() / 3)
    between = np.corrcoef(fires.T)[np.triu_indices(40, 1)]
    assert (abs(between).max() > 0.15) == bool(bed.correlation_rank)


@pytest.mark.parametrize("exclusive", [True, False])
def test_children_fire_only_with_their_parent(exclusive):
    bed = testbeds.Tree(d_model=64, branching=(4, 3, 2), rates=(0.3, 0.2, 0.4), exclusive=exclusive)
    assert bed.parents.tolist() == [-1] * 4 + [g for g in range(4) for _ in range(3)] + [
        g for g in range(4, 16) for _ in range(2)
    ]
    fires = drawn(bed).codes > 0
    for child, parent in enumerate(bed.parents):
        if parent >= 0:
            assert not (fires[:, child] & ~fires[:, parent]).any()
            rate = 0.2 if parent < 4 else 0.4
            assert fires[fires[:, parent], child].mean() == pytest.approx(rate, abs=0.08)
    siblings = np.stack([fires[:, bed.parents == p].sum(1) for p in range(16)])
    assert (siblings.max() <= 1) == exclusive
    np.testing.assert_allclose(bed.directions @ bed.directions.T, np.eye(len(fires.T)), atol=1e-5)


@pytest.mark.parametrize("correlation", [0.7, 0.0, -0.1])
def test_pairs_are_correlated_as_asked(correlation):
    fires = drawn(testbeds.Pairs(n_pairs=3, correlation=correlation)).codes > 0
    assert fires.mean(0) == pytest.approx(0.1, abs=0.01)
    for i in range(3):
        assert np.corrcoef(fires[:, 2 * i], fires[:, 2 * i + 1])[0, 1] == pytest.approx(correlation, abs=0.03)


def test_superposition_is_a_basis_when_dense_and_antipodal_pairs_when_sparse(monkeypatch):
    monkeypatch.setattr(testbeds, "TRAINING", (1500, 256, 3e-3))
    with jax.numpy_dtype_promotion("standard"):  # optax
        dense = testbeds.Superposition(d_model=3, n_features=6, density=1.0, importance=0.7)
        sparse = testbeds.Superposition(d_model=3, n_features=6, density=0.05, importance=0.95)
        assert sorted(dense.dimensionality.round(1)) == [0, 0, 0, 1, 1, 1]
        assert sparse.dimensionality == pytest.approx(0.5, abs=0.1)
    draw = drawn(sparse)
    np.testing.assert_allclose(draw.rows, draw.codes @ sparse.weights, atol=1e-5)
    assert (draw.codes > 0).mean() == pytest.approx(0.05, rel=0.1)


def test_a_bed_becomes_a_set_to_train_on(tmp_path, monkeypatch):
    monkeypatch.setattr(testbeds, "BLOCK_ROWS", 300)
    one, two = (testbeds.write(bed, tmp_path / name, 1000) for bed, name in ((BEDS[0], "one"), (BEDS[-1], "two")))
    assert one.sources == ("acts",)
    assert two.sources == ("a", "b")
    rng = np.random.default_rng(0)
    rows = np.concatenate([BEDS[0].draw(n, rng).rows for n in (300, 300, 300, 100)])
    stored = np.concatenate([one.read_chunk("acts", chunk) for chunk in range(one.n_chunks)])
    assert stored.shape == rows.shape
    np.testing.assert_array_equal(stored[np.lexsort(stored.T)], rows[np.lexsort(rows.T)])  # shuffled in shards


@pytest.mark.parametrize(
    ("bed", "settings", "says"),
    [
        (testbeds.SparseFeatures, {"mean_active": 300}, "decay"),
        (testbeds.SparseFeatures, {"n_features": 0}, "n_features"),
        (testbeds.SparseFeatures, {"noise": -1}, "noise"),
        (testbeds.Tree, {"rates": (0.1, 0.3)}, "0.25"),
        (testbeds.Tree, {"rates": (0.1,)}, "level"),
        (testbeds.Tree, {"strength": (1.0, 0.5)}, "strength"),
        (testbeds.Pairs, {"correlation": -0.5}, "avoid"),
        (testbeds.Superposition, {"density": 2.0}, "density"),
        (testbeds.PlantedChange, {"rate": 2.0}, "rate"),
    ],
)
def test_bad_settings_are_refused_in_one_line(bed, settings, says):
    with pytest.raises(UsageError, match=says) as error:
        bed(**settings)
    assert "\n" not in str(error.value)
