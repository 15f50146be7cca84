"""The least squares of a law, and where draws of its coefficients begin.

numpy and scipy alone, float64. Axes: N points, P coefficients, M draws, W walkers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy

from sae_jax.scaling import chance
from sae_jax.scaling.forms import LARGEST, Form, UnfitError

ROUGH = 1e-8  # relative tolerance for starts: a tighter one takes long where a law is barely determined
EXACT = 1e-10  # noise that comes from rounding
SHARES = (1e-3, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)  # of y, at most, of a second term
SLOPES = (-1.5, -1.0, -0.7, -0.5, -0.4, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.4, 0.7)  # of a second term
N_STARTS = 8  # the best of these
N_REWEIGHTED = 30  # fits, before the points that are far off no longer count
FAR_OFF = 6.0  # times the noise
ABOVE = 1.2  # times the least y, a constant at most
STEEPEST = 5.0  # slope of a second term near which walkers begin
SINGULAR = 1e-12  # share of a matrix's scale below which its eigenvalues are rounding
LEAST = 0.02  # share of y that is left to the first term where the second takes all


@dataclass(frozen=True, eq=False)
class Solved:
    """Least squares of the points of a law."""

    form: Form
    terms: tuple[np.ndarray, ...]  # designs
    log_y: np.ndarray  # f64[N]
    theta: np.ndarray  # f64[P]
    weight: np.ndarray  # f64[N], 0 or 1: whether a point counts

    @classmethod
    def of(cls, form: Form, y_N: np.ndarray, x: tuple[np.ndarray, ...]) -> Solved:
        """The best of several starts; raises UnfitError."""
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
        starts = [_flat_of(flat, terms, theta_P) for theta_P in _starts(terms, log_y_N)]
        rough = [_least_squares(flat, log_y_N, start_P, ROUGH) for start_P in starts]
        best_P = min(rough, key=lambda solution: solution[1])[0]
        all_N = np.ones_like(log_y_N)
        if len(y_N) < 2 * len(best_P) + 2:
            return cls(form, terms, log_y_N, back(_least_squares(flat, log_y_N, best_P)[0]), all_N)
        near_P, counts_N = _without_the_far(flat, log_y_N, best_P)
        return cls(form, terms, log_y_N, back(_least_squares(flat, log_y_N, near_P, weight_N=counts_N)[0]), counts_N)

    @property
    def off(self) -> np.ndarray:
        """f64[N] by which ln y lies above the law."""
        return self.log_y - log_sum(self.terms, self.theta)

    @property
    def size(self) -> float:
        """Of the noise of points that count."""
        off_N = self.off * self.weight
        return float(off_N @ off_N / max(self.weight.sum() - len(self.theta), 1)) ** 0.5

    def _exact(self) -> np.ndarray:
        """theta f64[P] of points without noise, with a constant that rounding has left as nought."""
        theta_P, c = self.theta.copy(), self.form.constant
        if c is not None and (self.terms[1] @ theta_P[c:] - self.log_y).max() < np.log(ROUGH):
            theta_P[c] = -LARGEST
        return theta_P

    def covariance(self) -> np.ndarray:
        """f64[P, P] of theta, of the first order."""
        slopes_NP = jacobian(self.terms, self.theta) * self.weight[:, None]
        return np.linalg.pinv(slopes_NP.T @ slopes_NP) * self.size**2

    def reweighted(self, weight_N: np.ndarray, has_constant: bool, draws_MP: np.ndarray) -> np.ndarray:
        """theta f64[P] of the points with these weights, the constant nought if there is none.

        The best of the draws where points determine so little that coefficients of order one would run away.
        """
        theta_P = self._least(weight_N, has_constant)
        if np.abs(theta_P[[*self.form.order_one]]).max() <= STEEPEST:
            return theta_P
        off_MN = np.array([log_sum(self.terms, draw_P) for draw_P in draws_MP]) - self.log_y
        return draws_MP[np.argmin((off_MN**2 * weight_N).sum(1))]

    def _least(self, weight_N: np.ndarray, has_constant: bool) -> np.ndarray:
        flat, back = _orthonormal(self.terms if has_constant else self.terms[:1])
        if has_constant:
            start_P = _flat_of(flat, self.terms, self.theta)
            return back(_least_squares(flat, self.log_y, start_P, weight_N=weight_N)[0])
        start_P = np.linalg.lstsq(flat[0], self.log_y)[0]
        part_P = back(_least_squares(flat, self.log_y, start_P, weight_N=weight_N)[0])
        return np.concatenate([part_P, [-LARGEST], np.zeros(len(self.theta) - len(part_P) - 1)])

    def draws(self, x_N: np.ndarray, seen_before_N: np.ndarray | None, m: int) -> tuple[np.ndarray, chance.Noise]:
        """(theta f64[M, P], noise); none where points are no more than coefficients."""
        n, p = len(self.log_y), len(self.theta)
        if n <= p:
            return np.zeros((0, p)), chance.Noise(0.0, np.zeros(n))
        if self.size < EXACT and seen_before_N is None:
            return np.tile(self._exact(), (m, 1)), chance.Noise(0.0, (np.abs(self.off) > ROUGH).astype(np.float64))
        low_N = self.log_y
        if seen_before_N is not None:
            low_N = np.where(seen_before_N > 0, np.log(np.maximum(seen_before_N, chance.TINY)), chance.ALONE)
        points = chance.Points(self.log_y, low_N, chance.position(x_N))
        rng = np.random.default_rng(0)
        if len(self.terms) == 1:
            first = self.terms[0]
            return chance.draws(
                lambda theta_WP: theta_WP @ first.T,
                lambda theta_WP: -0.5 * (theta_WP[:, self.form.order_one] ** 2).sum(1),
                points,
                *chance.around(self.theta, self.covariance(), rng),
                self.off,
                m,
                rng,
            )
        return _TwoTerms(self).draws(points, m, rng)


class _TwoTerms:
    """Draws of a law whose second term may be nought.

    Walkers move in the coefficients of the first term, the second term at the middle of the points, which counts as
    nought below 0, and its slopes.
    """

    def __init__(self, solved: Solved) -> None:
        self._solved, self._steep = solved, list(solved.form.order_one)
        self._first, last = solved.terms
        self._c = self._first.shape[1]
        self._middle = last[:, 1:].mean(0)
        self._around = last[:, 1:] - self._middle
        slopes_P = np.clip(solved.theta[self._c + 1 :], -STEEPEST, STEEPEST)
        under_N = (solved.log_y - self._around @ slopes_P)[solved.weight > 0]
        self._most = ABOVE * float(np.exp(under_N.min()))  # of the constant, so that no point lies far below it

    def draws(self, points: chance.Points, m: int, rng: np.random.Generator) -> tuple[np.ndarray, chance.Noise]:
        """(theta f64[M, P], noise)."""
        began = self._began(rng)
        drawn_MP, noise = chance.draws(self._log_f, self._log_prior, points, *began, self._solved.off, m, rng)
        c = self._c
        with np.errstate(divide="ignore"):
            at_1_M = np.log(np.maximum(drawn_MP[:, c], 0.0)) - drawn_MP[:, c + 1 :] @ self._middle
        drawn_MP[:, c] = np.maximum(at_1_M, -LARGEST)
        return drawn_MP, noise

    def _log_f(self, q_WP: np.ndarray) -> np.ndarray:
        c = self._c
        with np.errstate(divide="ignore"):
            constant_W = np.log(np.maximum(q_WP[:, c], 0.0))
        return np.logaddexp(q_WP[:, :c] @ self._first.T, constant_W[:, None] + q_WP[:, c + 1 :] @ self._around.T)

    def _log_prior(self, q_WP: np.ndarray) -> np.ndarray:
        is_there_W = np.abs(q_WP[:, self._c]) <= self._most
        return np.where(is_there_W, -0.5 * (q_WP[:, self._steep] ** 2).sum(1), -np.inf)

    def _began(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Places to begin at f64[W, P] and ln of their density: half of them near the fit, half with any constant."""
        solved, c, w, most = self._solved, self._c, chance.N_BEGUN, self._most
        slopes_P = np.clip(solved.theta[c + 1 :], -STEEPEST, STEEPEST)
        constant = np.exp(min(self._middle @ slopes_P + solved.theta[c], np.log(most)))
        near_P, root_PP = np.array([constant, *slopes_P]), self._root_near(constant, slopes_P)
        z_WP = rng.standard_normal((w, len(near_P)))
        last_WP = near_P + z_WP @ root_PP.T
        any_W = rng.random(w) < 0.5
        last_WP[any_W, 0] = rng.uniform(-most, most, any_W.sum())
        last_WP[any_W, 1:] = rng.standard_normal((any_W.sum(), len(slopes_P)))
        z_WP = (last_WP - near_P) @ np.linalg.pinv(root_PP).T
        near_W = -0.5 * (z_WP**2).sum(1) - np.linalg.slogdet(root_PP)[1] - 0.5 * np.log(2 * np.pi)
        of_any_W = -0.5 * (last_WP[:, 1:] ** 2).sum(1) - np.log(2 * most)
        log_density_W = np.logaddexp(near_W, of_any_W)
        # The first term by least squares of what the second leaves.
        y_N, weight_N = np.exp(solved.log_y), solved.weight
        q_NP, r_PP = np.linalg.qr(self._first)
        second_WN = np.maximum(last_WP[:, :1], 0.0) * np.exp(np.minimum(last_WP[:, 1:] @ self._around.T, LARGEST / 2))
        rest_WN = np.maximum(y_N - second_WN, LEAST * y_N)
        weight_WN = weight_N * (rest_WN / y_N) ** 2
        root_WPP, log_det_W = _root_of_inverse(np.einsum("wn,np,nq->wpq", weight_WN, q_NP, q_NP))
        right_WP = np.einsum("wn,np,wn->wp", weight_WN, q_NP, np.log(rest_WN))
        first_WP = np.einsum("wpr,wqr,wq->wp", root_WPP, root_WPP, right_WP)
        off_WN = (np.log(rest_WN) - first_WP @ q_NP.T) * np.sqrt(weight_WN)
        size_W = np.maximum(np.sqrt((off_WN**2).sum(1) / max(weight_N.sum() - c, 1)), solved.size)
        size_W = np.minimum(size_W, 3 * solved.size + chance.SMALLEST)
        z_WP = rng.standard_normal((w, c))
        first_WP = first_WP + size_W[:, None] * np.einsum("wpq,wq->wp", root_WPP, z_WP)
        log_density_W -= 0.5 * (z_WP**2).sum(1) + log_det_W + c * np.log(size_W)
        return np.concatenate([np.linalg.solve(r_PP, first_WP.T).T, last_WP], 1), log_density_W

    def _root_near(self, constant: float, slopes_P: np.ndarray) -> np.ndarray:
        """A root f64[P, P] of the covariance, near the fit, of the second term at the middle and its slopes."""
        solved, c = self._solved, self._c
        part_NP = jacobian(solved.terms, solved.theta)
        part_NP[:, c] = np.exp(self._around @ slopes_P - solved.log_y)
        part_NP[:, c + 1 :] = constant * part_NP[:, c : c + 1] * self._around
        part_NP[:, :c] = np.exp(self._first @ solved.theta[:c] - solved.log_y)[:, None] * np.linalg.qr(self._first)[0]
        part_NP = part_NP * solved.weight[:, None] / max(solved.size, chance.SMALLEST)
        information_PP = part_NP.T @ part_NP
        information_PP[c, c] += 3 / self._most**2
        information_PP[self._steep, self._steep] += 1
        root_PP, _ = _root_of_inverse(information_PP)
        return _root_of_inverse(np.linalg.pinv((root_PP @ root_PP.T)[c:, c:], hermitian=True))[0]


