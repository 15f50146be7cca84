"""Exact selection of the k largest pre-activations of a row, on one device and over a split dictionary.

Semantics, defined by the numpy oracle in tests/oracles/topk.py and held by every path: values are compared in f32
with -0.0 equal to 0.0, the larger first, and of equal values the lowest latent first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax import mesh

GROUP = 32  # members of a group in two-stage selection: a group's maxima vectorise, its members stay in cache
TWO_STAGE_FROM = 8  # two-stage pays when there are at least this many groups for each of the k wanted


def top_k(pre_BF: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of each row on one device.

    Args:
        pre_BF: f32[B, F].
        k: how many; at most F.

    Returns:
        values f32[B, k] in descending order and their indices i32[B, k]; ties go to the lower index.
    """
    # lax.top_k ranks -0.0 below 0.0; adding 0.0 instead of selecting would be optimised away.
    pre_BF = jnp.where(pre_BF == 0, 0.0, pre_BF)
    n_rows, width = pre_BF.shape
    if width % GROUP or width // GROUP < TWO_STAGE_FROM * k:
        values_BK, index_BK = lax.top_k(pre_BF, k)
        return values_BK, index_BK
    groups_BGM = pre_BF.reshape(n_rows, width // GROUP, GROUP)
    _, group_BK = lax.top_k(groups_BGM.max(-1), k)
    # Candidates must stand in order of latent, or the second stage would break ties by group maximum.
    group_BK = jnp.sort(group_BK, axis=-1)
    members_BC = jnp.take_along_axis(groups_BGM, group_BK[:, :, None], axis=1).reshape(n_rows, k * GROUP)
    values_BK, slot_BK = lax.top_k(members_BC, k)
    return values_BK, jnp.take_along_axis(group_BK, slot_BK // GROUP, axis=1) * GROUP + slot_BK % GROUP


def n_winners(values_BK: jax.Array, k: int) -> jax.Array:
    """How many of this latent shard's candidates are among the row's k largest over all shards. Inside `per_device`.

    Shards stand in order of latent and each list is sorted, so the winners are a prefix of every list and a count
    says it all. Traffic per device is B*K values out and B counts back, whatever the number of shards: rows are
    dealt to the shards, which merge the lists of their rows.

    Args:
        values_BK: f32[B, K], this shard's candidates for all rows of its data shard, descending.
        k: how many win over all shards.

    Returns:
        i32[B], in 0..K.
    """
    n_shards = mesh.axis_size(mesh.LATENT)
    n_rows, width = values_BK.shape
    if n_shards == 1:
        return jnp.full((n_rows,), min(k, width), jnp.int32)
    lists_SRK = lax.all_to_all(values_BK.reshape(n_shards, n_rows // n_shards, width), mesh.LATENT, 0, 0)
    merged_RC = lists_SRK.transpose(1, 0, 2).reshape(n_rows // n_shards, n_shards * width)
    _, winner_RK = lax.top_k(merged_RC, min(k, n_shards * width))
    shard_S = jnp.arange(n_shards)
    count_SR = (winner_RK[None] // width == shard_S[:, None, None]).sum(-1, dtype=jnp.int32)
    return lax.all_to_all(count_SR, mesh.LATENT, 0, 0).reshape(n_rows)
