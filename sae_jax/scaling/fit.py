"""Scaling laws fitted to points: how the error falls with compute, latents and k.

    joint            L(n, k) = exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n) + exp(zeta + eta ln k)
    decay            L(x) = coefficient * x^-exponent
    decay_constant   L(x) = constant + coefficient * x^-exponent
    growth           y(x) = coefficient * x^exponent

Source: Gao et al. 2024, arXiv 2406.04093, sections 3.1 (compute, tokens to convergence) and 3.2 (joint).

Every law is a sum of exponentials, each linear in its coefficients: y = sum over terms of exp(X theta). A coefficient
is found by least squares of ln y, each point weighted by its noise and outliers left out (solve.py). What else it may
be, and which points are outliers, is drawn in chance.py: intervals are those of 90 % of the draws. The second term of a
law, its constant, is nought with probability 1/2 before the points are seen.

numpy and scipy alone, float64. Axes: N points, P coefficients, M draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy  # its parts load on first use: most commands need none, and half a second less

from sae_jax.scaling import chance
from sae_jax.scaling.forms import FORMS, LARGEST, Form, UnfitError
from sae_jax.scaling.solve import Solved, jacobian, log_sum

LEVEL = 0.9  # of intervals
N_DRAWS = 400
SIGNED = ("beta_k", "beta_n", "gamma", "eta", "exponent")  # coefficients of which the first question is the sign
ROUNDING = 1e-6  # of a coefficient
SMALLEST_OFF = 0.01  # probability, by chance, of a test that says that the smallest points are off the law


@dataclass(frozen=True, eq=False)
class Law:
    """A fitted law."""

    form: str  # a key of FORMS
    coefficients: dict[str, float]
    interval: dict[str, tuple[float, float]]  # of 90 %; empty where there are no more points than coefficients
    chance: float | None  # that the second term is not nought; None without one, or without intervals
    r2: float  # of ln y
    rmse_log: float  # root of the mean squared residual of ln y
    noise_growth: float  # how many times noisier the largest n or x is than the smallest
    n_points: int
    outliers: tuple[int, ...]  # points that do not count
    largest_out: float | None  # mean relative error for the largest n or x by the law fitted without it
    carried: float | None  # the same for carrying over y of the next smaller one, at the same k
    range: dict[str, tuple[float, float]]  # of each variable, in the points
    warnings: tuple[str, ...]
    draws: np.ndarray = field(repr=False)  # f64[M, P], exponents' linear forms; M = 0 without intervals

    def predict(self, *x: float | np.ndarray) -> np.ndarray:
        """y f64[...] at the variables, in the order of the form's."""
        form = FORMS[self.form]
        written_P = np.array([self.coefficients[name] for name in form.coefficients])
        in_logs = np.array([name in ("coefficient", "constant") for name in form.coefficients])
        theta_P = np.where(in_logs, np.log(np.where(in_logs, np.maximum(written_P, chance.TINY), 1.0)), written_P)
        return self._at(theta_P, x)

    def draw(self, *x: float | np.ndarray) -> np.ndarray:
        """y f64[M, ...] by every draw: percentiles of it are an interval of the law, not of another point's scatter."""
        return np.array([self._at(theta_P, x) for theta_P in self.draws])

    def _at(self, theta_P: np.ndarray, x: tuple[float | np.ndarray, ...]) -> np.ndarray:
        logs = np.broadcast_arrays(*(np.log(np.asarray(each, np.float64)) for each in x))
        return np.exp(log_sum(FORMS[self.form].terms(*logs), theta_P))

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads, but for the draws: the coefficients by name, and how well the law fits."""
        return {**self.coefficients, **{name: getattr(self, name) for name in _SAID}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], draws: list[list[float]]) -> Law:
        """The inverse of `to_json`. Raises KeyError for a key that is missing."""
        names = FORMS[values["form"]].coefficients
        pairs = {key: {name: tuple(both) for name, both in values[key].items()} for key in ("interval", "range")}
        said: dict[str, Any] = {name: values[name] for name in _SAID} | pairs
        said |= {key: tuple(values[key]) for key in ("outliers", "warnings")}
        draws_MP = np.array(draws, np.float64).reshape(-1, len(names))
        return cls(**said, coefficients={name: values[name] for name in names}, draws=draws_MP)


_SAID = tuple(name for name in Law.__dataclass_fields__ if name not in ("coefficients", "draws"))


def joint(n_N: np.ndarray, k_N: np.ndarray, loss_N: np.ndarray) -> Law:
    """L(n, k), of latents n f64[N], active latents k f64[N] and errors f64[N] (section 3.2).

    Raises UnfitError for fewer than three n, two k or six points.
    """
    return _fit("joint", loss_N, (n_N, k_N))


def decay(x_N: np.ndarray, loss_N: np.ndarray) -> Law:
    """L(x) falling to nothing, of compute or latents x f64[N] (section 3.1). Raises UnfitError for fewer than two x."""
    return _fit("decay", loss_N, (x_N,))


def decay_constant(x_N: np.ndarray, loss_N: np.ndarray) -> Law:
    """L(x) falling to a constant that no x undercuts, or to nothing, whichever is likelier (section 3.1).

    Raises UnfitError for fewer than three x.
    """
    return _fit("decay_constant", loss_N, (x_N,))


def growth(x_N: np.ndarray, y_N: np.ndarray, seen_before_N: np.ndarray | None = None) -> Law:
    """y(x) of any positive y, such as tokens to convergence (section 3.1).

    `seen_before_N`: where y is the first of several marks that was passed, the mark before, 0 for none; so that the
    law is of what lies between. Raises UnfitError for fewer than two x.
    """
    return _fit("growth", y_N, (x_N,), seen_before_N)


def n_smallest_off(x_N: np.ndarray, loss_N: np.ndarray) -> int:
    """How many of the smallest x f64[N], a quarter at most, are off the law that the larger ones follow.

    By Student's test of each against the fit to those that are larger, with a probability of SMALLEST_OFF that one is
    off by chance. "The smallest fall off the trend" (section 3.1).
    """
    form, values = FORMS["decay_constant"], np.unique(x_N)
    most = min(len(values) // 4, len(values) - len(form.coefficients) - 2)
    for m in range(most, 0, -1):
        rest_N, tried_N = x_N > values[m - 1], x_N == values[m - 1]
        try:
            solved = Solved.of(form, loss_N[rest_N], (x_N[rest_N],))
        except UnfitError:
            continue
        free = int(solved.weight.sum()) - len(solved.theta)
        if free < 2:
            continue
        terms = form.terms(np.log(x_N[tried_N]))
        off_N = np.log(loss_N[tried_N]) - log_sum(terms, solved.theta)
        slopes_NP = jacobian(terms, solved.theta)
        variance_N = 1 + np.einsum("np,pq,nq->n", slopes_NP, solved.covariance() / solved.size**2, slopes_NP)
        t_N = np.abs(off_N) / (solved.size * np.sqrt(variance_N) + chance.SMALLEST)
        if 2 * scipy.special.stdtr(free, -t_N).min() * len(t_N) * most < SMALLEST_OFF:
            return m
    return 0


def ends(values_M: np.ndarray) -> tuple[float, float] | None:
    """The interval that 90 % of the values f64[M] of draws lie in; None if there are none."""
    if not len(values_M):
        return None
    low, high = np.quantile(values_M, (0.5 - LEVEL / 2, 0.5 + LEVEL / 2))
    return float(low), float(high)


def _fit(name: str, y_N: np.ndarray, x: tuple[np.ndarray, ...], seen_before_N: np.ndarray | None = None) -> Law:
    form = FORMS[name]
    y_N, x = np.asarray(y_N, np.float64), tuple(np.asarray(each, np.float64) for each in x)
    solved = Solved.of(form, y_N, x)
    draws_MP, noise = solved.draws(x[0], seen_before_N, N_DRAWS)
    theta_P, n = solved.theta, len(y_N)
    outlier_N, chance_of_constant = np.zeros(n, bool), None
    if len(draws_MP):
        outlier_N = noise.outlier > 0.5
        if outlier_N.sum() > n // 3:  # that is no law with a few exceptions
            outlier_N[:] = False
        chance_of_constant = float((draws_MP[:, form.constant] > -LARGEST).mean()) if form.constant else None
        if seen_before_N is not None:
            theta_P = np.median(draws_MP, axis=0)
        else:
            weight_N = np.where(outlier_N, 0.0, np.exp(-2 * noise.growth * chance.position(x[0])))
            theta_P = solved.reweighted(weight_N, name == "joint" or (chance_of_constant or 1) >= 0.5, draws_MP)
    natural_P = form.natural(theta_P)
    drawn_PM = form.natural(draws_MP).T
    interval = {key: both for key, each_M in zip(form.coefficients, drawn_PM, strict=True) if (both := ends(each_M))}
    coefficients = dict(zip(form.coefficients, natural_P.tolist(), strict=True))
    residual_N = (solved.log_y - log_sum(solved.terms, theta_P))[~outlier_N]
    squares, log_y_N = float(residual_N @ residual_N), solved.log_y[~outlier_N]
    spread = float(((log_y_N - log_y_N.mean()) ** 2).sum())
    largest_out, carried = _largest_out(form, y_N[~outlier_N], tuple(each[~outlier_N] for each in x))
    off_N = np.exp(solved.log_y - log_sum(solved.terms, theta_P)) - 1
    named = [
        _named(form, x, i) + f" is an outlier, {off_N[i]:+.0%} off the law, and does not count"
        for i in np.flatnonzero(outlier_N).tolist()
    ]
    return Law(
        name,
        coefficients,
        interval,
        chance_of_constant,
        r2=1 - squares / spread if spread else 0.0,
        rmse_log=(squares / len(residual_N)) ** 0.5,
        noise_growth=float(np.exp(noise.growth)),
        n_points=n,
        outliers=tuple(np.flatnonzero(outlier_N).tolist()),
        largest_out=largest_out,
        carried=carried,
        range={key: (float(each.min()), float(each.max())) for key, each in zip(form.variables, x, strict=True)},
        warnings=(*named, *_doubts(form, coefficients, interval)),
        draws=draws_MP,
    )


def _named(form: Form, x: tuple[np.ndarray, ...], i: int) -> str:
    return ", ".join(f"{name}={each[i]:g}" for name, each in zip(form.variables, x, strict=True))


def _largest_out(form: Form, y_N: np.ndarray, x: tuple[np.ndarray, ...]) -> tuple[float | None, float | None]:
    """Mean relative errors for the largest n or x: by the law fitted without it, and by carrying over the next one."""
    out_N = x[0] == x[0].max()
    seen = tuple(each[~out_N] for each in x)
    carried = []
    for i in np.flatnonzero(out_N):
        alike = ~out_N & np.logical_and.reduce([each == each[i] for each in x[1:]], initial=True)
        if alike.any():
            nearest = np.flatnonzero(alike & (x[0] == x[0][alike].max()))
            carried.append(abs(y_N[nearest].mean() / y_N[i] - 1))
    try:
        solved = Solved.of(form, y_N[~out_N], seen)
    except UnfitError:
        predicted = None
    else:
        foreseen_N = np.exp(log_sum(form.terms(*(np.log(each[out_N]) for each in x)), solved.theta))
        predicted = float(np.abs(foreseen_N / y_N[out_N] - 1).mean())
    return predicted, float(np.mean(carried)) if carried else None


def _doubts(form: Form, coefficients: dict[str, float], interval: dict[str, tuple[float, float]]) -> tuple[str, ...]:
    """Coefficients that the points do not determine. Values at x = 1 may be vague, as they lie far from all points."""
    if not interval:
        n = len(coefficients)
        return (f"as many points as coefficients ({n}): no intervals; add points",)
    # Where the value at x = 1 is cut off, points say no more of the exponent than that it is large.
    is_cut_off = abs(np.log(max(coefficients.get("coefficient", 1.0), chance.TINY))) > LARGEST - 1
    doubts = []
    for name, cure in form.cures.items():
        low, high = interval[name]
        value = coefficients[name]
        tolerated = min(max(abs(value), 1.0), 10.0) if name in ("alpha", "zeta") else abs(value)
        # Draws keep to what is of order one: where the least squares do not, that decides, and not the points.
        is_elsewhere = not low - ROUNDING * (1 + abs(low)) <= value <= high + ROUNDING * (1 + abs(high))
        if name in SIGNED and low < -ROUNDING and high > ROUNDING:
            doubts.append(f"{name} may be 0 ({value:.3g}, interval {low:.3g} to {high:.3g}): needs {cure}")
        elif high - low > tolerated or is_elsewhere or (name == "exponent" and is_cut_off):
            doubts.append(f"{name} is not determined ({value:.3g}, interval {low:.3g} to {high:.3g}): needs {cure}")
    return tuple(doubts)
