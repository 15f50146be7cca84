"""Bootstrap intervals: how far a mean over independent units (prompts, tasks, latents, sequences) may be off."""

from __future__ import annotations

import numpy as np

from sae_jax.evaluation.base import CONFIDENCE

N_DRAWS = 2000


def interval_of_mean(values_N: np.ndarray, seed: int = 0) -> tuple[float, tuple[float, float] | None]:
    """(mean, interval of 90 %) of values f64[N] of N units, by the percentiles of means of redrawn units.

    One unit says nothing of others: no interval.
    """
    values_N = np.asarray(values_N, np.float64)
    mean = float(values_N.mean())
    if len(values_N) < 2:
        return mean, None
    draws_RN = np.random.default_rng(seed).integers(0, len(values_N), (N_DRAWS, len(values_N)))
    low, high = np.quantile(values_N[draws_RN].mean(1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return mean, (float(low), float(high))
