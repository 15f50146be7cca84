"""Scaling laws fitted to points: how the error falls with compute, latents and k.

    joint            L(n, k) = exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n) + exp(zeta + eta ln k)
    decay            L(x) = coefficient * x^-exponent
    decay_constant   L(x) = constant + coefficient * x^-exponent
    growth           y(x) = coefficient * x^exponent

Source: Gao et al. 2024, arXiv 2406.04093, sections 3.1 (compute, tokens to convergence) and 3.2 (joint).

Every law is a sum of exponentials, each linear in its coefficients: y = sum over terms of exp(X theta). One solver
serves all: least squares of ln y from several starts. Intervals are of 90 %, from a residual bootstrap: residuals are
divided by sqrt(1 - leverage), drawn again with sqrt(dof / chi2) times their size, so that in a linear law the intervals
are Student's, also where points are few; each draw is refitted whole.

numpy and scipy alone, float64. Axes: N points, P coefficients, M bootstrap draws, W widths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy  # its parts load on first use: most commands need none, and half a second less

LEVEL = 0.9  # of intervals
N_DRAWS = 400
EXACT = 1e-10  # residuals that come from rounding
ROUGH = 1e-8  # relative tolerance for starts and draws: a tighter one takes long where a law is barely determined
SPACING = 1.5  # two budgets differ by at least this factor, since nearer ones repeat each other
ALIGNED = 1.05  # points whose costs differ by less than this factor belong to one budget
SHARES = (0.05, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99)  # of the least error, where the second term starts
N_JITTERED = 3  # starts beside each of these
LARGEST = 700.0  # ln of a coefficient
VANISHED = 0.01  # below this share of y everywhere, a term's gradient is too small for the solver to recover it


class UnfitError(ValueError):
    """The points do not determine the law; the message says what they lack."""


@dataclass(frozen=True)
class Form:
    """How a law is written."""

    variables: tuple[str, ...]  # the first is the one that largest_out leaves the largest value of out
    coefficients: tuple[str, ...]  # term after term
    terms: Callable[..., tuple[np.ndarray, ...]]  # ln of the variables f64[N] -> designs f64[N, *]
    distinct: Mapping[str, int]  # distinct values that each variable must have
    cures: Mapping[str, str]  # what would determine a coefficient that these points do not

    def natural(self, theta_P: np.ndarray) -> np.ndarray:
        """The coefficients as they are written: f64[..., P] of the exponents' linear forms -> f64[..., P]."""
        # Where points determine little, a draw at x = 1 may be beyond what a float holds.
        columns = [
            np.exp(np.clip(theta_P[..., i], -LARGEST, LARGEST))
            if name in ("coefficient", "constant")
            else theta_P[..., i]
            for i, name in enumerate(self.coefficients)
        ]
        return np.stack(columns, axis=-1)


def _falling(ln_x_N: np.ndarray) -> np.ndarray:
    return np.stack([np.ones_like(ln_x_N), -ln_x_N], axis=-1)


def _rising(ln_x_N: np.ndarray) -> np.ndarray:
    return np.stack([np.ones_like(ln_x_N), ln_x_N], axis=-1)


