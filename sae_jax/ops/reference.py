"""Plain dense forms of the ops, for tests and for reading: no mesh, no blocks, no hand-written gradient."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from sae_jax.ops.encode import EXACT, product
from sae_jax.ops.tiled import Tiled
from sae_jax.types import Code


def encode_topk(x_BD, w_enc_FD, b_enc_F, b_pre_D, k, dtype) -> tuple[Code, jax.Array]:
    """See ops/encode.py."""
    pre_BF = product((x_BD - b_pre_D[None]).astype(dtype), w_enc_FD.astype(dtype), "bd,fd->bf") + b_enc_F[None]
    values_BK, index_BK = jax.lax.top_k(jnp.where(pre_BF == 0, 0.0, pre_BF), k)
    return Code(index_BK, jax.nn.relu(values_BK)), w_enc_FD


def decode(code: Code, w_dec_FD: jax.Array, dtype=jnp.float32) -> tuple[jax.Array, jax.Array]:
    """See ops/sparse.py."""
    return product(code.values, w_dec_FD[code.indices], "bk,bkd->bd"), w_dec_FD


def unexplained(x_BD, error_BD, w_enc_FD, b_enc_F, b_pre_D, w_dec_FD, allowed_F, weight, key, k, dtype) -> jax.Array:
    """See ops/auxk.py; always of all rows."""
    code, _ = encode_topk(x_BD, w_enc_FD, jnp.where(allowed_F, b_enc_F, -jnp.inf), b_pre_D, k, dtype)
    return weight * ((error_BD - decode(code, w_dec_FD)[0]) ** 2).sum()


def reconstruct(x_BD, w_enc_FD, w_dec, b_pre_D, latents, activation, above) -> Tiled:
    """See ops/tiled.py; in float64, too."""
    exact = partial(jnp.matmul, precision=EXACT)
    codes, penalties = activation(exact(x_BD - b_pre_D[None], w_enc_FD.T), latents)
    x_hat = jax.tree.map(exact, codes, w_dec)
    z_BF = jax.tree.leaves(codes)[0]
    penalty = jax.tree.map(lambda penalty_BF: penalty_BF.sum(0), penalties)
    return Tiled(x_hat, penalty, (z_BF > 0).sum(0, dtype=jnp.float32), (z_BF > above).any(0))


def to_dense(code: Code, n_latents: int) -> jax.Array:
    """A code as f32[B, n_latents]."""
    rows_B1 = jnp.arange(code.indices.shape[0])[:, None]
    return jnp.zeros((code.indices.shape[0], n_latents)).at[rows_B1, code.indices].add(code.values)
