"""Top-k encoding of a batch by a dictionary that is split over devices.

    pre = (x - b_pre) W_enc^T + b_enc,   z = ReLU(keep_k(pre))

    rows exchanged a block at a time  ->  latent tiles, a running top-k over them  ->  row blocks of the product

so that pre-activations never exceed a memory budget (ops/tuning.py), whatever the batch and the dictionary are. Only
the winners carry a gradient: the weights receive row scatter-adds, and the gradient of `b_pre` sums over the batch
before it meets W_enc, which is one mat-vec instead of a product of full size.

Source: Gao et al. 2024, arXiv 2406.04093, sections 2.3 and D.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax import mesh
from sae_jax.mesh import CODE, DICT, REPLICATED, ROWS
from sae_jax.ops import pairs, sparse, spmd, topk, tuning
from sae_jax.ops.pairs import Pairs
from sae_jax.ops.sparse import shared_type
from sae_jax.types import Code

SOME = 8  # one in so many rows may be looked at once more by itself; where there are more, all are
EXACT = lax.Precision.HIGHEST  # float32 means float32: accelerators would round the inputs of a product by default


def encode_topk(
    x_BD: jax.Array,
    w_enc_FD: jax.Array,
    b_enc_F: jax.Array,
    b_pre_D: jax.Array,
    k: int,
    dtype: jnp.dtype,
    max_k: int | None = None,
    k_now: jax.Array | None = None,
) -> tuple[Code, jax.Array]:
    """The k largest pre-activations of each row, after ReLU.

    Args:
        x_BD: [B, D], ROWS, any float type.
        w_enc_FD: bf16 or f32[F, D], DICT.
        b_enc_F: f32[F], DICT; -inf bars a latent.
        b_pre_D: f32[D], subtracted from x first, in f32.
        k: active latents a row.
        dtype: what the product's inputs are rounded to; it accumulates in f32.
        max_k, k_now: for a k that changes during a run: `k_now` (i32[]) latents instead of k, at most `max_k` > k, in a
            code of `max_k` slots. Once k_now is at most k the search costs what it costs for k.

    Returns:
        The code. On one latent shard a public one, [B, min(k, F)]; on S shards [B, S * min(k, F/S)] as CODE: every
        shard's own candidates, those that did not win with value 0.
        And w_enc as it is. What uses the encoder again should use that one: the gradients of all uses then gather in
        one buffer, where several would be added up.
    """
    search, filling = _largest_of_row(k, max_k), sparse.Filling(k)
    code, w_enc_FD, _ = _encode(x_BD, w_enc_FD, b_enc_F, b_pre_D, k_now, search, filling, dtype)
    return code, w_enc_FD


def select_topk(
    x_BD: jax.Array, w_enc_FD: jax.Array, b_enc_F: jax.Array, b_pre_D: jax.Array, k: int, dtype: jnp.dtype
) -> Code:
    """The code of `encode_topk`, without gradient."""
    return _forward(x_BD, w_enc_FD, b_enc_F, b_pre_D, None, _largest_of_row(k), dtype)[0]


def _largest_of_row(k: int, max_k: int | None = None) -> Search:
    """The search of `encode_topk`."""
    n_slots = k if max_k is None else max_k

    def search(candidates, k_now, n_local):
        def select(width):
            values_BK, index_BK = candidates(width)
            wins_BK = _prefix(topk.n_winners(values_BK, width, k_now), values_BK.shape[1])
            return _kept(values_BK, index_BK, wins_BK, min(n_slots, n_local)), ()

        return select(k) if k_now is None else lax.cond(k_now > k, lambda: select(n_slots), lambda: select(k))

    return search


def encode_batch_topk(
    x_BD: jax.Array,
    w_enc_FD: jax.Array,
    b_enc_F: jax.Array,
    b_pre_D: jax.Array,
    k: int,
    dtype: jnp.dtype,
    n_candidates: int,
    max_candidates: int,
) -> tuple[Code, jax.Array, topk.BatchSelection]:
    """The B*k largest pre-activations of the whole batch, over all devices, after ReLU.

    Args:
        n_candidates: of a row on a latent shard.
        max_candidates: as many are looked at, of a row that might have had more; counted in `n_widened`. A row that
            might have had still more is counted in `n_saturated`: the selection is exact where that is 0.
        The others as in `encode_topk`.

    Returns:
        As `encode_topk`, with min(max_candidates, F/S) slots a shard, mostly empty; and the threshold and counts.

    Source: Bussmann et al. 2024, arXiv 2412.06410, section 3.
    """
    n_kept = len(x_BD) * k

    def search(candidates, _, n_local):
        def select(values_BC, index_BC):
            wins_BC, selection = topk.batch_winners(values_BC, index_BC, n_local, n_kept)
            return (_kept(values_BC, index_BC, wins_BC, min(max_candidates, n_local)), selection), wins_BC[:, -1]

        lists = candidates(n_candidates)
        first, is_short_B = select(*lists)
        if n_candidates >= min(max_candidates, n_local):
            return first
        # With longer lists of some rows the threshold rises, if it changes: the lists of the others stay long enough.
        is_short_B = spmd.total(is_short_B.astype(jnp.int32), mesh.LATENT) > 0
        n_some = -(-len(is_short_B) // SOME)

        def of_some():
            rows_S = jnp.nonzero(is_short_B, size=n_some, fill_value=len(is_short_B))[0]
            longer = candidates(max_candidates, rows_S)
            more = (0, 0), (0, longer[0].shape[1] - n_candidates)
            padded = (jnp.pad(list_BC, more) for list_BC in lists)
            return select(*(a.at[rows_S].set(new, mode="drop") for a, new in zip(padded, longer, strict=True)))[0]

        def again():
            are_few = spmd.largest(is_short_B.sum(dtype=jnp.int32)) <= n_some
            code, selection = lax.cond(are_few, of_some, lambda: select(*candidates(max_candidates))[0])
            return code, replace(selection, n_widened=first[1].n_saturated)

        # Counts over all devices: they take these turns together, or their collectives would wait for ever.
        return lax.cond(first[1].n_saturated > 0, again, lambda: first)

    return _encode(x_BD, w_enc_FD, b_enc_F, b_pre_D, None, search, sparse.Filling(k, n_kept), dtype)


def encode_above(
    x_BD: jax.Array,
    w_enc_FD: jax.Array,
    b_enc_F: jax.Array,
    b_pre_D: jax.Array,
    k: int,
    n_most: int,
    dtype: jnp.dtype,
    n_candidates: int,
    max_candidates: int,
) -> tuple[Code, jax.Array, jax.Array]:
    """Every pre-activation above 0, as long as there are few.

    Args:
        k: a guess at how many a row has.
        n_most: of the batch.
        n_candidates: of a row on a latent shard.
        max_candidates: as many are looked at where a row might have had more.
        The others as in `encode_topk`.

    Returns:
        As `encode_topk`, with min(max_candidates, F/S) slots a shard, mostly empty; and whether these are all that are
        above 0, bool[]. If not, the code is part of them.
    """

    def search(candidates, _, n_local):
        def select(width):
            values_BC, index_BC = candidates(width)
            n_found = spmd.total((values_BC > 0).sum(dtype=jnp.int32))
            n_cut = spmd.total((values_BC[:, -1] > 0).sum(dtype=jnp.int32)) if width < n_local else jnp.int32(0)
            code = _kept(values_BC, index_BC, values_BC > 0, min(max_candidates, n_local))
            return code, (n_found <= n_most, n_cut > 0)

        code, (are_few, is_cut) = first = select(n_candidates)
        if n_candidates < min(max_candidates, n_local):  # a batch that has too many already needs no longer lists
            code, (are_few, is_cut) = lax.cond(are_few & is_cut, lambda: select(max_candidates), lambda: first)
        return code, are_few & ~is_cut

    return _encode(x_BD, w_enc_FD, b_enc_F, b_pre_D, None, search, sparse.Filling(k, n_most), dtype)


def narrow(code: Code, k: int) -> Code:
    """A code of `encode_topk` cut down to the k largest of each row. Fewer slots on one latent shard, else zeros."""

    def local(code):
        values_BK, index_BK = code.values[:, :k], code.indices[:, :k]
        wins_B = topk.n_winners(lax.stop_gradient(values_BK), k)
        return Code(index_BK, jnp.where(_prefix(wins_B, values_BK.shape[1]), values_BK, 0.0))

    return spmd.per_device(local, (spmd.CODES,), spmd.CODES)(code)


def product(x_bD: jax.Array, w_FD: jax.Array, equation: str) -> jax.Array:
    """A product of two arrays of the same type, accumulated in f32."""
    return jnp.einsum(equation, x_bD, w_FD, precision=EXACT, preferred_element_type=jnp.float32)


def largest(x_BD: jax.Array, w_FD: jax.Array, b_F: jax.Array, k: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """The k largest pre-activations of each row on one device: values f32[B, k] descending, indices i32[B, k].

    Args:
        x_BD: of type `dtype`, centred.
        w_FD: f32[F, D], or already of type `dtype`.
        b_F: f32[F].
        k: at most F.
        dtype: of the product's inputs.
    """
    cut = tuning.current()
    n_rows, n_latents = len(x_BD), len(b_F)
    n_blocks, size = spmd.even(n_rows, cut.block_rows)
    # A tile that ends on a group's boundary, and holds the k that may all lie in it.
    max_tile = max(cut.block_bytes // (4 * size or 4), k, tuning.MIN_TILE) // topk.GROUP * topk.GROUP
    n_tiles, tile = spmd.even(n_latents, max(max_tile, k))
    blocks_nbD = jnp.pad(x_BD, ((0, n_blocks * size - n_rows), (0, 0))).reshape(n_blocks, size, x_BD.shape[1])

    def in_tile(first) -> tuple[jax.Array, jax.Array]:
        # The last tile of an uneven cut reaches back over latents that were seen, so that all have one shape.
        start = jnp.minimum(first, n_latents - tile)
        w_tD = lax.dynamic_slice_in_dim(w_FD, start, tile).astype(dtype)
        b_t = lax.dynamic_slice_in_dim(b_F, start, tile)
        b_t = jnp.where(start + jnp.arange(tile, dtype=jnp.int32) < first, -jnp.inf, b_t)

        def block(x_bD):
            if cut.kernels:
                from sae_jax.ops import pallas_encode  # not above: Pallas takes half a second to import

                with contextlib.suppress(NotImplementedError):  # what no kernel serves is the compiler's
                    return pallas_encode.block_topk(x_bD, w_tD, b_t, k)
            if cut.latent_major:
                return topk.top_k_latent_major(product(w_tD, x_bD, "fd,bd->fb") + b_t[:, None], k)
            return topk.top_k(product(x_bD, w_tD, "bd,fd->bf") + b_t[None], k)

        values_nbK, index_nbK = lax.map(block, blocks_nbD) if n_blocks > 1 else block(blocks_nbD[0])
        values_BK, index_BK = (y.reshape(n_blocks * size, k)[:n_rows] for y in (values_nbK, index_nbK))
        return values_BK, index_BK + start

    if n_tiles == 1:
        return in_tile(jnp.int32(0))
    firsts = tile * jnp.arange(1, n_tiles, dtype=jnp.int32)
    return lax.scan(lambda best, first: (topk.merge(best, in_tile(first), k), None), in_tile(jnp.int32(0)), firsts)[0]


# (candidates, k_now, n_local) -> (a shard's code, facts about the selection). candidates(width) are those of the shard,
# values_BC and index_BC, and candidates(width, rows_S) those of some rows of the data shard.
Search = Callable[[Callable[..., tuple[jax.Array, jax.Array]], Any, int], tuple[Code, Any]]


def _encode(x_BD, w_enc_FD, b_enc_F, b_pre_D, k_now, search: Search, filling: sparse.Filling, dtype: jnp.dtype):
    """The code that `search` selects, w_enc, and facts about the selection."""
    if (tape := pairs.tape()) is None:
        return _encode_learning(x_BD, w_enc_FD, b_enc_F, b_pre_D, k_now, search, filling, dtype)
    code, selection = _encode_fixed(x_BD, w_enc_FD, b_enc_F, b_pre_D, k_now, search, filling, dtype)

    def made(g_BK: jax.Array, saved: tuple[Code, jax.Array]) -> dict[str, list[Pairs]]:
        code, rows_BD = saved
        return {"w_enc": [Pairs(code.indices, jnp.where(code.values > 0, g_BK, 0.0), rows_BD)]}

    saved = code, shared_type(centred(x_BD, b_pre_D), dtype)
    return replace(code, values=tape.tap(code.values, saved, made)), w_enc_FD, selection


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _encode_learning(x_BD, w_enc_FD, b_enc_F, b_pre_D, k_now, search, filling, dtype):
    code, selection = _forward(x_BD, w_enc_FD, b_enc_F, b_pre_D, k_now, search, dtype)
    return code, w_enc_FD, selection


def _forward(x_BD, w_enc_FD, b_enc_F, b_pre_D, k_now, search, dtype) -> tuple[Code, Any]:
    def local(x_RD, w_RD, b_R, b_pre_D, k_now):
        w_FD, b_F = gathered(w_RD, dtype), spmd.gather(b_R, mesh.DATA)
        rows = spmd.row_blocks(*x_RD.shape)

        def candidates(width, rows_S=None):
            width = min(width, len(b_F))
            if rows_S is not None:
                own_S = rows_S - spmd.index(mesh.LATENT) * len(x_RD)
                x_SD = jnp.take(x_RD, jnp.where(own_S < 0, len(x_RD), own_S), axis=0, mode="fill", fill_value=0)
                x_SD = spmd.total(x_SD.astype(jnp.float32), mesh.LATENT)  # each row is one device's own
                return largest(centred(x_SD, b_pre_D).astype(dtype), w_FD, b_F, width, dtype)

            def block(_, x_rD):
                x_bD = spmd.gather(centred(x_rD, b_pre_D).astype(dtype), mesh.LATENT)
                return None, largest(x_bD, w_FD, b_F, width, dtype)

            return jax.tree.map(rows.join_shared, spmd.scan(block, None, rows.own(x_RD))[1])

        code, selection = search(candidates, k_now, len(b_F))
        return replace(code, indices=code.indices + spmd.first_latent(len(b_F))), selection

    in_specs = (ROWS, DICT, DICT, REPLICATED, REPLICATED)
    return spmd.per_device(local, in_specs, (spmd.CODES, REPLICATED))(x_BD, w_enc_FD, b_enc_F, b_pre_D, k_now)


def _forward_saving(x_BD, w_enc_FD, b_enc_F, b_pre_D, k_now, search, filling, dtype):
    code, selection = _forward(x_BD, w_enc_FD, b_enc_F, b_pre_D, k_now, search, dtype)
    return (code, w_enc_FD, selection), (x_BD, w_enc_FD, b_pre_D, code)


def _backward(search, filling, dtype, saved, cotangent: tuple[Code, jax.Array, Any]):
    x_BD, w_enc_FD, b_pre_D, code = saved
    g_code, g_w_FD, _ = cotangent

    def local(x_RD, b_pre_D, code, g_BK, g_w_RD):
        rows = sparse.row_blocks(len(x_RD), x_RD.shape[1], filling)
        index_BK = code.indices - spmd.first_latent(len(g_w_RD) * mesh.axis_size(mesh.DATA))
        g_BK = jnp.where(code.values > 0, g_BK, 0.0)

        def block(g_w_FD, blocks):
            x_rD, index_bK, g_bK = blocks
            x_bD = spmd.gather(shared_type(centred(x_rD, b_pre_D), dtype), mesh.LATENT)
            return sparse.scatter_rows(g_w_FD, index_bK, g_bK, x_bD[:, None], filling), None

        return sparse.accumulated(block, g_w_RD, (rows.own(x_RD), rows.shared(index_BK), rows.shared(g_BK)))[0]

    in_specs = (ROWS, REPLICATED, spmd.CODES, CODE, DICT)
    g_w_FD = spmd.per_device(local, in_specs, DICT)(x_BD, b_pre_D, code, g_code.values, g_w_FD)
    g_x_BD, g_b_F, g_b_pre_D = _gradients_beside_w(x_BD, w_enc_FD, code, g_code.values, filling)
    return g_x_BD, g_w_FD, g_b_F, g_b_pre_D, None


def _gradients_beside_w(x_BD, w_enc_FD, code, g_BK, filling):
    """Those of x, b_enc and b_pre, from that of a code's values."""

    def local(x_RD, w_RD, code, g_BK):
        n_local = len(w_RD) * mesh.axis_size(mesh.DATA)
        rows = sparse.row_blocks(len(x_RD), x_RD.shape[1], filling)
        index_BK = code.indices - spmd.first_latent(n_local)
        g_BK = jnp.where(code.values > 0, g_BK, 0.0)

        def block_of_x(_, blocks):
            index_bK, g_bK = blocks
            g_x_b1D = sparse.gather_rows(index_bK, g_bK, w_FD, filling)
            return None, spmd.reduce_scatter(g_x_b1D[:, 0], mesh.LATENT)

        g_b_R = spmd.reduce_scatter(sparse.add_up(index_BK, g_BK, n_local, filling), mesh.DATA)
        g_b_pre_D = -sparse.weighted_total(g_b_R, w_RD)
        # Dropped by the compiler wherever x is data, which needs no gradient.
        w_FD = spmd.gather(w_RD, mesh.DATA)
        g_x_RD = rows.join_own(spmd.scan(block_of_x, None, (rows.shared(index_BK), rows.shared(g_BK)))[1])
        return g_x_RD.astype(x_RD.dtype), g_b_R, g_b_pre_D

    out_specs = (ROWS, DICT, REPLICATED)
    return spmd.per_device(local, (ROWS, DICT, spmd.CODES, CODE), out_specs)(x_BD, w_enc_FD, code, g_BK)


