"""ops/auxk.py for matrices whose gradients are pairs: the k strongest dead latents of each row as a code.

One search among the dead replaces the products that are dense in them, and its k pairs a row take the place of two
gradients of the dictionary's size. Few dead latents are gathered first; of many dead ones the search is over all
latents, the living barred by their biases. Which rows are looked at, and when, is decided as there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax import mesh
from sae_jax.mesh import CODE, DICT, REPLICATED, ROWS
from sae_jax.ops import auxk, encode, pairs, sparse, spmd
from sae_jax.ops.pairs import Pairs
from sae_jax.types import Code


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
    tape: pairs.Tape,
) -> jax.Array:
    """See `auxk.unexplained`; of several latents equal to the k-th largest the lowest are taken.

    Args:
        tape: takes down the pairs of both matrices.
        The others as there; w_enc and w_dec are bf16 or f32.
    """
    args = x_BD, error_BD, w_enc_FD, b_enc_F, b_pre_D, w_dec_FD, allowed_F, weight, key
    left, found = _with_pairs(*args, k, dtype)

    def made(factor: jax.Array, found: tuple) -> dict[str, list[Pairs]]:
        indices_BK, z_BK, g_BK, x_BD, g_BD = found
        of_encoder, of_decoder = Pairs(indices_BK, factor * g_BK, x_BD), Pairs(indices_BK, factor * z_BK, g_BD)
        return {"w_enc": [of_encoder], "w_dec": [of_decoder]}

    return tape.tap(left, found, made)


@partial(jax.custom_vjp, nondiff_argnums=(9, 10))
def _with_pairs(x_BD, error_BD, w_enc_FD, b_enc_F, b_pre_D, w_dec_FD, allowed_F, weight, key, k, dtype):
    """The weighted sum, and its pairs: indices, coefficients of both matrices [B, K], and the rows of both [B, D]."""
    return _found(x_BD, error_BD, w_enc_FD, b_enc_F, b_pre_D, w_dec_FD, allowed_F, weight, key, k, dtype)[:2]


def _saving(*args):
    left, found, g_b_F, g_pre_D = _found(*args)
    return (left, found), (g_b_F, g_pre_D)


def _backward(k, dtype, gradients, cotangent: tuple[jax.Array, Any]):
    g_b_F, g_pre_D = gradients
    return None, None, None, cotangent[0] * g_b_F, cotangent[0] * g_pre_D, None, None, None, None


_with_pairs.defvjp(_saving, _backward)


def _found(x_BD, error_BD, w_enc_FD, b_enc_F, b_pre_D, w_dec_FD, allowed_F, weight, key, k, dtype):
    """What `_with_pairs` returns, and the gradients of b_enc and b_pre."""
    n_rows, n_latents = len(x_BD), len(b_enc_F)
    n_own, n_devices = n_rows // mesh.axis_size(mesh.AXES), mesh.axis_size(mesh.AXES)
    n_slots = mesh.axis_size(mesh.LATENT) * min(k, n_latents // mesh.axis_size(mesh.LATENT))
    draws_B = None if key is None else jax.random.uniform(key, (n_rows,))
    tiers = auxk._tiers(n_rows, sampled=key is not None)

    def none():
        zeros = partial(jnp.zeros, dtype=jnp.float32)
        code_at, rows_at, latents_at = (mesh.placed(role) for role in (CODE, ROWS, DICT))
        indices_BK = jnp.zeros((n_rows, n_slots), jnp.int32, out_sharding=code_at)
        z_BK, g_BK = (zeros((n_rows, n_slots), out_sharding=code_at) for _ in range(2))
        x_BD, g_BD = (zeros(error_BD.shape, out_sharding=rows_at) for _ in range(2))
        found = indices_BK, z_BK, g_BK, x_BD, g_BD
        return zeros(()), found, zeros(b_enc_F.shape, out_sharding=latents_at), zeros(b_pre_D.shape)

    def tier(part: int, stride: int) -> Callable:
        def some():
            x_SD, error_SD, is_one_S = (x_BD, error_BD, None) if stride == 1 else _sampled(stride)
            capacity = auxk._capacity(n_latents // n_devices, part)
            if capacity < n_latents // n_devices:
                w_CD, b_C, at_C = _gathered(w_enc_FD, b_enc_F, allowed_F, capacity)
                code = encode.select_topk(x_SD, w_CD, b_C, b_pre_D, k, dtype)
                code = Code(sparse.looked_up(code, at_C), code.values)
            else:
                b_F = jnp.where(allowed_F, b_enc_F, -jnp.inf)
                code = encode.select_topk(x_SD, w_enc_FD, b_F, b_pre_D, k, dtype)
            left_SD = sparse.reconstruction(code, w_dec_FD) - error_SD
            if is_one_S is not None:
                left_SD = jnp.where(is_one_S[:, None], left_SD, 0.0)
            left = weight * stride * (left_SD**2).sum()
            is_finite = jnp.isfinite(left)
            g_SD = jnp.where(is_finite, 2 * weight * stride * left_SD, 0.0)
            z_SK = jnp.where(is_finite, code.values, 0.0)
            g_SK = sparse.value_gradients(Code(code.indices, z_SK), w_dec_FD, g_SD, dtype)
            g_b_F = sparse.summed(Code(code.indices, g_SK), n_latents)
            g_pre_D = -spmd.per_device(sparse.weighted_total, (DICT, DICT), REPLICATED)(g_b_F, w_enc_FD)
            rows_SD = encode.centred(x_SD, b_pre_D)
            found = _padded((code.indices, z_SK, g_SK), (rows_SD, g_SD), n_own, n_slots)
            return jnp.where(is_finite, left, 0.0), found, g_b_F, g_pre_D

        return some

    def _sampled(stride: int):
        def local(x_RD, error_RD, draws_B):
            at_S, is_one_S = auxk._sample(draws_B, n_own, stride)
            return *(jnp.take(a_RD, at_S, axis=0, mode="clip") for a_RD in (x_RD, error_RD)), is_one_S

        return spmd.per_device(local, (ROWS, ROWS, REPLICATED), (ROWS, ROWS, ROWS))(x_BD, error_BD, draws_B)

    def number(allowed_R):
        n_allowed = allowed_R.sum(dtype=jnp.int32)
        n_all, n_most = spmd.total(n_allowed), spmd.largest(n_allowed)
        number = (n_all > 0).astype(jnp.int32)
        for part, _ in tiers[:-1]:
            is_more = (n_all > -(-n_latents // part)) | (n_most > auxk._capacity(len(allowed_R), part))
            number += is_more.astype(jnp.int32)
        return number

    branch = spmd.per_device(number, (DICT,), REPLICATED)(allowed_F)
    return lax.switch(branch, (none, *(tier(*parts) for parts in tiers)))


def _gathered(w_enc_FD, b_enc_F, allowed_F, capacity: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The allowed latents of each device, `capacity` of them: encoder rows, biases, and which latents they are."""

    def local(w_RD, b_R, allowed_R):
        n_local = len(b_R) * mesh.axis_size(mesh.DATA)
        first = spmd.first_latent(n_local) + spmd.index(mesh.DATA) * len(b_R)
        at_C = jnp.nonzero(allowed_R, size=capacity, fill_value=0)[0].astype(jnp.int32)
        b_C = jnp.where(jnp.arange(capacity) < allowed_R.sum(), b_R[at_C], -jnp.inf)
        return w_RD[at_C], b_C, at_C + first

    return spmd.per_device(local, (DICT, DICT, DICT), (DICT, DICT, DICT))(w_enc_FD, b_enc_F, allowed_F)


def _padded(codes: tuple, rows: tuple, n_own: int, n_slots: int) -> tuple:
    """Arrays of the sampled rows with as many rows a device, and slots a row, as those of all rows."""
    n_shards = mesh.axis_size(mesh.LATENT)

    def local(codes, rows):
        def with_slots(a_SK):
            a_SRK = a_SK.reshape(n_shards, -1, a_SK.shape[1])
            more = n_own - a_SRK.shape[1], n_slots // n_shards - a_SRK.shape[2]
            return jnp.pad(a_SRK, ((0, 0), *((0, n) for n in more))).reshape(n_shards * n_own, n_slots // n_shards)

        return *map(with_slots, codes), *(jnp.pad(a_SD, ((0, n_own - len(a_SD)), (0, 0))) for a_SD in rows)

    out_specs = (*(CODE,) * len(codes), *(ROWS,) * len(rows))
    return spmd.per_device(local, ((CODE,) * len(codes), (ROWS,) * len(rows)), out_specs)(codes, rows)
