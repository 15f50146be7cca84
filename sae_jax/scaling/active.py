"""At which k the decoder rows of a width are least alike: guidance on how many latents should be active.

Too few make rows share what correlated features have in common, and so do too many. The mean |cos| of pairs
(ops/mixing.py, after Chanin and Garriga-Alonso 2025, arXiv 2508.16560 v3, section 3.5) is least in between, where
features are nearly orthogonal; where there are more of them than dimensions it may fall without an end
(experiments/true_l0.py). It is flat near the least, so what a few k say is an interval.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sae_jax.scaling.table import Point

N_K = 3  # at least, for a curve
FLAT = 0.05  # of the way from the least to the most: no difference


@dataclass(frozen=True, eq=False)
class Curve:
    """One width at each k that it has been trained at, after the same number of tokens."""

    n_latents: int
    tokens: int
    k: np.ndarray  # i64[N], rising
    cosine: np.ndarray  # f64[N], mean |cos| of decoder rows

    @property
    def best(self) -> int:
        """The k tried at which the cosine is least."""
        return int(self.k[self.cosine.argmin()])

    @property
    def within(self) -> tuple[int | None, int | None]:
        """The nearest k on either side that are worse than the best; None where there is none: it may lie beyond."""
        least, most, at = self.cosine.min(), self.cosine.max(), self.cosine.argmin()
        (worse,) = np.nonzero(self.cosine > least + FLAT * (most - least))
        low, high = self.k[worse[worse < at]], self.k[worse[worse > at]]
        return int(low[-1]) if len(low) else None, int(high[0]) if len(high) else None

    def to_json(self) -> dict[str, Any]:
        """For fit.json."""
        return {"n_latents": self.n_latents, "best": self.best, "within": self.within, "tokens": self.tokens}


def curves(points: Sequence[Point]) -> list[Curve]:
    """A curve for each width that was trained at three k or more, after the most tokens that all of these have.

    Of several rates the one of least error counts; seeds are averaged. Points without the number do not count.
    """
    widths: dict[int, dict[int, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        if point.k is not None and point.decoder_cosine is not None:
            widths[point.n_latents][point.k].append(point)
    found = []
    for n, by_k in sorted(widths.items()):
        shared = set.intersection(*({point.tokens for point in group} for group in by_k.values()))
        if len(by_k) >= N_K and shared:
            tokens, ks = max(shared), sorted(by_k)
            cosine_N = [_mean([point for point in by_k[k] if point.tokens == tokens]) for k in ks]
            found.append(Curve(n, tokens, np.array(ks), np.array(cosine_N)))
    return found


def _mean(points: list[Point]) -> float:
    lr = min(points, key=lambda point: point.fvu).lr
    return float(np.mean(np.array([point.decoder_cosine for point in points if point.lr == lr], np.float64)))
