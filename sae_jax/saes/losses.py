"""Error measures that objectives share. Sums over D, means over rows; everything in f32."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def squared_error(error_BD: jax.Array) -> jax.Array:
    """SE: squared error summed over D, mean over rows (f32[])."""
    return (error_BD**2).sum(-1).mean()


def batch_fvu(x_BD: jax.Array, x_hat_BD: jax.Array) -> jax.Array:
    """Fraction of variance unexplained on one batch: a ratio of sums, centred on the batch's mean (f32[])."""
    x_BD = x_BD.astype(jnp.float32)
    total = squared_error(x_BD - x_BD.mean(0, keepdims=True))
    return squared_error(x_BD - x_hat_BD) / jnp.where(total > 0, total, 1.0)


def auxiliary_ratio(error_BD: jax.Array, unexplained: jax.Array) -> jax.Array:
    """AuxK loss: how much of the reconstruction error the dead latents leave unexplained; 0 where undefined.

    sum ||e - e_hat||^2 / sum ||e - mean_batch e||^2, the first given as `unexplained`. A perfect reconstruction has no
    error to explain; the denominator is guarded before the division, because a mask after it would let NaN through to
    the gradient.

    Source: Gao et al. 2024, arXiv 2406.04093, appendix A.2.
    """
    total = ((error_BD - error_BD.mean(0, keepdims=True)) ** 2).sum()
    ratio = unexplained / jnp.where(total > 0, total, 1.0)
    return jnp.where((total > 0) & jnp.isfinite(ratio), ratio, 0.0)
