"""Dictionaries in which any number of latents may be active: every product in tiles, none of them kept.

    pre = (x - b_pre) W_enc^T,   (z, penalty) = activation(pre, per-latent parameters),   x_hat = z W_dec

Row blocks outside, latent tiles inside. A tile [b, f] of pre-activations stays within the memory budget; the backward
pass computes it once more and differentiates the activation there, so an activation is a plain function and the
engine knows none. What it may ask for:

    biases, thresholds, decoder norms   per-latent parameters: arrays [F, ...], each differentiated
    several reconstructions             a tree of codes and a tree of decoders of one structure
    several penalties                   a tree of them
    tied weights, frozen decoders       the same array twice, `stop_gradient` of it: what needs no gradient costs none
    straight-through estimators         jax.custom_jvp or jax.custom_vjp inside the activation
    several inputs or outputs a row     side by side in D

Collectives stand inside the loop over row blocks, so a device holds a block of the rows of its data shard, never all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.custom_derivatives import SymbolicZero

from sae_jax import mesh
from sae_jax.mesh import CODE, DATA, DICT, LATENT, REPLICATED, ROWS
from sae_jax.ops import encode, spmd, topk, tuning
from sae_jax.types import Code

# (pre f32[b, f], parameters [f, ...]) -> (tree of codes f32[b, f] >= 0, tree of penalties f32[b, f])
Activation = Callable[[jax.Array, Any], tuple[Any, Any]]


def relu(pre_bf: jax.Array, b_enc_f: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The activation z = ReLU(pre + b_enc), whose penalty is z too."""
    z_bf = jax.nn.relu(pre_bf + b_enc_f[None])
    return z_bf, z_bf


@struct.dataclass
class Tiled:
    """What `reconstruct` returns."""

    x_hat: Any  # tree of f32[B, D], ROWS: one for each decoder, without bias
    penalty: Any  # tree of f32[F], DICT: each latent's penalties summed over the batch
    n_active: jax.Array  # f32[F], DICT: rows in which the first code is above 0; no gradient
    fired: jax.Array  # bool[F], DICT: the first code exceeds `above` in some row

    @property
    def l0(self) -> jax.Array:
        """Active latents a row on average, f32[]."""
        return self.n_active.sum() / jax.tree.leaves(self.x_hat)[0].shape[0]


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def reconstruct(
    x_BD: jax.Array,
    w_enc_FD: jax.Array,
    w_dec: Any,
    b_pre_D: jax.Array,
    latents: Any,
    activation: Activation,
    dtype: jnp.dtype,
    above: float,
) -> Tiled:
    """Encode and decode a batch without keeping its code.

    Args:
        x_BD: [B, D], ROWS, any float type.
        w_enc_FD: f32[F, D], DICT.
        w_dec: f32[F, D], DICT; a tree of the structure of the activation's codes, each of a D of its own.
        b_pre_D: f32[D], subtracted from x first, in f32.
        latents: tree of f32[F, ...], DICT: what the activation needs to know of each latent.
        activation: from tiles of pre-activations and of `latents` to tiles of codes and of penalties.
        dtype: what the inputs of products are rounded to, backward too; they accumulate in f32.
        above: a latent counts as fired when its value exceeds this.
    """
    return _forward(x_BD, w_enc_FD, w_dec, b_pre_D, latents, activation, dtype, above)


