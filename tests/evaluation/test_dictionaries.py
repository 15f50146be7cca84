"""Comparisons of dictionaries against their oracles, and what absorption must say of dictionaries made by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_jax import testbeds
from sae_jax.evaluation import dictionaries
from sae_jax.saes import relu
from tests.oracles import dictionaries as oracle

D = 6
seeds = st.integers(0, 2**31)


def directions(seed: int, n: int) -> np.ndarray:
    """Of different lengths; some nearly equal, one all zeros."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, D)) * rng.uniform(0.1, 10, (n, 1))
    rows[n // 2 :] = rows[rng.permutation(n)[n // 2 :]] + 0.1 * rng.standard_normal((n - n // 2, D))
    rows[0] = 0
    return rows.astype(np.float32)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(dictionaries, "TILE", 8)  # several, the last one short


@settings(max_examples=15)
@given(seeds)
def test_mmcs_and_duplicates_are_the_oracle_whatever_the_tiles(seed):
    a, b = directions(seed, 21), directions(seed + 1, 13)
    np.testing.assert_allclose(dictionaries.mmcs(a, b), (oracle.mmcs(a, b), oracle.mmcs(b, a)), atol=1e-6)
    index, cosine = dictionaries.closest(a, b)
    np.testing.assert_allclose(oracle.cosines(a, b)[np.arange(21), index], cosine, atol=1e-6)
    above = 0.901  # no cosine of these is so near to it that rounding decides
    assert dictionaries.duplicates(a, above).tolist() == [list(pair) for pair in oracle.duplicates(a, above)]


@settings(max_examples=15)
@given(seeds)
def test_a_dictionary_is_itself_in_any_order_and_length_but_not_mirrored(seed):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((21, D)).astype(np.float32)
    b = (a * rng.uniform(0.1, 10, (21, 1)))[rng.permutation(21)]
    np.testing.assert_allclose(dictionaries.mmcs(a, b), 1, atol=1e-6)
    assert dictionaries.mmcs(a[:3], -a[:3])[0] < 1 - 1e-3


TREE = testbeds.Tree(d_model=16, branching=(3, 2), rates=(0.5, 0.3), seed=1)


def by_hand(enc_FD: np.ndarray, dec_FD: np.ndarray) -> relu.Relu:
    zeros = jnp.zeros(len(enc_FD)), jnp.zeros(TREE.d_model)
    config = relu.Config(n_latents=len(enc_FD), dtype="float32")
    return relu.Relu(jnp.asarray(enc_FD), zeros[0], jnp.asarray(dec_FD), zeros[1], config)


def absorbing(strength: float) -> relu.Relu:
    """A parent's latent is shut where a child is there, whose latent writes `strength` of the parent's direction."""
    g, parents = TREE.directions, TREE.parents
    enc, dec = g.copy(), g.copy()
    for child in np.flatnonzero(parents >= 0):
        enc[parents[child]] -= 10 * g[child]
        dec[child] += strength * g[parents[child]]
    return by_hand(enc, dec)


def test_absorption_of_dictionaries_made_by_hand():
    rows, codes = TREE.draw(400, np.random.default_rng(0))
    truth = (rows, codes, TREE.directions, TREE.parents)
    assert dictionaries.absorption(by_hand(TREE.directions, TREE.directions), *truth).max() == 0
    # A silent parent that nobody stands in for is a miss, not absorption.
    assert dictionaries.absorption(absorbing(0.0), *truth).max() == 0
    # Strengths lie in [0.5, 1.5]: a child of any strength carries 0.4 of any parent, and vice versa none.
    with_child = [codes[codes[:, p] > 0][:, TREE.parents == p].any(1).mean() for p in range(3)]
    np.testing.assert_allclose(dictionaries.absorption(absorbing(1.2), *truth), with_child)


@pytest.mark.parametrize("seed", range(3))
def test_absorption_is_the_oracle(seed):
    rows, codes = TREE.draw(60, np.random.default_rng(seed))
    codes[:, 2] = 0  # a parent that is never there
    rng = np.random.default_rng(seed)
    mix = absorbing(0.6)
    sae = by_hand(
        *(np.asarray(w) + 0.1 * rng.standard_normal(w.shape).astype(np.float32) for w in (mix.w_enc, mix.w_dec))
    )
    code = sae.encode(rows)
    z = np.zeros((60, len(mix.w_dec)))
    np.put_along_axis(z, np.asarray(code.indices), np.asarray(code.values), 1)
    got = dictionaries.absorption(sae, rows, codes, TREE.directions, TREE.parents)
    want = oracle.absorption(z, sae.w_dec, codes, TREE.directions, TREE.parents, 0.1, 0.4)
    np.testing.assert_allclose(got, want)
    assert np.isnan(got).tolist() == [False, False, True]
    assert 0 < np.nanmax(got) < 1
