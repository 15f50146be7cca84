"""Running averages of matrices, and the matrices themselves, in fewer bytes than float32.

    float32     4 bytes a number, as it is
    bfloat16    2 bytes, the upper half of the f32
    int8        1 byte, and one f32 scale for each block of up to 256 neighbours in a row (`QuantisedArray`)

Blocks lie inside a row, so the split of dimension 0 over a mesh is that of the weights. Zero is kept as zeros: to clear
rows of an average is to clear them in every array of its tree. Averages are computed in f32; vectors stay f32.

Below f32, rounding is stochastic: the nearer a value is to the upper neighbour, the more often it is rounded up.
Rounding to nearest would never let go of a value that loses 0.1 % a step: half the distance of two bf16 numbers is 0.2
to 0.4 %. Nor would a weight in bf16 ever feel an update below that. The dither is a hash of step, array and position
alone, so a resumed run repeats it, on any mesh, and no array of random bits exists.

Sources: scales a block and codes with an exponent after Dettmers et al. 2022, arXiv 2110.02861, section 2; the code
itself is ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from sae_jax.training.settings import Precision

BLOCK = 256  # numbers that share a scale, at most


class Codebook(NamedTuple):
    """How 8 bits stand for y in [0, 1]: as f32 numbers of few mantissa bits, counted from f to f + y, f = 2^-octaves.

    That is one addition and one shift each way; logarithmic above f, linear below. Neighbours of y are at most
    (y + f) / 2^mantissa apart. The more octaves, the less mantissa.
    """

    octaves: int
    mantissa: int  # bits
    signed: bool


# Where Adam's second moment is small, a linear code has zero or far too much, and the update explodes or stalls.
MEAN = Codebook(15, 3, signed=True)
SQUARE = Codebook(30, 3, signed=False)
WEIGHT = Codebook(3, 5, signed=True)  # the weights of a row are of one magnitude


@struct.dataclass
class QuantisedArray:
    """Numbers in 8 bits: sign * y * scale, where y is at most 1 but for rounding.

    Rounding never makes zero of a number in an unsigned array. Scales bound the numbers of a block, which may all be
    smaller. A block that met inf or nan dequantises to nothing finite; one below the normal f32 to zeros.
    """

    codes: jax.Array  # i8[..., D], or u8[..., D] of numbers without a sign
    scales: jax.Array  # f32[..., D / block]
    codebook: Codebook = struct.field(pytree_node=False)


def zeros_like_moments(weights: Any, precision: Precision, codebook: Codebook) -> Any:
    """Running averages before the first step: zeros of the shape and placement of each array of a tree.

    Args:
        weights: arrays of any float type.
        precision: how those with two dimensions or more are kept.
        codebook: for these, if precision is int8.
    """

    def zeros(x: jax.Array) -> jax.Array | QuantisedArray:
        if precision == "float32" or x.ndim < 2:
            return jnp.zeros_like(x, jnp.float32)
        if precision == "bfloat16":
            return jnp.zeros_like(x, jnp.bfloat16)
        codes = jnp.zeros_like(x, jnp.int8 if codebook.signed else jnp.uint8)
        return QuantisedArray(codes, jnp.zeros_like(x[..., : _blocks(x.shape[-1])[0]], jnp.float32), codebook)

    return jax.tree.map(zeros, weights)


def update_moment(
    moment: Any,
    target: Any,
    decay: jax.Array | float,
    step: jax.Array,
    salt: int,
    factor: jax.Array | float = 1.0,
    power: int = 1,
    first: jax.Array | int = 0,
) -> Any:
    """decay * moment + (1 - decay) * (factor * target)^power for each array of a tree, kept in the form it had.

    Args:
        moment: what `zeros_like_moments` or this function returned.
        target: f32 arrays, a tree like the one that `zeros_like_moments` was given.
        decay: the share that remains of the moment, f32[].
        step: i32[]; with `salt` what stochastic rounding depends on, beside the array and the position in it.
        salt: a number below 8, another one for each call of a step.
        factor: f32[].
        power: 1 or 2.
        first: number, in the whole arrays, of the first row of these.
    """

    def update(seed: int, kept: jax.Array | QuantisedArray, target: jax.Array) -> jax.Array | QuantisedArray:
        y = factor * target
        # Not y**2: XLA would share the square with a norm of the gradients, and write it out for that.
        x = decay * _dequantised(kept) + ((1 - decay) * y * y if power == 2 else (1 - decay) * y)
        if not isinstance(kept, QuantisedArray):
            return x if kept.dtype == jnp.float32 else _to_bfloat16(x, _dither(x, step, seed, first))
        # A bound of the maximum from that of the target: the maximum itself would need x twice, or a copy of it.
        peaks = (factor * _per_block(jnp.abs(target)).max(-1)) ** power
        scales = decay * kept.scales + (1 - decay) * peaks
        return _quantised(x, scales, _dither(x, step, seed, first), kept.codebook)

    leaves, tree = jax.tree.flatten(target)
    pairs = zip(tree.flatten_up_to(moment), leaves, strict=True)
    return tree.unflatten([update(8 * leaf + salt, kept, x) for leaf, (kept, x) in enumerate(pairs)])


def rounded_like(kept: Any, x: Any, step: jax.Array, salt: int, first: jax.Array | int = 0) -> Any:
    """The f32 arrays of a tree, each as it is kept in `kept`: f32, or bf16, rounded stochastically.

    A number that bf16 holds stays as it is. Args: see `update_moment`.
    """
    leaves, tree = jax.tree.flatten(x)
    pairs = zip(tree.flatten_up_to(kept), leaves, strict=True)
    return tree.unflatten(
        [
            x if kept.dtype == jnp.float32 else _to_bfloat16(x, _dither(x, step, 8 * leaf + salt, first))
            for leaf, (kept, x) in enumerate(pairs)
        ]
    )


def dequantise(kept: Any) -> Any:
    """The f32 arrays of a tree of running averages."""
    return jax.tree.map(_dequantised, kept, is_leaf=lambda node: isinstance(node, QuantisedArray))


def _dequantised(kept: jax.Array | QuantisedArray) -> jax.Array:
    if not isinstance(kept, QuantisedArray):
        return kept.astype(jnp.float32)
    floor, shift = _floor_and_shift(kept.codebook)
    count = jnp.abs(kept.codes.astype(jnp.int32)).astype(jnp.uint32)
    y = lax.bitcast_convert_type((count << shift) + _bits(floor), jnp.float32) - floor
    x = y * _expanded(kept.scales, count.shape[-1])
    return jnp.where(kept.codes < 0, -x, x) if kept.codebook.signed else x


def _to_bfloat16(x: jax.Array, dither: jax.Array) -> jax.Array:
    bits = _bits(x) + (dither >> 16)
    upper = lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isnan(x), x, upper).astype(jnp.bfloat16)  # a nan with a full mantissa would wrap to -0


def _quantised(x: jax.Array, scales: jax.Array, dither: jax.Array, codebook: Codebook) -> QuantisedArray:
    floor, shift = _floor_and_shift(codebook)
    # A factor a block: XLA would make an array of the quotients of two.
    factors = jnp.where(scales < jnp.finfo(jnp.float32).tiny, 0.0, 1 / scales)
    y = jnp.abs(x) * _expanded(factors, x.shape[-1])
    count = (_bits(y + floor) - _bits(floor) + (dither >> (32 - shift))) >> shift
    if not codebook.signed:
        count = jnp.maximum(count, (x > 0).astype(jnp.uint32))
        return QuantisedArray(jnp.minimum(count, 255).astype(jnp.uint8), scales, codebook)
    count = jnp.minimum(count, 127).astype(jnp.int32)
    return QuantisedArray(jnp.where(x < 0, -count, count).astype(jnp.int8), scales, codebook)


def _floor_and_shift(codebook: Codebook) -> tuple[jax.Array, int]:
    """(f, mantissa bits of an f32 that the codebook leaves out)."""
    return jnp.float32(2.0**-codebook.octaves), 23 - codebook.mantissa


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


def _expanded(scales: jax.Array, d: int) -> jax.Array:
    """[..., blocks] -> [..., D], each scale at every element of its block."""
    n, length = _blocks(d)
    wide = jnp.broadcast_to(scales[..., None], (*scales.shape, length))
    return wide.reshape(*scales.shape[:-1], n * length)[..., :d]


def _dither(x: jax.Array, step: jax.Array, seed: int, first: jax.Array | int = 0) -> jax.Array:
    """u32 like x: even bits, a function of the arguments and the position in the whole array, however it is split.

    `first`: the number there of the first row of x.
    """
    hashed = _mix(_mix(step.astype(jnp.uint32)) ^ jnp.uint32(seed))
    hashed = hashed.reshape((1,) * x.ndim)
    for axis in range(x.ndim):
        position = lax.broadcasted_iota(jnp.uint32, x.shape, axis, out_sharding=jax.typeof(x).sharding)
        if axis == 0:
            position = position + jnp.asarray(first, jnp.uint32)
        # One hash a row, then one an element.
        hashed = _mix(hashed ^ position[tuple(slice(None) if a <= axis else slice(1) for a in range(x.ndim))])
    return hashed


def _mix(h: jax.Array) -> jax.Array:
    """u32 whose every bit depends on every bit of h: the finaliser of MurmurHash3 (Appleby, public domain)."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