def _forward(x_BD, w_enc_FD, w_dec, b_pre_D, latents, activation, dtype, above) -> Tiled:
    def local(x_RD, w_enc_RD, w_dec, b_pre_D, latents):
        w_enc_FD, w_dec = (jax.tree.map(partial(encode.gathered, dtype=dtype), w) for w in (w_enc_RD, w_dec))
        latents = _gathered(latents)
        cut, product = _Cut.of(x_RD, w_enc_FD), partial(_product, dtype=dtype)

        def block(sums, block):
            number, x_rD = block
            x_bD = spmd.gather(encode.centred(x_rD, b_pre_D).astype(dtype), LATENT)

            def tile(t, carry):
                x_hat, sums = carry
                at = cut.tile(t)
                pre_bf = product("bd,fd->bf", x_bD, at.take(w_enc_FD))
                codes, penalties = cut.real(activation, number, at)(pre_bf, at.take(latents))
                x_hat = jax.tree.map(
                    lambda x_hat_bD, z_bf, w_FD: x_hat_bD + product("bf,fd->bd", z_bf, at.take(w_FD)),
                    *(x_hat, codes, w_dec),
                )
                z_bf = jax.tree.leaves(codes)[0]
                parts = (penalties, *((z_bf > low).astype(jnp.float32) for low in (0.0, above)))
                return x_hat, at.add(sums, jax.tree.map(lambda part_bf: part_bf.sum(0), parts))

            zeros = jax.tree.map(lambda w_FD: jnp.zeros((x_bD.shape[0], w_FD.shape[1])), w_dec)
            x_hat, sums = lax.fori_loop(0, cut.n_tiles, tile, (zeros, sums))
            return sums, jax.tree.map(lambda x_hat_bD: spmd.reduce_scatter(x_hat_bD, LATENT), x_hat)

        zeros_F = jnp.zeros(cut.n_latents)
        penalties = jax.eval_shape(activation, jax.ShapeDtypeStruct((1, cut.n_latents), jnp.float32), latents)[1]
        zeros = jax.tree.map(lambda _: zeros_F, penalties), zeros_F, zeros_F
        sums, x_hat = spmd.scan(block, zeros, cut.blocks(x_RD))
        penalty, active_R, fired_R = jax.tree.map(lambda sum_F: spmd.reduce_scatter(sum_F, DATA), sums)
        return Tiled(jax.tree.map(cut.rows.join_own, x_hat), penalty, active_R, fired_R > 0)

    out_specs: Any = Tiled(ROWS, DICT, DICT, DICT)  # pyrefly: ignore[bad-argument-type] (specs in its shape)
    arguments = (x_BD, w_enc_FD, w_dec, b_pre_D, latents)
    return spmd.per_device(local, (ROWS, DICT, DICT, REPLICATED, DICT), out_specs)(*arguments)


def _forward_saving(x_BD, w_enc_FD, w_dec, b_pre_D, latents, activation, dtype, above):
    # Whether anyone wants a gradient is known while tracing; () or None, structure alone, tells the backward pass.
    may_need = x_BD, w_enc_FD, *jax.tree.leaves(w_dec, is_leaf=_is_argument)
    needed = [() if argument.perturbed else None for argument in may_need]
    saved = x_BD, w_enc_FD, w_dec, b_pre_D, latents = _values((x_BD, w_enc_FD, w_dec, b_pre_D, latents))
    return _forward(x_BD, w_enc_FD, w_dec, b_pre_D, latents, activation, dtype, above), (saved, needed)


def _is_argument(node: Any) -> bool:
    return hasattr(node, "perturbed")


def _values(arguments: Any) -> Any:
    return jax.tree.map(lambda argument: argument.value, arguments, is_leaf=_is_argument)


