"""The optimiser and the running average of the weights, and how their arrays are kept between steps.

    m <- b1 m + (1 - b1) g      v <- b2 v + (1 - b2) g^2      w <- w - rate * m' / (sqrt(v') + eps)
    a <- decay a + (1 - decay) w                              m', v', a': divided by 1 - b^t

All of it is computed in f32 from what is kept, and used before it is kept again. What is kept of a matrix is one of

    float32     4 bytes a weight, as it is
    bfloat16    2 bytes, the upper half of the f32
    int8        1 byte and one f32 scale a block of up to 256 neighbours in a row (`Blocks`)

while vectors (biases, thresholds) stay f32. Blocks lie inside a row, so the split of dimension 0 over a mesh is that of
the weights, and zero is kept as zeros: rows of any moment are cleared by clearing them in every array of its tree.

Below f32, rounding is stochastic, as likely up as the value is near the upper neighbour. Rounding to nearest would
never let go of a value that loses 0.1 % a step: half the distance of two bf16 numbers is 0.2 to 0.4 %. The dither is a
hash of step, leaf and position alone, so a resumed run repeats it, on any mesh, and no array of random bits exists.

Sources: Kingma and Ba 2015, arXiv 1412.6980, algorithm 1. Blocks and codes with an exponent after Dettmers et al. 2022,
arXiv 2110.02861, section 2; the code itself is ours (see `Blocks`). Bias correction of the average: Gao et al. 2024,
arXiv 2406.04093, released training code.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

if TYPE_CHECKING:
    from sae_jax.train.state import TrainConfig

Precision = Literal["float32", "bfloat16", "int8"]

B1, B2, EPS = 0.9, 0.999, 6.25e-10
BLOCK = 256  # elements that share a scale, at most
FLOOR = 2.0**-15  # of a block's maximum: codes are logarithmic above it, linear below


@struct.dataclass
class Blocks:
    """8-bit floats of their block's own range: x = sign * y * scale with y in [0, 1].

    A code counts the f32 numbers with few mantissa bits between FLOOR and FLOOR + y, which is one addition and one
    shift each way. Signed codes have 3 mantissa bits, so neighbours of y are (y + FLOOR) / 8 apart or closer, and the
    least number above zero is 2^-18 of the block's maximum. Codes of numbers that are never negative have 4 bits and
    hold the square root: for second moments a linear code would be zero where they are small, and the update would
    explode. A block with inf or nan in it reads back as nan; one that holds no normal f32 reads back as zeros.
    """

    codes: jax.Array  # i8[..., D], or u8[..., D] where no number is negative
    scales: jax.Array  # f32[..., D / block], maximum of each block


@struct.dataclass
class AdamState:
    """Adam's moments, each kept as `keep` says."""

    count: jax.Array  # i32[], steps done
    mean: Any  # of gradients, a tree like the weights
    square: Any  # of squared gradients


def learning_rate(config: TrainConfig, n_latents: int) -> float:
    """The configured rate, or 2e-4 / sqrt(n_latents / 2^14) (Gao et al. 2024, arXiv 2406.04093, appendix A.3)."""
    return config.lr if config.lr is not None else 2e-4 / (n_latents / 2**14) ** 0.5


def optimiser(config: TrainConfig, n_latents: int) -> optax.GradientTransformation:
    """Clip by the global norm, then Adam(0.9, 0.999, eps 6.25e-10) at a constant rate."""
    clip = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    rate = learning_rate(config, n_latents)
    return optax.chain(*clip, scale_by_adam(config.moments), optax.scale(-rate))


def scale_by_adam(precision: Precision) -> optax.GradientTransformation:
    """optax.scale_by_adam with these constants, its moments kept in `precision`."""

    def init(weights: Any) -> AdamState:
        mean = jax.tree.map(lambda w: nothing(w, precision), weights)
        square = jax.tree.map(lambda w: nothing(w, precision, signed=False), weights)
        return AdamState(jnp.int32(0), mean, square)

    def update(gradients: Any, state: AdamState, weights: Any = None) -> tuple[Any, AdamState]:
        count = state.count + 1
        fix_mean, fix_square = correction(B1, count), correction(B2, count)
        leaves, tree = jax.tree.flatten(gradients)
        kept = zip(leaves, tree.flatten_up_to(state.mean), tree.flatten_up_to(state.square), strict=True)
        updates, means, squares = [], [], []
        for leaf, (g, mean, square) in enumerate(kept):
            mean = B1 * read(mean) + (1 - B1) * g
            square = B2 * read(square, signed=False) + (1 - B2) * g**2
            updates.append(mean / fix_mean / (jnp.sqrt(square / fix_square) + EPS))
            means.append(keep(mean, precision, count, 3 * leaf))
            squares.append(keep(square, precision, count, 3 * leaf + 1, signed=False))
        return tree.unflatten(updates), AdamState(count, tree.unflatten(means), tree.unflatten(squares))

    return optax.GradientTransformation(init, update)  # pyrefly: ignore[bad-argument-type]


