"""Exact selection of the k largest pre-activations of a row, on one device and over a split dictionary.

Semantics, defined by the numpy oracle in tests/oracles/topk.py and held by every path: values are compared in f32
with -0.0 equal to 0.0, the larger first, and of equal values the lowest latent first.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from sae_jax import mesh
from sae_jax.ops import spmd, tuning

GROUP = 8  # members of a group in staged selection
STAGES_FROM = 8  # another stage pays when there are at least this many groups for each of the k that are selected


def top_k(pre_BF: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of each row on one device.

    In stages, where the row is long: of groups of neighbours by their maxima, in the same way, then of their members.

    Args:
        pre_BF: f32[B, F].
        k: how many; at most F.

    Returns:
        values f32[B, k] in descending order and their indices i32[B, k]; ties go to the lower index.
    """
    if not _in_stages(pre_BF.shape[1], k):
        values_BK, index_BK = lax.top_k(_one_zero(pre_BF), k)
        return values_BK, index_BK
    groups_BGM = pre_BF.reshape(len(pre_BF), pre_BF.shape[1] // GROUP, GROUP)
    group_BK = _in_order(top_k(groups_BGM.max(-1), k))
    return _best_members(jnp.take_along_axis(groups_BGM, group_BK[:, :, None], axis=1), group_BK, k)


def top_k_latent_major(pre_FB: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`top_k` of pre-activations that lie f32[F, B]; results as there, [B, k]."""
    if not _in_stages(len(pre_FB), k):
        return top_k(pre_FB.T, k)
    n_rows = pre_FB.shape[1]
    groups_GMB = pre_FB.reshape(len(pre_FB) // GROUP, GROUP, n_rows)
    # XLA's CPU back end hands a maximum that it knows as one to a library, for which it writes pre_FB out once more.
    best_GB = lax.reduce(groups_GMB, np.float32(-np.inf), _larger, (1,))
    group_BK = _in_order(top_k_latent_major(best_GB, k))
    rows_B = jnp.arange(n_rows, dtype=jnp.int32)
    members_BKM = groups_GMB[group_BK[:, :, None], jnp.arange(GROUP)[None, None], rows_B[:, None, None]]
    return _best_members(members_BKM, group_BK, k)


def merge(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array], k: int) -> tuple[jax.Array, jax.Array]:
    """The k best of two sorted lists (values, indices) [B, ...], where every index of `a` is below those of `b`."""
    values_BC, index_BC = (jnp.concatenate(pair, axis=1) for pair in zip(a, b, strict=True))
    values_BK, slot_BK = lax.top_k(values_BC, k)
    return values_BK, jnp.take_along_axis(index_BC, slot_BK, axis=1)


def n_winners(values_BK: jax.Array, k: int, k_now: jax.Array | None = None) -> jax.Array:
    """How many of this latent shard's candidates are among the row's k largest over all shards. Inside `per_device`.

    Shards stand in order of latent and each list is sorted, so the winners are a prefix of every list and a count
    says it all. Traffic per device is B*K values out and B counts back, whatever the number of shards: rows are
    dealt to the shards, which merge the lists of their rows.

    Args:
        values_BK: f32[B, K], this shard's candidates for all rows of its data shard, descending.
        k: how many win over all shards.
        k_now: i32[], fewer than k that win instead; None: k.

    Returns:
        i32[B], in 0..K.
    """
    n_shards = mesh.axis_size(mesh.LATENT)
    n_rows, width = values_BK.shape
    if n_shards == 1:
        return jnp.full((n_rows,), min(k, width) if k_now is None else jnp.minimum(k_now, width), jnp.int32)
    lists_SRK = spmd.swap(values_BK.reshape(n_shards, n_rows // n_shards, width))
    merged_RC = lists_SRK.transpose(1, 0, 2).reshape(n_rows // n_shards, n_shards * width)
    _, winner_RK = lax.top_k(merged_RC, min(k, n_shards * width))
    shard_RK = winner_RK // width
    if k_now is not None:
        shard_RK = jnp.where(jnp.arange(shard_RK.shape[1])[None] < k_now, shard_RK, n_shards)
    count_SR = (shard_RK[None] == jnp.arange(n_shards)[:, None, None]).sum(-1, dtype=jnp.int32)
    return spmd.swap(count_SR).reshape(n_rows)


def threshold(values_BF: jax.Array, k: int | jax.Array) -> jax.Array:
    """The k-th largest positive value of each row over all latent shards, f32[B]; 0 for a row with fewer than k.

    Its bits, which order positive floats as integers, are found four at a time: one read counts how many values reach
    each of the 15 that differ in these four. So the values are read 8 times and 8 counts are summed over the shards,
    whatever k and the width are, where sorted lists of a large k would cost a sort and k values a row. Inside
    `per_device`.

    Args:
        values_BF: f32[B, F], this shard's values; those not above 0 are ignored.
        k: rank of the value looked for, one for all rows or i32[B].
    """
    n_rows = len(values_BF)
    bits_BF = _bits(jnp.where(values_BF > 0, values_BF, 0.0)).astype(jnp.uint32)
    k_1B = jnp.broadcast_to(jnp.asarray(k, jnp.int32), (n_rows,))[None]

    def turn(i, bits_B):
        shift = jnp.uint32(28) - 4 * i.astype(jnp.uint32)
        tried = [bits_B | (jnp.uint32(digit) << shift) for digit in range(1, 16)]
        # As one reduction: XLA would read the values anew for each of several.
        at_least = [(bits_BF >= tried_B[:, None]).astype(jnp.int32) for tried_B in tried]
        counts = lax.reduce(at_least, [np.int32(0)] * 15, lambda a, b: [x + y for x, y in zip(a, b, strict=True)], (1,))
        holds_NB = spmd.total(jnp.stack(counts), mesh.LATENT) >= k_1B  # up to some digit, and not beyond
        return bits_B | (holds_NB.sum(0, dtype=jnp.uint32) << shift)

    return _from_bits(lax.fori_loop(0, 8, turn, jnp.zeros(n_rows, jnp.uint32)))


def largest_of(values_F: jax.Array, rank_G: jax.Array) -> jax.Array:
    """The rank-th largest positive value of an array [F], DICT, for each rank (i32[G]); 0 where there are fewer.

    f32[G], the same on all devices.
    """

    def local(values_R, rank_G):
        values_F = spmd.gather(values_R, mesh.DATA)
        return threshold(jnp.broadcast_to(values_F[None], (len(rank_G), len(values_F))), rank_G)

    return spmd.per_device(local, (mesh.DICT, mesh.REPLICATED), mesh.REPLICATED)(values_F, rank_G)


@struct.dataclass
class BatchSelection:
    """The threshold of a selection over a whole batch, and how many lists of candidates were too short."""

    threshold: jax.Array  # f32[], the smallest value kept; 0 if all positive ones were
    n_saturated: jax.Array  # i32[], lists of candidates kept to the last, which may have ended too early
    n_widened: jax.Array  # i32[], such lists of a narrower search before this one; 0 if there was none


def batch_winners(
    values_BC: jax.Array, index_BC: jax.Array, n_latents: int, n_kept: int
) -> tuple[jax.Array, BatchSelection]:
    """Which candidates are among the `n_kept` largest positive ones of all rows and latents. Inside `per_device`.

    Ties go to the lower row, then to the lower latent. The value that separates them is found by bisection, 31 sums
    over all devices; who wins among its equals by two more, only where they do not all win.

    Args:
        values_BC: f32[B, C], each row's C largest on this latent shard, descending.
        index_BC: i32[B, C], their latents, counted within the shard.
        n_latents: of this shard.
        n_kept: over the whole batch, rows * k.

    Returns:
        bool[B, C], and the threshold with its counts.

    Source: Bussmann et al. 2024, arXiv 2412.06410, section 3.
    """
    bits_BC = _bits(values_BC)
    zero = jnp.int32(0)

    def count(keep_BC):
        return spmd.total(keep_BC.sum(dtype=jnp.int32))

    # A value of 0 is never kept: so the least that may separate is the smallest positive one.
    least = jnp.maximum(_last_that(lambda bits: count(bits_BC >= bits) >= n_kept, zero), 1)
    above_BC, equal_BC = bits_BC > least, bits_BC == least
    n_free = n_kept - count(above_BC)

    def first_of_equals():
        n_rows = len(values_BC)
        row_BC = jnp.broadcast_to(jnp.arange(n_rows, dtype=jnp.int32)[:, None], values_BC.shape)
        row_BC = row_BC + spmd.index(mesh.DATA) * n_rows
        latent_BC = index_BC + spmd.first_latent(n_latents)
        row = _last_that(lambda row: count(equal_BC & (row_BC < row)) <= n_free, zero)
        before_BC = equal_BC & (row_BC < row)
        in_row_BC, n_left = equal_BC & (row_BC == row), n_free - count(before_BC)
        latent = _last_that(lambda latent: count(in_row_BC & (latent_BC < latent)) <= n_left, zero)
        return before_BC | (in_row_BC & (latent_BC < latent))

    keep_BC = above_BC | lax.cond(count(equal_BC) > n_free, first_of_equals, lambda: equal_BC)
    found_all = count(bits_BC > 0) <= n_kept
    is_cut = jnp.int32(values_BC.shape[1] < n_latents)
    n_saturated = is_cut * count(keep_BC[:, -1])
    return keep_BC, BatchSelection(jnp.where(found_all, 0.0, _from_bits(least)), n_saturated, zero)


def _last_that(holds: Callable[[jax.Array], jax.Array], zero: jax.Array) -> jax.Array:
    """The largest i32 >= 0 for which `holds`, elementwise; it holds up to some number and not beyond. 0 if never."""
    return lax.fori_loop(0, 31, lambda i, bits: jnp.where(holds(tried := bits | (1 << (30 - i))), tried, bits), zero)


def _bits(values: jax.Array) -> jax.Array:
    """Integers in the order of the values; 0 for those not above 0."""
    return lax.bitcast_convert_type(jnp.maximum(values, 0.0), jnp.int32)


def _from_bits(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _in_stages(width: int, k: int) -> bool:
    return tuning.current().in_stages and width % GROUP == 0 and width // GROUP >= STAGES_FROM * k


def _one_zero(pre: jax.Array) -> jax.Array:
    # lax.top_k ranks -0.0 below 0.0; adding 0.0 instead of selecting would be optimised away.
    return jnp.where(pre == 0, 0.0, pre)


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where((a > b) | (a != a), a, b)  # nan is the largest, as it is to lax.top_k


def _in_order(best: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The chosen groups in order of latent: else ties would go by group maximum."""
    return jnp.sort(best[1], axis=-1)


def _best_members(members_BKM: jax.Array, group_BK: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    values_BK, slot_BK = lax.top_k(_one_zero(members_BKM.reshape(len(members_BKM), k * GROUP)), k)
    return values_BK, jnp.take_along_axis(group_BK, slot_BK // GROUP, axis=1) * GROUP + slot_BK % GROUP