def _backward(activation, dtype, above, saved, cotangent: Tiled):
    (x_BD, w_enc_FD, w_dec, b_pre_D, latents), (wants_x, wants_enc, *wants_dec) = saved
    g_x_hat, g_penalty = (
        jax.tree.map(partial(_instantiated, role=role), g)
        for g, role in ((cotangent.x_hat, ROWS), (cotangent.penalty, DICT))
    )

    def local(x_RD, w_enc_RD, w_dec, b_pre_D, latents, g_x_hat, g_penalty):
        w_enc_FD, w_dec = (jax.tree.map(partial(encode.gathered, dtype=dtype), w) for w in (w_enc_RD, w_dec))
        latents, g_penalty = _gathered((latents, g_penalty))
        cut, product = _Cut.of(x_RD, w_enc_FD), partial(_product, dtype=dtype)
        decoders_FD, structure = jax.tree.flatten(w_dec)

        def block(sums, block):
            number, x_rD, g_x_hat = block
            x_bD = spmd.gather(encode.centred(x_rD, b_pre_D).astype(dtype), LATENT)
            g_x_hats_bD = [spmd.gather(g_rD.astype(dtype), LATENT) for g_rD in jax.tree.leaves(g_x_hat)]

            def tile(t, carry):
                g_x_bD, sums = carry
                at = cut.tile(t)
                pre_bf = product("bd,fd->bf", x_bD, at.take(w_enc_FD))
                (codes, _), pull = jax.vjp(cut.real(activation, number, at), pre_bf, at.take(latents))
                g_codes = [
                    product("bd,fd->bf", g_bD, at.take(w_FD))
                    for g_bD, w_FD in zip(g_x_hats_bD, decoders_FD, strict=True)
                ]
                g_penalties = jax.tree.map(lambda g_F: jnp.broadcast_to(at.take(g_F)[None], pre_bf.shape), g_penalty)
                g_pre_bf, g_latents = pull((jax.tree.unflatten(structure, g_codes), g_penalties))
                g_dec = [
                    None if wants is None else product("bf,bd->fd", z_bf, g_bD)
                    for wants, z_bf, g_bD in zip(wants_dec, jax.tree.leaves(codes), g_x_hats_bD, strict=True)
                ]
                g_enc = None if wants_enc is None else product("bf,bd->fd", g_pre_bf, x_bD)
                parts = (g_pre_bf.sum(0), g_enc, g_dec, g_latents)
                if wants_x is not None:
                    g_x_bD = g_x_bD + product("bf,fd->bd", g_pre_bf, at.take(w_enc_FD))
                return g_x_bD, at.add(sums, parts)

            g_x_bD = None if wants_x is None else jnp.zeros(x_bD.shape)
            g_x_bD, sums = lax.fori_loop(0, cut.n_tiles, tile, (g_x_bD, sums))
            return sums, jax.tree.map(lambda g_bD: spmd.reduce_scatter(g_bD, LATENT), g_x_bD)

        g_dec = [None if wants is None else w_FD for wants, w_FD in zip(wants_dec, decoders_FD, strict=True)]
        g_enc = None if wants_enc is None else w_enc_FD
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape), (jnp.zeros(cut.n_latents), g_enc, g_dec, latents))
        sums, g_x = spmd.scan(block, zeros, cut.blocks(x_RD, g_x_hat))
        g_pre_R, g_enc_RD, g_dec, g_latents = jax.tree.map(lambda sum_F: spmd.reduce_scatter(sum_F, DATA), sums)
        # Summed over the batch first: a mat-vec instead of a product of full size.
        g_b_pre_D = -spmd.total(jnp.matmul(g_pre_R, w_enc_RD, precision=encode.EXACT))
        g_x_RD = jax.tree.map(lambda g: cut.rows.join_own(g).astype(x_RD.dtype), g_x)
        return g_x_RD, g_enc_RD, g_dec, g_b_pre_D, g_latents

    in_specs = (ROWS, DICT, DICT, REPLICATED, DICT, ROWS, DICT)
    out_specs = (ROWS, DICT, DICT, REPLICATED, DICT)
    g_x, g_enc, g_dec, g_b_pre, g_latents = spmd.per_device(local, in_specs, out_specs)(
        x_BD, w_enc_FD, w_dec, b_pre_D, latents, g_x_hat, g_penalty
    )
    return g_x, g_enc, jax.tree.unflatten(jax.tree.structure(w_dec), g_dec), g_b_pre, g_latents


reconstruct.defvjp(_forward_saving, _backward, symbolic_zeros=True)


def n_active(x_BD, w_enc_FD, b_pre_D, latents, activation: Activation, dtype) -> jax.Array:
    """How many latents of each row are above 0 in the first code: i32[B, latent shards], CODE. See `reconstruct`."""

    def start(n_rows):
        return jnp.zeros((n_rows, 1), jnp.int32)

    def add(count_b1, z_bf, _):
        return count_b1 + (z_bf > 0).sum(-1, dtype=jnp.int32, keepdims=True)

    return _over_codes(x_BD, w_enc_FD, b_pre_D, latents, activation, dtype, start, add, CODE)


def encode_largest(x_BD, w_enc_FD, b_pre_D, latents, activation: Activation, dtype, k: int) -> Code:
    """The k largest values of each row's first code.

    Args:
        x_BD, w_enc_FD, b_pre_D, latents, activation, dtype: see `reconstruct`.
        k: slots a row; at most the latents of a shard.

    Returns:
        On one latent shard a public code, [B, k]. On S shards [B, S * k] as CODE: every shard's own k largest.
    """

    def start(n_rows):
        return Code(jnp.zeros((n_rows, k), jnp.int32), jnp.zeros((n_rows, k)))

    def merge(code, z_bf, first):
        values_bK, index_bK = topk.top_k(z_bf, min(k, z_bf.shape[1]))
        values_bK, index_bK = topk.merge((code.values, code.indices), (values_bK, index_bK + first), k)
        return Code(index_bK, values_bK)

    return _over_codes(x_BD, w_enc_FD, b_pre_D, latents, activation, dtype, start, merge, spmd.CODES)


