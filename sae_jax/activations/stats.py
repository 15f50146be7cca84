"""Mean and spread of a stream of rows, in float64, from parts that can be joined in a fixed order.

The commit of a shard holds its count, sum and M2 (the sum of squared deviations from its mean), so the
statistics of a set of any size are a reduction of small records and need no pass over the data. Parts are
joined by the parallel formula of Chan, Golub and LeVeque (1979, "Updating formulae and a pairwise algorithm
for computing sample variances", eq. 2.1), which does not cancel as sum of squares minus squared sum does.
Joined in shard order, the result is the same bits on every host.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sae_jax.activations.rows import decode, width

BLOCK_ROWS = 1024  # float64 copy of a block stays in cache up to d of a few thousand


@dataclass(frozen=True, eq=False)
class Stats:
    """Count, mean and sum of squared deviations of rows, per dimension."""

    count: int
    mean: np.ndarray  # f64[D]
    m2: np.ndarray  # f64[D]

    @classmethod
    def empty(cls, d: int) -> Stats:
        """The statistics of no rows of width d: the neutral element of `join`."""
        return cls(0, np.zeros(d), np.zeros(d))

    @classmethod
    def of_rows(cls, rows_BD: np.ndarray) -> Stats:
        """Statistics of stored rows [B, width], or rows [B, D]. Those that are not finite give such statistics."""
        total = cls.empty(width(rows_BD))
        with np.errstate(invalid="ignore"):
            for low in range(0, len(rows_BD), BLOCK_ROWS):
                block_BD = decode(rows_BD[low : low + BLOCK_ROWS]).astype(np.float64)
                mean_D = block_BD.sum(axis=0) / len(block_BD)
                block_BD -= mean_D
                total = total.join(cls(len(block_BD), mean_D, np.einsum("bd,bd->d", block_BD, block_BD)))
        return total

    def join(self, other: Stats) -> Stats:
        """Statistics of the rows of both parts."""
        count = self.count + other.count
        if count == 0:
            return self
        delta_D = other.mean - self.mean
        mean_D = self.mean + delta_D * (other.count / count)
        m2_D = self.m2 + other.m2 + delta_D * delta_D * (self.count * other.count / count)
        return Stats(count, mean_D, m2_D)

    @property
    def variance(self) -> np.ndarray:
        """Population variance per dimension, f64[D]; zeros where there are no rows."""
        return self.m2 / max(self.count, 1)

    @property
    def mean_square(self) -> float:
        """Mean over rows of their squared norm."""
        return float(self.variance.sum() + (self.mean**2).sum())

    def to_json(self) -> dict:
        """A JSON object; float64 survives the round trip exactly."""
        return {"count": self.count, "mean": self.mean.tolist(), "m2": self.m2.tolist()}
