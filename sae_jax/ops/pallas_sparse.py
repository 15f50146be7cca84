"""GPU kernels for what touches only the active latents: weighted sums of rows, and inner products of pairs of rows.

Two kernels serve all: decoding and scattering are both sums over segments of (row, latent, weight) pairs, in order of
row and in order of latent.

Bytes, for P pairs of rows of D numbers (B * K of them without compaction):
- a sum reads each pair's row once, 4 P D bytes (2 P D for a bf16 table), and writes its result once; the scan over K
  that XLA runs reads and writes the B x D sum for every slot as well, three times the traffic;
- a scatter writes its n x D result exactly once, zeros included, from registers. Atomics would first write n x D zeros,
  then read and write 8 P D bytes, in an order that changes from run to run. The price is one radix sort of P integers,
  and the sums come out the same bit for bit every time; the rows it reads (4 B D bytes) stay in the cache;
- products read both rows of a pair; pairs of one row stand together, so its second reading is from the cache.

A latent that fires on every row is one long segment, which one program per D columns walks alone.
Block sizes are untuned; see ops/pallas_encode.py for the choice of Triton.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

PAIRS = 8  # whose rows a program reads at once
COLUMNS = 256  # of a row that a program holds, 16 bytes in each thread of two warps; 768 is three times as many


def gather_rows(
    index_BK: jax.Array, weight_BK: jax.Array, table_FD: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Weighted sum of the K chosen rows of a bf16 or f32 table: f32[B, D]. One device."""
    n_rows, width = index_BK.shape
    start_B = jnp.arange(n_rows, dtype=jnp.int32) * width
    return _segment_sums(start_B, start_B + width, index_BK.ravel(), weight_BK.ravel(), table_FD, interpret)


def sampled_products(
    index_BK: jax.Array, rows_BD: jax.Array, table_FD: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Inner product of each row with its K chosen table rows: f32[B, K]. One device."""
    row_P = _rows_of(index_BK)
    return products_pairs(row_P, index_BK.ravel(), rows_BD, table_FD, interpret=interpret).reshape(index_BK.shape)


def scatter_rows(
    index_BK: jax.Array, weight_BK: jax.Array, rows_BD: jax.Array, n_latents: int, *, interpret: bool = False
) -> jax.Array:
    """Each row, weighted, added to its K chosen latents: f32[F, D], the same bits every time. One device."""
    row_P = _rows_of(index_BK)
    return scatter_pairs(row_P, index_BK.ravel(), weight_BK.ravel(), rows_BD, n_latents, interpret=interpret)


def gather_pairs(
    row_P: jax.Array,
    index_P: jax.Array,
    weight_P: jax.Array,
    table_FD: jax.Array,
    n_rows: int,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Weighted table rows added up by the row of their pair: f32[n_rows, D]. One device.

    Args:
        row_P: i32[P], ascending; pairs of a row outside 0..n_rows - 1 are left out.
        index_P: i32[P], table rows.
        weight_P: f32[P]; where it is 0, the table is not read.
        table_FD: bf16 or f32[F, D].
        n_rows: rows of the result; those without a pair are 0.
        interpret: run the kernel as ordinary JAX, on any back end.
    """
    start_B, end_B = _segments(row_P, n_rows)
    return _segment_sums(start_B, end_B, index_P, weight_P, table_FD, interpret)


def scatter_pairs(
    row_P: jax.Array,
    index_P: jax.Array,
    weight_P: jax.Array,
    rows_BD: jax.Array,
    n_latents: int,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Weighted rows added up by the latent of their pair: f32[n_latents, D], the same bits every time. One device.

    Args:
        row_P: i32[P], rows of `rows_BD`, in any order.
        index_P: i32[P], latents; pairs of a latent outside 0..n_latents - 1 are left out.
        weight_P: f32[P]; where it is 0, the row is not read.
        rows_BD: bf16 or f32[B, D].
        n_latents: rows of the result; those without a pair are 0.
        interpret: run the kernel as ordinary JAX, on any back end.
    """
    # One value beside the key: with more, XLA leaves the radix sort for a comparison sort.
    index_P, order_P = lax.sort((index_P, jnp.arange(index_P.size, dtype=jnp.int32)), num_keys=1, is_stable=True)
    start_F, end_F = _segments(index_P, n_latents)
    return _segment_sums(start_F, end_F, row_P[order_P], weight_P[order_P], rows_BD, interpret)


def products_pairs(
    row_P: jax.Array, index_P: jax.Array, rows_BD: jax.Array, table_FD: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Inner product of the two rows of each pair: f32[P]. One device.

    Args:
        row_P: i32[P], rows of `rows_BD`; ascending is fastest.
        index_P: i32[P], rows of `table_FD`.
        rows_BD: bf16 or f32[B, D].
        table_FD: bf16 or f32[F, D].
        interpret: run the kernel as ordinary JAX, on any back end.
    """
    n_pairs = row_P.size
    depth = table_FD.shape[1]
    columns = _columns(depth)

    def kernel(row_ref, index_ref, rows_ref, table_ref, out_ref):
        pair_P = pl.program_id(0) * PAIRS + jnp.arange(PAIRS)
        exists_P = pair_P < n_pairs
        row_P = plgpu.load(row_ref.at[pair_P], mask=exists_P, other=0)
        index_P = plgpu.load(index_ref.at[pair_P], mask=exists_P, other=0)

        def accumulate(i, sum_PC):
            a_PC = _load_rows(rows_ref, row_P, exists_P, i * columns, columns)
            return sum_PC + a_PC * _load_rows(table_ref, index_P, exists_P, i * columns, columns)

        zeros_PC = jnp.zeros((PAIRS, columns), jnp.float32)
        sum_PC = lax.fori_loop(0, pl.cdiv(depth, columns), accumulate, zeros_PC)
        plgpu.store(out_ref.at[pair_P], sum_PC.sum(1), mask=exists_P)

    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(n_pairs, PAIRS),),
        out_shape=jax.ShapeDtypeStruct((n_pairs,), jnp.float32),
        compiler_params=_params(columns),
        interpret=interpret,
        name="pair_products",
    )(row_P, index_P, rows_BD, table_FD)