def no_average(weights: Any, precision: Precision) -> Any:
    """The running average of `weights` before the first step: zeros, which `averaged` corrects for."""
    return jax.tree.map(lambda w: nothing(w, precision), weights)


def follow(average: Any, weights: Any, decay: float, step: jax.Array, precision: Precision) -> Any:
    """The running average after the step numbered `step`, which ended in `weights`."""
    leaves, tree = jax.tree.flatten(weights)
    pairs = enumerate(zip(tree.flatten_up_to(average), leaves, strict=True))
    moved = [keep(decay * read(a) + (1 - decay) * w, precision, step, 3 * leaf + 2) for leaf, (a, w) in pairs]
    return tree.unflatten(moved)


def averaged(average: Any, step: jax.Array, decay: float) -> Any:
    """The averaged weights f32 after `step` steps, the bias of their zero start removed: a / (1 - decay^t)."""
    return jax.tree.map(lambda a: read(a) / correction(decay, step), average, is_leaf=lambda a: isinstance(a, Blocks))


def correction(decay: float, step: jax.Array) -> jax.Array:
    """1 - decay^step, f32[]; written so that it does not cancel near decay = 1."""
    return -jnp.expm1(step.astype(jnp.float32) * math.log(decay))


def nothing(like: jax.Array, precision: Precision, signed: bool = True) -> jax.Array | Blocks:
    """Zeros of the shape and the place of an f32 array, as `keep` keeps them."""
    if precision == "float32" or like.ndim < 2:
        return jnp.zeros_like(like)
    if precision == "bfloat16":
        return jnp.zeros_like(like, jnp.bfloat16)
    codes = jnp.zeros_like(like, jnp.int8 if signed else jnp.uint8)
    return Blocks(codes, jnp.zeros_like(like[..., : _blocks(like.shape[-1])[0]]))


def keep(x: jax.Array, precision: Precision, step: jax.Array, salt: int, signed: bool = True) -> jax.Array | Blocks:
    """An f32 array in fewer bytes.

    Args:
        x: f32[...]; a vector or a scalar stays as it is.
        precision: in which form.
        step: i32[], with `salt` what stochastic rounding depends on, beside the position in `x`.
        salt: another number for each array of a step.
        signed: False for numbers that are never negative and of which the root matters.
    """
    if precision == "float32" or x.ndim < 2:
        return x
    dither = _dither(x, step, salt)
    if precision == "bfloat16":
        bits = lax.bitcast_convert_type(x, jnp.uint32) + (dither >> 16)
        upper = lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
        return jnp.where(jnp.isnan(x), x, upper).astype(jnp.bfloat16)  # a nan with a full mantissa would wrap to -0
    size = jnp.abs(x) if signed else jnp.sqrt(x)
    scales = _per_block(size).max(-1)
    normal = jnp.where(scales < jnp.finfo(jnp.float32).tiny, jnp.inf, scales)
    y = size / _spread(normal, x.shape[-1])
    shift = _shift(signed)
    above = lax.bitcast_convert_type(y + FLOOR, jnp.uint32) - _floor_bits()
    code = (above + (dither >> (32 - shift))) >> shift
    if signed:
        code = lax.bitcast_convert_type(code, jnp.int32)
        return Blocks(jnp.where(x < 0, -code, code).astype(jnp.int8), scales)
    # Never down to zero: the root of v divides.
    return Blocks(jnp.maximum(code, (y > 0).astype(jnp.uint32)).astype(jnp.uint8), scales)


def read(kept: jax.Array | Blocks, signed: bool = True) -> jax.Array:
    """The f32 array that `keep` was given, but for rounding. `signed` as it was there."""
    if not isinstance(kept, Blocks):
        return kept.astype(jnp.float32)
    code = jnp.abs(kept.codes.astype(jnp.int32)).astype(jnp.uint32)
    y = lax.bitcast_convert_type((code << _shift(signed)) + _floor_bits(), jnp.float32) - FLOOR
    size = y * _spread(kept.scales, code.shape[-1])
    return jnp.where(kept.codes < 0, -size, size) if signed else size**2


def _shift(signed: bool) -> int:
    """Mantissa bits of an f32 that a code leaves out."""
    return 20 if signed else 19


def _floor_bits() -> jax.Array:
    return lax.bitcast_convert_type(jnp.float32(FLOOR), jnp.uint32)


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


def _dither(x: jax.Array, step: jax.Array, salt: int) -> jax.Array:
    """u32 like x: even bits, a function of the arguments and the position in the whole array, however it is split."""
    hashed = _mix(_mix(step.astype(jnp.uint32)) ^ jnp.uint32(salt))
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
