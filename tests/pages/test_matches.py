"""Latents of two dictionaries that are alike, against plain numpy."""

from __future__ import annotations

import numpy as np

from sae_jax.analysis import examples
from sae_jax.pages import matches
from sae_jax.pages.latents import Subject

N_SEQ, N_POS = 6, 20


def fires(n_latents, seed, text=0):
    """bool[places, F], and the table of it."""
    rng = np.random.default_rng(seed)
    is_active = rng.random((N_SEQ * N_POS, n_latents)) < rng.random(n_latents) * 0.3
    is_active[:, 2] = False  # one is silent
    indices = np.broadcast_to(np.arange(n_latents), is_active.shape)
    sequences = np.full((N_SEQ, N_POS), text, np.int32)
    block = indices, is_active.astype(np.float32), np.arange(N_SEQ * N_POS)
    return is_active, examples.collect([block], n_latents, sequences)


def test_by_firing_is_the_greatest_jaccard(monkeypatch):
    monkeypatch.setattr(matches, "_PAIRS", 50)  # many blocks
    (a, of_a), (b, of_b) = fires(11, 0), fires(17, 1)
    both = a.T.astype(int) @ b.astype(int)
    jaccard = both / np.maximum(a.sum(0)[:, None] + b.sum(0) - both, 1)
    found = matches.by_firing(of_a, of_b)
    assert found is not None
    some = jaccard.max(1) > 0
    np.testing.assert_array_equal(found.latents[some], jaccard.argmax(1)[some])
    np.testing.assert_allclose(found.values, jaccard.max(1), rtol=1e-6)
    assert found.latents[2] == -1


def test_other_texts_are_not_matched_by_firing(capsys):
    assert matches.by_firing(fires(5, 0)[1], fires(5, 0, text=1)[1]) is None
    assert "other samples of text" in capsys.readouterr().err


def test_by_decoder_is_the_greatest_cosine(capsys):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((11, 8)).astype(np.float32), rng.standard_normal((17, 8)).astype(np.float32)
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a, b)]
    of_a, of_b = Subject(fires(11, 0)[1], a, 1), Subject(fires(17, 1)[1], b, 1)
    found = matches.by_decoder(of_a, of_b)
    assert found is not None
    cosine = unit[0] @ unit[1].T
    np.testing.assert_array_equal(found.latents, cosine.argmax(1))
    np.testing.assert_allclose(found.values, cosine.max(1), atol=1e-6)
    assert matches.by_decoder(of_a, Subject(fires(17, 1)[1], b[:, :4], 1)) is None
    assert "rows of 8 and of 4 numbers have no cosine" in capsys.readouterr().err
