"""The optimiser and the running average of the weights, and how their arrays are kept between steps.

    m <- b1 m + (1 - b1) g      v <- b2 v + (1 - b2) g^2      w <- w - rate * m' / (sqrt(v') + eps)
    a <- a + (1 - decay) / (1 - decay^t) * (w - a)            m', v': divided by 1 - b1^t, 1 - b2^t

m, v and a are running averages, computed in f32 and kept, for a matrix, in one of these forms. Vectors stay f32.

    float32     4 bytes a weight, as it is
    bfloat16    2 bytes, the upper half of the f32
    int8        1 byte and one f32 scale a block of up to 256 neighbours in a row (`Blocks`)

Blocks lie inside a row, so the split of dimension 0 over a mesh is that of the weights. Zero is kept as zeros: to clear
rows of an average is to clear them in every array of its tree. Weights move by the moments as they are kept: one pass
over an array then leaves nothing in f32 for the next pass.

Below f32, rounding is stochastic, as likely up as the value is near the upper neighbour. Rounding to nearest would
never let go of a value that loses 0.1 % a step: half the distance of two bf16 numbers is 0.2 to 0.4 %. The dither is a
hash of step, array and position alone, so a resumed run repeats it, on any mesh, and no array of random bits exists.

Sources: Kingma and Ba 2015, arXiv 1412.6980, algorithm 1. Scales a block and codes with an exponent: after Dettmers et
al. 2022, arXiv 2110.02861, section 2; the code itself is ours. Average: Gao et al. 2024, arXiv 2406.04093, its code.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

from sae_jax.saes.base import Adam
from sae_jax.training.settings import Precision, TrainConfig, Values

BLOCK = 256  # elements that share a scale, at most


class Code(NamedTuple):
    """How 8 bits stand for y in [0, 1]: as f32 numbers of few mantissa bits, counted from f to f + y, f = 2^-octaves.

    That is one addition and one shift each way; logarithmic above f, linear below. Neighbours of y are at most
    (y + f) / 2^mantissa apart. The more octaves, the less mantissa.
    """

    octaves: int
    mantissa: int  # bits
    signed: bool


# Where Adam's second moment is small, a linear code has zero or far too much, and the update explodes or stalls.
MEAN = Code(15, 3, signed=True)
SQUARE = Code(30, 3, signed=False)
WEIGHT = Code(3, 5, signed=True)  # the weights of a row are of one magnitude


@struct.dataclass
class Blocks:
    """Numbers in 8 bits: sign * y * scale, where y is at most 1 but for rounding.

    Rounding never makes zero of what has no sign. Scales bound the numbers of a block, which may all be smaller. A
    block that met inf or nan reads back as nothing finite; one below the normal f32 reads back as zeros.
    """

    codes: jax.Array  # i8[..., D], or u8[..., D] of numbers without a sign
    scales: jax.Array  # f32[..., D / block]
    code: Code = struct.field(pytree_node=False)


@struct.dataclass
class AdamState:
    """Adam's moments, as they are kept."""

    count: jax.Array  # i32[], steps done
    mean: Any  # of gradients, a tree like the weights
    square: Any  # of squared gradients


def schedule(config: TrainConfig) -> optax.Schedule:
    """Share of the peak rate at a step, counted from 1: up over the warm-up, 1, down over the decay."""
    parts, ends = [optax.constant_schedule(1.0)], []
    if config.warmup_steps:
        parts.insert(0, optax.linear_schedule(0.0, 1.0, config.warmup_steps))
        ends.append(config.warmup_steps)
    if config.decay_steps:
        linear = optax.linear_schedule(1.0, config.decay_to, config.decay_steps)
        cosine = optax.cosine_decay_schedule(1.0, config.decay_steps, config.decay_to)
        parts.append(linear if config.decay == "linear" else cosine)
        ends.append(config.steps - config.decay_steps)
    return optax.join_schedules(parts, ends)


