"""What a model's logits say about the next token, and how two models' predictions differ. In nats, in f32.

cross_entropy    -log p(next token)
kl_divergence    sum_v p(v) (log p(v) - log q(v))
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cross_entropy(logits_BTV: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """Next-token loss, f32[B, T-1]: entry t is -log p(ids[t + 1] | ids[: t + 1])."""
    logits_BTV = logits_BTV[:, :-1].astype(jnp.float32)
    target_BT1 = jnp.take_along_axis(logits_BTV, ids_BT[:, 1:, None], axis=-1)
    return jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT1[..., 0]


def kl_divergence(logits_BTV: jax.Array, other_BTV: jax.Array) -> jax.Array:
    """KL(p || q) of each position, f32[B, T], with p the predictions of the first logits and q those of the other."""
    log_p_BTV, log_q_BTV = jax.nn.log_softmax(logits_BTV), jax.nn.log_softmax(other_BTV)
    return (jnp.exp(log_p_BTV) * (log_p_BTV - log_q_BTV)).sum(-1)
