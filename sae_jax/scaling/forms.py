"""How the laws are written, and what points must be like to determine them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

LARGEST = 700.0  # ln of a coefficient; below -LARGEST it is nought


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
    order_one: tuple[int, ...] = ()  # coefficients that are Normal(0, 1) before the points are seen; others anything

    @property
    def constant(self) -> int | None:
        """Which coefficient is ln of the second term, that may be nought, at 1; None without one."""
        names = [name for name in ("constant", "zeta") if name in self.coefficients]
        return self.coefficients.index(names[0]) if names else None

    def natural(self, theta_P: np.ndarray) -> np.ndarray:
        """The coefficients as they are written: f64[..., P] of the exponents' linear forms -> f64[..., P]."""
        # Where points determine little, a draw at x = 1 may be beyond what a float holds.
        columns = [
            np.where(theta_P[..., i] <= -LARGEST, 0.0, np.exp(np.minimum(theta_P[..., i], LARGEST)))
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
        order_one=(5,),
    ),
    "decay": Form(
        ("x",), ("coefficient", "exponent"), lambda ln_x_N: (_falling(ln_x_N),), {"x": 2}, {"exponent": _EXPONENT}, (1,)
    ),
    "decay_constant": Form(
        ("x",),
        ("coefficient", "exponent", "constant"),
        lambda ln_x_N: (_falling(ln_x_N), np.ones((*ln_x_N.shape, 1))),
        {"x": 3},
        {"exponent": _EXPONENT, "constant": "larger values, where the error stops falling"},
        order_one=(1,),
    ),
    "growth": Form(
        ("x",), ("coefficient", "exponent"), lambda ln_x_N: (_rising(ln_x_N),), {"x": 2}, {"exponent": _EXPONENT}, (1,)
    ),
}
