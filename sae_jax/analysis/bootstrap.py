"""Intervals of means by the bootstrap."""

from __future__ import annotations

import numpy as np

CONFIDENCE = 0.9
N_DRAWS = 2000


def mean_and_interval(values: np.ndarray, seed: int = 0) -> tuple[float, tuple[float, float] | None]:
    """The mean of independent units f[N], and its percentile interval of CONFIDENCE; None of fewer than two units."""
    value = float(values.mean())
    if len(values) < 2:
        return value, None
    drawn = np.random.default_rng(seed).integers(0, len(values), (N_DRAWS, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return value, (float(low), float(high))
