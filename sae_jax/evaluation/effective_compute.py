"""What share of its training compute a language model with the reconstruction put in is worth.

    L(C)               the model's loss after training compute C: a curve that its author states
    effective compute  C' / C_end with L(C') = L(C_end) + (ce_sae - ce_clean)

The loss that the reconstruction adds is what counts, so the curve may be of another text than the one measured on.
Between two points of the curve the loss is taken to be linear in ln C.

Source: Gao et al. 2024, arXiv 2406.04093, section 4.1.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable

import numpy as np

from sae_jax import storage
from sae_jax.evaluation.base import Metric
from sae_jax.storage import StrPath
from sae_jax.types import UsageError

Curve = tuple[np.ndarray, np.ndarray]  # f64[P] ln C ascending, f64[P] losses falling


def read_curve(path: StrPath) -> Curve:
    """A curve from a csv file with the columns compute and loss, in any order and unit of compute.

    UsageError if it is not one: two points at least, numbers above 0, losses that fall.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(storage.read_limited(path).decode("utf-8-sig"))))
        points = sorted((float(row["compute"]), float(row["loss"])) for row in rows)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; give a csv file with the columns compute and loss") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: not a csv file with numbers in the columns compute and loss ({error})") from None
    compute, loss = np.array(points, np.float64).reshape(-1, 2).T
    if len(points) < 2 or not (np.isfinite(points).all() and compute[0] > 0):
        raise UsageError(f"{path}: a curve needs two points or more, finite and of compute above 0")
    if not ((np.diff(compute) > 0).all() and (np.diff(loss) < 0).all()):
        raise UsageError(f"{path}: the loss has to fall from each point to the next of more compute; smooth the curve")
    return np.log(compute), loss


def share(curve: Curve, added: float) -> float:
    """C' / C_end where the loss is `added` above that at the end; NaN beyond the curve, 1 for a loss that is not added.

    Args:
        curve: from `read_curve`.
        added: nats a token.
    """
    ln_compute, loss = curve
    at = loss[-1] + max(added, 0.0)
    if not at <= loss[0]:
        return math.nan
    return float(np.exp(np.interp(-at, -loss, ln_compute) - ln_compute[-1]))


def of(metrics: Iterable[Metric], curve: Curve) -> list[Metric]:
    """The effective compute, if `metrics` has the loss that it needs; its interval is that of the loss."""
    added = next((metric for metric in metrics if metric.name == "ce_added"), None)
    if added is None:
        return []
    low, high = (
        (math.nan, math.nan) if added.interval is None else (share(curve, each) for each in added.interval[::-1])
    )
    interval = (low, high) if math.isfinite(low + high) else None
    return [Metric("effective_compute", share(curve, added.value), interval)]
