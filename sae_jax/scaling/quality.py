"""How any metric of evaluation goes with the width, the active latents and the compute of a sweep's dictionaries.

    metric = a + b_n log2 n + b_k log2 k        what a doubling of latents, and of active latents, changes
    metric = a + b_C log2 FLOP                  what a doubling of training compute changes, along this sweep

Least squares, intervals of 90 % by Student's t: dictionaries are taken to vary independently about the plane, by as
much everywhere. They say which way a metric goes and how fast in the range of the sweep, and nothing beyond it. FVU has
laws of its own (laws.py).

`sae-jax evaluate SWEEPDIR` measures the members as their training left them. numpy and scipy alone, float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats

from sae_jax import figures, storage
from sae_jax.errors import UsageError
from sae_jax.scaling import table
from sae_jax.scaling.fit import LEVEL
from sae_jax.scaling.table import Point
from sae_jax.storage import AnyPath, StrPath

COLUMNS = 3  # of panels side by side
MIN_DICTIONARIES = 4
ROUNDING = 1e-6  # of a metric, relative: below it, it does not vary


@dataclass(frozen=True)
class Measured:
    """A member of a sweep at the end of its training, and what was measured of it."""

    point: Point
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Slope:
    """What a doubling changes."""

    value: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Trend:
    """How a metric goes with the sizes of dictionaries; slopes of what does not vary in the sweep are left out."""

    metric: str
    n_dictionaries: int
    slopes: Mapping[str, Slope]  # "latents", "k", "compute"
    r2: float | None  # of the plane over latents and k


def read(folder: StrPath, members: Mapping[str, AnyPath]) -> tuple[list[Measured], list[str]]:
    """(members at their last point with all their numbers, members that are not measured yet).

    Args:
        folder: of the sweep.
        members: {name: folder of its run}.
    """
    last = {point.name: point for point in table.read(folder)}  # sorted by tokens
    measured, missing = [], []
    for name, point in last.items():
        path = members[name] / "evaluation.json" if name in members else None
        content = None if path is None else storage.read_json(path)
        if content is None:
            missing.append(name)
            continue
        document = storage.unsealed(content, str(path))
        measured.append(Measured(point, {key: float(value) for key, value in document.items() if _is_number(value)}))
    return measured, missing


def trends(measured: Sequence[Measured], metrics: Sequence[str]) -> list[Trend]:
    """The trend of each metric.

    Raises UsageError for a metric that fewer than MIN_DICTIONARIES members have, naming those that can be had.
    """
    counts = {name: sum(name in one.metrics for one in measured) for one in measured for name in one.metrics}
    known = sorted(name for name, count in counts.items() if count >= MIN_DICTIONARIES)
    found = []
    for metric in metrics:
        if metric not in known:
            raise UsageError(
                f"metric {metric!r} was measured of {counts.get(metric, 0)} members, and a trend needs "
                f"{MIN_DICTIONARIES}; choose {', '.join(known) or 'none: run sae-jax evaluate on the sweep first'}"
            )
        found.append(_trend(metric, [one for one in measured if metric in one.metrics]))
    return found


def _trend(metric: str, measured: Sequence[Measured]) -> Trend:
    y_N = np.array([one.metrics[metric] for one in measured])
    columns = {
        "latents": np.log2([one.point.n_latents for one in measured]),
        "k": np.log2([one.point.k or math.nan for one in measured]),
    }
    sizes = {name: x_N for name, x_N in columns.items() if np.isfinite(x_N).all() and np.ptp(x_N) > 0}
    slopes, r2 = _least_squares(sizes, y_N)
    flops_N = np.log2([one.point.flops for one in measured])
    if np.ptp(flops_N) > 0:
        slopes |= _least_squares({"compute": flops_N}, y_N)[0]
    return Trend(metric, len(y_N), slopes, r2)


def _least_squares(columns: Mapping[str, np.ndarray], y_N: np.ndarray) -> tuple[dict[str, Slope], float | None]:
    x_NP = np.stack([np.ones_like(y_N), *columns.values()], 1)
    n, p = x_NP.shape
    if p == 1 or n <= p or np.linalg.matrix_rank(x_NP) < p:
        return {}, None
    theta_P, *_ = np.linalg.lstsq(x_NP, y_N, rcond=None)
    residual_N = y_N - x_NP @ theta_P
    variance_P = np.diag(np.linalg.inv(x_NP.T @ x_NP)) * (residual_N @ residual_N) / (n - p)
    half_P = scipy.stats.t.ppf(0.5 + LEVEL / 2, n - p) * np.sqrt(variance_P)
    slopes = {
        name: Slope(float(value), (float(value - half), float(value + half)))
        for name, value, half in zip(columns, theta_P[1:], half_P[1:], strict=True)
    }
    spread = float(((y_N - y_N.mean()) ** 2).sum())
    varies = spread > n * (ROUNDING * np.abs(y_N).max()) ** 2
    return slopes, 1 - float(residual_N @ residual_N) / spread if varies else None


def draw(measured: Sequence[Measured], found: Sequence[Trend], path: AnyPath) -> None:
    """A panel for each metric against latents, a line for each k; as a PNG."""
    rows = -(-len(found) // COLUMNS)
    figure = figures.new(4.0 * COLUMNS, 3.0 * rows)
    panels = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    for axes, trend in zip(panels, found, strict=False):
        paint(axes, measured, trend)
        axes.set_xlabel("latents", fontsize=8)
        axes.set_title(trend.metric, fontsize=9)
        axes.tick_params(labelsize=8)
    if any(one.point.k for one in measured):
        panels[0].legend(fontsize=7)
    figure.suptitle("How does each metric go with the width of the dictionary and its active latents?", fontsize=10)
    figures.save(figure, path)


def paint(axes: Any, measured: Sequence[Measured], trend: Trend) -> None:
    """A metric against latents, with a line through the means of each k."""
    every_k = sorted({one.point.k or 0 for one in measured})
    for place, k in enumerate(every_k):
        here = [one for one in measured if (one.point.k or 0) == k and trend.metric in one.metrics]
        widths = sorted({one.point.n_latents for one in here})
        means = [np.mean([o.metrics[trend.metric] for o in here if o.point.n_latents == n]) for n in widths]
        points = [(one.point.n_latents, one.metrics[trend.metric]) for one in here]
        axes.plot(*zip(*points, strict=True), ".", color=f"C{place}", markersize=4) if points else None
        axes.plot(widths, means, color=f"C{place}", linewidth=1.2, label=f"k={k}" if k else None)
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)


def rows(found: Sequence[Trend]) -> list[tuple[str, ...]]:
    """(metric, dictionaries, change a doubling of latents, of k, of compute, R^2) of each trend, as text."""

    def cell(slope: Slope | None) -> str:
        return "" if slope is None else f"{slope.value:+.4f} [{slope.interval[0]:+.4f}, {slope.interval[1]:+.4f}]"

    return [
        (
            trend.metric,
            str(trend.n_dictionaries),
            *(cell(trend.slopes.get(name)) for name in ("latents", "k", "compute")),
            "" if trend.r2 is None else f"{trend.r2:.2f}",
        )
        for trend in found
    ]


HEADER = ("metric", "dictionaries", "a doubling of latents", "of k", "of compute", "R^2")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