def _segment_sums(start_S, end_S, source_P, weight_P, table_ND, interpret):
    """sum of weight_P * table_ND[source_P] over start_S <= P < end_S: f32[S, D]."""
    n_segments = start_S.size
    depth = table_ND.shape[1]
    columns = _columns(depth)

    def kernel(start_ref, end_ref, source_ref, weight_ref, table_ref, out_ref):
        segment = pl.program_id(0)
        first_column = pl.program_id(1) * columns
        start, end = start_ref[segment], end_ref[segment]

        def accumulate(i, sum_C):
            pair_P = start + i * PAIRS + jnp.arange(PAIRS)
            exists_P = pair_P < end
            source_P = plgpu.load(source_ref.at[pair_P], mask=exists_P, other=0)
            weight_P = plgpu.load(weight_ref.at[pair_P], mask=exists_P, other=0.0)
            rows_PC = _load_rows(table_ref, source_P, weight_P != 0, first_column, columns)
            return sum_C + (weight_P[:, None] * rows_PC).sum(0)

        zeros_C = jnp.zeros((columns,), jnp.float32)
        sum_C = lax.fori_loop(0, pl.cdiv(end - start, PAIRS), accumulate, zeros_C)
        column_C = first_column + jnp.arange(columns)
        plgpu.store(out_ref.at[segment, column_C], sum_C, mask=column_C < depth)

    return pl.pallas_call(
        kernel,
        grid=(n_segments, pl.cdiv(depth, columns)),
        out_shape=jax.ShapeDtypeStruct((n_segments, depth), jnp.float32),
        compiler_params=_params(columns),
        interpret=interpret,
        name="segment_sums",
    )(start_S, end_S, source_P, weight_P, table_ND)


def _load_rows(ref, row_P, wanted_P, first_column, columns):
    """Part of some rows in f32, 0 where not wanted or past the end."""
    column_C = first_column + jnp.arange(columns)
    mask_PC = wanted_P[:, None] & (column_C < ref.shape[1])[None]
    return plgpu.load(ref.at[row_P[:, None], column_C[None]], mask=mask_PC, other=0.0).astype(jnp.float32)


def _segments(sorted_P, n_segments):
    """Where each of 0..n_segments - 1 starts and ends in an ascending list; 0 and 0 where it is not there."""
    place_P = jnp.arange(sorted_P.size, dtype=jnp.int32)
    changes_P = sorted_P[1:] != sorted_P[:-1]
    edge = jnp.ones(1, bool)

    def places(at_edge_P, place_P):
        outside_P = ~at_edge_P | (sorted_P < 0)  # a negative index would count from the end
        target_P = jnp.where(outside_P, n_segments, sorted_P)
        return jnp.zeros(n_segments, jnp.int32).at[target_P].set(place_P, mode="drop")

    return places(jnp.append(edge, changes_P), place_P), places(jnp.append(changes_P, edge), place_P + 1)


def _rows_of(index_BK):
    return jnp.repeat(jnp.arange(index_BK.shape[0], dtype=jnp.int32), index_BK.shape[1])


def _columns(depth):
    return min(COLUMNS, pl.next_power_of_2(depth))


def _params(columns):
    return plgpu.CompilerParams(num_warps=max(1, columns // 128), num_stages=1)
