"""Where the reconstruction is good and where it is not: FVU by position in the sequence, and by norm of the row.

fvu_by_position   positions 0, 1, 2 to 3, 4 to 7 and so on; of rows that come from text
fvu_by_norm       rows by their norm, as a multiple of the median norm in their batch

Each is squared error over squared distance from the mean of the set, both over the rows of the bin alone.
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

NORM_EDGES = (0.5, 0.71, 1.0, 1.41, 2.0)  # about powers of the square root of 2
NORM_BINS = ("below 0.5", "0.5 to 0.71", "0.71 to 1", "1 to 1.41", "1.41 to 2", "above 2")


class Evaluator(base.Evaluator):
    """FVU of parts of the rows."""

    ORDER = 12
    METRICS = {  # noqa: RUF012
        "fvu_by_position": Description("FVU by position", "in the sequence, from 0", in_table=False),
        "fvu_by_norm": Description("FVU by norm", "in multiples of the median norm", in_table=False),
    }

    def measure(self, batch: EvalBatch) -> dict[str, np.ndarray]:
        """See base.Evaluator."""
        mean_Y = jnp.asarray(self.subject.mean, jnp.float32)
        by_bin = _by_bin(batch.y, batch.y_hat, batch.keep, mean_Y, batch.context)
        return {
            f"{name}/{key}": part
            for name, values_NQ in by_bin.items()
            for key, part in base.by_unit(values_NQ, batch.keep, batch.context).items()
        }

    def metrics(self, sums: Sums) -> Iterator[Metric]:
        """See base.Evaluator."""
        of_bins = {
            name: {key: sums[f"{name}/{key}"] for key in ("n_units", "sums_Q", "products_QQ")}
            for name in ("position", "norm")
            if f"{name}/sums_Q" in sums
        }
        if "position" in of_bins:
            n_bins = len(of_bins["position"]["sums_Q"]) // 2
            names = ["0", "1", *(f"{2**i} to {2 ** (i + 1) - 1}" for i in range(1, n_bins))][:n_bins]
            yield base.gathered("fvu_by_position", _ratios(names, of_bins["position"]))
        yield base.gathered("fvu_by_norm", _ratios(NORM_BINS, of_bins["norm"]))


def _ratios(names: tuple[str, ...] | list[str], sums: Sums) -> Iterator[Metric]:
    """Bins without a row, or whose rows are all at the mean, are left out; NaN where squares have overflowed."""
    unit = np.eye(2 * len(names))
    for i, name in enumerate(names):
        error, offset = sums["sums_Q"][2 * i : 2 * i + 2]
        if not offset <= 0:
            value = float(error) / float(offset) if math.isfinite(offset) else math.nan
            yield Metric(name, value, base.interval(sums, value, unit[2 * i], unit[2 * i + 1]))


@partial(jax.jit, static_argnames="context")
def _by_bin(
    y_NY: jax.Array, y_hat_NY: jax.Array, keep_N: jax.Array, mean_Y: jax.Array, context: int | None
) -> dict[str, jax.Array]:
    """{place: f32[N, 2 P]}: error and squared distance from the mean of each row in its bin, of P bins; else 0."""
    error_N, offset_N = (((y_NY - other) ** 2).sum(-1) for other in (y_hat_NY, mean_Y[None]))
    both_N2 = jnp.stack([error_N, offset_N], -1)
    norm_N = jnp.linalg.norm(y_NY, axis=-1)
    multiple_N = norm_N / jnp.nanmedian(jnp.where(keep_N, norm_N, jnp.nan))  # NaN where no row counts: in no bin
    bins = {"norm": (jnp.searchsorted(jnp.array(NORM_EDGES), multiple_N, side="right"), len(NORM_BINS))}
    if context is not None:
        position_N = jnp.arange(len(keep_N), dtype=jnp.int32) % context
        bin_N = jnp.where(position_N > 0, 32 - jax.lax.clz(position_N), 0)
        bins["position"] = bin_N, (context - 1).bit_length() + 1
    rows_N = jnp.arange(len(keep_N), dtype=jnp.int32)
    return {
        name: jnp.zeros((len(keep_N), n_bins, 2)).at[rows_N, bin_N].set(both_N2).reshape(len(keep_N), -1)
        for name, (bin_N, n_bins) in bins.items()
    }
