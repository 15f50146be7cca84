"""Intervals by the bootstrap: they cover the mean, and are of units, not of values."""

import numpy as np
import pytest

from sae_jax.analysis.bootstrap import mean_and_interval


def test_an_interval_covers_the_mean_nine_times_in_ten():
    inside = 0
    for seed in range(200):
        _, interval = mean_and_interval(np.random.default_rng(seed).exponential(size=40), seed)
        inside += interval[0] <= 1 <= interval[1]
    assert 160 <= inside <= 195
    assert mean_and_interval(np.array([3.0])) == (3.0, None)


def test_intervals_are_of_units_not_of_values():
    values = np.repeat(np.random.default_rng(0).standard_normal(30), 20)
    _, of_units = mean_and_interval(values, 0, np.repeat(np.arange(30), 20))
    _, of_values = mean_and_interval(values)
    assert of_units[1] - of_units[0] == pytest.approx(2 * 1.645 / np.sqrt(30), rel=0.25)
    assert of_units[1] - of_units[0] > 3 * (of_values[1] - of_values[0])
    assert mean_and_interval(values, 0, np.zeros(600)) == (values.mean(), None)