def _joint(ln_n_N: np.ndarray, ln_k_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    one_N = np.ones_like(ln_n_N)
    return np.stack([one_N, ln_k_N, ln_n_N, ln_k_N * ln_n_N], axis=-1), np.stack([one_N, ln_k_N], axis=-1)


_EXPONENT = "more values, over a wider range"
FORMS = {
    "joint": Form(
        ("n", "k"),
        ("alpha", "beta_k", "beta_n", "gamma", "zeta", "eta"),
        _joint,
        {"n": 3, "k": 2},
        {
            "alpha": "more widths",
            "beta_k": "more values of k",
            "beta_n": "more widths",
            "gamma": "more widths at the smallest and the largest k",
            "zeta": "wider autoencoders, where the error stops falling",
            "eta": "more values of k at the largest widths",
        },
    ),
    "decay": Form(
        ("x",), ("coefficient", "exponent"), lambda ln_x_N: (_falling(ln_x_N),), {"x": 2}, {"exponent": _EXPONENT}
    ),
    "decay_constant": Form(
        ("x",),
        ("coefficient", "exponent", "constant"),
        lambda ln_x_N: (_falling(ln_x_N), np.ones((*ln_x_N.shape, 1))),
        {"x": 3},
        {"exponent": _EXPONENT, "constant": "larger values, where the error stops falling"},
    ),
    "growth": Form(
        ("x",), ("coefficient", "exponent"), lambda ln_x_N: (_rising(ln_x_N),), {"x": 2}, {"exponent": _EXPONENT}
    ),
}


@dataclass(frozen=True, eq=False)
class Law:
    """A fitted law."""

    form: str  # a key of FORMS
    coefficients: dict[str, float]
    interval: dict[str, tuple[float, float]]  # of 90 %; empty where there are no more points than coefficients
    r2: float  # of ln y
    rmse_log: float  # root of the mean squared residual of ln y
    n_points: int
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
        theta_P = np.where(in_logs, np.log(np.where(in_logs, np.maximum(written_P, _TINY), 1.0)), written_P)
        return self._at(theta_P, x)

    def draw(self, *x: float | np.ndarray) -> np.ndarray:
        """y f64[M, ...] by every draw: percentiles of it are an interval of the law, not of another point's scatter."""
        return np.array([self._at(theta_P, x) for theta_P in self.draws])

    def _at(self, theta_P: np.ndarray, x: tuple[float | np.ndarray, ...]) -> np.ndarray:
        logs = np.broadcast_arrays(*(np.log(np.asarray(each, np.float64)) for each in x))
        return np.exp(_log_sum(FORMS[self.form].terms(*logs), theta_P))

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads, but for the draws: the coefficients by name, and how well the law fits."""
        names = ("interval", "r2", "rmse_log", "n_points", "largest_out", "carried", "range", "form")
        return {**self.coefficients, **{name: getattr(self, name) for name in names}, "warnings": list(self.warnings)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], draws: list[list[float]]) -> Law:
        """The inverse of `to_json`. Raises KeyError for a key that is missing."""
        names = FORMS[values["form"]].coefficients
        return cls(
            **{name: values[name] for name in ("form", "r2", "rmse_log", "n_points", "largest_out", "carried")},
            coefficients={name: values[name] for name in names},
            interval={name: tuple(values["interval"][name]) for name in values["interval"]},
            range={name: tuple(values["range"][name]) for name in values["range"]},
            warnings=tuple(values["warnings"]),
            draws=np.array(draws, np.float64).reshape(-1, len(names)),
        )


_TINY = np.finfo(np.float64).tiny


def joint(n_N: np.ndarray, k_N: np.ndarray, loss_N: np.ndarray) -> Law:
    """L(n, k), of latents n f64[N], active latents k f64[N] and errors f64[N] (section 3.2).

    Raises UnfitError for fewer than three n, two k or seven points.
    """
    return _fit("joint", loss_N, n_N, k_N)


def decay(x_N: np.ndarray, loss_N: np.ndarray) -> Law:
    """L(x) falling to nothing, of compute or latents x f64[N] (section 3.1). Raises UnfitError for fewer than two x."""
    return _fit("decay", loss_N, x_N)


def decay_constant(x_N: np.ndarray, loss_N: np.ndarray) -> Law:
    """L(x) falling to a constant that no x undercuts (section 3.1). Raises UnfitError for fewer than three x."""
    return _fit("decay_constant", loss_N, x_N)


def growth(x_N: np.ndarray, y_N: np.ndarray) -> Law:
    """y(x) of any positive y, such as tokens to convergence (section 3.1). Raises UnfitError for fewer than two x."""
    return _fit("growth", y_N, x_N)


def better(with_constant: Law, without: Law) -> tuple[bool, str]:
    """Whether to use the law with a constant, and why.

    The law with one more coefficient never fits worse. It is used where, by the F test of nested models, noise alone
    would improve the fit as much with a probability below 1 - LEVEL; one-sided, since a constant is above 0.
    """
    free = with_constant.n_points - len(with_constant.coefficients)
    if free < 1:
        return False, "the law without a constant is taken: points are too few to tell it from the one with a constant"
    ours, theirs = (max(law.rmse_log, EXACT) for law in (with_constant, without))
    p = float(scipy.special.fdtrc(1, free, free * max((theirs / ours) ** 2 - 1, 0.0))) / 2
    reason = f"residuals {without.rmse_log:.2%} without, {with_constant.rmse_log:.2%} with, p = {p:.2g}"
    if p < 1 - LEVEL:
        return True, f"the law without the constant fits worse ({reason})"
    return False, f"no constant is needed to explain these points ({reason})"


def ends(values_M: np.ndarray) -> tuple[float, float] | None:
    """The interval that 90 % of the values f64[M] of draws lie in; None if there are none."""
    if not len(values_M):
        return None
    low, high = np.quantile(values_M, (0.5 - LEVEL / 2, 0.5 + LEVEL / 2))
    return float(low), float(high)


def frontier(flops_N: np.ndarray, loss_N: np.ndarray) -> np.ndarray:
    """Indices, by rising cost, of points that no cheaper point beats, thinned to SPACING from the dearest down."""
    order = np.lexsort((loss_N, flops_N))
    best_before = np.minimum.accumulate(np.concatenate([[np.inf], loss_N[order]]))[:-1]
    return _thinned(order[loss_N[order] < best_before], flops_N)


@dataclass(frozen=True)
class Valley:
    """A loss along one variable, at a minimum between the outermost values or not."""

    x: float  # of the minimum
    loss: float
    at_edge: bool  # the least loss is at the smallest or the largest x, so the minimum may lie beyond


def valley(x_N: np.ndarray, loss_N: np.ndarray) -> Valley:
    """Where ln loss f64[N] is least over ln x f64[N]: the parabola through the best point and its two neighbours."""
    order = np.argsort(x_N)
    x_N, loss_N = x_N[order], loss_N[order]
    i = int(np.argmin(loss_N))
    if i in (0, len(x_N) - 1):
        return Valley(float(x_N[i]), float(loss_N[i]), True)
    near = slice(i - 1, i + 2)
    a, b, c = np.polyfit(np.log(x_N[near] / x_N[i]), np.log(loss_N[near]), 2)
    shift = -b / (2 * a) if a > 0 else 0.0  # three equal losses have no parabola
    return Valley(float(x_N[i] * np.exp(shift)), float(np.exp(c + b * shift + a * shift**2)), False)


@dataclass(frozen=True, eq=False)
class Budget:
    """The widths that one budget could have bought."""

    flops: float
    n: np.ndarray  # f64[W], latents
    loss: np.ndarray  # f64[W]
    best: Valley  # over n


def budgets(n_N: np.ndarray, flops_N: np.ndarray, loss_N: np.ndarray) -> list[Budget]:
    """Iso-FLOP curves: at budgets that points have, SPACING apart, the error of each width that reaches so far.

    Between two points of a width its error follows a power law. Budgets with fewer than three widths are left out.
    """
    curves = {}
    for n in np.unique(n_N):
        of_width = np.flatnonzero(n_N == n)
        of_width = of_width[np.argsort(flops_N[of_width])]
        curves[n] = (flops_N[of_width], np.minimum.accumulate(loss_N[of_width]))
    curves_of_budgets = []
    for i in _thinned(np.argsort(flops_N), flops_N):
        c = flops_N[i]
        reach = [n for n, (flops, _) in curves.items() if flops[0] / ALIGNED <= c <= flops[-1] * ALIGNED]
        if len(reach) < 3:
            continue
        loss = [np.exp(np.interp(np.log(c), np.log(curves[n][0]), np.log(curves[n][1]))) for n in reach]
        n_W, loss_W = np.array(reach, np.float64), np.array(loss)
        curves_of_budgets.append(Budget(float(c), n_W, loss_W, valley(n_W, loss_W)))
    return curves_of_budgets


def _thinned(rising: np.ndarray, flops_N: np.ndarray) -> np.ndarray:
    """Of indices by rising cost those SPACING apart, from the dearest down."""
    kept: list[int] = []
    for i in rising[::-1]:
        if not kept or flops_N[i] * SPACING <= flops_N[kept[-1]]:
            kept.append(i)
    return np.array(kept[::-1], int)


def _fit(name: str, y_N: np.ndarray, *x: np.ndarray) -> Law:
    form = FORMS[name]
    y_N, x = np.asarray(y_N, np.float64), tuple(np.asarray(each, np.float64) for each in x)
    theta_P, terms, log_y_N = _solve(form, y_N, x)
    natural_P = form.natural(theta_P)
    residual_N = log_y_N - _log_sum(terms, theta_P)
    squares, n = float(residual_N @ residual_N), len(y_N)
    spread = float(((log_y_N - log_y_N.mean()) ** 2).sum())
    draws_MP = _draws(terms, theta_P, residual_N)
    drawn_PM = form.natural(draws_MP).T
    interval = {name: both for name, each_M in zip(form.coefficients, drawn_PM, strict=True) if (both := ends(each_M))}
    coefficients = dict(zip(form.coefficients, natural_P.tolist(), strict=True))
    largest_out, carried = _largest_out(form, y_N, x)
    return Law(
        name,
        coefficients,
        interval,
        r2=1 - squares / spread if spread else 0.0,
        rmse_log=(squares / n) ** 0.5,
        n_points=n,
        largest_out=largest_out,
        carried=carried,
        range={key: (float(each.min()), float(each.max())) for key, each in zip(form.variables, x, strict=True)},
        warnings=_doubts(form, coefficients, interval),
        draws=draws_MP,
    )


def _solve(
    form: Form, y_N: np.ndarray, x: tuple[np.ndarray, ...]
) -> tuple[np.ndarray, tuple[np.ndarray, ...], np.ndarray]:
    """The best of several starts: (theta f64[P], designs, ln y f64[N]). Raises UnfitError."""
    for name, each in zip(form.variables, x, strict=True):
        if (n_distinct := len(np.unique(each))) < form.distinct[name]:
            raise UnfitError(f"{n_distinct} distinct {name}, and {form.distinct[name]} are needed")
    if len(y_N) < len(form.coefficients):
        raise UnfitError(f"{len(y_N)} points for {len(form.coefficients)} coefficients")
    terms, log_y_N = form.terms(*map(np.log, x)), np.log(y_N)
    ranks = [np.linalg.matrix_rank(term) for term in terms]
    if any(rank < term.shape[1] for rank, term in zip(ranks, terms, strict=True)):
        raise UnfitError("the points lie on one line; vary n and k apart")
    flat, back = _orthonormal(terms)
    rough = [_least_squares(flat, log_y_N, start_P, ROUGH) for start_P in _starts(flat, log_y_N)]
    best_P = min(rough, key=lambda solution: solution[1])[0]
    return back(_least_squares(flat, log_y_N, best_P)[0]), terms, log_y_N


def _starts(terms: tuple[np.ndarray, ...], log_y_N: np.ndarray) -> list[np.ndarray]:
    """Where to begin: the last term shaped like y but below it, the first fitted to the rest; and places nearby."""
    if len(terms) == 1:
        return [np.linalg.lstsq(terms[0], log_y_N)[0]]
    rng, starts = np.random.default_rng(0), []
    first, last = terms
    like_P = np.linalg.lstsq(last, log_y_N)[0]
    for share in SHARES:
        for jitter in range(1 + N_JITTERED):
            slope_P = like_P * (1 if jitter == 0 else rng.normal(1, 0.1, like_P.shape))
            low_N = last @ slope_P
            low_N += (log_y_N - low_N).min() + np.log(share)
            rest_N = np.log(-np.expm1(low_N - log_y_N)) + log_y_N
            starts.append(np.concatenate([np.linalg.lstsq(first, rest_N)[0], np.linalg.lstsq(last, low_N)[0]]))
    return starts


def _least_squares(
    terms: tuple[np.ndarray, ...], log_y_N: np.ndarray, start_P: np.ndarray, tolerance: float = 1e-14
) -> tuple[np.ndarray, float]:
    """(theta f64[P], half the sum of squares) of ln y, by Levenberg-Marquardt with the exact Jacobian."""
    solution = scipy.optimize.least_squares(
        lambda theta_P: _log_sum(terms, theta_P) - log_y_N,
        start_P,
        jac=lambda theta_P: _jacobian(terms, theta_P),  # pyrefly: ignore
        method="lm",
        xtol=tolerance,
        ftol=tolerance,
        gtol=tolerance,
    )
    return solution.x, float(solution.cost)


def _split(terms: tuple[np.ndarray, ...], theta_P: np.ndarray) -> list[np.ndarray]:
    """ln of each term, f64[N]."""
    ends = np.cumsum([term.shape[-1] for term in terms])[:-1]
    return [term @ part for term, part in zip(terms, np.split(theta_P, ends), strict=True)]


def _log_sum(terms: tuple[np.ndarray, ...], theta_P: np.ndarray) -> np.ndarray:
    return np.logaddexp.reduce(_split(terms, theta_P))


def _jacobian(terms: tuple[np.ndarray, ...], theta_P: np.ndarray) -> np.ndarray:
    """f64[N, P]: a term's design times its share of y."""
    logs = _split(terms, theta_P)
    whole_N = np.logaddexp.reduce(logs)
    return np.concatenate(
        [np.exp(part_N - whole_N)[:, None] * term for part_N, term in zip(logs, terms, strict=True)], axis=1
    )


def _orthonormal(
    terms: tuple[np.ndarray, ...],
) -> tuple[tuple[np.ndarray, ...], Callable[[np.ndarray], np.ndarray]]:
    """The same law in coefficients that are near independent, since ln n and ln k are far from 0, and the way back."""
    pairs = [np.linalg.qr(term) for term in terms]
    ends = np.cumsum([term.shape[1] for term in terms])[:-1]

    def back(phi_P: np.ndarray) -> np.ndarray:
        parts = zip(pairs, np.split(phi_P, ends), strict=True)
        return np.concatenate([np.linalg.solve(r, part) for (_, r), part in parts])

    return tuple(q for q, _ in pairs), back


def _draws(terms: tuple[np.ndarray, ...], theta_P: np.ndarray, residual_N: np.ndarray) -> np.ndarray:
    """theta f64[M, P] refitted to the law with other residuals. None where points are no more than coefficients."""
    n, p = len(residual_N), len(theta_P)
    if n <= p:
        return np.zeros((0, p))
    rng = np.random.default_rng(1)
    flat, back = _orthonormal(terms)
    fitted_N = _log_sum(terms, theta_P)
    q_NP = np.linalg.qr(_jacobian(flat, _flat_of(flat, terms, theta_P)))[0]
    leverage_N = np.minimum((q_NP**2).sum(1), 1 - 1e-6)
    even_N = residual_N / np.sqrt(1 - leverage_N)
    even_N = even_N - even_N.mean()
    start_P = _flat_of(flat, terms, theta_P, floor=VANISHED)
    noises = [np.sqrt((n - p) / rng.chisquare(n - p)) * rng.choice(even_N, n) for _ in range(N_DRAWS // 2)]
    # Each with both signs, so that the draws are symmetric.
    drawn = [fitted_N + sign * noise_N for noise_N in noises for sign in (1, -1)]
    return np.array([back(_least_squares(flat, drawn_N, start_P, ROUGH)[0]) for drawn_N in drawn])


def _flat_of(
    flat: tuple[np.ndarray, ...], terms: tuple[np.ndarray, ...], theta_P: np.ndarray, floor: float = 0.0
) -> np.ndarray:
    """theta in the orthonormal designs, each term raised until it has a share `floor` of y somewhere."""
    logs = _split(terms, theta_P)
    whole_N = np.logaddexp.reduce(logs)
    lifts = [max(0.0, np.log(floor) - float((part_N - whole_N).max())) if floor else 0.0 for part_N in logs]
    return np.concatenate([q.T @ (part_N + lift) for q, part_N, lift in zip(flat, logs, lifts, strict=True)])


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
        theta_P, *_ = _solve(form, y_N[~out_N], seen)
    except UnfitError:
        predicted = None
    else:
        foreseen_N = np.exp(_log_sum(form.terms(*(np.log(each[out_N]) for each in x)), theta_P))
        predicted = float(np.abs(foreseen_N / y_N[out_N] - 1).mean())
    return predicted, float(np.mean(carried)) if carried else None


def _doubts(form: Form, coefficients: dict[str, float], interval: dict[str, tuple[float, float]]) -> tuple[str, ...]:
    """Coefficients that the points do not determine. Values at x = 1 may be vague, as they lie far from all points."""
    if not interval:
        n = len(coefficients)
        return (f"as many points as coefficients ({n}): no intervals; add points",)
    # Where the value at x = 1 is cut off, points say no more of the exponent than that it is large.
    is_cut_off = abs(np.log(coefficients.get("coefficient", 1.0))) > LARGEST - 1
    doubts = []
    for name, cure in form.cures.items():
        low, high = interval[name]
        value = coefficients[name]
        tolerated = max(abs(value), 1.0 if name in ("alpha", "zeta") else 0.0)
        if high - low > tolerated or (name == "exponent" and is_cut_off):
            doubts.append(f"{name} is not determined ({value:.3g}, interval {low:.3g} to {high:.3g}): needs {cure}")
    return tuple(doubts)
