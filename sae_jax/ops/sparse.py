"""Decoding a sparse code, and the gradients that go with it, touching only the active latents.

    x_hat = z W_dec

The sum over shards is reduce-scattered, so the reconstruction of a row exists on one device only; its gradient
is gathered on the way back. On one latent shard slots that are in use in every row are gone through one by one. Where
slots are mostly empty the active ones are counted off and taken in chunks, as many as there are: on S shards, where
about k/S of k are in use, so that a device's work is its share and no row is ever dropped; and beyond the first `dense`
slots of a code whose rows differ in their number of latents.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax import mesh
from sae_jax.mesh import CODE, DICT, ROWS
from sae_jax.ops import pairs, spmd, tuning
from sae_jax.ops.pairs import Pairs
from sae_jax.types import Code

SINGLES = 4096  # chunks of single numbers are those of rows of this width: longer sorts take a TPU's compiler long


def decode(
    code: Code,
    w_dec_FD: jax.Array,
    dtype: jnp.dtype = jnp.float32,
    dense: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sum of the decoder rows of the active latents, without bias.

    Args:
        code: [B, K], CODE on a mesh. A slot of value 0 is empty: it adds nothing and has no gradient.
        w_dec_FD: bf16 or f32[F, D], DICT.
        dtype: in which the gradient of the reconstruction is sent to other latent shards.
        dense: leading slots that most rows use; None: all. It decides how the work is done, not what comes out.

    Returns:
        f32[B, D], ROWS; and w_dec as it is, for what uses the decoder again (see `encode.encode_topk`).
    """
    if (tape := pairs.tape()) is None:
        return _decode(code, w_dec_FD, dtype, dense)

    def made(g_x_hat_BD: jax.Array, code: Code) -> dict[str, Pairs]:
        return {"w_dec": Pairs(code.indices, code.values, shared_type(g_x_hat_BD, dtype))}

    return tape.tap(_decode_fixed(code, w_dec_FD, dtype, dense), code, made), w_dec_FD


