"""Diffing of two sources: where latents write, and whether the other source has what one seems to have alone."""

import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import open_activations, write_activations
from sae_jax.evaluation import diffing
from sae_jax.evaluation.diffing import Side
from sae_jax.saes import crosscoder
from sae_jax.types import Sites, Widths
from tests.oracles import diffing as oracle

B, D, F = 40, 6, 24
A, OTHER = Side(slice(0, D)), Side(slice(D, 2 * D))


@pytest.fixture(scope="module")
def sae():
    """Latents 0 to 7 write to both sources, 8 to 15 to a, the others to b; none for 23."""
    rng = np.random.default_rng(0)
    w_enc, w_dec = rng.standard_normal((2, F, 2 * D))
    w_dec /= np.linalg.norm(w_dec.reshape(F, 2, D), axis=2).repeat(D, axis=1)
    w_dec[8:16, D:] *= 0.02
    w_dec[16:, :D] *= 0.02
    w_dec[23] = 0
    b_enc = np.where(np.arange(F) == 16, -1e3, rng.standard_normal(F))
    arrays = (jnp.asarray(a, jnp.float32) for a in (w_enc, b_enc, w_dec, rng.standard_normal(2 * D)))
    widths = Widths((D, D), (D, D))
    return crosscoder.Crosscoder(*arrays, jnp.float32(0), crosscoder.Config(n_latents=F, k=1, dtype="float32"), widths)


def test_latents_are_split_by_where_they_write(sae):
    relative = diffing.relative_norms(sae, A, OTHER)
    w_dec = np.asarray(sae.w_dec, np.float64)
    norm_a, norm_b = (np.sqrt((w_dec[:22, at.columns] ** 2).sum(1)) for at in (A, OTHER))
    np.testing.assert_allclose(relative[:22], norm_b / (norm_a + norm_b), rtol=1e-6)
    assert np.isnan(relative[23])
    found = diffing.split(relative)
    np.testing.assert_array_equal(np.flatnonzero(found.a), np.arange(8, 16))
    np.testing.assert_array_equal(np.flatnonzero(found.b), np.arange(16, 23))
    assert found.shared.sum() == 8
    counts, edges = diffing.histogram(relative, 10)
    assert counts.sum() == 23
    assert counts[0] == 8
    assert (edges[0], edges[-1]) == (0, 1)
    a, b = w_dec[:23, :D], w_dec[:23, D:]
    want = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(diffing.decoder_cosines(sae, A, OTHER)[:23], want, rtol=1e-5)


def test_latent_scaling_is_least_squares_over_all_rows(sae, monkeypatch):
    monkeypatch.setattr(diffing, "LATENTS_AT_ONCE", 3)
    x = np.random.default_rng(1).standard_normal((B, 2 * D)).astype(np.float32)
    own, other = OTHER._replace(unit=2.0), A._replace(unit=0.5)
    latents = np.array([17, 3, 20, 16, 22])
    got = diffing.latent_scaling(sae, np.split(x, [16, 32]), latents, own, other)
    f, x_hat, w_dec = np.zeros((B, F)), np.float64(sae(x)), np.float64(sae.w_dec)
    code = sae.encode(x)
    np.add.at(f, (np.arange(B)[:, None], np.asarray(code.indices)), np.float64(code.values))
    scaled = [part[:, at.columns] / at.unit for at in (own, other) for part in (np.float64(x), x_hat)]
    active = latents != 16
    want = oracle.scaling(f, latents[active], w_dec[:, own.columns] / own.unit, *scaled)
    np.testing.assert_allclose(np.array(got)[:, active], want, rtol=1e-4, atol=1e-5)
    assert np.isnan(got.error[~active]).all()


def test_what_is_shrunk_or_written_by_others_shows_and_what_is_exclusive_does_not():
    """Rows of one direction: in b alone; in both, lost by a's decoder; in both, written to a by another latent."""
    strength = np.random.default_rng(0).random((64, 1)).astype(np.float32) + 0.5
    u = np.eye(D, dtype=np.float32)[0]
    cases = {"exclusive": (0, 0, 0), "shrunk": (1, 0, 0), "decoupled": (1, 0, 1)}
    for name, (there, own_a, others_a) in cases.items():
        w_enc = np.zeros((2, 2 * D), np.float32)
        w_enc[:, D:] = u
        w_dec = np.stack([np.concatenate([own_a * u, u]), np.concatenate([others_a * u, 0 * u])])
        arrays = (jnp.asarray(a) for a in (w_enc, np.zeros(2, np.float32), w_dec, np.zeros(2 * D, np.float32)))
        config, widths = crosscoder.Config(n_latents=2, k=1, dtype="float32"), Widths((D, D), (D, D))
        x = strength * np.concatenate([there * u, u])
        got = diffing.latent_scaling(
            crosscoder.Crosscoder(*arrays, jnp.float32(0), config, widths), [x], np.array([0]), OTHER, A
        )
        assert got.nu_error[0] == pytest.approx(float(name == "shrunk"), abs=1e-5)
        assert got.nu_reconstruction[0] == pytest.approx(float(name == "decoupled"), abs=1e-5)


def test_sides_of_a_set(tmp_path):
    rng = np.random.default_rng(0)
    write_activations(tmp_path / "set", {"a": rng.standard_normal((64, 4)), "b": 3 * rng.standard_normal((64, 2))})
    activations, sites = open_activations(tmp_path / "set"), Sites(("b", "a"), ("b", "a"))
    a, b = (diffing.side(activations, sites, name) for name in "ab")
    assert (b.columns, a.columns) == (slice(0, 2), slice(2, 6))
    assert a.unit == pytest.approx(2, rel=0.2)
    assert b.unit == pytest.approx(3 * 2**0.5, rel=0.2)


def test_sources_of_different_widths_have_no_cosine(sae):
    with pytest.raises(ValueError, match="of 6 and of 5"):
        diffing.decoder_cosines(sae, A, Side(slice(D, 2 * D - 1)))
