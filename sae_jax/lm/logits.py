"""From the last residual stream to logits, and what a direction in the model does to the logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sae_jax.lm import block
from sae_jax.lm.hooks import check_hook
from sae_jax.lm.model import LanguageModel
from sae_jax.lm.spec import Spec


def unembed(params: Mapping[str, Any], spec: Spec, x_BTD: jax.Array) -> jax.Array:
    """Logits f32[B, T, V] of the last layer's residual stream: the final norm, then the unembedding."""
    h_BTD = block.norm(spec, params, "norm", x_BTD)
    return jnp.einsum("btd,vd->btv", h_BTD, _unembedding(params, spec), preferred_element_type=jnp.float32)


def logit_effect(model: LanguageModel, hook: tuple[int, str], directions_ND: jax.Array) -> jax.Array:
    """What adding each direction at `hook` does to the logits along the direct path, to first order.

    Inside the MLP or the attention, the direction passes its output matrix first; then come the final norm without
    its data-dependent scale (centred, times the norm's weight) and the unembedding. How later layers react is left
    out.

    Args:
        model: the language model.
        hook: where.
        directions_ND: [N, hook_width], heads flattened at attn_z.

    Returns:
        f32[N, V], centred over the vocabulary, which leaves probabilities unchanged.
    """
    layer, point = check_hook(hook, model.spec)
    inside = {"mlp_act": "down.w", "attn_z": "o.w"}.get(point)
    directions_ND = directions_ND.astype(jnp.float32)
    if inside is not None:
        directions_ND = directions_ND @ model.params["layers"][inside][layer].astype(jnp.float32)
    centred_ND = directions_ND - directions_ND.mean(axis=-1, keepdims=True)
    scaled_ND = centred_ND * model.params["norm.w"].astype(jnp.float32)[None, :]
    effect_NV = scaled_ND @ _unembedding(model.params, model.spec).astype(jnp.float32).T
    return effect_NV - effect_NV.mean(axis=-1, keepdims=True)


def _unembedding(params: Mapping[str, Any], spec: Spec) -> jax.Array:
    return params["embed"] if spec.tied else params["unembed"]