def reconstruction(code: Code, w_dec_FD: jax.Array, dense: int | None = None) -> jax.Array:
    """What `decode` reconstructs, f32[B, D], ROWS. Without gradient."""

    def local(code, w_RD):
        w_FD = spmd.gather(w_RD, mesh.DATA)
        rows = spmd.row_blocks(len(code.values) // mesh.axis_size(mesh.LATENT), w_FD.shape[1])

        def block(_, blocks):
            index_bK, values_bK = blocks
            return None, spmd.reduce_scatter(gather_rows(index_bK, values_bK, w_FD, dense), mesh.LATENT)

        index_BK = code.indices - spmd.first_latent(len(w_FD))
        return rows.join_own(spmd.scan(block, None, (rows.shared(index_BK), rows.shared(code.values)))[1])

    return spmd.per_device(local, (spmd.CODES, DICT), ROWS)(code, w_dec_FD)


def value_gradients(
    code: Code, w_dec_FD: jax.Array, g_x_hat_BD: jax.Array, dtype: jnp.dtype, dense: int | None = None
) -> jax.Array:
    """The gradient of a code's values from that of its reconstruction, f32[B, K], CODE. Without gradient."""

    def local(code, w_RD, g_RD):
        w_FD, rows = spmd.gather(w_RD, mesh.DATA), spmd.row_blocks(*g_RD.shape)

        def block(_, blocks):
            g_rD, index_bK, values_bK = blocks
            g_bD = spmd.gather(shared_type(g_rD, dtype), mesh.LATENT)
            return None, sampled_products(index_bK, values_bK, g_bD, w_FD, dense)

        index_BK = code.indices - spmd.first_latent(len(w_FD))
        return rows.join_shared(
            spmd.scan(block, None, (rows.own(g_RD), rows.shared(index_BK), rows.shared(code.values)))[1]
        )

    return spmd.per_device(local, (spmd.CODES, DICT, ROWS), CODE)(code, w_dec_FD, g_x_hat_BD)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _decode(code, w_dec_FD, dtype, dense):
    return reconstruction(code, w_dec_FD, dense), w_dec_FD


def _decode_backward(dtype, dense, saved, cotangents: tuple[jax.Array, jax.Array]):
    code, w_dec_FD = saved
    g_x_hat_BD, g_w_FD = cotangents

    def local(code, w_RD, g_RD, g_w_RD):
        w_FD = spmd.gather(w_RD, mesh.DATA)
        rows = spmd.row_blocks(*g_RD.shape)

        def block(g_w_FD, blocks):
            g_rD, index_bK, values_bK = blocks
            g_bD = spmd.gather(shared_type(g_rD, dtype), mesh.LATENT)
            g_values_bK = sampled_products(index_bK, values_bK, g_bD, w_FD, dense)
            return scatter_rows(g_w_FD, index_bK, values_bK, g_bD, dense), g_values_bK

        index_BK = code.indices - spmd.first_latent(len(w_FD))
        blocks = rows.own(g_RD), rows.shared(index_BK), rows.shared(code.values)
        g_w_RD, g_values_nbK = accumulated(block, g_w_RD, blocks)
        return g_w_RD, rows.join_shared(g_values_nbK)

    g_w_FD, g_values_BK = spmd.per_device(local, (spmd.CODES, DICT, ROWS, DICT), (DICT, CODE))(
        code, w_dec_FD, g_x_hat_BD, g_w_FD
    )
    return Code(None, g_values_BK), g_w_FD  # pyrefly: ignore[bad-argument-type] (integers have no gradient)


def _decode_saving(code, w_dec_FD, dtype, dense):
    return (reconstruction(code, w_dec_FD, dense), w_dec_FD), (code, w_dec_FD)


_decode.defvjp(_decode_saving, _decode_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _decode_fixed(code, w_dec_FD, dtype, dense):
    """The reconstruction; w_dec is a constant."""
    return reconstruction(code, w_dec_FD, dense)


def _decode_fixed_backward(dtype, dense, saved, g_x_hat_BD: jax.Array):
    code, w_dec_FD = saved
    g_values_BK = value_gradients(code, w_dec_FD, g_x_hat_BD, dtype, dense)
    return Code(None, g_values_BK), None  # pyrefly: ignore[bad-argument-type] (integers have no gradient)


_decode_fixed.defvjp(
    lambda code, w_dec_FD, dtype, dense: (reconstruction(code, w_dec_FD, dense), (code, w_dec_FD)),
    _decode_fixed_backward,
)


def fired(code: Code, n_latents: int, above: float) -> jax.Array:
    """Which latents exceed `above` anywhere in the batch: bool[F], DICT."""
    return summed(Code(code.indices, (code.values > above).astype(jnp.float32)), n_latents) > 0


def summed(code: Code, n_latents: int) -> jax.Array:
    """Each latent's values summed over the batch: f32[F], DICT. Without gradient."""

    def local(code):
        n_local = n_latents // mesh.axis_size(mesh.LATENT)
        index_BK = code.indices - spmd.first_latent(n_local)
        return spmd.reduce_scatter(add_up(index_BK, code.values, n_local), mesh.DATA)

    return spmd.per_device(local, (spmd.CODES,), DICT)(lax.stop_gradient(code))


def looked_up(code: Code, table_F: jax.Array) -> jax.Array:
    """What a table [F], DICT, says of the latent of each slot: [B, K], CODE. Without gradient."""

    def local(indices_BK, table_R):
        table_F = spmd.gather(table_R, mesh.DATA)
        return table_F[indices_BK - spmd.first_latent(len(table_F))]

    return spmd.per_device(local, (CODE, DICT), CODE)(code.indices, lax.stop_gradient(table_F))


def shared_type(x_rD: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows in the type that other latent shards get them in: the products' own halves what is sent."""
    return x_rD.astype(dtype) if mesh.axis_size(mesh.LATENT) > 1 else x_rD


def weighted_total(weight_R: jax.Array, w_RD: jax.Array) -> jax.Array:
    """The sum of a matrix's rows over all devices, weighted: f32[D]. Of bf16 without a copy in f32."""
    if w_RD.dtype == jnp.float32:
        return spmd.total(jnp.matmul(weight_R, w_RD, precision=lax.Precision.HIGHEST))
    return spmd.total((weight_R[:, None] * w_RD.astype(jnp.float32)).sum(0))


def accumulated(block: Callable[..., Any], g_w_RD: jax.Array, blocks: Any) -> tuple[jax.Array, Any]:
    """`spmd.scan` of a block that adds to a gradient of the latent shard, [F, D], of which this device owns [R, D].

    It starts from what is there already, g_w_RD.
    """
    if mesh.axis_size(mesh.DATA) == 1:
        return spmd.scan(block, g_w_RD, blocks)
    zeros_FD = jnp.zeros((len(g_w_RD) * mesh.axis_size(mesh.DATA), g_w_RD.shape[1]))
    g_w_FD, y = spmd.scan(block, zeros_FD, blocks)
    return g_w_RD + spmd.reduce_scatter(g_w_FD, mesh.DATA), y


def gather_rows(index_BK: jax.Array, weight_BK: jax.Array, table_FD: jax.Array, dense: int | None = None) -> jax.Array:
    """Weighted sum of the K chosen rows: f32[B, D]. One device. For `dense` see `decode`."""
    if tuning.current().kernels:
        return _kernels().gather_rows(index_BK, weight_BK, table_FD)
    (index_BS, weight_BS), (index_BE, weight_BE) = _split(dense, index_BK, weight_BK)

    def add(sum_BD, slots):
        index_BC, weight_BC = slots
        return sum_BD + (weight_BC[:, :, None] * table_FD[index_BC].astype(jnp.float32)).sum(1), None

    def add_pairs(sum_BD, pairs):
        rows_PD = table_FD[pairs.take(index_BE)].astype(jnp.float32)
        return sum_BD.at[pairs.row].add(pairs.take(weight_BE)[:, None] * rows_PD)

    sum_BD = jnp.zeros((index_BK.shape[0], table_FD.shape[1]))
    if index_BS.size:
        sum_BD, _ = spmd.scan(add, sum_BD, _chunks(tuning.current().decoded_slots, index_BS, weight_BS))
    return _for_active(weight_BE, table_FD.shape[1], add_pairs, sum_BD)


def scatter_rows(
    sum_FD: jax.Array, index_BK: jax.Array, weight_BK: jax.Array, rows_BD: jax.Array, dense: int | None = None
) -> jax.Array:
    """`sum_FD` with each row, weighted, added to its K chosen latents: f32[F, D]. One device. `dense`: see `decode`.

    In pieces: one scatter of all B*K rows may first write them out, B*K*D numbers.
    """
    if tuning.current().kernels:
        return _kernels().scatter_rows(sum_FD, index_BK, weight_BK, rows_BD)
    (index_BS, weight_BS), (index_BE, weight_BE) = _split(dense, index_BK, weight_BK)

    def add(sum_FD, slots):
        index_BC, weight_BC = slots
        rows_BCD = weight_BC[:, :, None] * rows_BD[:, None]
        return sum_FD.at[index_BC.ravel()].add(rows_BCD.reshape(-1, rows_BD.shape[1])), None

    def add_pairs(sum_FD, pairs):
        rows_PD = rows_BD[pairs.row].astype(jnp.float32)
        return sum_FD.at[pairs.take(index_BE)].add(pairs.take(weight_BE)[:, None] * rows_PD)

    if index_BS.size:
        sum_FD, _ = spmd.scan(add, sum_FD, _chunks(tuning.current().scattered_slots, index_BS, weight_BS))
    return _for_active(weight_BE, rows_BD.shape[1], add_pairs, sum_FD)


def add_up(index_BK: jax.Array, weight_BK: jax.Array, n_latents: int) -> jax.Array:
    """Each weight added to its latent: f32[F]. One device.

    A TPU sorts the indices of a scatter of single numbers, so the empty slots had better stay out of it.
    """
    zeros_F = jnp.zeros(n_latents)
    if mesh.axis_size(mesh.LATENT) == 1:
        return zeros_F.at[index_BK.ravel()].add(weight_BK.ravel())

    def add_pairs(sum_F, pairs):
        return sum_F.at[pairs.take(index_BK)].add(pairs.take(weight_BK))

    return _for_active(weight_BK, SINGLES, add_pairs, zeros_F)


def sampled_products(
    index_BK: jax.Array, weight_BK: jax.Array, rows_BD: jax.Array, table_FD: jax.Array, dense: int | None = None
) -> jax.Array:
    """Inner product of each row with its K chosen table rows, 0 where the weight is: f32[B, K]. One device."""
    if tuning.current().kernels:
        return _kernels().sampled_products(index_BK, weight_BK, rows_BD, table_FD)
    (index_BS, weight_BS), (index_BE, weight_BE) = _split(dense, index_BK, weight_BK)

    def product(_, slots):
        return None, (rows_BD[:, None] * table_FD[slots[0]].astype(jnp.float32)).sum(-1)

    def set_pairs(products_BE, pairs):
        rows_PD = rows_BD[pairs.row].astype(jnp.float32)
        products_P = (rows_PD * table_FD[pairs.take(index_BE)].astype(jnp.float32)).sum(-1)
        return products_BE.at[pairs.row, pairs.slot].add(jnp.where(pairs.is_one, products_P, 0.0))

    products_BE = _for_active(weight_BE, rows_BD.shape[1], set_pairs, jnp.zeros(index_BE.shape))
    if not index_BS.size:
        return products_BE
    _, products_NBC = spmd.scan(product, None, _chunks(tuning.current().scattered_slots, index_BS))
    products_BS = jnp.moveaxis(products_NBC, 0, 1).reshape(len(index_BS), -1)[:, : index_BS.shape[1]]
    products_BS = jnp.where(weight_BS != 0, products_BS, 0.0)
    return jnp.concatenate([products_BS, products_BE], axis=1) if index_BE.size else products_BS


class _Pairs:
    """A chunk of the active (row, slot) pairs of a code; past the last one weight is 0."""

    def __init__(self, flat_P: jax.Array, is_one: jax.Array, width: int) -> None:
        self.row, self.slot, self.is_one = flat_P // width, flat_P % width, is_one

    def take(self, x_BK: jax.Array) -> jax.Array:
        """x at the pairs, [P]; 0 past the last one."""
        return jnp.where(self.is_one, x_BK[self.row, self.slot], 0)


def _for_active(weight_BK: jax.Array, width: int, body: Callable, carry: jax.Array) -> jax.Array:
    """`body` over the pairs whose weight is not 0, a chunk at a time and no more chunks than they fill.

    A chunk is as many rows f32[width] as keep to the budget.
    """
    if not weight_BK.size:
        return carry
    size = min(max(1, tuning.current().pair_bytes // (4 * width)), weight_BK.size)
    upto_P = jnp.cumsum((weight_BK != 0).ravel(), dtype=jnp.int32)

    def chunk(i, carry):
        nth_P = i * size + 1 + jnp.arange(size, dtype=jnp.int32)
        flat_P = jnp.searchsorted(upto_P, nth_P)  # the place of the nth active pair
        is_one = nth_P <= upto_P[-1]
        return body(carry, _Pairs(jnp.where(is_one, flat_P, 0), is_one, weight_BK.shape[1]))

    return lax.fori_loop(0, -(-upto_P[-1] // size), chunk, carry)


def _chunks(size: int, *codes_BS: jax.Array) -> tuple[jax.Array, ...]:
    """`size` slots at a time: [N, B, C] of [B, S]; what is added to fill the last is latent 0 with weight 0."""
    n_slots = codes_BS[0].shape[1]
    n_chunks, size = spmd.even(n_slots, size)
    n_more = n_chunks * size - n_slots
    padded = (jnp.pad(c_BS, ((0, 0), (0, n_more))) for c_BS in codes_BS)
    return tuple(jnp.moveaxis(c.reshape(len(c), n_chunks, size), 1, 0) for c in padded)


def _kernels() -> ModuleType:
    from sae_jax.ops import pallas_sparse  # not above: Pallas takes half a second to import, and few use it

    return pallas_sparse


def _split(dense: int | None, *codes_BK: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
    """Slots to go through one by one, and those beyond them, or of several latent shards, which are mostly empty."""
    n_slots = codes_BK[0].shape[1]
    n = 0 if mesh.axis_size(mesh.LATENT) > 1 else n_slots if dense is None else min(dense, n_slots)
    return [c_BK[:, :n] for c_BK in codes_BK], [c_BK[:, n:] for c_BK in codes_BK]