_encode_learning.defvjp(_forward_saving, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _encode_fixed(x_BD, w_enc_FD, b_enc_F, b_pre_D, k_now, search, filling, dtype):
    """The code and facts about the selection; w_enc is a constant."""
    return _forward(x_BD, w_enc_FD, b_enc_F, b_pre_D, k_now, search, dtype)


def _fixed_saving(x_BD, w_enc_FD, b_enc_F, b_pre_D, k_now, search, filling, dtype):
    code, selection = _forward(x_BD, w_enc_FD, b_enc_F, b_pre_D, k_now, search, dtype)
    return (code, selection), (x_BD, w_enc_FD, code)


def _fixed_backward(search, filling, dtype, saved, cotangent: tuple[Code, Any]):
    x_BD, w_enc_FD, code = saved
    g_x_BD, g_b_F, g_b_pre_D = _gradients_beside_w(x_BD, w_enc_FD, code, cotangent[0].values, filling)
    return g_x_BD, None, g_b_F, g_b_pre_D, None


_encode_fixed.defvjp(_fixed_saving, _fixed_backward)


def centred(x_rD: jax.Array, b_pre_D: jax.Array) -> jax.Array:
    """x - b_pre in f32."""
    return x_rD.astype(jnp.float32) - b_pre_D[None]


def gathered(w_RD: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The latent shard's weights from the devices of `data`, rounded before they are sent; as they are on one."""
    return spmd.gather(w_RD.astype(dtype), mesh.DATA) if mesh.axis_size(mesh.DATA) > 1 else w_RD


def _kept(values_BC: jax.Array, index_BC: jax.Array, wins_BC: jax.Array, n_slots: int) -> Code:
    """The code of the candidates that win, in more slots if need be."""
    values_BC = jnp.where(wins_BC, jnp.maximum(values_BC, 0.0), 0.0)
    more = (0, 0), (0, n_slots - values_BC.shape[1])
    return Code(jnp.pad(index_BC, more), jnp.pad(values_BC, more)) if any(more[1]) else Code(index_BC, values_BC)


def _prefix(count_B: jax.Array, width: int) -> jax.Array:
    """bool[B, width]: the first `count` slots of each row."""
    return jnp.arange(width, dtype=count_B.dtype)[None] < count_B[:, None]
