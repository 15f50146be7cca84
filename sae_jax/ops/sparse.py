"""Decoding a sparse code, and the gradients that go with it, touching only the active latents.

    x_hat = z W_dec

The sum over shards is reduce-scattered, so the reconstruction of a row exists on one device only; its gradient
is gathered on the way back.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax import mesh
from sae_jax.mesh import DICT, ROWS
from sae_jax.ops import spmd
from sae_jax.types import Code


@jax.custom_vjp
def decode(code: Code, w_dec_FD: jax.Array) -> jax.Array:
    """Sum of the decoder rows of the active latents, without bias.

    Args:
        code: [B, K], CODE on a mesh.
        w_dec_FD: f32[F, D], DICT.

    Returns:
        f32[B, D], ROWS.
    """
    return _decode(code, w_dec_FD)


def _decode(code: Code, w_dec_FD: jax.Array) -> jax.Array:
    def local(code, w_RD):
        w_FD = spmd.gather(w_RD, mesh.DATA)
        index_BK = code.indices - spmd.first_latent(w_FD.shape[0])
        return spmd.reduce_scatter(gather_rows(index_BK, code.values, w_FD), mesh.LATENT)

    return spmd.per_device(local, (spmd.CODES, DICT), ROWS)(code, w_dec_FD)


def _decode_backward(saved, g_x_hat_BD: jax.Array):
    code, w_dec_FD = saved

    def local(code, w_RD, g_RD):
        w_FD = spmd.gather(w_RD, mesh.DATA)
        g_BD = spmd.gather(g_RD, mesh.LATENT)
        index_BK = code.indices - spmd.first_latent(w_FD.shape[0])
        g_values_BK = sampled_products(index_BK, g_BD, w_FD)
        g_w_FD = scatter_rows(index_BK, code.values, g_BD, w_FD.shape[0])
        return g_values_BK, spmd.reduce_scatter(g_w_FD, mesh.DATA)

    g_values_BK, g_w_FD = spmd.per_device(local, (spmd.CODES, DICT, ROWS), (mesh.CODE, DICT))(
        code, w_dec_FD, g_x_hat_BD
    )
    return Code(None, g_values_BK), g_w_FD  # pyrefly: ignore[bad-argument-type] (integers have no gradient)


decode.defvjp(lambda code, w_dec_FD: (_decode(code, w_dec_FD), (code, w_dec_FD)), _decode_backward)


def fired(code: Code, n_latents: int, above: float) -> jax.Array:
    """Which latents exceed `above` anywhere in the batch: bool[F], DICT."""

    def local(code):
        n_local = n_latents // mesh.axis_size(mesh.LATENT)
        index_BK = code.indices - spmd.first_latent(n_local)
        hits_F = jnp.zeros(n_local).at[index_BK.ravel()].add((code.values > above).astype(jnp.float32).ravel())
        return spmd.reduce_scatter(hits_F, mesh.DATA) > 0

    return spmd.per_device(local, (spmd.CODES,), DICT)(code)


def gather_rows(index_BK: jax.Array, weight_BK: jax.Array, table_FD: jax.Array) -> jax.Array:
    """Weighted sum of the K chosen rows: f32[B, D]. One device."""

    def add(sum_BD, slot):
        index_B, weight_B = slot
        return sum_BD + weight_B[:, None] * table_FD[index_B], None

    zeros_BD = jnp.zeros((index_BK.shape[0], table_FD.shape[1]))
    return lax.scan(add, zeros_BD, (index_BK.T, weight_BK.T))[0]


def scatter_rows(index_BK: jax.Array, weight_BK: jax.Array, rows_BD: jax.Array, n_latents: int) -> jax.Array:
    """Each row, weighted, added to its K chosen latents: f32[F, D]. One device.

    Slot by slot: one scatter of all B*K rows would first write them out, B*K*D numbers.
    """

    def add(sum_FD, slot):
        index_B, weight_B = slot
        return sum_FD.at[index_B].add(weight_B[:, None] * rows_BD), None

    zeros_FD = jnp.zeros((n_latents, rows_BD.shape[1]))
    return lax.scan(add, zeros_FD, (index_BK.T, weight_BK.T))[0]


def sampled_products(index_BK: jax.Array, rows_BD: jax.Array, table_FD: jax.Array) -> jax.Array:
    """Inner product of each row with its K chosen table rows: f32[B, K]. One device."""

    def product(_, index_B):
        return None, (rows_BD * table_FD[index_B]).sum(-1)

    return lax.scan(product, None, index_BK.T)[1].T
