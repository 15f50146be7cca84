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

    def measure(self, batch: EvalBatch) -> dict[str, jax.Array]:
        """See base.Evaluator."""
        mean_Y = jnp.asarray(self.subject.mean, jnp.float32)
        context = None if batch.text is None else batch.text.model.ids.shape[1]
        return _sums(batch.y, batch.y_hat, batch.keep, mean_Y, context)

    def metrics(self, sums: Sums) -> Iterator[Metric]:
        """See base.Evaluator."""
        if "position" in sums:
            n_bins = len(sums["position"])
            names = ["0", "1", *(f"{2**i} to {2 ** (i + 1) - 1}" for i in range(1, n_bins))][:n_bins]
            yield Metric("fvu_by_position", _ratios(names, sums["position"]))
        yield Metric("fvu_by_norm", _ratios(NORM_BINS, sums["norm"]))


def _ratios(names: tuple[str, ...] | list[str], sums_P2: np.ndarray) -> dict[str, float]:
    """Bins without a row, or whose rows are all at the mean, are left out; NaN where squares have overflowed."""
    return {
        name: float(error) / float(offset) if math.isfinite(offset) else math.nan
        for name, (error, offset) in zip(names, sums_P2, strict=True)
        if not offset <= 0
    }


@partial(jax.jit, static_argnames="context")
def _sums(
    y_NY: jax.Array, y_hat_NY: jax.Array, keep_N: jax.Array, mean_Y: jax.Array, context: int | None
) -> dict[str, jax.Array]:
    error_N, offset_N = (((y_NY - other) ** 2).sum(-1) for other in (y_hat_NY, mean_Y[None]))
    both_N2 = jnp.where(keep_N[:, None], jnp.stack([error_N, offset_N], -1), 0.0)
    norm_N = jnp.linalg.norm(y_NY, axis=-1)
    multiple_N = norm_N / jnp.nanmedian(jnp.where(keep_N, norm_N, jnp.nan))  # NaN where no row counts: in no bin
    sums = {"norm": _by_bin(jnp.searchsorted(jnp.array(NORM_EDGES), multiple_N, side="right"), both_N2, len(NORM_BINS))}
    if context is not None:
        position_N = jnp.arange(len(keep_N), dtype=jnp.int32) % context
        bin_N = jnp.where(position_N > 0, 32 - jax.lax.clz(position_N), 0)
        sums["position"] = _by_bin(bin_N, both_N2, (context - 1).bit_length() + 1)
    return sums


def _by_bin(bin_N: jax.Array, values_N2: jax.Array, n_bins: int) -> jax.Array:
    return jnp.zeros((n_bins, 2)).at[bin_N].add(values_N2)
