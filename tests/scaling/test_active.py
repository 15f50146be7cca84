"""Where decoder rows are least alike over k, from the points of a sweep."""

import dataclasses

import numpy as np
import pytest

from sae_jax.scaling import active
from sae_jax.scaling.table import Point


def points(cosines, tokens=(1000, 2000), **fields):
    """Points at k = 4, 8, 16, ..., of which the last mark has the cosines; None has none."""
    point = Point(n_latents=256, k=4, lr=1e-3, seed=0, tokens=1, flops=1.0, fvu=0.1)
    return [
        dataclasses.replace(point, k=4 * 2**i, tokens=t, decoder_cosine=c if t == tokens[-1] else 0.5, **fields)
        for i, c in enumerate(cosines)
        for t in tokens
    ]


@pytest.mark.parametrize(
    ("cosines", "best", "within"),
    [
        ((0.3, 0.2, 0.1, 0.15, 0.2), 16, (8, 32)),
        ((0.3, 0.2, 0.101, 0.1, 0.2), 32, (8, 64)),  # as good as the best, on a curve from 0.1 to 0.3
        ((0.3, 0.2, 0.15, 0.1), 32, (16, None)),
        ((0.1, 0.2, 0.3), 4, (None, 8)),
        ((0.1, 0.1, 0.1), 4, (None, None)),
    ],
)
def test_the_least_is_between_neighbours(cosines, best, within):
    (curve,) = active.curves(points(cosines))
    assert (curve.best, curve.within, curve.tokens) == (best, within, 2000)


def test_seeds_are_averaged_and_the_best_rate_counts():
    seeds = points((0.3, 0.1, 0.2)) + points((0.5, 0.3, 0.4), seed=1)
    (curve,) = active.curves(seeds + points((0.9, 0.9, 0.9), lr=1e-2, fvu=0.2))
    np.testing.assert_allclose(curve.cosine, [0.4, 0.2, 0.3])


def test_points_without_the_number_do_not_count():
    assert active.curves(points((None, None, None), tokens=(2000,))) == []
    assert active.curves(points((0.3, None, 0.2), tokens=(2000,))) == []  # of two k
    assert active.curves([p for p in points((0.3, 0.1, 0.2)) if (p.k, p.tokens) not in {(4, 1000), (8, 2000)}]) == []
