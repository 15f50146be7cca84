"""One optimiser step, pure: (state, batch) -> (state, metrics).

objective and gradient -> clip, Adam -> constraints of the variant -> running average

And what a state makes of rows it does not learn from: (state, batch) -> sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax

from sae_jax.saes import base, losses
from sae_jax.saes.base import Batch, SaeConfig
from sae_jax.training import optim
from sae_jax.training.settings import TrainConfig
from sae_jax.training.state import TrainState

Metrics = dict[str, jax.Array]


def make_step(sae_config: SaeConfig, config: TrainConfig) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step of all runs with this `program(config)`. The state it is given is donated to the next one."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        objective_key, after_key = jax.random.split(key)

        rows, undo = base.normalised(batch, sae_config.input_norm, state.statistics.scale)

        def objective(sae):
            return sae.objective(rows, state.statistics, state.step, objective_key)

        with jax.named_scope("objective"):
            (loss, outcome), gradients = jax.value_and_grad(objective, has_aux=True)(state.sae)
        with jax.named_scope("optimiser"):
            grad_norm = optax.tree.norm(gradients)
            tx = optim.optimiser(config, state.values, sae_config.ADAM)
            updates, moments = tx.update(gradients, state.moments, state.sae)  # pyrefly: ignore[bad-argument-type]
            # What is not finite moves nothing. It also parts the update from the norms that constraints take of the new
            # weights: XLA's CPU fusion of the two would write every scalar of Adam's out as an array of weights.
            finite = jnp.isfinite(grad_norm)

            def learn(w, update):
                return jnp.where(finite, w + update, w)

            state = replace(
                state,
                step=state.step + 1,
                sae=replace(jax.tree.map(learn, state.sae, updates), **outcome.set),
                moments=moments,
                statistics=outcome.statistics,
            )
            state = state.sae.after_step(state, after_key)
            if config.ema:
                average = optim.average(state.average, state.sae, state.values.ema, state.step)
                state = replace(state, average=average)
        return state, {
            "loss": loss,
            "fvu": losses.batch_fvu(undo(rows.y if outcome.y is None else outcome.y), undo(outcome.y_hat)),
            "l0": outcome.l0,
            "dead_fraction": outcome.statistics.dead.mean(dtype=jnp.float32),
            "grad_norm": grad_norm,
            **outcome.metrics,
        }

    return jax.jit(step, donate_argnums=0)


def make_measure(sae_config: SaeConfig) -> Callable[[TrainState, Batch], Metrics]:
    """What a state makes of a batch that it does not learn from, jitted, wherever the state lies.

    Returns:
        error: f32[], mean over rows of the squared error, where errors are measured (`base.normalised`).
        mean: f32[Y], of what is reconstructed; variance: f32[], mean over rows of the squared distance from it.
        l0: f32[], active latents a row on average, as users will see them: thresholds, not the selection of a batch.
        dead_fraction: f32[], of latents.
    """

    def measure(state: TrainState, batch: Batch) -> Metrics:
        rows, undo = base.normalised(batch, sae_config.input_norm, state.statistics.scale)
        y_hat_BY, l0 = state.sae.reconstruct_rows(rows.x)
        y_BY, y_hat_BY = undo(rows.y).astype(jnp.float32), undo(y_hat_BY)
        mean_1Y = y_BY.mean(0, keepdims=True)
        return {
            "error": losses.squared_error(y_BY - y_hat_BY),
            "mean": mean_1Y[0],
            "variance": losses.squared_error(y_BY - mean_1Y),
            "l0": l0,
            "dead_fraction": state.statistics.dead.mean(dtype=jnp.float32),
        }

    return jax.jit(measure)