def _root_of_inverse(square_XPP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(R f64[..., P, P], ln det R), R R^T the inverse of a matrix that may be nearly singular."""
    scale_XP = 1 / np.sqrt(np.maximum(np.einsum("...pp->...p", square_XPP), chance.TINY))
    values_XP, vectors_XPP = np.linalg.eigh(square_XPP * scale_XP[..., :, None] * scale_XP[..., None, :])
    values_XP = np.maximum(values_XP, SINGULAR)
    root_XPP = scale_XP[..., :, None] * vectors_XPP / np.sqrt(values_XP)[..., None, :]
    return root_XPP, np.log(scale_XP).sum(-1) - 0.5 * np.log(values_XP).sum(-1)


def _starts(terms: tuple[np.ndarray, ...], log_y_N: np.ndarray) -> list[np.ndarray]:
    """Where to begin, theta f64[P] each: the best of a grid of second terms, first terms fitted to what these leave.

    Axis key, beside that of the file: G places of the grid.
    """
    if len(terms) == 1:
        return [np.linalg.lstsq(terms[0], log_y_N)[0]]
    first, last = terms
    middle, n_slopes = last[:, 1:].mean(0), last.shape[1] - 1
    shares, *slopes = np.meshgrid(SHARES, *[SLOPES] * n_slopes)
    slope_GP = np.stack([each.ravel() for each in slopes], 1) if slopes else np.zeros((shares.size, 0))
    shape_GN = slope_GP @ (last[:, 1:] - middle).T
    at_middle_G = (log_y_N - shape_GN).min(1) + np.log(shares.ravel())
    second_GN = at_middle_G[:, None] + shape_GN
    q_NP, r_PP = np.linalg.qr(first)
    first_GP = (np.log(-np.expm1(second_GN - log_y_N)) + log_y_N) @ q_NP
    off_GN = np.logaddexp(first_GP @ q_NP.T, second_GN) - log_y_N
    best = np.argsort((off_GN**2).sum(1), kind="stable")[:N_STARTS]
    at_1_G = at_middle_G - slope_GP @ middle
    return [np.array([*np.linalg.solve(r_PP, first_GP[g]), at_1_G[g], *slope_GP[g]]) for g in best]


def _least_squares(
    terms: tuple[np.ndarray, ...],
    log_y_N: np.ndarray,
    start_P: np.ndarray,
    tolerance: float = 1e-14,
    weight_N: np.ndarray | None = None,
) -> tuple[np.ndarray, float]:
    """(theta f64[P], half the sum of squares) of ln y, by Levenberg-Marquardt with the exact Jacobian."""
    root_N = np.ones_like(log_y_N) if weight_N is None else np.sqrt(weight_N)
    solution = scipy.optimize.least_squares(
        lambda theta_P: (log_sum(terms, theta_P) - log_y_N) * root_N,
        start_P,
        jac=lambda theta_P: jacobian(terms, theta_P) * root_N[:, None],  # pyrefly: ignore
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


def log_sum(terms: tuple[np.ndarray, ...], theta_P: np.ndarray) -> np.ndarray:
    """ln y by the law, f64[N]."""
    return np.logaddexp.reduce(_split(terms, theta_P))


def jacobian(terms: tuple[np.ndarray, ...], theta_P: np.ndarray) -> np.ndarray:
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


def _without_the_far(
    terms: tuple[np.ndarray, ...], log_y_N: np.ndarray, theta_P: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(theta f64[P], 1 for the points that it is near and 0 for others f64[N]), by the weights of Cauchy's density."""
    freedom = len(log_y_N) / (len(log_y_N) - len(theta_P))
    for _ in range(N_REWEIGHTED):
        off_N = np.abs(log_y_N - log_sum(terms, theta_P))
        size = 1.4826 * float(np.median(off_N)) * freedom**0.5
        if size < chance.SMALLEST:
            break
        before_P = theta_P
        theta_P = _least_squares(terms, log_y_N, theta_P, ROUGH, 1 / (1 + (off_N / (2.4 * size)) ** 2))[0]
        if np.abs(theta_P - before_P).max() < ROUGH:
            break
    off_N = np.abs(log_y_N - log_sum(terms, theta_P))
    limit = FAR_OFF * max(1.4826 * float(np.median(off_N)) * freedom**0.5, chance.SMALLEST)
    return theta_P, (off_N <= limit).astype(np.float64)


def _flat_of(flat: tuple[np.ndarray, ...], terms: tuple[np.ndarray, ...], theta_P: np.ndarray) -> np.ndarray:
    """theta in the orthonormal designs."""
    return np.concatenate([q.T @ part_N for q, part_N in zip(flat, _split(terms, theta_P), strict=True)])
