"""Which points of a sweep are best for what they cost: the frontier, iso-FLOP curves, and minima of curves.

numpy alone, float64. Axes: N points, W widths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SPACING = 1.5  # two budgets differ by at least this factor, since nearer ones repeat each other
ALIGNED = 1.05  # points whose costs differ by less than this factor belong to one budget
LUCKY = 6.0  # times the scatter about its neighbours, beyond which a point is not believed
NEAREST = 10  # points that one is compared with, itself among them
N_ROUNDS = 4  # of fits that weigh down what is far off


def smooth(n_N: np.ndarray, tokens_N: np.ndarray, loss_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(losses f64[N] as the points around have them, whether each is believed bool[N]).

    Local regression (Cleveland 1979, J. Am. Stat. Assoc. 74, 829): about each point, ln loss is of the second degree in
    ln n and ln tokens, or in tokens alone where there is one width. Where points are too few, all are believed and stay
    as they are.
    """
    steps = [_in_steps(np.log(each)) for each in (n_N, tokens_N)]
    log_N, (u_N, v_N) = np.log(loss_N), steps
    powers = [(i, j) for i in range(3) for j in range(3 - i) if i == 0 or np.ptp(u_N)]
    if len(log_N) < NEAREST:
        return loss_N, np.ones(len(log_N), bool)
    near_NK = np.argsort((u_N[:, None] - u_N) ** 2 + (v_N[:, None] - v_N) ** 2, axis=1, kind="stable")[:, :NEAREST]
    du_NK, dv_NK = (each[near_NK] - each[:, None] for each in steps)
    away_NK = np.hypot(du_NK, dv_NK)
    tricube_NK = (1 - np.minimum(away_NK / (1.05 * away_NK.max(1, keepdims=True) + 1e-12), 1) ** 3) ** 3
    design_NKP = np.stack([du_NK**i * dv_NK**j for i, j in powers], -1)
    surface_N, off_N, trust_N = log_N, np.zeros_like(log_N), np.ones_like(log_N)
    for _ in range(N_ROUNDS):
        weight_NK = tricube_NK * trust_N[near_NK]
        square_NPP = np.einsum("nk,nkp,nkq->npq", weight_NK, design_NKP, design_NKP)
        right_NP = np.einsum("nk,nkp,nk->np", weight_NK, design_NKP, log_N[near_NK])
        inverse_NPP = np.linalg.pinv(square_NPP, rcond=1e-9, hermitian=True)
        surface_N = np.einsum("np,np->n", inverse_NPP[:, 0], right_NP)
        # Each as noisy as any other.
        own_N = np.minimum(inverse_NPP[:, 0, 0] * weight_NK[:, 0], 0.99)
        off_N = (log_N - surface_N) / np.sqrt(1 - own_N)
        size = 1.4826 * float(np.median(np.abs(off_N))) + 1e-12
        trust_N = np.maximum(1 - (off_N / (LUCKY * size)) ** 2, 0.0) ** 2
    return np.exp(surface_N), trust_N > 0


def _in_steps(log_N: np.ndarray) -> np.ndarray:
    """So that values next to each other are one apart, in the median."""
    values = np.unique(log_N)
    return log_N / float(np.median(np.diff(values))) if len(values) > 1 else log_N


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
