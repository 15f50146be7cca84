"""How well a dictionary reconstructs activations.

fvu               E||y - y_hat||^2 / E||y - E y||^2, both over all rows: a ratio of sums
fvu_by_source     the same of each source by itself, where several are reconstructed
nmse_uncentered   E||y - y_hat||^2 / E||y||^2
cosine            mean over rows of the cosine of y and y_hat
gamma             E||y_hat||^2 / E[y . y_hat]; 1 is unbiased, below 1 is shrinkage (Rajamanoharan et al. 2024,
                  arXiv 2404.16014)

Intervals are by the variation between sequences, or between rows of a set, which are shuffled. Those of FVU take the
centre of the rows to be the mean of the set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.evaluation import base
from sae_jax.evaluation.base import Description, EvalBatch, Metric, Sums

ROUNDING = 1e-6  # relative, of a sum in float32: a variance below it is none


class Evaluator(base.Evaluator):
    """Errors of the reconstruction."""

    ORDER = 10
    METRICS = {  # noqa: RUF012
        "n_rows": Description("rows", "rows measured on", in_table=False),
        "fvu": Description("FVU", "fraction of the variance that the reconstruction leaves unexplained"),
        "fvu_by_source": Description("FVU", "the same, of one source by itself"),
        "nmse_uncentered": Description("NMSE, uncentred", "squared error over the mean square of the activations"),
        "cosine": Description("cosine", "of activation and reconstruction, mean over rows"),
        "gamma": Description("gamma", "relative size of the reconstruction: 1 is unbiased, less is shrinkage"),
    }

    def measure(self, batch: EvalBatch) -> dict[str, jax.Array | np.ndarray]:
        """See base.Evaluator."""
        args = batch.y, batch.y_hat, jnp.asarray(self.subject.mean, jnp.float32)
        by_row_NQ = _by_row(*args, tuple(self.subject.sources.values()))
        return {**_sums(*args[:2], batch.keep, args[2]), **base.by_unit(by_row_NQ, batch.keep, batch.context)}

    def metrics(self, sums: Sums) -> Iterator[Metric]:
        """See base.Evaluator."""
        n = float(sums["rows"])
        error_Y, variance_Y = sums["error2_Y"], sums["offset2_Y"] - sums["offset_Y"] ** 2 / n
        is_constant_Y = np.isfinite(variance_Y) & (variance_Y <= ROUNDING * sums["offset2_Y"])
        variance_Y = np.where(is_constant_Y, 0.0, variance_Y)
        error, offset, y2, y_hat2, product, cosine, rows, *by_row = np.eye(len(sums["sums_Q"]))

        def metric(name: str, value: float, numerator_Q: np.ndarray, denominator_Q: np.ndarray) -> Metric:
            return Metric(name, value, base.interval(sums, value, numerator_Q, denominator_Q))

        yield Metric("n_rows", int(n))
        yield metric("fvu", _divided(error_Y.sum(), variance_Y.sum()), error, offset)
        if len(self.subject.sources) > 1:
            by_source, first = [], 0
            for i, (name, width) in enumerate(self.subject.sources.items()):
                columns = slice(first, first := first + width)
                value = _divided(error_Y[columns].sum(), variance_Y[columns].sum())
                by_source.append(metric(name, value, *by_row[2 * i : 2 * i + 2]))
            yield base.gathered("fvu_by_source", by_source)
        yield metric("nmse_uncentered", _divided(error_Y.sum(), sums["y2"]), error, y2)
        yield metric("cosine", float(sums["cosine"]) / n, cosine, rows)
        yield metric("gamma", _divided(sums["y_hat2"], sums["product"]), y_hat2, product)


def _divided(numerator: np.ndarray, denominator: np.ndarray) -> float:
    """NaN where it is not defined, and where squares have overflowed: an error over infinity would read as 0."""
    return float(numerator) / float(denominator) if denominator and math.isfinite(denominator) else math.nan


@partial(jax.jit, static_argnames="widths")
def _by_row(y_NY: jax.Array, y_hat_NY: jax.Array, centre_Y: jax.Array, widths: tuple[int, ...]) -> jax.Array:
    """Quantities of each row f32[N, 7 + 2 S]: the last are error and offset of each of S sources."""
    y2_N, y_hat2_N, product_N = (y_NY**2).sum(-1), (y_hat_NY**2).sum(-1), (y_NY * y_hat_NY).sum(-1)
    error_NY, offset_NY = (y_NY - y_hat_NY) ** 2, (y_NY - centre_Y[None]) ** 2
    cosine_N = product_N / jnp.maximum(jnp.sqrt(y2_N) * jnp.sqrt(y_hat2_N), 1e-30)
    rest = [error_NY.sum(-1), offset_NY.sum(-1), y2_N, y_hat2_N, product_N, cosine_N, jnp.ones_like(y2_N)]
    first = 0
    for width in widths:
        rest += [each[:, first : first + width].sum(-1) for each in (error_NY, offset_NY)]
        first += width
    return jnp.stack(rest, -1)


@jax.jit
def _sums(y_NY: jax.Array, y_hat_NY: jax.Array, keep_N: jax.Array, centre_Y: jax.Array) -> dict[str, jax.Array]:
    y2_N, y_hat2_N, product_N = (y_NY**2).sum(-1), (y_hat_NY**2).sum(-1), (y_NY * y_hat_NY).sum(-1)
    # Squares are summed around a centre: activations far from the origin would lose their variance to rounding.
    offset_NY = y_NY - centre_Y[None]
    weight_N = keep_N.astype(jnp.float32)
    cosine_N = product_N / jnp.maximum(jnp.sqrt(y2_N) * jnp.sqrt(y_hat2_N), 1e-30)
    return {
        "rows": keep_N.sum(),
        "y2": (weight_N * y2_N).sum(),
        "y_hat2": (weight_N * y_hat2_N).sum(),
        "product": (weight_N * product_N).sum(),
        "error2_Y": (weight_N[:, None] * (y_NY - y_hat_NY) ** 2).sum(0),
        "offset_Y": (weight_N[:, None] * offset_NY).sum(0),
        "offset2_Y": (weight_N[:, None] * offset_NY**2).sum(0),
        "cosine": (weight_N * cosine_N).sum(),
    }
