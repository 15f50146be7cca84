"""Error measures that objectives share, everything in f32; AuxK; and what a sparsity coefficient stands beside.

    summed    SE = squared error summed over D, mean over rows       loss = SE + coefficient * penalty
    mean      MSE = SE / D                                           loss = MSE + coefficient * penalty

The penalty is a sum over latents and a mean over rows in both, so the same trade-off has coefficient(mean) =
coefficient(summed) / D. A variant with a penalty has `error` in its config, and so in the config.json of its runs.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax.ops import auxk, auxk_pairs, pairs, sparse
from sae_jax.saes import base
from sae_jax.saes.base import Batch, Context, KConfig, Outcome
from sae_jax.types import Code, UsageError

Error = Literal["summed", "mean"]
AUXK = 1  # folded into a step's key: other uses of it are others' draws


def error(kind: Error, error_BD: jax.Array) -> jax.Array:
    """SE or MSE, see the head of this file (f32[])."""
    return squared_error(error_BD) / (error_BD.shape[1] if kind == "mean" else 1)


def check_penalty(**settings: float) -> None:
    """Refuse coefficients and numbers of warm-up steps below 0, or not finite."""
    for name, value in settings.items():
        if not 0 <= value < math.inf:
            raise UsageError(f"sae.{name}={value} must be >= 0 and finite; 0 turns it off")


def squared_error(error_BD: jax.Array) -> jax.Array:
    """SE: squared error summed over D, mean over rows (f32[])."""
    return (error_BD**2).sum(-1).mean()


def batch_fvu(x_BD: jax.Array, x_hat_BD: jax.Array) -> jax.Array:
    """Fraction of variance unexplained on one batch: a ratio of sums, centred on the batch's mean (f32[]).

    NaN for rows that do not vary or whose squares overflow: an error over infinity would read as a perfect fit.
    """
    x_BD = x_BD.astype(jnp.float32)
    total = squared_error(x_BD - x_BD.mean(0, keepdims=True))
    return squared_error(x_BD - x_hat_BD) / jnp.where((total > 0) & jnp.isfinite(total), total, jnp.nan)


def auxiliary_weight(error_BD: jax.Array, coefficient: float) -> jax.Array:
    """What the error that the dead latents leave counts in the loss: coefficient / sum ||e - mean_batch e||^2 (f32[]).

    0 for a perfect reconstruction, which has no error to explain, and for one whose squares overflow.

    Source: Gao et al. 2024, arXiv 2406.04093, appendix A.2.
    """
    total = ((error_BD - error_BD.mean(0, keepdims=True)) ** 2).sum()
    is_defined = (total > 0) & jnp.isfinite(total)
    return jnp.where(is_defined, coefficient / jnp.where(is_defined, total, 1.0), 0.0)


def with_auxk(
    loss: jax.Array,
    batch: Batch,
    y_hat_BY: jax.Array,
    code: Code,
    encoder: tuple[jax.Array, jax.Array, jax.Array],
    w_dec: jax.Array,
    config: KConfig,
    context: Context,
) -> tuple[jax.Array, Outcome]:
    """A loss with that of AuxK added; counters and L0 of the code.

    The k_aux strongest dead latents auxk, without bias, the error that the living leave, e = sg(y - y_hat).

    Args:
        loss: f32[].
        batch: as the objective got it.
        y_hat_BY: f32[B, Y], ROWS.
        code: [B, K], CODE: what y_hat was decoded from.
        encoder: w_enc, b_enc, and what is subtracted from x before; as the code's op returned them.
        w_dec: f32[F, Y], DICT; as the code's decoding returned it.
        config: says the weight, and k_aux.
        context: as the objective got it.
    """
    # Counters before AuxK: a latent that fires in this very batch is not dead.
    counters = context.count(sparse.fired(code, config.n_latents, base.FIRED_ABOVE), batch.x.shape[0])
    outcome = Outcome(y_hat_BY, base.l0(code), counters, {})
    if not config.aux_coefficient:
        return loss, outcome
    error_BY = lax.stop_gradient(batch.y - y_hat_BY)
    k_aux = config.k_aux or 2 ** round(math.log2(max(error_BY.shape[1] / 2, 1)))
    dead_F, dtype = counters.silent > context.hparams.dead_after, config.product_dtype
    weight = auxiliary_weight(error_BY, config.aux_coefficient)
    key = None if config.aux_rows == "all" else jax.random.fold_in(context.key, AUXK)
    args = batch.x, error_BY, *encoder, w_dec, dead_F, weight, key, k_aux, dtype
    tape = pairs.tape()
    aux = auxk.unexplained(*args) if tape is None else auxk_pairs.unexplained(*args, tape)
    outcome.metrics["aux_loss"] = aux / config.aux_coefficient
    return loss + aux, outcome
