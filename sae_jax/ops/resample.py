"""Giving dead latents new directions: which rows of the data to take, and which latent takes which.

Rows are drawn without replacement and with a probability that grows with a weight, while they pass by: each gets the
key u^(1 / weight), u uniform, and the largest keys stay. Rows and latents are split over devices; what is kept is
small, and the same on all of them, on any mesh.

Source: Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir", algorithm A.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax import mesh
from sae_jax.mesh import DICT, REPLICATED, ROWS
from sae_jax.ops import spmd


def keep_rows(
    keys_R: jax.Array, kept_RD: jax.Array, rows_BD: jax.Array, weight_B: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What is kept after a batch: (keys, rows), in descending order of keys.

    Args:
        keys_R: f32[R], logarithms of keys; -inf where nothing is kept yet.
        kept_RD: f32[R, D].
        rows_BD: [B, D], ROWS.
        weight_B: f32[B], ROWS, >= 0; a row of weight 0 is never kept.
        key: of this batch.
    """
    tiny = float(jnp.finfo(jnp.float32).tiny)
    u_B = jax.random.uniform(key, weight_B.shape, minval=tiny, out_sharding=mesh.placed(ROWS))
    new_B = jnp.where(weight_B > 0, jnp.log(u_B) / jnp.maximum(weight_B, tiny), -jnp.inf)

    def local(keys_R, kept_RD, rows_bD, new_b):
        n_kept, n_own = len(keys_R), len(rows_bD)
        keys_R, index_R = lax.top_k(jnp.concatenate([keys_R, spmd.gather(new_b, mesh.AXES)]), n_kept)
        own_R = index_R - n_kept - spmd.index(mesh.AXES) * n_own
        is_own_R = (own_R >= 0) & (own_R < n_own) & (index_R >= n_kept)
        new_RD = jnp.where(is_own_R[:, None], rows_bD[jnp.clip(own_R, 0, n_own - 1)].astype(jnp.float32), 0.0)
        old_RD = kept_RD[jnp.minimum(index_R, n_kept - 1)]
        return keys_R, jnp.where((index_R >= n_kept)[:, None], spmd.total(new_RD), old_RD)

    specs = (REPLICATED, REPLICATED, ROWS, ROWS)
    return spmd.per_device(local, specs, (REPLICATED, REPLICATED))(keys_R, kept_RD, rows_BD, new_B)


def ranks(chosen_F: jax.Array) -> jax.Array:
    """How many of the chosen latents (bool[F], DICT) come before each: i32[F], DICT."""
    axes = (*mesh.LATENT, mesh.DATA)  # in the order of DICT

    def local(chosen_f):
        upto_f = jnp.cumsum(chosen_f, dtype=jnp.int32)
        counts_S = spmd.gather(upto_f[-1:], axes)
        before = jnp.where(jnp.arange(len(counts_S)) < spmd.index(axes), counts_S, 0).sum(dtype=jnp.int32)
        return before + upto_f - chosen_f.astype(jnp.int32)

    return spmd.per_device(local, (DICT,), DICT)(chosen_F)
