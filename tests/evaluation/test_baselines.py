"""Baselines as dictionaries: what each must reconstruct and find, through the measures that trained ones go through."""

import numpy as np
import pytest

from sae_jax.evaluation import baselines
from sae_jax.evaluation.dictionaries import mmcs
from sae_jax.evaluation.evaluate import on_rows

D = 8


@pytest.fixture(scope="module")
def sources():
    """Independent and skewed, each along a direction of its own."""
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.standard_normal((D, D)))[0] + 0.3 * rng.standard_normal((D, D))
    return directions, rng.exponential(size=(3000, D))


@pytest.fixture(scope="module")
def rows(sources):
    directions, strengths = sources
    return np.float32(strengths @ directions + 50)


@pytest.mark.parametrize("make", [baselines.identity, baselines.pca, baselines.ica])
def test_a_whole_basis_leaves_nothing_and_spends_one_latent_a_direction(make, rows):
    found = on_rows(make(rows), rows)
    assert found["fvu"] == pytest.approx(0, abs=1e-6)
    assert found["l0"] == pytest.approx(D, abs=0.01)
    cut = make(rows, k=3)
    assert on_rows(cut, rows)["l0"] == 3
    # The three largest of a row beat any fixed three.
    values = np.asarray(make(rows).encode(rows).values)
    np.testing.assert_allclose(np.asarray(cut.encode(rows).values), values[:, :3], rtol=1e-4, atol=1e-4)


def test_pca_leaves_the_variance_of_the_components_left_out(rows):
    eigenvalues = np.linalg.eigvalsh(np.cov(rows.T.astype(np.float64)))[::-1]
    found = on_rows(baselines.pca(rows, n_components=3), rows)
    assert found["fvu"] == pytest.approx(eigenvalues[3:].sum() / eigenvalues.sum(), rel=1e-4)
    assert found["l0"] == pytest.approx(3, abs=0.01)


def test_ica_finds_independent_sources_and_pca_does_not(sources, rows):
    directions, _ = sources
    assert mmcs(directions, baselines.ica(rows).w_dec)[0] > 0.99
    assert mmcs(directions, baselines.pca(rows).w_dec)[0] < 0.95


@pytest.mark.parametrize("k", [0, 4])
def test_random_directions_have_the_scale_that_fits_best(rows, k):
    sae = baselines.random(rows, n_latents=64, k=k, seed=3)
    best = on_rows(sae, rows)["fvu"]
    assert 0 < best < 1
    for factor in (0.9, 1.1):
        assert on_rows(sae.replace(w_enc=sae.w_enc * factor), rows)["fvu"] > best
    assert (np.asarray(sae.encode(rows).values) >= 0).all()
