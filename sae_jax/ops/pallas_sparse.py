"""GPU kernels for what touches only the active latents: the three one-device ops of ops/sparse.py, same signatures.

Two kernels serve all. Decoding and scattering are both sums over segments of (row, latent, weight) pairs, in order of
row and in order of latent; the third op is a list of inner products. A pair of weight 0 is never read, so a code that
is mostly empty (one of many latent shards) needs no compaction: its slots cost instructions, not bytes.

Bytes, for P active pairs of rows of D numbers:
- a sum reads each pair's row once, 4 P D bytes (2 P D for a bf16 table), and writes its result once; the scan over
  slots that XLA runs reads and writes the B x D sum for every slot as well, three times the traffic;
- a scatter reads and writes the latents that it touches once each, its sums staying in registers. Atomics would read
  and write 8 P D bytes, in an order that changes from run to run. The price is one radix sort of B * K integers, and
  the sums come out the same bit for bit every time; the rows it reads (4 B D bytes) stay in the cache;
- products read both rows of a pair; pairs of one row stand together, so its second reading is from the cache.

A latent that fires on every row is one long segment, which one program per 256 columns walks alone.
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
    """Weighted sum of the K chosen rows: f32[B, D]. One device.

    Args:
        index_BK: i32[B, K], in range where the weight is not 0.
        weight_BK: f32[B, K].
        table_FD: bf16 or f32[F, D].
        interpret: run the kernel as ordinary JAX, on any back end.
    """
    n_rows, width = index_BK.shape
    start_B = jnp.arange(n_rows, dtype=jnp.int32) * width
    return _segment_sums(start_B, start_B + width, index_BK.ravel(), weight_BK.ravel(), table_FD, (), interpret)


def scatter_rows(
    sum_FD: jax.Array, index_BK: jax.Array, weight_BK: jax.Array, rows_BD: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """`sum_FD` with each row, weighted, added to its K chosen latents: f32[F, D], the same bits every time. One device.

    Args:
        sum_FD: f32[F, D]; the result takes its place.
        index_BK: i32[B, K], in range where the weight is not 0.
        weight_BK: f32[B, K].
        rows_BD: bf16 or f32[B, D].
        interpret: run the kernel as ordinary JAX, on any back end.
    """
    n_rows, width = index_BK.shape
    index_P = jnp.where(weight_BK != 0, index_BK, len(sum_FD)).ravel()  # what is empty sorts behind every latent
    # One value beside the key: with more, XLA leaves the radix sort for a comparison sort.
    index_P, order_P = lax.sort((index_P, jnp.arange(n_rows * width, dtype=jnp.int32)), num_keys=1, is_stable=True)
    start_F, end_F = _segments(index_P, len(sum_FD))
    weight_P = weight_BK.ravel()[order_P]
    return _segment_sums(start_F, end_F, order_P // width, weight_P, rows_BD, (sum_FD,), interpret)


def sampled_products(
    index_BK: jax.Array, weight_BK: jax.Array, rows_BD: jax.Array, table_FD: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Inner product of each row with its K chosen table rows, 0 where the weight is: f32[B, K]. One device.

    Args:
        index_BK: i32[B, K], in range where the weight is not 0.
        weight_BK: f32[B, K].
        rows_BD: bf16 or f32[B, D].
        table_FD: bf16 or f32[F, D].
        interpret: run the kernel as ordinary JAX, on any back end.
    """
    width, n_pairs = index_BK.shape[1], index_BK.size
    depth = table_FD.shape[1]
    columns = _columns(depth)

    def kernel(index_ref, weight_ref, rows_ref, table_ref, out_ref):
        pair_P = pl.program_id(0) * PAIRS + jnp.arange(PAIRS)
        exists_P = pair_P < n_pairs
        index_P = plgpu.load(index_ref.at[pair_P], mask=exists_P, other=0)
        active_P = plgpu.load(weight_ref.at[pair_P], mask=exists_P, other=0.0) != 0

        def accumulate(i, sum_PC):
            a_PC = _load_rows(rows_ref, pair_P // width, active_P, i * columns, columns)
            return sum_PC + a_PC * _load_rows(table_ref, index_P, active_P, i * columns, columns)

        zeros_PC = jnp.zeros((PAIRS, columns), jnp.float32)
        sum_PC = lax.fori_loop(0, pl.cdiv(depth, columns), accumulate, zeros_PC)
        plgpu.store(out_ref.at[pair_P], sum_PC.sum(1), mask=exists_P)

    products_P = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(n_pairs, PAIRS),),
        out_shape=jax.ShapeDtypeStruct((n_pairs,), jnp.float32),
        compiler_params=_params(columns),
        interpret=interpret,
        name="sampled_products",
    )(index_BK.ravel(), weight_BK.ravel(), rows_BD, table_FD)
    return products_P.reshape(index_BK.shape)


def _segment_sums(start_S, end_S, source_P, weight_P, table_ND, into, interpret):
    """sum of weight_P * table_ND[source_P] over start_S <= P < end_S: f32[S, D].

    Added to `into`, (f32[S, D],) or (), which the result takes the place of: there, empty segments cost nothing.
    """
    n_segments = start_S.size
    depth = table_ND.shape[1]
    columns = _columns(depth)

    def kernel(start_ref, end_ref, source_ref, weight_ref, table_ref, *sums):
        out_ref = sums[-1]
        segment = pl.program_id(0)
        first_column = pl.program_id(1) * columns
        start, end = start_ref[segment], end_ref[segment]
        column_C = first_column + jnp.arange(columns)
        written_C = column_C < depth
        sum_C = jnp.zeros((columns,), jnp.float32)
        if into:
            written_C &= end > start
            sum_C = plgpu.load(sums[0].at[segment, column_C], mask=written_C, other=0.0)

        def accumulate(i, sum_C):
            pair_P = start + i * PAIRS + jnp.arange(PAIRS)
            exists_P = pair_P < end
            source_P = plgpu.load(source_ref.at[pair_P], mask=exists_P, other=0)
            weight_P = plgpu.load(weight_ref.at[pair_P], mask=exists_P, other=0.0)
            rows_PC = _load_rows(table_ref, source_P, weight_P != 0, first_column, columns)
            return sum_C + (weight_P[:, None] * rows_PC).sum(0)

        sum_C = lax.fori_loop(0, pl.cdiv(end - start, PAIRS), accumulate, sum_C)
        plgpu.store(out_ref.at[segment, column_C], sum_C, mask=written_C)

    return pl.pallas_call(
        kernel,
        grid=(n_segments, pl.cdiv(depth, columns)),
        out_shape=jax.ShapeDtypeStruct((n_segments, depth), jnp.float32),
        input_output_aliases={5: 0} if into else {},
        compiler_params=_params(columns),
        interpret=interpret,
        name="segment_sums",
    )(start_S, end_S, source_P, weight_P, table_ND, *into)


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
        target_P = jnp.where(at_edge_P, sorted_P, n_segments)
        return jnp.zeros(n_segments, jnp.int32).at[target_P].set(place_P, mode="drop")

    return places(jnp.append(edge, changes_P), place_P), places(jnp.append(changes_P, edge), place_P + 1)


def _columns(depth):
    return min(COLUMNS, pl.next_power_of_2(depth))


def _params(columns):
    return plgpu.CompilerParams(num_warps=max(1, columns // 128), num_stages=1)
