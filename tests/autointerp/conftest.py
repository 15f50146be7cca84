"""A store in which each latent fires on one token."""

import functools

import numpy as np
import pytest

from sae_jax import lm
from sae_jax.analysis.store import Plan, Store
from sae_jax.autointerp import judge

N_LATENTS = 8
CONTEXT = 80  # longer than a fragment


@functools.cache
def words():
    """Tokens of which none is part of another, by latent; and others."""
    vocabulary = lm.tokenizer("bundled")
    strings = vocabulary.tokens(range(300, 900))
    alone = [
        (300 + i, s)
        for i, s in enumerate(strings)
        if s.strip().isalpha() and sum(s in other or other in s for other in strings) == 1
    ]
    return [i for i, _ in alone][: N_LATENTS + 30]


def make_store(path, fires=lambda latent, seq: True, value=lambda latent, n: 7.0):
    """Latent f fires on the f-th word of `words`, in the sequences that `fires` says."""
    rng = np.random.default_rng(0)
    ids, n_seq = words(), 60
    sequences = rng.choice(ids[N_LATENTS:], (n_seq, CONTEXT)).astype(np.int32)
    for seq in range(n_seq):
        for latent in range(N_LATENTS):
            if seq % N_LATENTS in (latent, (latent + 1) % N_LATENTS, (latent + 2) % N_LATENTS) and fires(latent, seq):
                sequences[seq, rng.choice(np.arange(1, CONTEXT), 2, replace=False)] = ids[latent]
    sequences[:, 0] = lm.tokenizer("bundled").separator_id  # which has no row
    plan = Plan("d", "c", ["resid_post.1"], N_LATENTS, CONTEXT, [0], [n_seq], "bundled", lm.tokenizer("bundled").digest)
    store = Store.create(path, plan)
    place = np.flatnonzero(sequences != sequences[0, 0])
    token = sequences.ravel()[place]
    latent_of = {token: latent for latent, token in enumerate(ids[:N_LATENTS])}
    indices = np.array([[latent_of.get(t, 0)] for t in token.tolist()])
    is_active = np.array([t in latent_of for t in token.tolist()])
    values = np.array([value(latent, n) for n, latent in enumerate(indices[:, 0].tolist())], np.float32)
    store.write_part(0, sequences, [(indices, (values * is_active)[:, None].astype(np.float32), place)])
    store.join()
    return path


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(judge, "FIRST_WAIT", 0.001)
