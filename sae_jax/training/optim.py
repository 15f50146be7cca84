"""The optimiser and the running average of the weights.

    m <- b1 m + (1 - b1) g      v <- b2 v + (1 - b2) g^2      w <- w - rate * m' / (sqrt(v') + eps)
    a <- a + (1 - decay) / (1 - decay^t) * (w - a)            m', v': divided by 1 - b1^t, 1 - b2^t

m, v and a are running averages, computed in f32 and kept as training/quantise.py says. Weights move by the moments as
they are kept: one pass over an array then leaves nothing in f32 for the next pass.

Sources: Kingma and Ba 2015, arXiv 1412.6980, algorithm 1. Average: Gao et al. 2024, arXiv 2406.04093, its code.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

from sae_jax.saes.base import AbstractSae, Adam, Hyperparameters
from sae_jax.training.quantise import MEAN, SQUARE, dequantise, update_moment, zeros_like_moments
from sae_jax.training.settings import TrainConfig


@struct.dataclass
class AdamState:
    """Adam's moments, as they are kept."""

    count: jax.Array  # i32[], steps done
    mean: Any  # of gradients, a tree like the weights
    square: Any  # of squared gradients


def share_of_rate(config: TrainConfig, step: jax.Array, n_steps: jax.Array) -> jax.Array | float:
    """Share of the peak rate at a step, counted from 1: up over the warm-up, 1, down over the decay."""
    done, share = step.astype(jnp.float32) / n_steps.astype(jnp.float32), 1.0
    if config.warmup:
        share = jnp.minimum(done / config.warmup, 1.0)
    if config.decay_share:
        left = jnp.clip((1 - done) / config.decay_share, 0.0, 1.0)
        left = left if config.decay_shape == "linear" else (1 - jnp.cos(jnp.pi * left)) / 2
        share = share * (config.decay_to + (1 - config.decay_to) * left)
    return share


def along_sphere(gradients: AbstractSae, weights: AbstractSae) -> tuple[AbstractSae, jax.Array]:
    """Gradients without what would change the norm of unit rows, g_f - (g_f . w_f) w_f; and the norm of all of them.

    So the moments never see a direction that renormalisation will undo. The norm of a row is that of its gradient as it
    comes less that of what is taken out: of what is left XLA would make an array of weights, and read it once more.
    """
    unit = {name: (getattr(gradients, name), getattr(weights, name)) for name in weights.unit_rows}
    square = optax.tree.norm(replace(cast(Any, gradients), **dict.fromkeys(unit)), squared=True)
    left = {}
    for name, (g_FD, w_FD) in unit.items():
        along_F = (g_FD * w_FD).sum(-1)
        square += jnp.maximum((g_FD * g_FD).sum(-1) - along_F**2, 0.0).sum()
        left[name] = g_FD - along_F[:, None] * w_FD
    return replace(cast(Any, gradients), **left), jnp.sqrt(square)


def optimiser(config: TrainConfig, hparams: Hyperparameters, defaults: Adam) -> optax.GradientTransformationExtraArgs:
    """Clip by the global norm, which is given to the update as `norm`, then Adam. `first`: see quantise.update_moment.

    Args:
        config: what is done, and how moments are kept.
        hparams: peak rate, number of steps and limit of the norm.
        defaults: Adam's constants where `config` leaves them to the variant.
    """
    b1 = defaults.beta1 if config.beta1 is None else config.beta1
    b2 = defaults.beta2 if config.beta2 is None else config.beta2
    eps = defaults.eps if config.eps is None else config.eps

    def init(weights: Any) -> AdamState:
        mean, square = (zeros_like_moments(weights, config.moments, codebook) for codebook in (MEAN, SQUARE))
        return AdamState(jnp.int32(0), mean, square)

    def update(
        gradients: Any, state: AdamState, weights: Any = None, *, norm: jax.Array, first: jax.Array | int = 0
    ) -> tuple[Any, AdamState]:
        # One factor, not a quotient of every gradient, of which XLA would make an array.
        clip = jnp.minimum(1, hparams.clip / norm) if config.clip else 1.0
        count = state.count + 1
        mean = update_moment(state.mean, gradients, b1, count, salt=0, factor=clip, first=first)
        square = update_moment(state.square, gradients, b2, count, salt=1, factor=clip, power=2, first=first)
        rate = -hparams.lr * share_of_rate(config, count, hparams.steps) / correction(b1, count)
        fix_square = lax.rsqrt(correction(b2, count))

        def step(m: jax.Array, v: jax.Array) -> jax.Array:
            return rate * m / (fix_square * jnp.sqrt(v) + eps)

        return jax.tree.map(step, dequantise(mean), dequantise(square)), AdamState(count, mean, square)

    return optax.GradientTransformationExtraArgs(init, update)  # pyrefly: ignore[bad-argument-type]


def clear_rows(state: AdamState, rows_F: jax.Array, names: tuple[str, ...]) -> AdamState:
    """The state with the moments of these rows (bool[F]) of the arrays `names` back at zero."""

    def cleared(moment: jax.Array) -> jax.Array:
        chosen = rows_F.reshape(-1, *(1,) * (moment.ndim - 1))
        return jnp.where(chosen, jnp.zeros((), moment.dtype), moment)

    def forget(moments: Any) -> Any:
        return replace(moments, **{name: jax.tree.map(cleared, getattr(moments, name)) for name in names})

    return replace(state, mean=forget(state.mean), square=forget(state.square))


def ema_update(
    average: Any, weights: Any, decay: jax.Array | float, step: jax.Array, first: jax.Array | int = 0
) -> Any:
    """The running average of the weights after the step numbered `step` (from 1), which ended in `weights` (f32).

    It equals the usual one divided by 1 - decay^t, but is close to the weights from the first step on: rounding costs
    as much as an average moves.
    """
    return update_moment(average, weights, 1 - (1 - decay) / correction(decay, step), step, salt=2, first=first)


def correction(decay: jax.Array | float, step: jax.Array) -> jax.Array:
    """1 - decay^step, f32[]; written so that it does not cancel near decay = 1."""
    log_decay = jnp.log(decay) if isinstance(decay, jax.Array) else math.log(max(decay, 1e-38))
    return -jnp.expm1(step.astype(jnp.float32) * log_decay)
