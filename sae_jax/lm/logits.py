"""From the last residual stream to logits, and what a direction in the model does to the logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sae_jax.lm import block
from sae_jax.lm.hooks import READ_BY_BLOCK, check_hook
from sae_jax.lm.model import LanguageModel
from sae_jax.lm.spec import Spec
from sae_jax.ops.encode import product
from sae_jax.types import UsageError

# The norm that each point meets on its way to the stream, in models that have one there.
_BEFORE_POST_NORM = {
    **dict.fromkeys(("attn_z", "attn_raw"), "attn_norm.w"),
    **dict.fromkeys(("mlp_act", "mlp_raw"), "mlp_norm.w"),
}


def unembed(params: Mapping[str, Any], spec: Spec, x_BTD: jax.Array) -> jax.Array:
    """Logits f32[B, T, V] of the last layer's residual stream: the final norm, then the unembedding."""
    h_BTD = block.norm(spec, params, "norm", x_BTD)
    logits_BTV = product(h_BTD, _unembedding(params, spec), "btd,vd->btv")
    return block.capped(logits_BTV, spec.logit_cap)


def logit_effect(model: LanguageModel, hook: tuple[int, str], directions_ND: jax.Array) -> jax.Array:
    """What adding each direction at `hook` does to the logits along the direct path, to first order.

    Inside the MLP or the attention, the direction passes its output matrix first; then come the norms that it meets
    without their data-dependent scale (LayerNorm: centred; times the norm's weight) and the unembedding. How later
    layers react is left out, and what a cap does to the logits.

    Args:
        model: the language model.
        hook: where.
        directions_ND: [N, hook_width], heads flattened at attn_z.

    Returns:
        f32[N, V], centred over the vocabulary, which leaves probabilities unchanged.
    """
    layer, point = check_hook(hook, model.spec)
    spec, layers = model.spec, model.params["layers"]
    inside = {"mlp_act": "down.w", "attn_z": "o.w"}.get(point)
    directions_ND = directions_ND.astype(jnp.float32)
    if point in READ_BY_BLOCK:
        raise UsageError(f"{point} is read by the block and does not add to the stream; choose another hook")
    if inside is not None:
        directions_ND = product(directions_ND, layers[inside][layer].astype(jnp.float32), "ni,id->nd")
    if spec.post_norms and point in _BEFORE_POST_NORM:
        directions_ND = _through_norm(spec, layers[_BEFORE_POST_NORM[point]][layer], directions_ND)
    scaled_ND = _through_norm(spec, model.params["norm.w"], directions_ND)
    effect_NV = product(scaled_ND, _unembedding(model.params, model.spec).astype(jnp.float32), "nd,vd->nv")
    return effect_NV - effect_NV.mean(axis=-1, keepdims=True)


def _through_norm(spec: Spec, w_D: jax.Array, directions_ND: jax.Array) -> jax.Array:
    """What a norm does to directions, but for its scale."""
    if spec.norm == "layer_norm":
        directions_ND = directions_ND - directions_ND.mean(axis=-1, keepdims=True)
    return directions_ND * (w_D.astype(jnp.float32) + spec.norm_offset)[None, :]


def _unembedding(params: Mapping[str, Any], spec: Spec) -> jax.Array:
    return params["embed"] if spec.tied else params["unembed"]
