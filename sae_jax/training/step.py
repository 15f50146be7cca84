"""One optimiser step, pure: (state, hyperparameters, batch) -> (state, metrics).

objective and gradient -> unit rows along their sphere, clip, Adam -> constraints of the variant -> running average

And how well a state does on rows it does not learn from: (state, batch) -> sums.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from sae_jax.ops import mixing, pairs, sparse, tuning
from sae_jax.saes import losses
from sae_jax.saes.base import AbstractSae, Batch, Context, Hyperparameters, Outcome, SaeConfig, Updated
from sae_jax.saes.normalise import normalise_pair
from sae_jax.training import optim, tiles
from sae_jax.training.settings import TrainConfig
from sae_jax.training.state import TrainState, step_key, with_config
from sae_jax.types import Code

Metrics = dict[str, jax.Array]

DENSITY_BINS = 40
MOST_SLOTS = 1 << 26  # of the codes of a batch, on all devices: 512 MiB


class Step:
    """The jitted step of all runs that share a program. The state it is given is donated to the next one.

    A state carries its run's own settings. What is compiled knows only the program that they share, so the settings are
    set aside at the border and come back with the next state.
    """

    def __init__(self, sae_config: SaeConfig, config: TrainConfig) -> None:
        self._program = sae_config.program
        self.compiled = tuning.jit(make_step(self._program, config, config.weights != "float32"), donate_argnums=0)

    def __call__(self, state: TrainState, hparams: Hyperparameters, batch: Batch) -> tuple[TrainState, Metrics]:
        """Queue a step."""
        config = state.sae.config
        state, metrics = self.compiled(with_config(state, self._program), hparams, batch)
        return with_config(state, config), metrics

    def trace(self, state: TrainState, hparams: Hyperparameters, batch: Batch) -> Any:
        """See `jax.jit(f).trace`."""
        return self.compiled.trace(with_config(state, self._program), hparams, batch)


def make_step(sae_config: SaeConfig, config: TrainConfig, by_tiles: bool):
    """The step that `Step` compiles. `by_tiles`: without gradients of the size of the weights (training/tiles.py)."""

    def step(state: TrainState, hparams: Hyperparameters, batch: Batch) -> tuple[TrainState, Metrics]:
        key = step_key(hparams, state.step)
        context = Context(state.step, key, state.counters, state.constants, hparams)
        x, y, undo = normalise_pair(batch.x, batch.y, sae_config.input_norm, state.constants.scale)
        rows = replace(batch, x=x, y=y)

        def objective(sae: AbstractSae) -> tuple[jax.Array, Outcome]:
            return sae.objective(rows, context)

        if by_tiles:
            with jax.named_scope("objective"):
                (loss, outcome), gradients, parts = pairs.value_and_pairs(objective, state.sae)
            with jax.named_scope("optimiser"):
                sae, optimiser_state, average, grad_norm = tiles.update(
                    *(state.sae, state.optimiser_state, state.average, gradients, parts, outcome.assigned),
                    *(config, sae_config.ADAM, hparams),
                )
                updated = sae.after_step(Updated(sae, optimiser_state, outcome.counters), context, optim.clear_rows)
        else:
            with jax.named_scope("objective"):
                (loss, outcome), gradients = jax.value_and_grad(objective, has_aux=True)(state.sae)
            with jax.named_scope("optimiser"):
                gradients, grad_norm = optim.along_sphere(gradients, state.sae)
                tx = optim.optimiser(config, hparams, sae_config.ADAM)
                updates, optimiser_state = tx.update(gradients, state.optimiser_state, norm=grad_norm)  # pyrefly: ignore[bad-argument-type]
                # Skip the update if the gradient is not finite. This also keeps the update apart from the norms that
                # constraints take of the new weights: XLA's CPU fusion of the two would write every scalar of Adam's
                # out as an array of weights.
                is_finite = jnp.isfinite(grad_norm)
                sae = jax.tree.map(lambda w, update: jnp.where(is_finite, w + update, w), state.sae, updates)
                sae = replace(sae, **outcome.assigned).constrained()
                updated = sae.after_step(Updated(sae, optimiser_state, outcome.counters), context, optim.clear_rows)
                average = state.average
                if config.ema:
                    average = optim.ema_update(average, updated.sae, hparams.ema, state.step + 1)
        state = replace(
            state,
            step=state.step + 1,
            sae=updated.sae,
            optimiser_state=updated.optimiser_state,
            average=average,
            counters=updated.counters,
        )
        return state, {
            "loss": loss,
            "fvu": losses.batch_fvu(undo(rows.y if outcome.y is None else outcome.y), undo(outcome.y_hat)),
            "l0": outcome.l0,
            "dead_fraction": (outcome.counters.silent > hparams.dead_after).mean(dtype=jnp.float32),
            "grad_norm": grad_norm,
            "lr": hparams.lr * optim.share_of_rate(config, state.step, hparams.steps),
            **outcome.metrics,
        }

    return step


def make_measure(sae_config: SaeConfig) -> tuning.Jitted:
    """(state, hparams, batch) -> how well a state does on a batch that it does not learn from, jitted.

    Returns:
        error: f32[], mean over rows of the squared error, where errors are measured (saes/normalise.py).
        mean: f32[Y], of what is reconstructed; variance: f32[], mean over rows of the squared distance from it.
        l0: f32[], active latents a row on average, as users will see them: thresholds, not the selection of a batch.
        dead_fraction: f32[], of latents.
        decoder_cosine, decoder_projection: f32[], see ops/mixing.py; the second in units that the decoder works in, and
        square: f32[], mean over rows of the squared distance from their mean, in these units.
    """

    def measure(state: TrainState, hparams: Hyperparameters, batch: Batch) -> Metrics:
        x, y, undo = normalise_pair(batch.x, batch.y, sae_config.input_norm, state.constants.scale)
        y_hat_BY, l0 = state.sae.reconstruct_rows(x)
        y, y_BY, y_hat_BY = y.astype(jnp.float32), undo(y).astype(jnp.float32), undo(y_hat_BY)
        mean_1Y = y_BY.mean(0, keepdims=True)
        return {
            "error": losses.squared_error(y_BY - y_hat_BY),
            "mean": mean_1Y[0],
            "variance": losses.squared_error(y_BY - mean_1Y),
            "l0": l0,
            "dead_fraction": (state.counters.silent > hparams.dead_after).mean(dtype=jnp.float32),
            "decoder_cosine": mixing.pairwise_cosine(state.sae.w_dec),
            "decoder_projection": mixing.nth_projections(y, state.sae.w_dec, state.sae.b_dec).mean(),
            "square": losses.squared_error(y - y.mean(0, keepdims=True)),
        }

    return tuning.jit(measure)


def densities(state: TrainState, batch: Batch) -> Metrics | None:
    """How many latents are active in what share of a batch; None where the codes would be too large.

    The batch is encoded once more; twice, where it has to be looked up how many latents are active in a row.

    Returns:
        counts: i32[DENSITY_BINS], latents by the log10 of the share of rows, from a tenth of a row in the batch to all.
        silent: f32[], share of latents that are active in no row, which are in no bin.
    """
    x = _normalised(state, batch)
    if (n_slots := state.sae.n_slots(x)) * x.shape[0] > MOST_SLOTS:
        return None
    return _densities(state.sae, x, n_slots=n_slots)


@tuning.jit
def _normalised(state: TrainState, batch: Batch) -> jax.Array:
    return normalise_pair(batch.x, batch.y, state.sae.config.input_norm, state.constants.scale)[0]


@tuning.jit(static_argnames=("n_slots",))
def _densities(sae: AbstractSae, x_BX: jax.Array, n_slots: int) -> Metrics:
    code = sae.encode_rows(x_BX, n_slots)
    active = Code(code.indices, (code.values > 0).astype(jnp.float32))
    rows_F = sparse.summed(active, sae.config.n_latents)
    share = jnp.log10(jnp.maximum(rows_F, 1) / x_BX.shape[0]) / lowest_density(x_BX.shape[0])  # 0: in all rows
    bin_F = jnp.clip(((1 - share) * DENSITY_BINS).astype(jnp.int32), 0, DENSITY_BINS - 1)
    bin_F = jnp.where(rows_F > 0, bin_F, -1)
    return {
        "counts": jnp.stack([(bin_F == i).sum() for i in range(DENSITY_BINS)]),
        "silent": (bin_F < 0).mean(dtype=jnp.float32),
    }


def lowest_density(batch_size: int) -> float:
    """The lower end of the histogram of `densities`, in log10."""
    return math.log10(0.1 / batch_size)
