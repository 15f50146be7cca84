"""How well the dead latents would explain what the living leave over: the part of AuxK that scales with the batch.

    z = ReLU(keep_k(pre)) over the dead only,   e_hat = z W_dec,   weight * sum ||e - e_hat||^2

k is large here, half of d_model, and the dead are few: their rows are gathered and everything is dense in them. Dense
also means that selection needs no order, so the k-th largest value is found by its bits instead of a sort.

No dead latent costs nothing. Else the price is bounded: the more latents are dead, the fewer rows are looked at, so
that the products are at most a sixteenth of rows x latents (TIERS). Which tier it is, is decided while it runs. The
rows are drawn anew each time, every row as likely as another, and all dead latents compete for the k strongest of each;
what is summed over the sample counts `stride` times, so that the sum and its gradients are those over all rows on
average. Without a key nothing is drawn, and the sum is over all rows whatever it costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax import mesh
from sae_jax.mesh import DICT, REPLICATED, ROWS
from sae_jax.ops import spmd, topk, tuning
from sae_jax.ops.encode import EXACT, centred, product

# (a, b): while at most 1/a of the latents are dead, 1/b of the rows are looked at.
TIERS = ((16, 1), (4, 4), (1, 16))
LEAST_ROWS = 128  # of a batch that are looked at in any tier, or all if there are fewer
PARTS = 8  # that a gradient is scaled in
ROWS_AT_ONCE = 4  # encoder blocks' rows: the products here are narrower


@partial(jax.custom_vjp, nondiff_argnums=(9, 10))
def unexplained(
    x_BD: jax.Array,
    error_BD: jax.Array,
    w_enc_FD: jax.Array,
    b_enc_F: jax.Array,
    b_pre_D: jax.Array,
    w_dec_FD: jax.Array,
    allowed_F: jax.Array,
    weight: jax.Array,
    key: jax.Array | None,
    k: int,
    dtype: jnp.dtype,
) -> jax.Array:
    """`weight` times the squared error that is left when the k strongest allowed latents explain `error`.

    Args:
        x_BD: [B, D], ROWS; as data, without gradient.
        error_BD: f32[B, D], ROWS; as data.
        w_enc_FD, b_enc_F, b_pre_D: the encoder, as in `encode.encode_topk`.
        w_dec_FD: f32[F, D], DICT.
        allowed_F: bool[F], DICT.
        weight: f32[], of the sum over rows and D; as data. Given here, not multiplied with the result, it costs no
            further pass over the gradients.
        key: what the rows are drawn with, the same ones on every mesh; None: all rows.
        k: latents a row; of several equal to the k-th largest value all are taken.
        dtype: what inputs of products are rounded to.

    Returns:
        f32[]; 0 if none is allowed, and, as its gradients, if it is not finite.
    """
    args = x_BD, error_BD, w_enc_FD, b_enc_F, b_pre_D, w_dec_FD, allowed_F, weight, key
    return _with_gradients(*args, k, dtype)[0]


def most_work(n_rows: int, sampled: bool) -> float:
    """Rows x latents that are looked at, at most, as a part of all."""
    return max(-(-n_rows // stride) / n_rows / part for part, stride in _tiers(n_rows, sampled))


def _backward(k, dtype, gradients, factor: jax.Array):
    g_w_enc, g_b_enc, g_b_pre, g_w_dec = jax.tree.map(lambda g: factor * g, gradients)
    return None, None, g_w_enc, g_b_enc, g_b_pre, g_w_dec, None, None, None


def _with_gradients(x_BD, error_BD, w_enc_FD, b_enc_F, b_pre_D, w_dec_FD, allowed_F, weight, key, k, dtype):
    """The weighted sum, and its gradients with respect to w_enc, b_enc, b_pre and w_dec: one pass over rows for both.

    The gradient of a sum of squares is known up to its factor.
    """

    def local(x_RD, error_RD, w_enc_RD, b_R, b_pre_D, w_dec_RD, allowed_R, weight, key):
        n_own, n_latents = len(x_RD), len(b_R)
        n_rows = n_own * mesh.axis_size(mesh.AXES)
        draws_B = None if key is None else jax.random.uniform(key, (n_rows,))  # once for all tiers
        tiers = _tiers(n_rows, sampled=key is not None)

        def none():
            # One of the two is zeros that the compiler does not know: it would make one array of them, and a copy.
            zero = 0 * number.astype(jnp.float32)
            g_dec_RD = jnp.broadcast_to(zero, w_dec_RD.shape)
            return jnp.float32(0), (*jax.tree.map(jnp.zeros_like, (w_enc_RD, b_R, b_pre_D)), g_dec_RD)

        def tier(part: int, stride: int) -> Callable:
            capacity = _capacity(n_latents, part)

            def some():
                x_SD, error_SD, is_one_S = x_RD, error_RD, jnp.ones(n_own, bool)
                if draws_B is not None and stride > 1:
                    at_S, is_one_S = _sample(draws_B, n_own, stride)
                    x_SD, error_SD = (jnp.take(a_RD, at_S, axis=0, mode="clip") for a_RD in (x_RD, error_RD))
                rows = x_SD, error_SD, is_one_S
                settings = b_pre_D, weight * stride, k, dtype
                if capacity == n_latents:
                    return _dense(*rows, w_enc_RD, jnp.where(allowed_R, b_R, -jnp.inf), w_dec_RD, *settings)
                at_C = jnp.nonzero(allowed_R, size=capacity, fill_value=0)[0]
                is_one_C = jnp.arange(capacity) < allowed_R.sum()
                b_C = jnp.where(is_one_C, b_R[at_C], -jnp.inf)
                left, (g_enc_CD, g_b_C, g_pre_D, g_dec_CD) = _dense(
                    *rows, w_enc_RD[at_C], b_C, w_dec_RD[at_C], *settings
                )

                def put(g_C, like_R):
                    return jnp.zeros_like(like_R).at[at_C].add(g_C)

                return left, (put(g_enc_CD, w_enc_RD), put(g_b_C, b_R), g_pre_D, put(g_dec_CD, w_dec_RD))

            return some

        n_allowed = allowed_R.sum(dtype=jnp.int32)
        n_all, n_most = spmd.total(n_allowed), spmd.largest(n_allowed)
        number = (n_all > 0).astype(jnp.int32)
        for part, _ in tiers[:-1]:
            limit = -(-n_latents * mesh.axis_size(mesh.AXES) // part)
            number += ((n_all > limit) | (n_most > _capacity(n_latents, part))).astype(jnp.int32)
        return lax.switch(number, (none, *(tier(*parts) for parts in tiers)))

    in_specs = (ROWS, ROWS, DICT, DICT, REPLICATED, DICT, DICT, REPLICATED, REPLICATED)
    return spmd.per_device(local, in_specs, (REPLICATED, (DICT, DICT, REPLICATED, DICT)))(
        x_BD, error_BD, w_enc_FD, b_enc_F, b_pre_D, w_dec_FD, allowed_F, weight, key
    )


unexplained.defvjp(_with_gradients, _backward)


def _tiers(n_rows: int, sampled: bool) -> list[tuple[int, int]]:
    """TIERS for a batch of `n_rows`: (part of the latents, one of how many rows); of several as many rows, the last.

    The first stays, where only few latents are gathered.
    """
    strides = [max(1, min(stride, n_rows // LEAST_ROWS)) if sampled else 1 for _, stride in TIERS]
    last = {stride: part for (part, _), stride in zip(TIERS[1:], strides[1:], strict=True)}
    return [(TIERS[0][0], 1), *((part, stride) for stride, part in last.items())]


def _capacity(n_own: int, part: int) -> int:
    """For how many of a device's own latents a tier has room that is for 1/part of all.

    Of several devices some own more than that: room for four standard deviations more, if they are dead at random, lets
    every mesh take the same tier. One that owns more still, as where the last latents die first, takes all to the next.
    """
    capacity = -(-n_own // part)
    if mesh.axis_size(mesh.AXES) > 1:
        capacity += math.ceil(4 * math.sqrt(capacity))
    return min(capacity, n_own)


def _sample(draws_B: jax.Array, n_own: int, stride: int) -> tuple[jax.Array, jax.Array]:
    """Which of a device's own rows are looked at: one at random of each `stride` rows of the batch that are neighbours.

    Args:
        draws_B: f32[B] between 0 and 1; the g-th says which row of the g-th neighbours it is, on whatever device.
        n_own: rows of a device.
        stride: as many are neighbours; the last ones may be fewer, of which then none may be drawn.

    Returns:
        i32[S], numbers of own rows, and bool[S], whether they are: neighbours may lie on several devices.
    """
    first = spmd.index(mesh.AXES) * n_own
    # A device begins at a multiple of what n_own and stride have in common: so many neighbours may own a row of it.
    n_slots = (n_own + stride - math.gcd(n_own, stride) - 1) // stride + 1
    group_S = first // stride + jnp.arange(n_slots)
    draw_S = draws_B.at[group_S].get(mode="clip")
    at_S = group_S * stride + jnp.minimum((draw_S * stride).astype(jnp.int32), stride - 1) - first
    return at_S, (at_S >= 0) & (at_S < n_own)


def _dense(x_RD, error_RD, is_row_R, w_enc_CD, b_C, w_dec_CD, b_pre_D, weight, k, dtype):
    """`_with_gradients` on one device, for the rows and latents it is given of those that it owns."""
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
        left_rD = jnp.where(is_row_r[:, None], left_rD, 0.0)  # not one that only fills up
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
    blocks = rows.own(x_RD), rows.own(error_RD), rows.own(is_row_R)
    sums, _ = spmd.scan(block, zeros, blocks)
    error, g_enc_CD, g_b_C, g_dec_CD = (sums[0], *(spmd.reduce_scatter(g, mesh.DATA) for g in sums[1:]))
    g_pre_D = -spmd.total(jnp.matmul(g_b_C, w_enc_CD, precision=EXACT))
    left = weight * spmd.total(error)
    factor = jnp.where(jnp.isfinite(left), weight, 0.0)
    gradients = tuple(_times(factor, g) for g in (g_enc_CD, g_b_C, g_pre_D, g_dec_CD))
    return jnp.where(factor == 0, 0.0, left), gradients


def _times(factor: jax.Array, g: jax.Array) -> jax.Array:
    """factor * g, and 0 for a factor of 0 whatever g is.

    In parts, since a loop works in place: as one operation XLA makes copies of arrays that leave a branch.
    """
    n_parts = math.gcd(len(g), PARTS)

    def part(i: jax.Array, g: jax.Array) -> jax.Array:
        at = i * (len(g) // n_parts)
        own = lax.dynamic_slice_in_dim(g, at, len(g) // n_parts)
        return lax.dynamic_update_slice_in_dim(g, jnp.where(factor == 0, 0.0, factor * own), at, 0)

    return lax.fori_loop(0, n_parts, part, g)


def _row_blocks(n_own: int, d_model: int, n_latents: int) -> spmd.RowBlocks:
    """Row blocks whose pre-activations keep to the encoder's budget too."""
    cut, n_shards = tuning.current(), mesh.axis_size(mesh.LATENT)
    max_rows = min(cut.block_bytes // (4 * n_latents), ROWS_AT_ONCE * cut.block_rows) // n_shards
    return spmd.RowBlocks(n_own, *spmd.even(n_own, max(1, min(max_rows, spmd.row_blocks(n_own, d_model).size))))
