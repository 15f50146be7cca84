"""Reconstruction metrics against plain numpy over the whole set."""

import jax
import numpy as np
import pytest

from sae_jax.evaluation.reconstruction import Reconstruction, on_rows
from sae_jax.saes import init, topk

D, F, K = 8, 32, 4


@pytest.fixture(scope="module")
def rows():
    # A mean far from the origin: where uncentred and centred measures part, and where rounding bites.
    return np.float32(np.random.default_rng(0).standard_normal((1000, D)) + 50)


@pytest.fixture(scope="module")
def sae(rows):
    config = topk.Config(n_latents=F, k=K, dtype="float32")
    return config.init(jax.random.key(0), init.sample_statistics(rows, "none"))


def test_metrics_are_ratios_of_sums_over_the_whole_set(rows, sae):
    reconstruction = Reconstruction(F)
    for first in (0, 300, 650):  # blocks of different sizes
        reconstruction.add(sae, rows[first : {0: 300, 300: 650, 650: 1000}[first]])
    got = reconstruction.result({"a": 3, "b": D - 3})
    x, x_hat = np.float64(rows), np.float64(sae(rows))
    values = np.asarray(sae.encode(rows).values)
    error = ((x - x_hat) ** 2).sum()
    assert got["fvu"] == pytest.approx(error / ((x - x.mean(0)) ** 2).sum(), rel=1e-4)
    for name, part in {"a": slice(0, 3), "b": slice(3, D)}.items():
        own = ((x - x_hat)[:, part] ** 2).sum() / ((x - x.mean(0))[:, part] ** 2).sum()
        assert got["fvu_by_source"][name] == pytest.approx(own, rel=1e-4)
    assert "fvu_by_source" not in reconstruction.result({"all": D})
    assert got["nmse_uncentered"] == pytest.approx(error / (x**2).sum(), rel=1e-4)
    assert got["l0"] == pytest.approx((values > 0).sum(1).mean())
    cosine = (x * x_hat).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(x_hat, axis=1)
    assert got["cosine"] == pytest.approx(cosine.mean(), rel=1e-4)
    assert got["gamma"] == pytest.approx((x_hat**2).sum() / (x * x_hat).sum(), rel=1e-4)
    assert got["n_rows"] == 1000
    assert sum(got["l0_histogram"]) == 1000
    dense = np.zeros((1000, F), bool)
    np.put_along_axis(dense, np.asarray(sae.encode(rows).indices), values > 0, 1)
    np.testing.assert_allclose(reconstruction.firing_rates, dense.mean(0))
    assert got["silent_fraction"] == pytest.approx((~dense.any(0)).mean())
    assert sum(got["density_histogram"]["counts"]) == dense.any(0).sum()


def test_left_out_rows_do_not_count(rows, sae):
    keep = np.arange(1000) % 3 > 0
    masked, plain = Reconstruction(F), Reconstruction(F)
    masked.add(sae, np.where(keep[:, None], rows, 1e4).astype(np.float32), keep)
    plain.add(sae, rows[keep])
    a, b = masked.result(), plain.result()
    assert a["n_rows"] == b["n_rows"]
    assert a["fvu"] == pytest.approx(b["fvu"], rel=1e-3)
    assert a["l0_histogram"] == b["l0_histogram"]


def test_rows_in_memory_are_cut_into_blocks(rows, sae):
    whole = Reconstruction(F)
    whole.add(sae, rows)
    want, got = whole.result(), on_rows(sae, rows, block_rows=300)
    assert got["l0_histogram"] == want["l0_histogram"]
    assert got["fvu"] == pytest.approx(want["fvu"], rel=1e-4)
