"""Intervals of means by the bootstrap: what varies independently (prompts, latents, sequences) is drawn again."""

from __future__ import annotations

import numpy as np

CONFIDENCE = 0.9
N_DRAWS = 2000


def mean_and_interval(
    values_N: np.ndarray, seed: int = 0, unit_N: np.ndarray | None = None
) -> tuple[float, tuple[float, float] | None]:
    """(mean of the values, its percentile interval of CONFIDENCE); None of fewer than two units.

    Args:
        values_N: [N].
        seed: of the draws.
        unit_N: i[N], which unit each value is of; None: each is one of its own.
    """
    values_N = np.asarray(values_N, np.float64)
    mean = float(values_N.mean())
    unit_N = np.arange(len(values_N)) if unit_N is None else np.unique(unit_N, return_inverse=True)[1]
    sums_U, counts_U = (np.bincount(unit_N, weights) for weights in (values_N, np.ones(len(values_N))))
    if len(sums_U) < 2:
        return mean, None
    drawn_RU = np.random.default_rng(seed).integers(0, len(sums_U), (N_DRAWS, len(sums_U)))
    means_R = sums_U[drawn_RU].sum(1) / counts_U[drawn_RU].sum(1)
    low, high = np.quantile(means_R, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return mean, (float(low), float(high))
