"""How sparse codes are, and how often latents fire.

l0                 mean number of active latents a row;  l0_histogram: rows by their number of active latents
dead_fraction      share of latents that had not fired for `train.dead_after_tokens` when training ended
silent_fraction    share of latents that are active on no row
density_histogram  latents by the log10 of the share of rows on which they are active, those silent left out
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.evaluation import base
from sae_jax.evaluation.base import Description, EvalBatch, Metric, Sums
from sae_jax.types import Code

DENSITY_EDGES = np.arange(-6.0, 0.01, 0.25)  # of log10 of the share


class Evaluator(base.Evaluator):
    """Counts of active latents."""

    ORDER = 20
    METRICS = {  # noqa: RUF012
        "l0": Description("L0", "active latents a row, mean"),
        "l0_histogram": Description("L0 histogram", "rows by their number of active latents", in_table=False),
        "dead_fraction": Description(
            "dead",
            "share of latents silent for the last train.dead_after_tokens of training",
            no_interval="counted, at the end of training",
        ),
        "silent_fraction": Description(
            "silent",
            "share of latents that are active on none of the rows measured here",
            no_interval="counted on these rows; more rows leave fewer silent",
        ),
        "density_histogram": Description("density", "latents by how often they are active", in_table=False),
    }

    def measure(self, batch: EvalBatch) -> dict[str, jax.Array | np.ndarray]:
        """See base.Evaluator."""
        active_N = (batch.code.values > 0).sum(-1).astype(jnp.float32)
        both_N2 = jnp.stack([active_N, jnp.ones_like(active_N)], -1)
        counts = _counts(batch.code, batch.keep, self.subject.n_latents)
        return {**counts, **base.by_unit(both_N2, batch.keep, batch.context)}

    def metrics(self, sums: Sums) -> Iterator[Metric]:
        """See base.Evaluator."""
        rows_by_l0 = np.trim_zeros(sums["rows_by_l0"], "b")
        n = rows_by_l0.sum()
        rates_F = sums["active_F"] / n
        counts, _ = np.histogram(np.log10(np.maximum(rates_F[rates_F > 0], 1e-6)), DENSITY_EDGES)
        l0 = float(rows_by_l0 @ np.arange(len(rows_by_l0)) / n)
        yield Metric("l0", l0, base.interval(sums, l0, (1, 0), (0, 1)))
        yield Metric("l0_histogram", rows_by_l0.astype(int).tolist())
        if "dead_fraction" in self.subject.recorded:
            yield Metric("dead_fraction", self.subject.recorded["dead_fraction"])
        yield Metric("silent_fraction", float((rates_F == 0).mean()))
        edges = DENSITY_EDGES.round(2).tolist()
        yield Metric("density_histogram", {"log10_edges": edges, "counts": counts.tolist()})


@partial(jax.jit, static_argnames="n_latents")
def _counts(code: Code, keep_N: jax.Array, n_latents: int) -> dict[str, jax.Array]:
    active_NK = (code.values > 0) & keep_N[:, None]
    one_N, one_NK = keep_N.astype(jnp.int32), active_NK.astype(jnp.int32)
    return {
        "rows_by_l0": jnp.zeros(code.values.shape[1] + 1, jnp.int32).at[one_NK.sum(-1)].add(one_N),
        "active_F": jnp.zeros(n_latents, jnp.int32).at[code.indices.ravel()].add(one_NK.ravel()),
    }
