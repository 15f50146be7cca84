"""GPU kernels for exact top-k encoding of one block of rows by one device's latents.

    pre = x W^T + b,   keep the k largest of each row

The encoder product takes the maximum of every group of 32 latents in its epilogue. The k winners of a row lie in its
k best groups, so selection reads 1/32 of the pre-activations and then k groups, where `lax.top_k` sorts the whole row
on a GPU for k above 16.

Bytes decide the rest. At d=768, n=131072, k=32, for each row:
- writing every pre-activation takes 4 n = 512 KiB;
- computing the winning groups again takes 32 k d products in bf16 whose weights no other row shares, 1.5 MiB of reads,
  and would round differently from the maxima that chose the groups, so that ties could come out wrong;
- writing only groups that can still win takes 4 n sqrt(k / G) * 2 = 90 KiB for G = n / 32 groups. This is what runs: a
  first pass over sqrt(k G) groups writes all of them, the k-th best maximum there is a lower bound of the k-th best of
  all, and the second pass writes a group where its maximum exceeds that bound: a tie would lose to the k groups of the
  first pass, which stand before it. Were the latents in random order, these are about sqrt(k G) groups again; the order
  moves bytes, never the result. A group is one cache line of 128 bytes.
The buffer has the full n columns all the same: the caller bounds rows times latents by its memory budget.

Values travel as integers that order as floats do, so -0.0, ties and NaN (largest, as `lax.top_k` has it) are settled
once, in the epilogue.

Kernels go through Triton, which serves compute capability 8.0 and newer (Mosaic GPU begins at 9.0); JAX 0.11 says that
Pallas will drop it one day. Block sizes follow from bytes and registers.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

GROUP = 32  # latents of a group: 128 bytes of pre-activations
TILE_ROWS, TILE_LATENTS = 128, 128  # of one program; 64 KiB of accumulators over 8 warps, 64 registers a thread
TILE_DEPTH_BYTES = 128  # of each row in one step; three stages take 96 KiB, below the 99 KiB of compute capability 8.9
TWO_PASSES_FROM = 32  # groups for each latent wanted; below, the first pass would be more than a sixth of the work
MAX_CANDIDATES = 2**14  # that one program of 16 warps holds in registers; twice as many spill
LOWEST, HIGHEST = -(2**31), 2**31 - 1  # keys: below every number's, and NaN's


def block_topk(
    x_bD: jax.Array, w_FD: jax.Array, b_F: jax.Array, k: int, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The k largest pre-activations of each row. One device.

    Args:
        x_bD: bf16 or f32[b, D]; b * F * 4 bytes of memory are taken.
        w_FD: [F, D] of the same dtype.
        b_F: f32[F]; -inf keeps a latent out until nothing else is left.
        k: how many.
        interpret: run the kernels as ordinary JAX, on any back end.

    Returns:
        values f32[b, k] in descending order and their indices i32[b, k]; ties go to the lowest latent.

    Raises:
        NotImplementedError: where the kernels cannot serve the shapes; the message says why.
    """
    n_rows, n_latents = x_bD.shape[0], w_FD.shape[0]
    _refuse(x_bD.dtype, w_FD.dtype, n_latents, k)
    tile_rows = min(TILE_ROWS, max(16, pl.next_power_of_2(n_rows)))  # a tensor core takes no fewer than 16
    x_bD = jnp.pad(x_bD, ((0, -n_rows % tile_rows), (0, 0)))
    n_tiles = pl.cdiv(n_latents, TILE_LATENTS)
    groups_per_tile = TILE_LATENTS // GROUP
    n_groups = n_tiles * groups_per_tile
    product = partial(_product, x_bD, w_FD, b_F, n_tiles=n_tiles, tile_rows=tile_rows, interpret=interpret)
    best_groups = partial(_best_groups, k=k, interpret=interpret)

    everything_b = jnp.full(x_bD.shape[0], LOWEST, jnp.int32)
    if n_groups < TWO_PASSES_FROM * k:
        keys_bGM, maxima_bG = product(everything_b, (), 0, n_tiles)
    else:
        n_first = pl.cdiv(math.isqrt(k * n_groups), groups_per_tile)
        partly = product(everything_b, (), 0, n_first)
        _, bound_b = best_groups(partly[1], n_groups=n_first * groups_per_tile)
        keys_bGM, maxima_bG = product(bound_b, partly, n_first, n_tiles - n_first)
    group_bK, _ = best_groups(maxima_bG, n_groups=n_groups)
    keys_bK, index_bK = _best_members(keys_bGM, group_bK, k=k, interpret=interpret)
    # The winners stand in order of latent; sorting k of them is all that is left to XLA.
    keys_bK, slot_bK = lax.top_k(keys_bK[:n_rows, :k], k)
    return _value(keys_bK), jnp.take_along_axis(index_bK[:n_rows], slot_bK, axis=1)


