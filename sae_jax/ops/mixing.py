"""Two signs, in the decoder, that its rows mix features: both are least near the number of features that are active.

    c = mean over pairs i < j of |cos(W_dec,i, W_dec,j)|
    s_n = the projection that is n-th in a row, from 0 and the largest, of z = (y - b_dec) W_dec^T; unit decoder rows

With too few active latents a dictionary puts what correlated features have in common into its rows, which then point
the same way, and project on rows of data that do not hold their feature.

Source: Chanin and Garriga-Alonso 2025, arXiv 2508.16560 v3, equation 4 (c_dec) and equations 58 and 59 (s_n^dec). There
s_n is the (n * b)-th of the b * F projections of a batch of b rows; here each row is sorted by itself and the mean is
over rows, so that batches add up and large rows weigh no more than their share. Where there are many latents, c is of
the pairs of a sample of them with all.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax import mesh
from sae_jax.ops import encode

N_ROWS = 64  # of a batch that are projected: f32[64, F] is the largest array of `nth_projections`
N_PAIRS = 1 << 20  # that `pairwise_cosine` looks at, or with all for as many decoder rows as are a BLOCK
BLOCK = 64  # decoder rows that are compared with all at a time


def nth_projections(y_BD: jax.Array, w_dec_FD: jax.Array, b_dec_D: jax.Array) -> jax.Array:
    """s_n of rows spread over a batch, f32[R], R = min(B, N_ROWS); n = F // 4 (any n above k and below F / 2 may do).

    Args:
        y_BD: [B, D], ROWS: what is reconstructed, as the decoder makes it (normalised).
        w_dec_FD: f32[F, D], DICT, rows of any norm.
        b_dec_D: f32[D].
    """
    n = w_dec_FD.shape[0] // 4
    y_RD = spread(y_BD, N_ROWS).astype(jnp.float32)
    z_RF = jnp.einsum("rd,fd->rf", y_RD - b_dec_D[None], _unit(w_dec_FD), precision=encode.EXACT)
    # Selection by counting: over a split axis it is one sum a bit, where a sort would gather all projections.
    bits_RF = lax.bitcast_convert_type(z_RF, jnp.uint32)
    top = jnp.uint32(1 << 31)
    rising_RF = jnp.where(bits_RF >= top, ~bits_RF, bits_RF | top)  # in the order of the numbers

    def with_bit(i: jax.Array, found_R: jax.Array) -> jax.Array:
        trial_R = found_R | (top >> i.astype(jnp.uint32))
        n_above_R = (rising_RF >= trial_R[:, None]).sum(-1, dtype=jnp.int32)
        return jnp.where(n_above_R > n, trial_R, found_R)

    found_R = lax.fori_loop(0, 32, with_bit, jnp.zeros(y_RD.shape[0], jnp.uint32))
    return lax.bitcast_convert_type(jnp.where(found_R >= top, found_R ^ top, ~found_R), jnp.float32)


def pairwise_cosine(w_dec_FD: jax.Array) -> jax.Array:
    """c, f32[], of decoder rows f32[F, D], DICT: of all pairs up to 1,024 latents, else of a sample with all."""
    unit_FD = _unit(w_dec_FD)
    sample_SD = spread(unit_FD, max(N_PAIRS // unit_FD.shape[0], BLOCK))

    def with_others(row_D: jax.Array) -> jax.Array:
        return jnp.abs(jnp.matmul(unit_FD, row_D, precision=encode.EXACT)).sum() - (row_D**2).sum()

    sums_S = lax.map(with_others, sample_SD, batch_size=BLOCK)
    return sums_S.mean() / max(unit_FD.shape[0] - 1, 1)


def spread(x_B: jax.Array, n: int) -> jax.Array:
    """n of the rows of an array [B, ...], or all if there are fewer, at equal distances; on every device."""
    n = min(n, x_B.shape[0])
    rows_R = jnp.arange(n) * (x_B.shape[0] // n)
    return x_B.at[rows_R].get(out_sharding=mesh.placed(mesh.REPLICATED))


def _unit(w_FD: jax.Array) -> jax.Array:
    w_FD = w_FD.astype(jnp.float32)
    return w_FD / jnp.maximum(jnp.linalg.norm(w_FD, axis=-1, keepdims=True), 1e-30)
