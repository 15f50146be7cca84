"""Figures without `pyplot`: that would choose a back end for the whole process, a notebook's included."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_jax import storage

if TYPE_CHECKING:  # importing it takes half a second
    from matplotlib.figure import Figure


def new(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    storage.write_bytes(path, data.getvalue())


def label_logarithmic(axis: Any) -> None:
    """Plain numbers on a logarithmic axis (`axes.xaxis` or `yaxis`), enough of them to read values off.

    By default only powers of ten have labels: where an axis shows less than two, that is one number or none.
    """
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    if decades > 2.5:
        axis.set_minor_formatter(ticker.NullFormatter())
        return
    if decades < 0.5:
        axis.set_major_locator(ticker.MaxNLocator(6))
    else:
        axis.set_major_locator(
            ticker.LogLocator(subs=(1.0, 2.0, 5.0) if decades > 1 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
        )
    axis.set_major_formatter("{x:.4g}")
    axis.set_minor_locator(ticker.NullLocator())
