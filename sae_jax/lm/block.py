"""One decoder block, with a tap on every intermediate, and the norm that the head shares.

Products accumulate in f32 and are returned in the dtype of the stream; norms and softmax are computed in f32.
Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.3;
LayerNorm after Ba et al. 2016, arXiv 1607.06450.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from sae_jax.lm.spec import Spec

Tap = Callable[[str, jax.Array], jax.Array]
Extend = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

_ACTIVATIONS = {
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
_MASKED = -1e30  # finite, so that a row with nothing to attend to gives numbers and not NaN


def block(
    spec: Spec, layer: Mapping[str, jax.Array], x_BTD: jax.Array, mask_TS: jax.Array, tap: Tap, extend: Extend
) -> jax.Array:
    """The residual stream after one block.

    Args:
        spec: the model's sizes and kinds.
        layer: this layer's parameters, as in params.py without the layer axis.
        x_BTD: the residual stream before the block.
        mask_TS: bool, which of the S keys each of the T queries sees.
        tap: called as tap(point, value) on every intermediate of hooks.POINTS; what it returns is used.
        extend: maps the keys and values of these T positions to those of all S, [B, S, H, d] each.
    """
    act = _ACTIVATIONS[spec.activation]
    heads = (*x_BTD.shape[:2], spec.n_heads, spec.d_head)

    x_BTD = tap("resid_pre", x_BTD)
    h_BTD = norm(spec, layer, "norm1", x_BTD)
    q_BTHd = _linear(layer, "q", h_BTD).reshape(heads)
    k_BSHd, v_BSHd = extend(*(_linear(layer, name, h_BTD).reshape(heads) for name in "kv"))
    z_BTHd = tap("attn_z", _attend(q_BTHd, k_BSHd, v_BSHd, mask_TS))
    out_BTD = tap("attn_out", _linear(layer, "o", z_BTHd.reshape(*heads[:2], -1)))

    x_BTD = tap("resid_mid", x_BTD + out_BTD)
    h_BTD = norm(spec, layer, "norm2", x_BTD)
    act_BTM = tap("mlp_act", act(_linear(layer, "up", h_BTD)))
    out_BTD = tap("mlp_out", _linear(layer, "down", act_BTM))
    return tap("resid_post", x_BTD + out_BTD)


def norm(spec: Spec, params: Mapping[str, jax.Array], name: str, x_BTD: jax.Array) -> jax.Array:
    """The norm of that name over the last axis: LayerNorm (biased variance), in f32, returned in x's dtype."""
    w_D, b_D = (params[f"{name}.{part}"].astype(jnp.float32) for part in "wb")
    x32_BTD = x_BTD.astype(jnp.float32)
    centred_BTD = x32_BTD - x32_BTD.mean(-1, keepdims=True)
    variance_BT1 = jnp.square(centred_BTD).mean(-1, keepdims=True)
    y_BTD = centred_BTD * jax.lax.rsqrt(variance_BT1 + spec.norm_eps)
    return (y_BTD * _row(w_D) + _row(b_D)).astype(x_BTD.dtype)


def _attend(q_BTHd: jax.Array, k_BSHd: jax.Array, v_BSHd: jax.Array, mask_TS: jax.Array) -> jax.Array:
    scores_BHTS = jnp.einsum("bthd,bshd->bhts", q_BTHd, k_BSHd, preferred_element_type=jnp.float32)
    scores_BHTS = jnp.where(mask_TS[None, None], scores_BHTS * q_BTHd.shape[-1] ** -0.5, _MASKED)
    weights_BHTS = jax.nn.softmax(scores_BHTS, axis=-1).astype(v_BSHd.dtype)
    z_BTHd = jnp.einsum("bhts,bshd->bthd", weights_BHTS, v_BSHd, preferred_element_type=jnp.float32)
    return z_BTHd.astype(v_BSHd.dtype)


def _linear(layer: Mapping[str, jax.Array], name: str, x_BTi: jax.Array) -> jax.Array:
    y_BTo = jnp.einsum("bti,io->bto", x_BTi, layer[f"{name}.w"], preferred_element_type=jnp.float32)
    if f"{name}.b" in layer:  # see Spec.qkv_bias, out_bias and mlp_bias
        y_BTo = y_BTo + _row(layer[f"{name}.b"].astype(jnp.float32))
    return y_BTo.astype(x_BTi.dtype)


def _row(v_D: jax.Array) -> jax.Array:
    return v_D[None, None, :]