def _refuse(x_dtype: jnp.dtype, w_dtype: jnp.dtype, n_latents: int, k: int) -> None:
    if x_dtype != w_dtype or x_dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"block_topk takes two bf16 or two f32 inputs, not {x_dtype} and {w_dtype}")
    if k * GROUP > n_latents:
        raise NotImplementedError(f"block_topk needs {GROUP} latents for each of k={k} wanted, not {n_latents} in all")
    for name, value, limit in (("n_latents", n_latents, MAX_CANDIDATES * GROUP), ("k", k, MAX_CANDIDATES // GROUP)):
        if value > limit:
            raise NotImplementedError(f"block_topk serves {name} up to {limit}, not {value}: a row fills the registers")


def _product(x_bD, w_FD, b_F, bound_b, partly, first_tile, n_run, *, n_tiles, tile_rows, interpret):
    """Keys i32[b, G, 32] and group maxima i32[b, G] of `n_run` tiles of latents, into the buffers `partly` if given.

    A group is written where its maximum exceeds the row's bound, its maximum always. All row blocks of a tile run side
    by side: weights are read from memory once, rows from the cache.
    """
    n_rows, depth = x_bD.shape
    n_latents = w_FD.shape[0]
    groups_per_tile = TILE_LATENTS // GROUP
    step = min(TILE_DEPTH_BYTES // x_bD.dtype.itemsize, max(16, pl.next_power_of_2(depth)))

    def kernel(x_ref, w_ref, b_ref, bound_ref, *buffers):
        keys_ref, maxima_ref = buffers[-2:]
        tile = pl.program_id(1) + first_tile
        row_M = pl.program_id(0) * tile_rows + jnp.arange(tile_rows)
        latent_N = tile * TILE_LATENTS + jnp.arange(TILE_LATENTS)
        exists_N = latent_N < n_latents
        source_N = jnp.minimum(latent_N, n_latents - 1)

        def accumulate(i, sum_MN):
            column_C = i * step + jnp.arange(step)
            # Highest: f32 inputs are multiplied as f32, not rounded for the tensor cores.
            return sum_MN + lax.dot_general(
                _load(x_ref, row_M, column_C, depth),
                _load(w_ref, source_N, column_C, depth),
                (((1,), (1,)), ((), ())),
                precision="highest",
                preferred_element_type=jnp.float32,
            )

        zeros_MN = jnp.zeros((tile_rows, TILE_LATENTS), jnp.float32)
        pre_MN = lax.fori_loop(0, pl.cdiv(depth, step), accumulate, zeros_MN)
        pre_MN = pre_MN + plgpu.load(b_ref.at[source_N])[None]
        keys_MN = jnp.where(exists_N[None], _key(pre_MN), LOWEST)

        keys_MGC = keys_MN.reshape(tile_rows, groups_per_tile, GROUP)
        maxima_MG = keys_MGC.max(-1)
        group_G = tile * groups_per_tile + jnp.arange(groups_per_tile)
        plgpu.store(maxima_ref.at[row_M[:, None], group_G[None]], maxima_MG)
        wanted_MG = maxima_MG > plgpu.load(bound_ref.at[row_M])[:, None]
        plgpu.store(
            keys_ref.at[row_M[:, None, None], group_G[None, :, None], jnp.arange(GROUP)[None, None]],
            keys_MGC,
            mask=jnp.broadcast_to(wanted_MG[:, :, None], keys_MGC.shape),
        )

    return pl.pallas_call(
        kernel,
        grid=(n_rows // tile_rows, n_run),  # on a GPU the first runs fastest
        out_shape=(
            jax.ShapeDtypeStruct((n_rows, n_tiles * groups_per_tile, GROUP), jnp.int32),
            jax.ShapeDtypeStruct((n_rows, n_tiles * groups_per_tile), jnp.int32),
        ),
        input_output_aliases={4: 0, 5: 1} if partly else {},
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
        name="encoder_product",
    )(x_bD, w_FD, b_F, bound_b, *partly)


def _load(ref, row_N, column_C, depth):
    place = ref.at[row_N[:, None], column_C[None]]
    if depth % column_C.size == 0:  # a mask costs the copy pipeline its widest loads
        return plgpu.load(place)
    mask_NC = jnp.broadcast_to((column_C < depth)[None], (row_N.size, column_C.size))
    return plgpu.load(place, mask=mask_NC, other=0.0)


def _best_groups(maxima_bG, *, k, n_groups, interpret):
    """The k best of the first `n_groups` groups of each row, i32[b, k + 1] in order of latent, and the k-th key i32[b].

    Reads each maximum once and keeps a row in the registers of one program. The last column is where a program puts
    what it does not want: stores that are masked out may not collide with those that are not.
    """
    n_rows = maxima_bG.shape[0]
    width = pl.next_power_of_2(n_groups)

    def kernel(maxima_ref, group_ref, kth_ref):
        row = pl.program_id(0)
        group_G = jnp.arange(width)
        keys_G = plgpu.load(maxima_ref.at[row, group_G], mask=group_G < n_groups, other=LOWEST)
        kth = _kth_largest(keys_G, k)
        slot_G = _slots(keys_G, kth, k)
        plgpu.store(group_ref.at[row, slot_G], group_G, mask=slot_G < k)
        plgpu.store(kth_ref.at[row], kth)

    return pl.pallas_call(
        kernel,
        grid=(n_rows,),
        out_shape=(jax.ShapeDtypeStruct((n_rows, k + 1), jnp.int32), jax.ShapeDtypeStruct((n_rows,), jnp.int32)),
        compiler_params=plgpu.CompilerParams(num_warps=_warps(width), num_stages=1),
        interpret=interpret,
        name="best_groups",
    )(maxima_bG)


def _best_members(keys_bGM, group_bK, *, k, interpret):
    """Keys and latents, i32[b, k + 1] in order of latent, of the k largest members of each row's k groups."""
    n_rows = keys_bGM.shape[0]
    width = pl.next_power_of_2(k)

    def kernel(keys_ref, group_ref, key_ref, index_ref):
        row = pl.program_id(0)
        slot_K = jnp.arange(width)
        member_M = jnp.arange(GROUP)
        group_K = plgpu.load(group_ref.at[row, slot_K], mask=slot_K < k, other=0)
        mask_KM = jnp.broadcast_to((slot_K < k)[:, None], (width, GROUP))
        keys_KM = plgpu.load(keys_ref.at[row, group_K[:, None], member_M[None]], mask=mask_KM, other=LOWEST)
        keys_C = keys_KM.reshape(width * GROUP)
        latent_C = (group_K[:, None] * GROUP + member_M[None]).reshape(width * GROUP)
        slot_C = _slots(keys_C, _kth_largest(keys_C, k), k)
        plgpu.store(key_ref.at[row, slot_C], keys_C, mask=slot_C < k)
        plgpu.store(index_ref.at[row, slot_C], latent_C, mask=slot_C < k)

    return pl.pallas_call(
        kernel,
        grid=(n_rows,),
        out_shape=(jax.ShapeDtypeStruct((n_rows, k + 1), jnp.int32),) * 2,
        compiler_params=plgpu.CompilerParams(num_warps=_warps(width * GROUP), num_stages=1),
        interpret=interpret,
        name="best_members",
    )(keys_bGM, group_bK)


def _kth_largest(keys_N, k):
    """The largest key that at least k keys reach, bit by bit: 32 counts whatever k is, where k maxima would take k."""

    def bit(i, kth):
        candidate = kth ^ lax.shift_left(jnp.int32(1), jnp.int32(31) - i)
        n_reach = (keys_N >= candidate).astype(jnp.int32).sum(dtype=jnp.int32)
        return jnp.where(n_reach >= k, candidate, kth)

    return lax.fori_loop(jnp.int32(0), jnp.int32(32), bit, jnp.int32(LOWEST))


def _slots(keys_N, kth, k):
    """Place of each of the k largest among themselves, in order of index; k for all others. The lowest ties win."""
    above_N = (keys_N > kth).astype(jnp.int32)
    tied_N = (keys_N == kth).astype(jnp.int32)
    n_tied_in = k - above_N.sum(dtype=jnp.int32)
    tied_so_far_N = jnp.cumsum(tied_N, dtype=jnp.int32)
    wins_N = (above_N == 1) | ((tied_N == 1) & (tied_so_far_N <= n_tied_in))
    slot_N = jnp.cumsum(above_N, dtype=jnp.int32) + jnp.minimum(tied_so_far_N, n_tied_in) - 1
    return jnp.where(wins_N, slot_N, k)


def _key(pre):
    """Integers in the order of the floats: -0.0 as 0.0, every NaN above infinity."""
    bits = lax.bitcast_convert_type(pre, jnp.int32)
    bits = jnp.where(bits == LOWEST, 0, bits)
    return jnp.where(pre != pre, HIGHEST, _flip(bits))


def _value(key):
    return lax.bitcast_convert_type(_flip(key), jnp.float32)


def _flip(bits):
    """Negative floats order backwards in their bits. Its own inverse."""
    return jnp.where(bits < 0, bits ^ HIGHEST, bits)


def _warps(width):
    """16 candidates in each thread while that lasts; more warps would exchange more in each of the 32 counts."""
    return min(16, max(1, width // 512))
