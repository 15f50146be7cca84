"""Decoding a sparse code, and the gradients that go with it, touching only the active latents.

    x_hat = z W_dec

The sum over shards is reduce-scattered, so the reconstruction of a row exists on one device only; its gradient
is gathered on the way back. On one latent shard slots that are in use in every row are gone through one by one. Where
slots are mostly empty the active ones are counted off as pairs (row, slot): on S shards, where about k/S of k are in
use, so that a device's work is its share and no row is ever dropped; and in codes whose rows differ in their number of
latents.

How many pairs there are is known only while the step runs. On a TPU a loop is as long as that. Elsewhere none waits for
it, as a GPU would ask the host before each turn: as many pairs as a code has at most, or as a shard usually has, are
taken whatever their number, those beyond the last one as nothing. A shard that has more takes the rest in one of a few
loops of known length, each twice as long as the one before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
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
ROOM = 1.25  # for pairs on a latent shard, as a part of an equal share


@dataclass(frozen=True)
class Filling:
    """How much of a code is in use. It decides how the work is done; what comes out is exact if `total` holds."""

    k: int  # active latents a row, on average and on all latent shards together
    total: int | None = None  # the most that a batch has; None: as many as it has slots


def decode_parts(
    code: Code,
    part_BK: jax.Array | None,
    w_dec_FD: jax.Array,
    n_parts: int = 1,
    dtype: jnp.dtype = jnp.float32,
    filling: Filling | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sums of the decoder rows of the active latents, without bias: one for each part of a row's code.

    Args:
        code: [B, K], CODE on a mesh. A slot of value 0 is empty: it adds nothing and has no gradient.
        part_BK: i32[B, K], CODE: to which of the sums a slot is added; None: there is one.
        w_dec_FD: bf16 or f32[F, D], DICT.
        n_parts: how many sums.
        dtype: in which the gradient of the reconstruction is sent to other latent shards.
        filling: how much of the code is in use; None: all slots.

    Returns:
        f32[B, n_parts, D], ROWS; and w_dec as it is, for what uses the decoder again (see `encode.encode_topk`).
    """
    if (tape := pairs.tape()) is None:
        return _decode(code, part_BK, w_dec_FD, n_parts, dtype, filling)

    def made(g_x_hat_BGD: jax.Array, saved: tuple[Code, jax.Array | None]) -> dict[str, list[Pairs]]:
        code, part_BK = saved
        weights = _of_parts(code.values, part_BK, n_parts)
        rows = (shared_type(g_x_hat_BGD[:, part], dtype) for part in range(n_parts))
        return {"w_dec": [Pairs(code.indices, w_BK, g_BD) for w_BK, g_BD in zip(weights, rows, strict=True)]}

    return tape.tap(_decode_fixed(code, part_BK, w_dec_FD, n_parts, dtype, filling), (code, part_BK), made), w_dec_FD


def decode(
    code: Code, w_dec_FD: jax.Array, dtype: jnp.dtype = jnp.float32, filling: Filling | None = None
) -> tuple[jax.Array, jax.Array]:
    """The whole sum, f32[B, D], ROWS, and w_dec: see `decode_parts`."""
    x_hat_BGD, w_dec_FD = decode_parts(code, None, w_dec_FD, 1, dtype, filling)
    return lax.squeeze(x_hat_BGD, (1,)), w_dec_FD


def reconstruction(code: Code, w_dec_FD: jax.Array) -> jax.Array:
    """What `decode` reconstructs, f32[B, D], ROWS. Without gradient."""
    return lax.squeeze(_sums(code, None, w_dec_FD, 1, None), (1,))


