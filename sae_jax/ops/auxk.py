"""How well the dead latents would explain what the living leave over: the part of AuxK that scales with the batch.

    z = ReLU(keep_k(pre)) over the dead only,   e_hat = z W_dec,   sum ||e - e_hat||^2

k is large here, half of d_model, and the dead are few: their rows are gathered and everything is dense in them. Dense
also means that selection needs no order, so the k-th largest value is found by bisection instead of a sort.

Three cases, chosen while it runs: no dead latent costs nothing; few are gathered to a fixed capacity; many are taken as
they lie, the whole dictionary with the living barred.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax import mesh
from sae_jax.mesh import DICT, REPLICATED, ROWS
from sae_jax.ops import spmd, topk, tuning
from sae_jax.ops.encode import EXACT, centred, product

CAPACITY = 16  # the few: at most this part of a device's latents
ROWS_AT_ONCE = 4  # encoder blocks' rows: the products here are narrower


@partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def unexplained(
    x_BD: jax.Array,
    error_BD: jax.Array,
    w_enc_FD: jax.Array,
    b_enc_F: jax.Array,
    b_pre_D: jax.Array,
    w_dec_FD: jax.Array,
    allowed_F: jax.Array,
    k: int,
    dtype: jnp.dtype,
    tangent: bool = False,
) -> jax.Array:
    """Squared error, summed over rows and D, that is left when the k strongest allowed latents explain `error`.

    Args:
        x_BD: [B, D], ROWS; as data, without gradient.
        error_BD: f32[B, D], ROWS; as data.
        w_enc_FD, b_enc_F, b_pre_D: the encoder, as in `encode.encode_topk`.
        w_dec_FD: f32[F, D], DICT.
        allowed_F: bool[F], DICT.
        k: latents a row; of several equal to the k-th largest value all are taken.
        dtype: what inputs of products are rounded to.
        tangent: of the gradient of w_dec, as in `sparse.decode`.

    Returns:
        f32[]; 0 if none is allowed.
    """
    return _with_gradients(x_BD, error_BD, w_enc_FD, b_enc_F, b_pre_D, w_dec_FD, allowed_F, k, dtype, tangent)[0]


def _forward(x_BD, error_BD, w_enc_FD, b_enc_F, b_pre_D, w_dec_FD, allowed_F, k, dtype, tangent):
    # The gradient of a sum of squares is known up to its factor, so one pass over the rows gives both.
    error, gradients = _with_gradients(
        x_BD, error_BD, w_enc_FD, b_enc_F, b_pre_D, w_dec_FD, allowed_F, k, dtype, tangent
    )
    return error, (gradients, allowed_F.any())


def _backward(k, dtype, tangent, saved, factor: jax.Array):
    gradients, some = saved
    # Without a dead latent they are zeros, and stay untouched. A loop of one trip or none, since it works in place
    # where the branches of a cond would copy. A factor of 0 says that the loss was not finite.
    g_w_enc, g_b_enc, g_b_pre, g_w_dec = lax.fori_loop(
        0,
        some.astype(jnp.int32),
        lambda _, gradients: jax.tree.map(lambda g: jnp.where(factor == 0, 0.0, factor * g), gradients),
        gradients,
    )
    return None, None, g_w_enc, g_b_enc, g_b_pre, g_w_dec, None


unexplained.defvjp(_forward, _backward)


def _with_gradients(x_BD, error_BD, w_enc_FD, b_enc_F, b_pre_D, w_dec_FD, allowed_F, k, dtype, tangent):
    """The sum, and its gradients with respect to w_enc, b_enc, b_pre and w_dec."""

    def local(x_RD, error_RD, w_enc_RD, b_R, b_pre_D, w_dec_RD, allowed_R):
        capacity = -(-len(b_R) // CAPACITY)
        n_allowed = spmd.largest(allowed_R.sum(dtype=jnp.int32))

        def none():
            return jnp.float32(0), jax.tree.map(jnp.zeros_like, (w_enc_RD, b_R, b_pre_D, w_dec_RD))

        def few():
            at_C = jnp.nonzero(allowed_R, size=capacity, fill_value=0)[0]
            is_one_C = jnp.arange(capacity) < allowed_R.sum()
            b_C = jnp.where(is_one_C, b_R[at_C], -jnp.inf)
            error, (g_enc_CD, g_b_C, g_pre_D, g_dec_CD) = _dense(
                x_RD, error_RD, w_enc_RD[at_C], b_C, b_pre_D, w_dec_RD[at_C], k, dtype, tangent
            )

            def put(g_C, like_R):
                return jnp.zeros_like(like_R).at[at_C].add(g_C)

            return error, (put(g_enc_CD, w_enc_RD), put(g_b_C, b_R), g_pre_D, put(g_dec_CD, w_dec_RD))

        def many():
            b_allowed_R = jnp.where(allowed_R, b_R, -jnp.inf)
            return _dense(x_RD, error_RD, w_enc_RD, b_allowed_R, b_pre_D, w_dec_RD, k, dtype, tangent)

        return lax.switch(sum((n_allowed > limit).astype(jnp.int32) for limit in (0, capacity)), (none, few, many))

    in_specs = (ROWS, ROWS, DICT, DICT, REPLICATED, DICT, DICT)
    return spmd.per_device(local, in_specs, (REPLICATED, (DICT, DICT, REPLICATED, DICT)))(
        x_BD, error_BD, w_enc_FD, b_enc_F, b_pre_D, w_dec_FD, allowed_F
    )


def _dense(x_RD, error_RD, w_enc_CD, b_C, b_pre_D, w_dec_CD, k, dtype, tangent):
    """`_with_gradients` on one device, for the latents it is given of those that it owns."""
    w_enc_GD, w_dec_GD = (spmd.gather(w_CD.astype(dtype), mesh.DATA) for w_CD in (w_enc_CD, w_dec_CD))
    b_G = spmd.gather(b_C, mesh.DATA)
    rows = _row_blocks(len(x_RD), x_RD.shape[1], len(b_G))

    def block(sums, blocks):
        error, g_enc_GD, g_b_G, g_dec_GD = sums
        x_rD, error_rD, is_row_r = blocks
        x_bD = spmd.gather(centred(x_rD, b_pre_D).astype(dtype), mesh.LATENT)
        pre_bG = product(x_bD, w_enc_GD, "bd,gd->bg") + b_G[None]
        chosen_bG = (pre_bG > 0) & (pre_bG >= topk.threshold(pre_bG, k)[:, None])
        z_bG = jnp.where(chosen_bG, pre_bG, 0.0).astype(dtype)
        left_rD = spmd.reduce_scatter(product(z_bG, w_dec_GD, "bg,gd->bd"), mesh.LATENT) - error_rD
        left_rD = jnp.where(is_row_r[:, None], left_rD, 0.0)  # not one that only fills up the block
        g_bD = spmd.gather((2 * left_rD).astype(dtype), mesh.LATENT)
        g_pre_bG = jnp.where(chosen_bG, product(g_bD, w_dec_GD, "bd,gd->bg"), 0.0)
        sums = (
            error + (left_rD**2).sum(),
            g_enc_GD + product(g_pre_bG.astype(dtype), x_bD, "bg,bd->gd"),
            g_b_G + g_pre_bG.sum(0),
            g_dec_GD + product(z_bG, g_bD, "bg,bd->gd"),
        )
        return sums, None

    zeros = jnp.float32(0), jnp.zeros(w_enc_GD.shape), jnp.zeros(b_G.shape), jnp.zeros(w_dec_GD.shape)
    blocks = rows.own(x_RD), rows.own(error_RD), rows.own(jnp.ones(len(x_RD), bool))
    sums, _ = spmd.scan(block, zeros, blocks)
    error, g_enc_CD, g_b_C, g_dec_CD = (sums[0], *(spmd.reduce_scatter(g, mesh.DATA) for g in sums[1:]))
    if tangent:
        g_dec_CD = g_dec_CD - (g_dec_CD * w_dec_CD).sum(-1, keepdims=True) * w_dec_CD
    g_pre_D = -spmd.total(jnp.matmul(g_b_C, w_enc_CD, precision=EXACT))
    return spmd.total(error), (g_enc_CD, g_b_C, g_pre_D, g_dec_CD)


def _row_blocks(n_own: int, d_model: int, n_latents: int) -> spmd.RowBlocks:
    """Row blocks whose pre-activations keep to the encoder's budget too."""
    cut, n_shards = tuning.current(), mesh.axis_size(mesh.LATENT)
    max_rows = min(cut.block_bytes // (4 * n_latents), ROWS_AT_ONCE * cut.block_rows) // n_shards
    return spmd.RowBlocks(n_own, *spmd.even(n_own, max(1, min(max_rows, spmd.row_blocks(n_own, d_model).size))))
