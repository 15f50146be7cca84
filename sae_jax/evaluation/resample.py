"""Intervals by the bootstrap: the units that vary independently, such as sequences or prompts, are drawn again."""

from __future__ import annotations

import numpy as np

from sae_jax.evaluation.base import CONFIDENCE

N_DRAWS = 1000


def interval_of_mean(values_N: np.ndarray, unit_N: np.ndarray, seed: int) -> tuple[float, float] | None:
    """The interval of CONFIDENCE of the mean of values that come in units; None for a single unit.

    Args:
        values_N: f64[N].
        unit_N: i64[N], which unit each is of.
        seed: of the draws.
    """
    _, unit_N = np.unique(unit_N, return_inverse=True)
    sums_U, counts_U = (np.bincount(unit_N, weights) for weights in (values_N, np.ones(len(values_N))))
    if len(sums_U) < 2:
        return None
    rng = np.random.default_rng(seed)
    drawn_RU = rng.integers(0, len(sums_U), (N_DRAWS, len(sums_U)))
    means_R = sums_U[drawn_RU].sum(1) / counts_U[drawn_RU].sum(1)
    low, high = np.quantile(means_R, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