def _over_codes(x_BD, w_enc_FD, b_pre_D, latents, activation, dtype, start, merge, out_specs):
    """Fold `merge(carry, z_bf, number of its first latent)` over the tiles of each row block, from `start(b)`."""

    def local(x_RD, w_enc_RD, b_pre_D, latents):
        w_enc_FD, latents = encode.gathered(w_enc_RD, dtype), _gathered(latents)
        cut = _Cut.of(x_RD, w_enc_FD)

        def block(_, block):
            number, x_rD = block
            x_bD = spmd.gather(encode.centred(x_rD, b_pre_D).astype(dtype), LATENT)

            def tile(t, carry):
                at = cut.tile(t)
                pre_bf = _product("bd,fd->bf", x_bD, at.take(w_enc_FD), dtype)
                codes, _ = cut.real(activation, number, at)(pre_bf, at.take(latents))
                return merge(carry, jax.tree.leaves(codes)[0], at.first + spmd.first_latent(cut.n_latents))

            return None, lax.fori_loop(0, cut.n_tiles, tile, start(len(x_bD)))

        return jax.tree.map(cut.rows.join_shared, spmd.scan(block, None, cut.blocks(x_RD))[1])

    return spmd.per_device(local, (ROWS, DICT, REPLICATED, DICT), out_specs)(x_BD, w_enc_FD, b_pre_D, latents)


@dataclass(frozen=True)
class _Tile:
    """A range of the latents of this shard."""

    first: jax.Array
    size: int
    new: jax.Array | None  # bool[f]: not in the tile before; None where that holds for all

    def take(self, tree: Any) -> Any:
        """This range of arrays [F, ...]."""
        return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, self.first, self.size), tree)

    def add(self, sums: Any, parts: Any) -> Any:
        """`sums` [F, ...] with `parts` [f, ...] added to this range."""
        return jax.tree.map(
            lambda a, b: lax.dynamic_update_slice_in_dim(a, b, self.first, 0),
            sums,
            jax.tree.map(jnp.add, self.take(sums), parts),
        )


@dataclass(frozen=True)
class _Cut:
    """How a device cuts the rows of its data shard and the latents of its shard. Inside `per_device`."""

    rows: spmd.RowBlocks
    n_latents: int
    n_tiles: int
    tile_size: int

    @classmethod
    def of(cls, x_RD: jax.Array, w_FD: jax.Array) -> _Cut:
        """Tiles with about as many rows as latents, whose pre-activations keep to the budget of the back end.

        A tile reads and writes its rows' reconstruction and its latents' gradients: the fewest bytes for the products
        when it is square.
        """
        n_shards, n_latents = mesh.axis_size(LATENT), len(w_FD)
        budget = tuning.current().block_bytes // 4
        max_rows = max(math.isqrt(budget), budget // n_latents) // n_shards
        max_rows = max(1, min(max_rows, spmd.row_blocks(*x_RD.shape).size))
        rows = spmd.RowBlocks(len(x_RD), *spmd.even(len(x_RD), max_rows))
        return cls(rows, n_latents, *spmd.even(n_latents, max(1, budget // max(1, rows.size * n_shards))))

    def blocks(self, *arrays: Any) -> Any:
        """(block number, row blocks of arrays [R, ...]) to scan over."""
        return jnp.arange(self.rows.n_blocks), *jax.tree.map(self.rows.own, arrays)

    def tile(self, t: jax.Array) -> _Tile:
        """The t-th tile. The last one of an uneven cut reaches back over latents that were seen."""
        begin = t * self.tile_size
        first = jnp.minimum(begin, self.n_latents - self.tile_size)
        uneven = self.n_tiles * self.tile_size > self.n_latents
        return _Tile(first, self.tile_size, first + jnp.arange(self.tile_size) >= begin if uneven else None)

    def real(self, activation: Activation, number: jax.Array, at: _Tile) -> Activation:
        """`activation` with nothing from rows that fill up a block and from latents that were seen."""
        masks = [] if at.new is None else [at.new[None]]
        if self.rows.n_blocks * self.rows.size > self.rows.n_own:
            own_r = number * self.rows.size + jnp.arange(self.rows.size) < self.rows.n_own
            masks.append(jnp.tile(own_r, mesh.axis_size(LATENT))[:, None])

        def masked(pre_bf, latents):
            outputs = activation(pre_bf, latents)
            for mask in masks:
                outputs = jax.tree.map(lambda a: jnp.where(mask, a, 0.0), outputs)
            return outputs

        return masked


def _gathered(tree: Any) -> Any:
    """What the devices of `data` know of the latents of this shard."""
    return jax.tree.map(lambda a: spmd.gather(a, DATA), tree)


def _product(equation: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Their product, each rounded to `dtype`, accumulated in f32."""
    return encode.product(a.astype(dtype), b.astype(dtype), equation)


def _instantiated(g: Any, role: Any) -> jax.Array:
    """A cotangent as an array: JAX leaves out those of outputs that the loss does not use."""
    return jnp.zeros(g.shape, out_sharding=mesh.placed(role)) if isinstance(g, SymbolicZero) else g
