"""What else the coefficients of a law may be, given that its points scatter: draws from their posterior.

    ln y_i = ln f(x_i; theta) + e_i,   e_i ~ Normal(0, s_i),   s_i = s exp(growth u_i)

u runs from -1/2 at the smallest to 1/2 at the largest of the first variable, so noise may grow with the width. Where
points are at least twice as many as coefficients and two more, a share OUTLIERS of them may be anything:
e_i ~ Cauchy(0, WIDE s_i). A y that was seen to pass a mark counts as anything between that mark and the one before.
Before the points are seen, growth is Cauchy(0, GROWTH), s has the density 1 / s, or 1 / (s + COARSE) with marks, and
the coefficients are as forms.py says.

Sampled by stretch moves of an ensemble of walkers (Goodman and Weare 2010, Comm. App. Math. Comp. Sci. 5, 65), which
begin at the likelier of places around a fit. numpy and scipy alone, float64. Axes: W walkers, N points, P coefficients,
Q = P + 2 with ln s and growth, M draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy

N_WALKERS = 200
N_BEGUN = 2000  # places, of which walkers begin at the likelier
N_MOVES = 200  # of each walker before the first draws
BETWEEN = 60  # and then between draws
GROWTH = 1.0  # this and the next three: see above
OUTLIERS = 0.02
WIDE = 5.0
COARSE = 0.05
SMALLEST = 1e-12  # noise, which rounding also makes
TINY = np.finfo(np.float64).tiny
ALONE = -np.inf  # lower end of a y that was seen at its first mark

_LOG_ROOT = 0.5 * np.log(2 * np.pi)


@dataclass(frozen=True, eq=False)
class Points:
    """What the law is of."""

    log_y: np.ndarray  # f64[N]
    low: np.ndarray  # f64[N], ln of the mark before; equal to log_y where y is known itself
    position: np.ndarray  # f64[N], u above

    @property
    def between(self) -> np.ndarray:
        """bool[N]: of which only two marks are known."""
        return self.low < self.log_y


class Noise(NamedTuple):
    """Means over the draws."""

    growth: float
    outlier: np.ndarray  # f64[N], probability that a point is one


def draws(
    log_f: Callable[[np.ndarray], np.ndarray],
    log_prior: Callable[[np.ndarray], np.ndarray],
    points: Points,
    begun_WP: np.ndarray,
    log_begun_W: np.ndarray,
    off_N: np.ndarray,
    m: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, Noise]:
    """(theta f64[M, P], noise), M = m rounded up to whole ensembles.

    `log_f`: theta f64[W, P] -> ln f f64[W, N]. `log_prior`: theta -> f64[W]. `begun_WP`, `log_begun_W`: where walkers
    may begin, and ln of the density by which these places were drawn. `off_N`: the noise of a fit.
    """
    p, n = begun_WP.shape[1], len(points.log_y)
    has_outliers = n >= 2 * p + 2
    is_coarse = bool(points.between.any())

    def log_density(q_WQ: np.ndarray) -> np.ndarray:
        theta_WP, log_s_W, growth_W = q_WQ[:, :p], q_WQ[:, p], q_WQ[:, p + 1]
        log_s_WN = log_s_W[:, None] + growth_W[:, None] * points.position
        with np.errstate(over="ignore", invalid="ignore"):
            like_WN = _log_likelihood(points, log_f(theta_WP), log_s_WN, has_outliers)
            prior_W = log_prior(theta_WP) - np.log1p((growth_W / GROWTH) ** 2)
            prior_W -= is_coarse * np.log1p(COARSE * np.exp(-log_s_W))
            total_W = like_WN.sum(1) + prior_W
        return np.where((log_s_W > np.log(SMALLEST)) & np.isfinite(total_W), total_W, -np.inf)

    w, z_W2 = len(begun_WP), rng.standard_normal((len(begun_WP), 2))
    beside_W2 = _roughly(off_N, points.position, p) + z_W2 * (min(1 / max(n - p, 1) ** 0.5, 0.7), 0.5)
    begun_WQ = np.concatenate([begun_WP, beside_W2], 1)
    gain_W = log_density(begun_WQ) - log_begun_W + 0.5 * (z_W2**2).sum(1)
    # By chance in proportion to their density, but none twice: walkers that stand in one place cannot leave it.
    first = np.argsort(-(gain_W + rng.gumbel(size=w)), kind="stable")
    walkers_WQ = begun_WQ[first[:N_WALKERS]]
    walkers_WQ, kept = _moved(log_density, walkers_WQ, N_MOVES, rng), []
    for _ in range(-(-m // N_WALKERS)):
        walkers_WQ = _moved(log_density, walkers_WQ, BETWEEN, rng)
        kept.append(walkers_WQ)
    drawn_MQ = np.concatenate(kept)
    log_s_MN = drawn_MQ[:, p, None] + drawn_MQ[:, p + 1, None] * points.position
    outlier_N = np.zeros(n)
    if has_outliers:
        plain_MN, wild_MN = _log_parts(points.log_y - log_f(drawn_MQ[:, :p]), log_s_MN)
        outlier_N = scipy.special.expit(wild_MN - plain_MN).mean(0)
    return drawn_MQ[:, :p], Noise(float(drawn_MQ[:, p + 1].mean()), outlier_N)


def _roughly(off_N: np.ndarray, position_N: np.ndarray, p: int) -> tuple[float, float]:
    """(ln s, growth) of a fit's noise: the slope of its logarithm along u, drawn to 0 where points are few."""
    log_N, aside_N = np.log(np.abs(off_N) + SMALLEST), position_N - position_N.mean()
    slope = float(aside_N @ log_N) / (float(aside_N @ aside_N) + 1.0)
    # A median, as there may be outliers; a normal one is 0.6745 of its root mean square.
    size = float(np.median(np.abs(off_N) * np.exp(-slope * position_N))) / 0.6745
    freedom = (len(off_N) / max(len(off_N) - p, 1)) ** 0.5
    return float(np.log(max(freedom * size, 10 * SMALLEST))), slope


