"""How far a narrow dictionary's latents had mixed in features that it had no latent for.

The dictionary is given N more latents and trained on, on held-out text, and once more without them, on equal batches:

    hedging         sum over old latents of |P (d_i' - d_i)|^2 / sum of |d_i' - d_i|^2
    hedging_chance  rank(P) / d, what it is of changes in all directions alike

d_i': decoder row of a latent that was trained on with the new ones; d_i: without; both of norm 1; P: onto the span of
the new latents' decoder rows. A latent that had mixed in part of another feature lets go of it once that has a latent
of its own, so its change lies along the new ones. Latents that fire on none of the rows count on neither side.

Source: Chanin, Dulka and Garriga-Alonso 2025, "Feature hedging", arXiv 2505.11756. Differences: the change is from a
dictionary trained on for as long, so that it is the new latents' doing alone; a share of squared lengths over all
latents together, not the mean of lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.evaluation import study
from sae_jax.evaluation.base import Description, Metric, interval, of_units
from sae_jax.evaluation.study import Case
from sae_jax.progress import Progress, say_once
from sae_jax.saes import init
from sae_jax.saes.base import AbstractSae, Batch
from sae_jax.training.settings import TrainConfig, hyperparameters
from sae_jax.training.state import initial
from sae_jax.training.step import Step
from sae_jax.types import UsageError

GROWABLE = ("topk", "batch_topk", "relu", "relu_norm", "tied", "gated", "jumprelu")  # each latent is a row by itself


class Grown(NamedTuple):
    """Decoder rows of norm 1."""

    without: np.ndarray  # f64[F, D], trained on as it was
    after: np.ndarray  # f64[F, D], trained on with the new ones
    new: np.ndarray  # f64[M, D], of those that fire
    fires: np.ndarray  # bool[F], in both


@dataclass(frozen=True)
class Study(study.Study):
    """Grows a dictionary."""

    n_new: int = 16
    """latents; at most a quarter of the width of the activations"""
    n_rows: int = 32_768
    n_steps: int = 200
    batch_size: int = 1024

    SUITE = "probing"
    ORDER = 280
    METRICS = {  # noqa: RUF012
        "hedging": Description("hedging", "share of the latents' change along new latents, when it gets some"),
        "hedging_chance": Description(
            "hedging by chance", "the same of changes in all directions alike", no_interval="a count of directions"
        ),
    }

    def metrics(self, case: Case) -> Iterator[Metric]:
        """See study.Study. Nothing where no new latent fires."""
        subject, variant = case.subject, case.subject.sae.config.variant
        if subject.encoded != subject.reconstructed or len(subject.encoded) > 1:
            raise UsageError("only a dictionary that reconstructs the one hook that it reads is grown")
        if variant not in GROWABLE:
            raise UsageError(f"a dictionary of {variant} is not grown; only {', '.join(GROWABLE)} are")
        rows, n_rows = [], 0
        for block in case.blocks(len(case.text.sequences)):
            rows.append(block.x[block.is_row])
            n_rows += len(rows[-1])
            if n_rows >= self.n_rows:
                break
        x_NX = np.concatenate(rows)[: self.n_rows] if rows else np.zeros((0, 1), np.float32)
        if len(x_NX) < 2:
            return
        grown = self.grown(subject.sae, x_NX, case.seed)
        if not len(grown.new) or not grown.fires.any():
            say_once("hedging: no latent fires of those that were added, or of the others; nothing is measured")
            return
        basis_DM = np.linalg.svd(grown.new.T, full_matrices=False)[0]
        change_fD = (grown.after - grown.without)[grown.fires]
        both_f2 = np.stack([((change_fD @ basis_DM) ** 2).sum(1), (change_fD**2).sum(1)], 1)
        along, whole = both_f2.sum(0)
        if whole:
            value = float(along / whole)
            yield Metric("hedging", value, interval(of_units(both_f2), value, (1, 0), (0, 1)))
            yield Metric("hedging_chance", basis_DM.shape[1] / len(basis_DM))

    def grown(self, sae: AbstractSae, x_NX: np.ndarray, seed: int) -> Grown:
        """Train a dictionary on rows f32[N, X], in their own units, with more latents and without."""
        config, n = sae.config, sae.b_enc.shape[0]
        n_new = max(min(self.n_new, x_NX.shape[1] // 4), 1)
        sample = init.sample_statistics(x_NX, config.input_norm)
        # As in training: for rows that are scaled.
        sae = sae.unfolded(sample.scale)
        with Progress("hedging", 2 * self.n_steps, "steps") as progress:
            without = self._trained(sae, config, sample, x_NX, seed, progress, 0)
            larger = replace(config, n_latents=n + n_new)
            after = self._trained(sae, larger, sample, x_NX, seed, progress, self.n_steps)
        without_F, after_F = (_fires(one.folded(sample.scale), x_NX) for one in (without, after))
        rows_FD = _unit(after.w_dec)
        return Grown(_unit(without.w_dec), rows_FD[:n], rows_FD[n:][after_F[n:]], without_F & after_F[:n])

    def _trained(
        self,
        sae: AbstractSae,
        config: Any,
        sample: init.Sample,
        x_NX: np.ndarray,
        seed: int,
        progress: Progress,
        done: int,
    ) -> AbstractSae:
        size = min(self.batch_size, len(x_NX))
        settings = TrainConfig(steps=self.n_steps, batch_size=size, ema=0.0, seed=seed % 2**31)
        state = jax.jit(lambda sample: initial(config, settings, sample))(sample)
        state = state.replace(sae=_enlarged(sae, state.sae, config))
        step, hparams = Step(config, settings), hyperparameters(settings, config)
        order = np.random.default_rng(seed)
        for t in range(self.n_steps):
            rows = jnp.asarray(x_NX[order.choice(len(x_NX), size, replace=False)])
            state, _ = step(state, hparams, Batch(rows, rows))
            progress.update(done + t + 1)
        return state.sae


def _enlarged(sae: AbstractSae, fresh: AbstractSae, config: Any) -> AbstractSae:
    """The dictionary with the last latents of a fresh one."""
    n, arrays = sae.b_enc.shape[0], {}
    for field in fields(cast(Any, sae)):
        if field.name == "config":
            continue
        old, new = getattr(sae, field.name), getattr(fresh, field.name)
        of_latents = hasattr(old, "shape") and old.ndim and old.shape[0] == n and new.shape[0] == config.n_latents
        # A copy: the arrays of a state are given up to the next one.
        arrays[field.name] = jnp.concatenate([old, new[n:]]) if of_latents else jax.tree.map(jnp.copy, old)
    return replace(cast(Any, sae), **{**arrays, "config": config})


def _fires(sae: AbstractSae, x_NX: np.ndarray) -> np.ndarray:
    """bool[F]: latents that are active on some row."""
    fires_F = np.zeros(sae.b_enc.shape[0], bool)
    for first in range(0, len(x_NX), 4096):
        code = sae.encode(x_NX[first : first + 4096])
        fires_F[np.asarray(code.indices)[np.asarray(code.values) > 0]] = True
    return fires_F


def _unit(w_FD: jax.Array) -> np.ndarray:
    rows_FD = np.asarray(w_FD, np.float64)
    return rows_FD / np.maximum(np.linalg.norm(rows_FD, axis=1, keepdims=True), 1e-30)
