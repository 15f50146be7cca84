"""One decoder block, with a tap on every intermediate, and the norm that the head shares.

Products accumulate in f32 and are returned in the dtype of the stream; norms, rotations and softmax are computed in
f32. What a model has beyond GPT-2 is a field of its Spec; each source stands there or beside the function.
Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.3;
LayerNorm after Ba et al. 2016, arXiv 1607.06450; RMSNorm after Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4; gated
MLP after Shazeer 2020, arXiv 2002.05202, eq. 6; shared keys and values after Ainslie et al. 2023, arXiv 2305.13245;
the cap of scores after Gemma Team 2024, arXiv 2408.00118, section 2.

Scores of all pairs of positions would grow with the square of the context. Where they are many, attention goes through
the queries in blocks, each with all keys at once, so that the softmax of a query is the same as without; the backward
pass computes the scores of a block again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sae_jax.lm.spec import Rotary, Spec
from sae_jax.mesh import n_shards, reshape
from sae_jax.ops.encode import product

Tap = Callable[[str, jax.Array], jax.Array]
Extend = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

_ACTIVATIONS = {
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
SCORE_BYTES = 256 << 20  # of f32 scores that a device holds at once
_MASKED = -1e30  # finite, so that a row with nothing to attend to gives numbers and not NaN


@struct.dataclass
class Positions:
    """What the place of T tokens among S means to layers of one kind; with a leading axis, of every kind."""

    position: jax.Array  # i32[T], of the queries; keys have positions 0 ... S - 1
    window: jax.Array  # i32[], of how many positions, the last of which is its own, a query sees the keys
    cos: jax.Array | None  # f32[T, d_rotary / 2], of the angle that each pair of a head is turned by
    sin: jax.Array | None


def positions_of(spec: Spec, position_T: jax.Array, n_slots: int) -> Positions:
    """Of every kind of layer, stacked in the order of `spec.attention`, for S = n_slots keys."""
    windows = [n_slots if kind.window is None else kind.window for kind in spec.attention]
    seen_A = jnp.stack([position_T] * len(windows)), jnp.asarray(windows, jnp.int32)
    if spec.positions != "rotary":
        return Positions(*seen_A, None, None)
    n = spec.d_head if spec.d_rotary is None else spec.d_rotary
    frequency_Ap = np.stack([frequencies(kind.rotary or Rotary(), n) for kind in spec.attention])
    angle_ATp = position_T.astype(jnp.float32)[None, :, None] * jnp.asarray(frequency_Ap, jnp.float32)[:, None, :]
    return Positions(*seen_A, jnp.cos(angle_ATp), jnp.sin(angle_ATp))


def block(
    spec: Spec, layer: Mapping[str, jax.Array], x_BTD: jax.Array, positions: Positions, tap: Tap, extend: Extend
) -> jax.Array:
    """The residual stream after one block.

    Args:
        spec: the model's sizes and kinds.
        layer: this layer's parameters, as in params.py without the layer axis.
        x_BTD: the residual stream before the block.
        positions: of its kind of layer.
        tap: called as tap(point, value) on every intermediate of hooks.points; what it returns is used.
        extend: maps the keys and values of these T positions to those of all S, [B, S, G, d] each.
    """
    act, width = _ACTIVATIONS[spec.activation], x_BTD.shape[:2]

    x_BTD = tap("resid_pre", x_BTD)
    h_BTD = tap("attn_in", norm(spec, layer, "norm1", x_BTD))
    q_BTHd, k_BTGd, v_BTGd = (
        reshape(_linear(layer, name, h_BTD), *width, n, spec.d_head)
        for name, n in (("q", spec.n_heads), ("k", spec.n_kv), ("v", spec.n_kv))
    )
    if spec.qk_norm:
        q_BTHd, k_BTGd = norm(spec, layer, "q_norm", q_BTHd), norm(spec, layer, "k_norm", k_BTGd)
    q_BTHd, k_BTGd = _rotate(q_BTHd, positions), _rotate(k_BTGd, positions)
    k_BSGd, v_BSGd = extend(k_BTGd, v_BTGd)
    z_BTHd = tap("attn_z", _attend(spec, q_BTHd, k_BSGd, v_BSGd, positions))
    out_BTD = _linear(layer, "o", reshape(z_BTHd, *width, -1))
    if spec.post_norms:
        out_BTD = norm(spec, layer, "attn_norm", tap("attn_raw", out_BTD))
    attn_BTD = tap("attn_out", out_BTD)

    mid_BTD = x_BTD if spec.parallel else tap("resid_mid", x_BTD + attn_BTD)
    h_BTD = tap("mlp_in", norm(spec, layer, "norm2", mid_BTD))
    if spec.gated:
        act_BTM = act(_linear(layer, "gate", h_BTD)) * _linear(layer, "up", h_BTD)
    else:
        act_BTM = act(_linear(layer, "up", h_BTD))
    out_BTD = _linear(layer, "down", tap("mlp_act", act_BTM))
    if spec.post_norms:
        out_BTD = norm(spec, layer, "mlp_norm", tap("mlp_raw", out_BTD))
    mlp_BTD = tap("mlp_out", out_BTD)
    return tap("resid_post", (mid_BTD + attn_BTD if spec.parallel else mid_BTD) + mlp_BTD)


def norm(spec: Spec, params: Mapping[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
    """The norm of that name over the last axis, in f32, returned in x's dtype.

    LayerNorm: (x - mean) / sqrt(variance + eps) w + b, with the biased variance. RMSNorm: x / sqrt(mean square + eps)
    (w + spec.norm_offset).
    """
    x32 = x.astype(jnp.float32)
    if spec.norm == "layer_norm":
        x32 = x32 - x32.mean(-1, keepdims=True)
    y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + spec.norm_eps)
    y = y * _row(params[f"{name}.w"].astype(jnp.float32) + spec.norm_offset, x)
    if spec.norm == "layer_norm":
        y = y + _row(params[f"{name}.b"].astype(jnp.float32), x)
    return y.astype(x.dtype)


def capped(x: jax.Array, cap: float | None) -> jax.Array:
    """`x`, or cap * tanh(x / cap)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def query_block(score_bytes: int, n_queries: int) -> int:
    """How many of these queries are attended from at once, if scores of all of them take so many bytes on a device."""
    n_blocks = min(-(-score_bytes // SCORE_BYTES), n_queries)
    return -(-n_queries // n_blocks)


def _attend(spec: Spec, q_BTHd: jax.Array, k_BSGd: jax.Array, v_BSGd: jax.Array, positions: Positions) -> jax.Array:
    """Attention outputs per head, of a block of queries after the other."""
    rows, n_new, n_heads, width = q_BTHd.shape
    t = query_block(4 * rows * n_heads * n_new * k_BSGd.shape[1] // n_shards(q_BTHd), n_new)
    if t >= n_new:
        return _attend_block(spec, q_BTHd, k_BSGd, v_BSGd, positions.position, positions.window)
    n_blocks = -(-n_new // t)
    filling = n_blocks * t - n_new  # queries at position -1, which see nothing
    q_BTHd = jnp.pad(q_BTHd, ((0, 0), (0, filling), (0, 0), (0, 0)))
    position_nt = jnp.pad(positions.position, (0, filling), constant_values=-1).reshape(n_blocks, t)
    q_nBtHd = jnp.moveaxis(reshape(q_BTHd, rows, n_blocks, t, n_heads, width), 1, 0)

    @jax.checkpoint
    def attend(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        q_BtHd, position_t = block
        return _attend_block(spec, q_BtHd, k_BSGd, v_BSGd, position_t, positions.window)

    z_BntHd = jnp.moveaxis(jax.lax.map(attend, (q_nBtHd, position_nt)), 0, 1)
    return reshape(z_BntHd, rows, n_blocks * t, n_heads, width)[:, :n_new]


def _attend_block(
    spec: Spec, q_BTHd: jax.Array, k_BSGd: jax.Array, v_BSGd: jax.Array, position_T: jax.Array, window: jax.Array
) -> jax.Array:
    """Attention outputs per head of these queries; heads are in groups that share keys and values."""
    rows, n_new, n_heads, width = q_BTHd.shape
    scale = width**-0.5 if spec.query_scale is None else spec.query_scale
    back_TS = position_T[:, None] - jnp.arange(k_BSGd.shape[1], dtype=jnp.int32)[None, :]
    mask_TS = (back_TS >= 0) & (back_TS < window)
    q_BTGrd = reshape(q_BTHd, rows, n_new, spec.n_kv, n_heads // spec.n_kv, width)
    scores_BGrTS = product(q_BTGrd, k_BSGd, "btgrd,bsgd->bgrts")
    scores_BGrTS = jnp.where(mask_TS[None, None, None], capped(scores_BGrTS * scale, spec.attn_cap), _MASKED)
    weights_BGrTS = jax.nn.softmax(scores_BGrTS, axis=-1).astype(v_BSGd.dtype)
    z_BTGrd = product(weights_BGrTS, v_BSGd, "bgrts,bsgd->btgrd")
    return reshape(z_BTGrd, *q_BTHd.shape).astype(v_BSGd.dtype)


def _rotate(x_BTHd: jax.Array, positions: Positions) -> jax.Array:
    """The first numbers of each head turned: number i and number i + n/2 of n are a pair."""
    if positions.cos is None or positions.sin is None:
        return x_BTHd
    cos_1T1p, sin_1T1p = positions.cos[None, :, None], positions.sin[None, :, None]
    n = 2 * cos_1T1p.shape[-1]
    a, b = (x_BTHd[..., part].astype(jnp.float32) for part in (slice(n // 2), slice(n // 2, n)))
    turned = jnp.concatenate([a * cos_1T1p - b * sin_1T1p, b * cos_1T1p + a * sin_1T1p], axis=-1)
    return jnp.concatenate([turned.astype(x_BTHd.dtype), x_BTHd[..., n:]], axis=-1)


def frequencies(rotary: Rotary, n: int) -> np.ndarray:
    """f64[n / 2]: radians that each pair turns by, a position."""
    frequency = rotary.theta ** -(np.arange(0, n, 2) / n)
    if rotary.kind == "linear":
        return frequency / rotary.factor
    if rotary.kind == "llama3":
        turns = rotary.original_context * frequency / (2 * np.pi)
        low, high = rotary.low_freq_factor, rotary.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return frequency * (kept + (1 - kept) / rotary.factor)
    return frequency


def _linear(layer: Mapping[str, jax.Array], name: str, x_BTi: jax.Array) -> jax.Array:
    y_BTo = product(x_BTi, layer[f"{name}.w"], "bti,io->bto")
    if f"{name}.b" in layer:  # see Spec.qkv_bias, out_bias and mlp_bias
        y_BTo = y_BTo + _row(layer[f"{name}.b"].astype(jnp.float32), y_BTo)
    return y_BTo.astype(x_BTi.dtype)


def _row(v_D: jax.Array, like: jax.Array) -> jax.Array:
    return v_D.reshape(*(1,) * (like.ndim - 1), -1)
