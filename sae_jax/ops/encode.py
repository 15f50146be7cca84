"""Top-k encoding of a batch by a dictionary that is split over devices.

    pre = (x - b_pre) W_enc^T + b_enc,   z = ReLU(keep_k(pre))

The product runs in row blocks, so that pre-activations never exceed a memory budget. Only the winners carry a
gradient: the weights receive row scatter-adds, and the gradient of `b_pre` sums over the batch before it meets
W_enc, which is one mat-vec instead of a product of full size.

Source: Gao et al. 2024, arXiv 2406.04093, sections 2.3 and D.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax import mesh
from sae_jax.mesh import DICT, REPLICATED, ROWS
from sae_jax.ops import sparse, spmd, topk
from sae_jax.types import Code

PRE_BYTES = 64 * 2**20  # budget for one block of pre-activations
EXACT = lax.Precision.HIGHEST  # float32 means float32: accelerators would round the inputs of a product by default


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def encode_topk(
    x_BD: jax.Array,
    w_enc_FD: jax.Array,
    b_enc_F: jax.Array,
    b_pre_D: jax.Array,
    allowed_F: jax.Array | None,
    k: int,
    dtype: jnp.dtype,
) -> Code:
    """The k largest pre-activations of each row, after ReLU.

    Args:
        x_BD: f32[B, D], ROWS.
        w_enc_FD: f32[F, D], DICT.
        b_enc_F: f32[F], DICT.
        b_pre_D: f32[D], subtracted from x first.
        allowed_F: bool[F], DICT; latents that may be chosen. None allows all.
        k: active latents a row.
        dtype: what the product's inputs are rounded to; it accumulates in f32.

    Returns:
        On one latent shard a public code, [B, min(k, F)]. On S shards [B, S * min(k, F/S)] as CODE: every shard's
        own candidates, those that did not win with value 0.
    """
    return _forward(x_BD, w_enc_FD, b_enc_F, b_pre_D, allowed_F, k, dtype)


def _forward(x_BD, w_enc_FD, b_enc_F, b_pre_D, allowed_F, k, dtype) -> Code:
    def local(x_RD, w_RD, b_R, b_pre_D, allowed_R):
        x_BD = spmd.gather(x_RD, mesh.LATENT) - b_pre_D[None]
        w_FD = spmd.gather(w_RD, mesh.DATA).astype(dtype)
        b_F = spmd.gather(b_R, mesh.DATA)
        if allowed_R is not None:
            b_F = jnp.where(spmd.gather(allowed_R, mesh.DATA), b_F, -jnp.inf)
        n_local = w_FD.shape[0]

        def block(x_bD):
            pre_bF = jnp.einsum(
                "bd,fd->bf", x_bD.astype(dtype), w_FD, precision=EXACT, preferred_element_type=jnp.float32
            )
            pre_bF = pre_bF + b_F[None]
            return topk.top_k(pre_bF, min(k, n_local))

        values_BK, index_BK = _in_row_blocks(block, x_BD, n_local)
        wins_BK = jnp.arange(values_BK.shape[1])[None] < topk.n_winners(values_BK, k)[:, None]
        values_BK = jnp.where(wins_BK, jnp.maximum(values_BK, 0.0), 0.0)
        return Code(index_BK + spmd.first_latent(n_local), values_BK)

    in_specs = (ROWS, DICT, DICT, REPLICATED, DICT if allowed_F is not None else None)
    return spmd.per_device(local, in_specs, spmd.CODES)(x_BD, w_enc_FD, b_enc_F, b_pre_D, allowed_F)


def _forward_saving(x_BD, w_enc_FD, b_enc_F, b_pre_D, allowed_F, k, dtype):
    code = _forward(x_BD, w_enc_FD, b_enc_F, b_pre_D, allowed_F, k, dtype)
    return code, (x_BD, w_enc_FD, b_pre_D, code)


def _backward(k, dtype, saved, cotangent: Code):
    x_BD, w_enc_FD, b_pre_D, code = saved

    def local(x_RD, w_RD, b_pre_D, code, g_BK):
        x_BD = spmd.gather(x_RD, mesh.LATENT) - b_pre_D[None]
        w_FD = spmd.gather(w_RD, mesh.DATA)
        n_local = w_FD.shape[0]
        index_BK = code.indices - spmd.first_latent(n_local)
        g_BK = jnp.where(code.values > 0, g_BK, 0.0)
        g_w_FD = sparse.scatter_rows(index_BK, g_BK, x_BD, n_local)
        g_b_F = jnp.zeros(n_local).at[index_BK.ravel()].add(g_BK.ravel())
        g_b_pre_D = -spmd.total(jnp.matmul(g_b_F, w_FD, precision=EXACT))
        # Dropped by the compiler wherever x is data, which needs no gradient.
        g_x_RD = spmd.reduce_scatter(sparse.gather_rows(index_BK, g_BK, w_FD), mesh.LATENT)
        g_w_RD, g_b_R = (spmd.reduce_scatter(g, mesh.DATA) for g in (g_w_FD, g_b_F))
        return g_x_RD, g_w_RD, g_b_R, g_b_pre_D

    gradients = spmd.per_device(local, (ROWS, DICT, REPLICATED, spmd.CODES, mesh.CODE), (ROWS, DICT, DICT, REPLICATED))(
        x_BD, w_enc_FD, b_pre_D, code, cotangent.values
    )
    return (*gradients, None)


encode_topk.defvjp(_forward_saving, _backward)


def _in_row_blocks(block, x_BD: jax.Array, width: int):
    """`block` over the fewest row blocks whose pre-activations fit the budget; the last is filled up with zeros."""
    n_rows = x_BD.shape[0]
    n_blocks = -(-n_rows * width * 4 // PRE_BYTES)
    if n_blocks <= 1:
        return block(x_BD)
    size = -(-n_rows // (n_blocks * 8)) * 8
    padded_BD = jnp.pad(x_BD, ((0, -n_rows % size), (0, 0)))
    outputs = lax.map(block, padded_BD.reshape(-1, size, x_BD.shape[1]))
    return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:n_rows], outputs)