def optimiser(config: TrainConfig, values: Values, own: Adam) -> optax.GradientTransformation:
    """Clip by the global norm, then Adam.

    `config` says what is done and in which form moments are kept, `values` how far, `own` what the variant wants.
    """
    b1, b2 = own.beta1 if config.beta1 is None else config.beta1, own.beta2 if config.beta2 is None else config.beta2
    eps, share = own.eps if config.eps is None else config.eps, schedule(config)

    def init(weights: Any) -> AdamState:
        return AdamState(jnp.int32(0), nothing(weights, config.moments, MEAN), nothing(weights, config.moments, SQUARE))

    def update(gradients: Any, state: AdamState, weights: Any = None) -> tuple[Any, AdamState]:
        # One factor, not a quotient of every gradient, of which XLA would make an array.
        clip = jnp.minimum(1, values.clip / optax.tree.norm(gradients)) if config.clip else 1.0
        count = state.count + 1
        mean = follow(state.mean, gradients, b1, count, salt=0, factor=clip)
        square = follow(state.square, gradients, b2, count, salt=1, factor=clip, power=2)
        rate_now = -values.lr * share(count) / correction(b1, count)
        fix_square = lax.rsqrt(correction(b2, count))

        def step(m: jax.Array, v: jax.Array) -> jax.Array:
            return rate_now * m / (fix_square * jnp.sqrt(v) + eps)

        return jax.tree.map(step, read(mean), read(square)), AdamState(count, mean, square)

    return optax.GradientTransformation(init, update)  # pyrefly: ignore[bad-argument-type]


def nothing(like: Any, precision: Precision, code: Code) -> Any:
    """The running averages before the first step: zeros of the shape and the place of each array of a tree.

    Args:
        like: f32 arrays.
        precision: the form of those with two dimensions or more.
        code: of those, if precision is int8.
    """

    def of(x: jax.Array) -> jax.Array | Blocks:
        if precision == "float32" or x.ndim < 2:
            return jnp.zeros_like(x)
        if precision == "bfloat16":
            return jnp.zeros_like(x, jnp.bfloat16)
        codes = jnp.zeros_like(x, jnp.int8 if code.signed else jnp.uint8)
        return Blocks(codes, jnp.zeros_like(x[..., : _blocks(x.shape[-1])[0]]), code)

    return jax.tree.map(of, like)


def follow(
    kept: Any,
    target: Any,
    decay: jax.Array | float,
    step: jax.Array,
    salt: int,
    factor: jax.Array | float = 1.0,
    power: int = 1,
) -> Any:
    """decay * kept + (1 - decay) * (factor * target)^power for each array of a tree, in the form that it had.

    Args:
        kept: what `nothing` or this function returned.
        target: f32 arrays, a tree like the one that `nothing` was given.
        decay: how much remains of what was, f32[].
        step: i32[]; with `salt` what stochastic rounding depends on, beside the array and the position in it.
        salt: another number below 8 for each call of a step.
        factor: f32[].
        power: 1 or 2.
    """

    def one(seed: int, kept: jax.Array | Blocks, target: jax.Array) -> jax.Array | Blocks:
        y = factor * target
        # Not y**2: XLA would share the square with a norm of the gradients, and write it out for that.
        x = decay * _read(kept) + ((1 - decay) * y * y if power == 2 else (1 - decay) * y)
        if not isinstance(kept, Blocks):
            return x if kept.dtype == jnp.float32 else _to_bfloat16(x, _dither(x, step, seed))
        # A bound of the maximum from that of the target: the maximum itself would need x twice, or a copy of it.
        peaks = (factor * _per_block(jnp.abs(target)).max(-1)) ** power
        scales = decay * kept.scales + (1 - decay) * peaks
        return _to_blocks(x, scales, _dither(x, step, seed), kept.code)

    leaves, tree = jax.tree.flatten(target)
    pairs = zip(tree.flatten_up_to(kept), leaves, strict=True)
    return tree.unflatten([one(8 * leaf + salt, k, x) for leaf, (k, x) in enumerate(pairs)])


def average(kept: Any, weights: Any, decay: jax.Array | float, step: jax.Array) -> Any:
    """The running average after the step numbered `step` (from 1), which ended in `weights`.

    It equals the usual one divided by 1 - decay^t, but is close to the weights from the first step on: rounding costs
    as much as an average moves.
    """
    return follow(kept, weights, 1 - (1 - decay) / correction(decay, step), step, salt=2)