def value_gradients(code: Code, w_dec_FD: jax.Array, g_x_hat_BD: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The gradient of a code's values from that of its reconstruction, f32[B, K], CODE. Without gradient."""
    return _value_gradients(code, None, w_dec_FD, lax.expand_dims(g_x_hat_BD, (1,)), dtype, None)


def _sums(code: Code, part_BK: jax.Array | None, w_dec_FD: jax.Array, n_parts: int, filling: Filling | None):
    def local(code, part_BK, w_RD):
        w_FD = spmd.gather(w_RD, mesh.DATA)
        n_own = len(code.values) // mesh.axis_size(mesh.LATENT)
        rows = row_blocks(n_own, n_parts * w_FD.shape[1], filling)

        def block(_, blocks):
            index_bK, values_bK, part_bK = blocks
            sum_bGD = gather_rows(index_bK, values_bK, w_FD, filling, part_bK, n_parts)
            return None, spmd.reduce_scatter(sum_bGD, mesh.LATENT)

        index_BK = code.indices - spmd.first_latent(len(w_FD))
        blocks = jax.tree.map(rows.shared, (index_BK, code.values, part_BK))
        return rows.join_own(spmd.scan(block, None, blocks)[1])

    return spmd.per_device(local, (spmd.CODES, CODE, DICT), ROWS)(code, part_BK, w_dec_FD)


def _value_gradients(code, part_BK, w_dec_FD, g_x_hat_BGD, dtype, filling):
    def local(code, part_BK, w_RD, g_RGD):
        w_FD = spmd.gather(w_RD, mesh.DATA)
        rows = row_blocks(len(g_RGD), g_RGD.shape[1] * w_FD.shape[1], filling)

        def block(_, blocks):
            g_rGD, index_bK, values_bK, part_bK = blocks
            g_bGD = spmd.gather(shared_type(g_rGD, dtype), mesh.LATENT)
            return None, sampled_products(index_bK, values_bK, g_bGD, w_FD, filling, part_bK)

        index_BK = code.indices - spmd.first_latent(len(w_FD))
        blocks = rows.own(g_RGD), *jax.tree.map(rows.shared, (index_BK, code.values, part_BK))
        return rows.join_shared(spmd.scan(block, None, blocks)[1])

    return spmd.per_device(local, (spmd.CODES, CODE, DICT, ROWS), CODE)(code, part_BK, w_dec_FD, g_x_hat_BGD)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _decode(code, part_BK, w_dec_FD, n_parts, dtype, filling):
    return _sums(code, part_BK, w_dec_FD, n_parts, filling), w_dec_FD


def _decode_saving(code, part_BK, w_dec_FD, n_parts, dtype, filling):
    return (_sums(code, part_BK, w_dec_FD, n_parts, filling), w_dec_FD), (code, part_BK, w_dec_FD)


def _decode_backward(n_parts, dtype, filling, saved, cotangents: tuple[jax.Array, jax.Array]):
    code, part_BK, w_dec_FD = saved
    g_x_hat_BGD, g_w_FD = cotangents

    def local(code, part_BK, w_RD, g_RGD, g_w_RD):
        w_FD = spmd.gather(w_RD, mesh.DATA)
        rows = row_blocks(len(g_RGD), n_parts * w_FD.shape[1], filling)

        def block(g_w_FD, blocks):
            g_rGD, index_bK, values_bK, part_bK = blocks
            g_bGD = spmd.gather(shared_type(g_rGD, dtype), mesh.LATENT)
            g_values_bK = sampled_products(index_bK, values_bK, g_bGD, w_FD, filling, part_bK)
            return scatter_rows(g_w_FD, index_bK, values_bK, g_bGD, filling, part_bK), g_values_bK

        index_BK = code.indices - spmd.first_latent(len(w_FD))
        blocks = rows.own(g_RGD), *jax.tree.map(rows.shared, (index_BK, code.values, part_BK))
        g_w_RD, g_values_nbK = accumulated(block, g_w_RD, blocks)
        return g_w_RD, rows.join_shared(g_values_nbK)

    g_w_FD, g_values_BK = spmd.per_device(local, (spmd.CODES, CODE, DICT, ROWS, DICT), (DICT, CODE))(
        code, part_BK, w_dec_FD, g_x_hat_BGD, g_w_FD
    )
    return Code(None, g_values_BK), None, g_w_FD  # pyrefly: ignore[bad-argument-type] (integers have no gradient)


_decode.defvjp(_decode_saving, _decode_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _decode_fixed(code, part_BK, w_dec_FD, n_parts, dtype, filling):
    """The sums; w_dec is a constant."""
    return _sums(code, part_BK, w_dec_FD, n_parts, filling)


def _decode_fixed_saving(code, part_BK, w_dec_FD, n_parts, dtype, filling):
    return _sums(code, part_BK, w_dec_FD, n_parts, filling), (code, part_BK, w_dec_FD)


def _decode_fixed_backward(n_parts, dtype, filling, saved, g_x_hat_BGD: jax.Array):
    code, part_BK, w_dec_FD = saved
    g_values_BK = _value_gradients(code, part_BK, w_dec_FD, g_x_hat_BGD, dtype, filling)
    return Code(None, g_values_BK), None, None  # pyrefly: ignore[bad-argument-type] (integers have no gradient)


_decode_fixed.defvjp(_decode_fixed_saving, _decode_fixed_backward)


def fired(code: Code, n_latents: int, above: float, filling: Filling | None = None) -> jax.Array:
    """Which latents exceed `above` anywhere in the batch: bool[F], DICT. `filling`: see `decode_parts`."""
    return summed(Code(code.indices, (code.values > above).astype(jnp.float32)), n_latents, filling) > 0


def summed(code: Code, n_latents: int, filling: Filling | None = None) -> jax.Array:
    """Each latent's values summed over the batch: f32[F], DICT. Without gradient. `filling`: see `decode_parts`."""

    def local(code):
        n_local = n_latents // mesh.axis_size(mesh.LATENT)
        index_BK = code.indices - spmd.first_latent(n_local)
        return spmd.reduce_scatter(add_up(index_BK, code.values, n_local, filling), mesh.DATA)

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


def row_blocks(n_own: int, width: int, filling: Filling | None) -> spmd.RowBlocks:
    """`spmd.row_blocks`, but one block where a total of pairs holds for the batch and nothing is exchanged."""
    if filling is not None and filling.total is not None and mesh.axis_size(mesh.LATENT) == 1:
        return spmd.RowBlocks(n_own, 1, n_own)
    return spmd.row_blocks(n_own, width)


def gather_rows(
    index_BK: jax.Array,
    weight_BK: jax.Array,
    table_FD: jax.Array,
    filling: Filling | None = None,
    part_BK: jax.Array | None = None,
    n_parts: int = 1,
) -> jax.Array:
    """Weighted sums of the K chosen rows: f32[B, G, D]. One device. For the last three see `decode_parts`."""
    if tuning.current().kernels:
        of_parts = _of_parts(weight_BK, part_BK, n_parts)
        return jnp.stack([_kernels().gather_rows(index_BK, each_BK, table_FD) for each_BK in of_parts], axis=1)
    n_slots, n_pairs = _cut(filling, index_BK, part_BK)
    (index_BS, weight_BS), (index_BE, weight_BE) = _split(n_slots, index_BK, weight_BK)

    def add(sum_BD, slots):
        index_BC, weight_BC = slots
        return sum_BD + (weight_BC[:, :, None] * table_FD[index_BC].astype(jnp.float32)).sum(1), None

    def add_pairs(sum_SD, pairs):
        rows_PD = pairs.take(weight_BE)[:, None] * table_FD[pairs.take(index_BE)].astype(jnp.float32)
        # In order of row, so that a GPU adds up what belongs to one row before it writes.
        return sum_SD.at[pairs.sum(part_BK, n_parts)].add(rows_PD, mode="drop", indices_are_sorted=part_BK is None)

    sum_SD = jnp.zeros((len(index_BK) * n_parts, table_FD.shape[1]))
    if index_BS.size:
        sum_SD, _ = spmd.scan(add, sum_SD, _chunks(tuning.current().decoded_slots, index_BS, weight_BS))
    sum_SD = _for_active(weight_BE, table_FD.shape[1], n_pairs, add_pairs, sum_SD)
    return sum_SD.reshape(len(index_BK), n_parts, table_FD.shape[1])


def scatter_rows(
    sum_FD: jax.Array,
    index_BK: jax.Array,
    weight_BK: jax.Array,
    rows_BGD: jax.Array,
    filling: Filling | None = None,
    part_BK: jax.Array | None = None,
) -> jax.Array:
    """`sum_FD` with rows, weighted, added to their K chosen latents: f32[F, D]. One device. See `decode_parts`.

    In pieces: one scatter of all B*K rows may first write them out, B*K*D numbers.
    """
    n_parts, width = rows_BGD.shape[1:]
    if tuning.current().kernels:
        for part, each_BK in enumerate(_of_parts(weight_BK, part_BK, n_parts)):
            sum_FD = _kernels().scatter_rows(sum_FD, index_BK, each_BK, rows_BGD[:, part])
        return sum_FD
    n_slots, n_pairs = _cut(filling, index_BK, part_BK)
    (index_BS, weight_BS), (index_BE, weight_BE) = _split(n_slots, index_BK, weight_BK)
    rows_SD = rows_BGD.reshape(-1, width)

    def add(sum_FD, slots):
        index_BC, weight_BC = slots
        rows_BCD = weight_BC[:, :, None] * rows_SD[:, None]
        return sum_FD.at[index_BC.ravel()].add(rows_BCD.reshape(-1, width)), None

    def add_pairs(sum_FD, pairs):
        rows_PD = rows_SD.at[pairs.sum(part_BK, n_parts)].get(mode="clip").astype(jnp.float32)
        at_P = jnp.where(pairs.is_one, pairs.take(index_BE), len(sum_FD))
        return sum_FD.at[at_P].add(pairs.take(weight_BE)[:, None] * rows_PD, mode="drop")

    if index_BS.size:
        sum_FD, _ = spmd.scan(add, sum_FD, _chunks(tuning.current().scattered_slots, index_BS, weight_BS))
    return _for_active(weight_BE, width, n_pairs, add_pairs, sum_FD)


def add_up(index_BK: jax.Array, weight_BK: jax.Array, n_latents: int, filling: Filling | None = None) -> jax.Array:
    """Each weight added to its latent: f32[F]. One device. `filling`: see `decode_parts`.

    A TPU sorts the indices of a scatter of single numbers, so the empty slots had better stay out of it.
    """
    zeros_F = jnp.zeros(n_latents)
    if mesh.axis_size(mesh.LATENT) == 1:
        return zeros_F.at[index_BK.ravel()].add(weight_BK.ravel())

    def add_pairs(sum_F, pairs):
        return sum_F.at[pairs.take(index_BK)].add(pairs.take(weight_BK))

    return _for_active(weight_BK, SINGLES, _cut(filling, index_BK, None)[1], add_pairs, zeros_F)


def sampled_products(
    index_BK: jax.Array,
    weight_BK: jax.Array,
    rows_BGD: jax.Array,
    table_FD: jax.Array,
    filling: Filling | None = None,
    part_BK: jax.Array | None = None,
) -> jax.Array:
    """Inner product of rows with their K chosen table rows, 0 where the weight is: f32[B, K]. One device.

    See `decode_parts`.
    """
    n_parts, width = rows_BGD.shape[1:]
    if tuning.current().kernels:
        products_BK = jnp.zeros(weight_BK.shape)
        for part, each_BK in enumerate(_of_parts(weight_BK, part_BK, n_parts)):
            products_BK += _kernels().sampled_products(index_BK, each_BK, rows_BGD[:, part], table_FD)
        return products_BK
    n_slots, n_pairs = _cut(filling, index_BK, part_BK)
    (index_BS, weight_BS), (index_BE, weight_BE) = _split(n_slots, index_BK, weight_BK)
    rows_SD = rows_BGD.reshape(-1, width)

    def product(_, slots):
        return None, (rows_SD[:, None] * table_FD[slots[0]].astype(jnp.float32)).sum(-1)

    def set_pairs(products_BE, pairs):
        rows_PD = rows_SD.at[pairs.sum(part_BK, n_parts)].get(mode="clip").astype(jnp.float32)
        products_P = (rows_PD * table_FD[pairs.take(index_BE)].astype(jnp.float32)).sum(-1)
        return products_BE.at[pairs.row, pairs.slot].set(products_P, mode="drop")

    products_BE = _for_active(weight_BE, width, n_pairs, set_pairs, jnp.zeros(index_BE.shape))
    products_BE = jnp.where(weight_BE != 0, products_BE, 0.0)
    if not index_BS.size:
        return products_BE
    _, products_NBC = spmd.scan(product, None, _chunks(tuning.current().scattered_slots, index_BS))
    products_BS = jnp.moveaxis(products_NBC, 0, 1).reshape(len(index_BS), -1)[:, : index_BS.shape[1]]
    products_BS = jnp.where(weight_BS != 0, products_BS, 0.0)
    return jnp.concatenate([products_BS, products_BE], axis=1) if index_BE.size else products_BS


class _Pairs:
    """A chunk of the (row, slot) pairs of a code; past the last one the row is one too many, the weight 0."""

    def __init__(self, nth_P: jax.Array, upto_B: jax.Array, count_B: jax.Array) -> None:
        self.is_one = nth_P < upto_B[-1]
        self.row = jnp.searchsorted(upto_B, nth_P, side="right", method="scan_unrolled").astype(jnp.int32)
        self.slot = jnp.where(self.is_one, nth_P - (upto_B - count_B).at[self.row].get(mode="clip"), 0)

    def take(self, x_BK: jax.Array) -> jax.Array:
        """x at the pairs, [P]; 0 past the last one."""
        return jnp.where(self.is_one, x_BK.at[self.row, self.slot].get(mode="clip"), 0)

    def sum(self, part_BK: jax.Array | None, n_parts: int) -> jax.Array:
        """Which of the sums [B * n_parts] each pair goes into, i32[P]; one too many past the last pair."""
        return self.row if part_BK is None else self.row * n_parts + self.take(part_BK)


def _for_active(
    weight_BK: jax.Array, width: int, n_pairs: tuple[int, int], body: Callable, carry: jax.Array
) -> jax.Array:
    """`body` over the pairs that are in use, a chunk at a time: those of each row up to its last weight that is not 0.

    Args:
        weight_BK: f32[B, K].
        width: a chunk is as many rows f32[width] as keep to the budget.
        n_pairs: so many are gone through whatever their number is, and so many there are at most.
        body: from the carry and `_Pairs` to the carry.
        carry: to begin with.
    """
    usual, most = n_pairs
    if not most:
        return carry
    upto_K = 1 + jnp.arange(weight_BK.shape[1], dtype=jnp.int32)
    count_B = jnp.where(weight_BK != 0, upto_K[None], 0).max(1)
    upto_B = jnp.cumsum(count_B)
    n_chunks, size = spmd.even(usual or most, max(1, tuning.current().pair_bytes // (4 * width)))
    n_chunks, most_chunks = n_chunks if usual else 0, -(-most // size)

    def chunks(first, last, carry):
        def chunk(i, carry):
            return body(carry, _Pairs(i * size + jnp.arange(size, dtype=jnp.int32), upto_B, count_B))

        return lax.fori_loop(first, last, chunk, carry)

    if tuning.current().open_loops:
        return chunks(0, -(-upto_B[-1] // size), carry)
    carry = chunks(0, n_chunks, carry)
    lengths = [n_chunks]
    while lengths[-1] < most_chunks:
        lengths.append(min(2 * lengths[-1] or -(-most_chunks // 8), most_chunks))
    if len(lengths) == 1:
        return carry
    number = sum((upto_B[-1] > size * n).astype(jnp.int32) for n in lengths[:-1])
    return lax.switch(number, [partial(chunks, n_chunks, n) for n in lengths], carry)


def _cut(filling: Filling | None, index_BK: jax.Array, part_BK: jax.Array | None) -> tuple[int, tuple[int, int]]:
    """How many leading slots to go through one by one, and the usual and the largest number of pairs beyond."""
    (n_rows, n_slots), n_shards = index_BK.shape, mesh.axis_size(mesh.LATENT)
    k, total = (n_slots, None) if filling is None else (filling.k, filling.total)
    if n_shards == 1 and total is None and part_BK is None:
        return min(k, n_slots), (0, n_rows * max(0, n_slots - k))
    most = n_rows * n_slots if total is None else min(n_rows * n_slots, total)
    return 0, (min(math.ceil(ROOM * n_rows * k / n_shards), most), most)


def _of_parts(weight_BK: jax.Array, part_BK: jax.Array | None, n_parts: int) -> list[jax.Array]:
    """The weights of each part, zeros elsewhere."""
    return [weight_BK] if part_BK is None else [jnp.where(part_BK == part, weight_BK, 0.0) for part in range(n_parts)]


def _split(n: int, *codes_BK: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
    """The first n slots, and those beyond."""
    return [c_BK[:, :n] for c_BK in codes_BK], [c_BK[:, n:] for c_BK in codes_BK]


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
