"""Losses of next-token predictions against their definitions."""

import jax.numpy as jnp
import numpy as np

from sae_jax.ops.predictions import cross_entropy, kl_divergence

RNG = np.random.default_rng(0)


def softmax(logits):
    p = np.exp(np.float64(logits))
    return p / p.sum(-1, keepdims=True)


def test_cross_entropy_is_the_next_token_loss():
    logits, ids = RNG.normal(size=(2, 5, 7)).astype(np.float32), RNG.integers(0, 7, (2, 5))
    p = softmax(logits)
    expected = [[-np.log(p[b, t, ids[b, t + 1]]) for t in range(4)] for b in range(2)]
    np.testing.assert_allclose(cross_entropy(jnp.asarray(logits), jnp.asarray(ids)), expected, atol=1e-6)


def test_kl_divergence_is_that_of_the_second_from_the_first():
    a, b = RNG.normal(size=(2, 2, 5, 7)).astype(np.float32)
    p, q = softmax(a), softmax(b)
    np.testing.assert_allclose(kl_divergence(jnp.asarray(a), jnp.asarray(b)), (p * np.log(p / q)).sum(-1), atol=1e-6)
    np.testing.assert_allclose(kl_divergence(jnp.asarray(a), jnp.asarray(a)), 0, atol=1e-6)