def correction(decay: jax.Array | float, step: jax.Array) -> jax.Array:
    """1 - decay^step, f32[]; written so that it does not cancel near decay = 1."""
    log_decay = jnp.log(decay) if isinstance(decay, jax.Array) else math.log(max(decay, 1e-38))
    return -jnp.expm1(step.astype(jnp.float32) * log_decay)


def read(kept: Any) -> Any:
    """The f32 arrays of a tree of kept ones."""
    return jax.tree.map(_read, kept, is_leaf=lambda node: isinstance(node, Blocks))


def _read(kept: jax.Array | Blocks) -> jax.Array:
    if not isinstance(kept, Blocks):
        return kept.astype(jnp.float32)
    floor, shift = _floor_and_shift(kept.code)
    count = jnp.abs(kept.codes.astype(jnp.int32)).astype(jnp.uint32)
    y = lax.bitcast_convert_type((count << shift) + _bits(floor), jnp.float32) - floor
    x = y * _spread(kept.scales, count.shape[-1])
    return jnp.where(kept.codes < 0, -x, x) if kept.code.signed else x


def _to_bfloat16(x: jax.Array, dither: jax.Array) -> jax.Array:
    bits = _bits(x) + (dither >> 16)
    upper = lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isnan(x), x, upper).astype(jnp.bfloat16)  # a nan with a full mantissa would wrap to -0


def _to_blocks(x: jax.Array, scales: jax.Array, dither: jax.Array, code: Code) -> Blocks:
    floor, shift = _floor_and_shift(code)
    # A factor a block: XLA would make an array of the quotients of two.
    factors = jnp.where(scales < jnp.finfo(jnp.float32).tiny, 0.0, 1 / scales)
    y = jnp.abs(x) * _spread(factors, x.shape[-1])
    count = (_bits(y + floor) - _bits(floor) + (dither >> (32 - shift))) >> shift
    if not code.signed:
        count = jnp.maximum(count, (x > 0).astype(jnp.uint32))
        return Blocks(jnp.minimum(count, 255).astype(jnp.uint8), scales, code)
    count = jnp.minimum(count, 127).astype(jnp.int32)
    return Blocks(jnp.where(x < 0, -count, count).astype(jnp.int8), scales, code)


def _floor_and_shift(code: Code) -> tuple[jax.Array, int]:
    """(f, mantissa bits of an f32 that the code leaves out)."""
    return jnp.float32(2.0**-code.octaves), 23 - code.mantissa


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint32)


def _blocks(d: int) -> tuple[int, int]:
    """(number of blocks, length of each) of a row of d; the last block may be shorter."""
    n = -(-d // BLOCK)
    return n, -(-d // n)


def _per_block(x: jax.Array) -> jax.Array:
    """[..., D] -> [..., blocks, length], zeros at the end."""
    n, length = _blocks(x.shape[-1])
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, n * length - x.shape[-1])])
    return padded.reshape(*x.shape[:-1], n, length)


def _spread(scales: jax.Array, d: int) -> jax.Array:
    """[..., blocks] -> [..., D], each scale at every element of its block."""
    n, length = _blocks(d)
    wide = jnp.broadcast_to(scales[..., None], (*scales.shape, length))
    return wide.reshape(*scales.shape[:-1], n * length)[..., :d]


def _dither(x: jax.Array, step: jax.Array, seed: int) -> jax.Array:
    """u32 like x: even bits, a function of the arguments and the position in the whole array, however it is split."""
    hashed = _mix(_mix(step.astype(jnp.uint32)) ^ jnp.uint32(seed))
    hashed = hashed.reshape((1,) * x.ndim)
    for axis in range(x.ndim):
        position = lax.broadcasted_iota(jnp.uint32, x.shape, axis, out_sharding=jax.typeof(x).sharding)
        # One hash a row, then one an element.
        hashed = _mix(hashed ^ position[tuple(slice(None) if a <= axis else slice(1) for a in range(x.ndim))])
    return hashed


def _mix(h: jax.Array) -> jax.Array:
    """u32 whose every bit depends on every bit of h: the finaliser of MurmurHash3 (Appleby, public domain)."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