def position(x_N: np.ndarray) -> np.ndarray:
    """From -1/2 at the smallest ln x to 1/2 at the largest."""
    log_N = np.log(x_N)
    return (log_N - log_N.min()) / (np.ptp(log_N) or 1.0) - 0.5


def around(theta_P: np.ndarray, covariance_PP: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Places to begin at f64[W, P], near a fit with this covariance, and ln of their density f64[W]."""
    covariance_PP = covariance_PP + 1e-20 * np.eye(len(theta_P))
    begun_WP = rng.multivariate_normal(theta_P, 4 * covariance_PP, N_BEGUN, method="eigh")
    off_WP = begun_WP - theta_P
    return begun_WP, -0.125 * np.einsum("wp,pq,wq->w", off_WP, np.linalg.pinv(covariance_PP, hermitian=True), off_WP)


def _log_likelihood(points: Points, log_f_WN: np.ndarray, log_s_WN: np.ndarray, has_outliers: bool) -> np.ndarray:
    plain_WN, wild_WN = _log_parts(points.log_y - log_f_WN, log_s_WN)
    like_WN = np.logaddexp(plain_WN, wild_WN) if has_outliers else plain_WN
    if not (between_N := points.between).any():
        return like_WN
    s_WN = np.exp(log_s_WN[:, between_N])
    ends_WN = [(end_N[between_N] - log_f_WN[:, between_N]) / s_WN for end_N in (points.low, points.log_y)]
    # Both in the tail that is not near 1, where differences of probabilities are exact.
    is_above_WN = ends_WN[0] > 0
    low_WN = np.where(is_above_WN, -ends_WN[1], ends_WN[0])
    high_WN = np.where(is_above_WN, -ends_WN[0], ends_WN[1])
    log_high_WN, log_low_WN = scipy.special.log_ndtr(high_WN), scipy.special.log_ndtr(low_WN)
    with np.errstate(divide="ignore"):
        like_WN[:, between_N] = log_high_WN + np.log(-np.expm1(np.minimum(log_low_WN - log_high_WN, 0.0)))
    return like_WN


def _log_parts(residual_WN: np.ndarray, log_s_WN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ln of the density of each residual with its chance, as noise and as an outlier."""
    with np.errstate(over="ignore"):
        z2_WN = (residual_WN * np.exp(-log_s_WN)) ** 2
        plain_WN = np.log1p(-OUTLIERS) - 0.5 * z2_WN - log_s_WN - _LOG_ROOT
        wild_WN = np.log(OUTLIERS / (np.pi * WIDE)) - np.log1p(z2_WN / WIDE**2) - log_s_WN
    return plain_WN, wild_WN


def _moved(
    log_density: Callable[[np.ndarray], np.ndarray], walkers_WQ: np.ndarray, n: int, rng: np.random.Generator
) -> np.ndarray:
    """The ensemble after n stretch moves of each walker, half of them at a time along lines to the other half."""
    walkers_WQ, (w, q) = walkers_WQ.copy(), walkers_WQ.shape
    halves = slice(0, w // 2), slice(w // 2, w)
    density_W = log_density(walkers_WQ)
    for _ in range(n):
        for mine, others in (halves, halves[::-1]):
            stretch_W = (rng.random(w // 2) + 1) ** 2 / 2  # density 1 / sqrt(z) from 1/2 to 2
            partner_WQ = walkers_WQ[others][rng.integers(w // 2, size=w // 2)]
            there_WQ = partner_WQ + stretch_W[:, None] * (walkers_WQ[mine] - partner_WQ)
            there_W = log_density(there_WQ)
            goes_W = np.log(rng.random(w // 2)) < (q - 1) * np.log(stretch_W) + there_W - density_W[mine]
            walkers_WQ[mine] = np.where(goes_W[:, None], there_WQ, walkers_WQ[mine])
            density_W[mine] = np.where(goes_W, there_W, density_W[mine])
    return walkers_WQ
