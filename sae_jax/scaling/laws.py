"""The laws that the table of a sweep can identify, each fitted to the points that bear on it.

    compute        the lower frontier of all points in FLOP, at one k
    best_latents   the minima of iso-FLOP curves, where a wider and a narrower autoencoder are worse
    latents        the best over rates and seeds of each width, at one k: trained to convergence; where too few are,
                   after the largest number of tokens that all have; or after a given number of tokens a latent
    tokens         tokens until convergence of each width
    lr             minima of parabolas over ln lr, of widths that have at least three rates
    joint          as latents, of every width and k

A law that the points cannot identify is left out, with the reason among the warnings.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from sae_jax.errors import UsageError, UserError
from sae_jax.scaling import active, fit, frontier
from sae_jax.scaling.forms import FORMS, UnfitError
from sae_jax.scaling.table import Point

V = TypeVar("V")

N_MINIMA = 4  # of iso-FLOP curves, from which the law of compute can be fitted
N_RATES = 3  # that a width must have for its best one to be known
NEAR = 0.05  # relative distance up to which tokens are as many as were asked for
LINEAR = 0.02  # relative error up to which FLOP of a token are taken to be linear in n and k


@dataclass(frozen=True, eq=False)
class Fitted:
    """A law, the points it was fitted to and how they were chosen."""

    law: fit.Law
    x: tuple[np.ndarray, ...]  # f64[N] each
    y: np.ndarray  # f64[N]
    note: str = ""


@dataclass(frozen=True, eq=False)
class Study:
    """Everything that is fitted to a table."""

    variant: str
    site: str  # sources that are encoded; "" if the table does not say
    k: int | None
    d_model: int | None  # None if the table does not say
    data: str
    points: list[Point]  # of the variant
    at_k: list[Point]
    laws: dict[str, Fitted]
    budgets: list[frontier.Budget]
    rates: dict[int, tuple[np.ndarray, np.ndarray, frontier.Valley]]  # width -> rates, losses, their minimum
    active: list[active.Curve]  # signs of mixed features over k
    flops_per_token: dict[str, float]
    lr_of_points: dict[str, float]  # coefficient * n^exponent through the rate of each width's best point
    warnings: list[str] = field(default_factory=list)

    @property
    def widest(self) -> int:
        """The largest width of any point."""
        return max(point.n_latents for point in self.points)

    def to_json(self) -> dict[str, Any]:
        """fit.json, apart from the draws."""
        laws: dict[str, Any] = {name: self._law(name) for name in ("joint", "compute", "latents", "tokens", "lr")}
        if laws["compute"]:
            laws["compute"]["best_latents"] = self._law("best_latents")
        return {
            "variant": self.variant,
            "site": self.site,
            "k": self.k,
            "d_model": self.d_model,
            "data": self.data,
            "widest": self.widest,
            "n_points": len(self.points),
            "n_points_at_k": len(self.at_k),
            **laws,
            "flops_per_token": self.flops_per_token,
            "lr_of_points": self.lr_of_points,
            "active": [curve.to_json() for curve in self.active],
            "warnings": self.warnings,
        }

    def draws(self) -> dict[str, list[list[float]]]:
        """The bootstrap draws of each law that is predicted by."""
        return {name: np.round(fitted.law.draws, 9).tolist() for name, fitted in self.laws.items()}

    def _law(self, name: str) -> dict[str, Any] | None:
        if (fitted := self.laws.get(name)) is None:
            return None
        return {**fitted.law.to_json(), "note": fitted.note}


def study(
    points: Sequence[Point],
    variant: str | None = None,
    site: str | None = None,
    k: int | None = None,
    tokens_per_latent: float | None = None,
    leave_out: int | None = None,
) -> Study:
    """Fit every law that the points can identify. None = the variant, then the site, then the k, with most points.

    With `tokens_per_latent` the laws of width, and of width and k, are of points that learned from so many tokens a
    latent. `leave_out` of the smallest budgets and widths do not count for the laws of compute and latents; None = as
    many as are off the law of the others, by a test.

    Raises UsageError if no point has these, UserError if such points are of different activation sets.
    """
    variant, site, points = _comparable(points, variant, site)
    k = _choose("k", [point.k for point in points], k)
    at_k = [point for point in points if point.k == k]
    laws, warnings = {}, []

    def attempt(name: str, make: Callable[[], Fitted]) -> None:
        try:
            laws[name] = make()
        except UnfitError as reason:
            warnings.append(f"{name}: left out: {reason}")
        else:
            fitted = laws[name]
            warnings.extend(f"{name}: {doubt}" for doubt in fitted.law.warnings)

    rates, rate_note = _rates(at_k, warnings)
    best, smooth_N = _believed(at_k, warnings)
    n_N, flops_N = _columns(best, "n_latents", "flops")
    budgets = frontier.budgets(n_N, flops_N, smooth_N)
    attempt("compute", lambda: _compute(best, smooth_N, budgets, leave_out, warnings))
    attempt("best_latents", lambda: _best_latents(budgets))
    attempt("latents", lambda: _latents(at_k, tokens_per_latent, leave_out, warnings))
    attempt("tokens", lambda: _tokens(at_k))
    attempt("lr", lambda: _lr(rates, rate_note))
    if k is None:
        warnings.append(f"joint: left out: {variant} has no k")
    else:
        attempt("joint", lambda: _joint(points, tokens_per_latent))
    first = points[0]
    return Study(
        variant,
        site,
        k,
        first.d_model,
        first.data,
        points,
        at_k,
        laws,
        budgets,
        rates,
        active.curves(points),
        _flops_per_token(points, warnings),
        _lr_of_points(at_k),
        warnings,
    )


def _comparable(points: Sequence[Point], variant: str | None, site: str | None) -> tuple[str, str, list[Point]]:
    variant = _choose("variant", [point.variant for point in points], variant)
    points = [point for point in points if point.variant == variant]
    site = _choose("site", [_site(point) for point in points], site)
    points = [point for point in points if _site(point) == site]
    for name in ("data", "d_model"):
        if len(values := {getattr(point, name) for point in points}) > 1:
            several = " and ".join(sorted(map(str, values)))
            raise UserError(f"{variant} has points of {name} {several}: errors compare on one set; fit them apart")
    return variant, site, points


def _site(point: Point) -> str:
    return "+".join(point.config.get("sites", {}).get("x", ()))


def _choose(name: str, present: Sequence[V], asked: V | None) -> V:
    if asked is None:
        counts = Counter(present)
        return min(counts, key=lambda value: (-counts[value], str(value)))
    if asked not in present:
        there = ", ".join(sorted({str(value) for value in present}, key=lambda text: (len(text), text)))
        raise UsageError(f"--{name}={asked}: no point has it; the table has {there}")
    return asked


def _columns(points: Iterable[Point], *names: str) -> tuple[np.ndarray, ...]:
    rows = [[getattr(point, name) for name in names] for point in points]
    return tuple(np.array(rows, np.float64).reshape(-1, len(names)).T)


def _by(points: Iterable[Point], *names: str) -> dict[tuple, list[Point]]:
    groups = defaultdict(list)
    for point in points:
        groups[tuple(getattr(point, name) for name in names)].append(point)
    return dict(sorted(groups.items()))


def _believed(at_k: list[Point], warnings: list[str]) -> tuple[list[Point], np.ndarray]:
    """The best point of each width and mark over rates and seeds, and its error f64[N] by a smooth surface over all.

    A point far off that surface does not count, and the next best takes its place: of many points the luckiest would
    lead the frontier.
    """
    points = list(at_k)
    while True:
        best = [min(group, key=lambda point: point.fvu) for group in _by(points, "n_latents", "tokens").values()]
        smooth_N, is_believed_N = frontier.smooth(*_columns(best, "n_latents", "tokens", "fvu"))
        for point, smooth, is_believed in zip(best, smooth_N, is_believed_N, strict=True):
            if not is_believed:
                points.remove(point)
                warnings.append(
                    f"compute: {point.name} at {point.tokens:,} tokens is {point.fvu / smooth - 1:+.0%} off a smooth "
                    f"surface through all points and does not count"
                )
        if is_believed_N.all():
            return best, smooth_N


def _decaying(name: str, x_N: np.ndarray, loss_N: np.ndarray, leave_out: int | None, warnings: list[str]) -> Fitted:
    """The law of points without the smallest x, as many as asked, or as are off it."""
    values = np.unique(x_N)
    n_off = fit.n_smallest_off(x_N, loss_N)
    n_out = n_off if leave_out is None else leave_out
    if n_out >= len(values):
        raise UnfitError(f"--leave-out={n_out} leaves nothing of {len(values)} {name}")
    if n_off > n_out:
        warnings.append(
            f"{name}: {_smallest(values, n_off)} off the law of the larger ones; --leave-out={n_off} is due"
        )
    elif n_out:
        why = "are off the law of the larger ones and" if leave_out is None else "were to be left out and"
        warnings.append(f"{name}: {_smallest(values, n_out, why)} do not count")
    keep_N = x_N >= values[n_out]
    return Fitted(fit.decay_constant(x_N[keep_N], loss_N[keep_N]), (x_N[keep_N],), loss_N[keep_N])


def _smallest(values: np.ndarray, n: int, what: str = "are") -> str:
    return f"the smallest {n} ({', '.join(f'{value:.3g}' for value in values[:n])}) {what}"


def _compute(
    best: list[Point],
    smooth_N: np.ndarray,
    budgets: list[frontier.Budget],
    leave_out: int | None,
    warnings: list[str],
) -> Fitted:
    """Of the minima of iso-FLOP curves; where these are few, of points on the frontier, which lie a little higher."""
    n_N, flops_N, fvu_N = _columns(best, "n_latents", "flops", "fvu")
    on = frontier.frontier(flops_N, smooth_N)  # not by luck
    inner = [budget for budget in budgets if not budget.best.at_edge]
    if len(inner) >= N_MINIMA:
        flops_N, fvu_N = (np.array(each) for each in zip(*((b.flops, b.best.loss) for b in inner), strict=True))
        fitted = _decaying("compute", flops_N, fvu_N, leave_out, warnings)
        note = f"{len(fitted.y)} budgets, at the minima of their iso-FLOP curves"
    else:
        fitted = _decaying("compute", flops_N[on], fvu_N[on], leave_out, warnings)
        note = f"{len(fitted.y)} budgets on the frontier of {len(best)} points"
    if widest := int((n_N[on] == n_N.max()).sum()):
        warnings.append(
            f"compute: {widest} of {len(on)} budgets are best spent on the largest width, {int(n_N.max())}: wider "
            f"autoencoders may do better there"
        )
    return dataclasses.replace(fitted, note=note)


def _best_latents(budgets: list[frontier.Budget]) -> Fitted:
    inner = [budget for budget in budgets if not budget.best.at_edge]
    if len(inner) < 2:
        raise UnfitError(
            f"{len(inner)} of {len(budgets)} budgets have their best width between two others, and 2 are needed; add "
            f"widths beyond the best ones, and token marks at which they cost the same"
        )
    flops_N = np.array([budget.flops for budget in inner])
    best_N = np.array([budget.best.x for budget in inner])
    note = f"{len(inner)} of {len(budgets)} budgets, whose best width lies between two others"
    return Fitted(fit.growth(flops_N, best_N), (flops_N,), best_N, note)


def _settled(
    points: list[Point], names: tuple[str, ...], enough: int, per_latent: float | None
) -> tuple[list[Point], str]:
    """The best point of each group over rates and seeds: at convergence, else at the most tokens that all have."""
    groups = _by(points, *names)
    if per_latent is not None:
        return _in_proportion(list(groups.values()), per_latent)
    done = {key: [point for point in group if point.converged] for key, group in groups.items()}
    if (n_done := sum(map(bool, done.values()))) >= enough:
        chosen, note = [group for group in done.values() if group], "trained to convergence"
        if n_done < len(groups):
            note += f"; {len(groups) - n_done} of {len(groups)} are not there yet and left out"
    else:
        shared = set.intersection(*({point.tokens for point in group} for group in groups.values()))
        if not shared:
            raise UnfitError(
                f"{n_done} of {len(groups)} are trained to convergence, and there are no tokens at which all were "
                f"measured"
            )
        chosen = [[point for point in group if point.tokens == max(shared)] for group in groups.values()]
        note = f"at {max(shared):,} tokens, the most that all have: {n_done} of {len(groups)} are converged"
    return [min(group, key=lambda point: point.fvu) for group in chosen], note


def _in_proportion(groups: list[list[Point]], per_latent: float) -> tuple[list[Point], str]:
    """The best point of each group among those nearest to so many tokens a latent."""

    def distance(point: Point) -> float:
        return abs(point.tokens / point.n_latents / per_latent - 1)

    near = [[point for point in group if distance(point) <= NEAR] for group in groups]
    best = [min(group, key=lambda point: (distance(point), point.fvu)) for group in near if group]
    note = f"at {per_latent:g} tokens a latent"
    if not best:
        raise UnfitError(f"no point is {note}, to {NEAR:.0%}")
    if len(best) < len(groups):
        note += f"; {len(groups) - len(best)} of {len(groups)} were not measured there and are left out"
    return best, note


def _latents(at_k: list[Point], per_latent: float | None, leave_out: int | None, warnings: list[str]) -> Fitted:
    best, note = _settled(at_k, ("n_latents",), FORMS["decay_constant"].distinct["x"], per_latent)
    n_N, fvu_N = _columns(best, "n_latents", "fvu")
    fitted = _decaying("latents", n_N, fvu_N, leave_out, warnings)
    return dataclasses.replace(fitted, note=f"{len(fitted.y)} widths {note}")


def _tokens(at_k: list[Point]) -> Fitted:
    done = _by([point for point in at_k if point.converged], "n_latents")
    best = [min(group, key=lambda point: point.fvu) for group in done.values()]
    if len(best) < 2:
        raise UnfitError(f"{len(best)} widths are trained to convergence, and 2 are needed")
    n_N, tokens_N = _columns(best, "n_latents", "tokens")
    # Convergence is seen at a mark, and was reached after the one before.
    before_N = np.array(
        [max((p.tokens for p in at_k if p.name == at.name and p.tokens < at.tokens), default=0) for at in best],
        np.float64,
    )
    note = f"{len(best)} widths trained to convergence, each between two marks"
    return Fitted(fit.growth(n_N, tokens_N, before_N), (n_N,), tokens_N, note)


def _joint(points: list[Point], per_latent: float | None) -> Fitted:
    best, note = _settled(points, ("n_latents", "k"), len(FORMS["joint"].coefficients) + 1, per_latent)
    n_N, k_N, fvu_N = _columns(best, "n_latents", "k", "fvu")
    return Fitted(fit.joint(n_N, k_N, fvu_N), (n_N, k_N), fvu_N, f"{len(best)} pairs of n and k {note}")


def _rates(
    at_k: list[Point], warnings: list[str]
) -> tuple[dict[int, tuple[np.ndarray, np.ndarray, frontier.Valley]], str]:
    """For each width with enough rates: the rates, their errors (means over seeds) at common tokens, the minimum."""
    widths = {n: _by(group, "lr") for (n,), group in _by(at_k, "n_latents").items()}
    widths = {n: rates for n, rates in widths.items() if len(rates) >= N_RATES}
    marks = [{point.tokens for point in group} for rates in widths.values() for group in rates.values()]
    shared = set.intersection(*marks) if marks else set()
    if not shared:
        return {}, ""
    searches = {}
    for n, rates in widths.items():
        errors = [np.mean([p.fvu for p in group if p.tokens == max(shared)]) for group in rates.values()]
        lr_N, fvu_N = np.array([lr for (lr,) in rates]), np.array(errors)
        searches[n] = (lr_N, fvu_N, frontier.valley(lr_N, fvu_N))
        if searches[n][2].at_edge:
            warnings.append(
                f"lr: the best rate at n_latents={n} is the {'smallest' if fvu_N.argmin() == 0 else 'largest'} of the "
                f"grid, {lr_N[fvu_N.argmin()]:.3g}, so it is left out; add rates beyond"
            )
    return searches, f"at {max(shared):,} tokens"


def _lr(rates: dict[int, tuple[np.ndarray, np.ndarray, frontier.Valley]], note: str) -> Fitted:
    inner = {n: best for n, (_, _, best) in rates.items() if not best.at_edge}
    if len(inner) < 2:
        raise UnfitError(
            f"{len(inner)} widths have their best rate between two others, and 2 are needed, each with at least "
            f"{N_RATES} rates at the same tokens"
        )
    n_N = np.array(list(inner), np.float64)
    lr_N = np.array([best.x for best in inner.values()])
    return Fitted(fit.growth(n_N, lr_N), (n_N,), lr_N, f"{len(inner)} widths {note}")


def _flops_per_token(points: list[Point], warnings: list[str]) -> dict[str, float]:
    """FLOP of a token as per_latent * n + per_active * k, by least squares of relative errors."""
    rows = np.array([[point.n_latents, point.k or 0] for point in points], np.float64)
    cost_N = np.array([point.flops / point.tokens for point in points])
    costs = np.linalg.lstsq(rows / cost_N[:, None], np.ones(len(points)))[0]
    if (error := float(np.abs(rows @ costs / cost_N - 1).max())) > LINEAR:
        warnings.append(f"flops_per_token: off by up to {error:.0%} from per_latent * n + per_active * k")
    return {"per_latent": float(costs[0]), "per_active": float(costs[1])}


def _lr_of_points(at_k: list[Point]) -> dict[str, float]:
    """The rates that the points were trained at, for advice where no rate was searched; they need not be the best."""
    best = [min(group, key=lambda point: point.fvu) for group in _by(at_k, "n_latents").values()]
    n_N, lr_N = np.log(_columns(best, "n_latents", "lr"))
    exponent, shift = np.polyfit(n_N, lr_N, 1) if len(best) > 1 else (0.0, lr_N[0])
    return {"coefficient": float(np.exp(shift)), "exponent": float(exponent)}
