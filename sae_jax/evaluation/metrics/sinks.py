"""The reconstruction with and without rows far larger than the others, which can make up most of the variance.

n_sinks             rows of text with over 10 times the median norm of their batch, at any hook of the site
fvu_without_sinks   FVU over all other rows of text
fvu_with_sinks      FVU over all rows of text, these too, whether the set holds them or not

Reported where there are such rows. A set leaves them out by default (activations/sinks.py), so its dictionaries have
not learnt them, and `fvu` is without them.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.evaluation import base
from sae_jax.evaluation.base import Description, EvalBatch, Metric, Sums


class Evaluator(base.Evaluator):
    """FVU of two sets of rows."""

    ORDER = 15
    NEEDS_TEXT = True
    METRICS = {  # noqa: RUF012
        "n_sinks": Description("sinks", "rows with over 10 times the median norm", no_interval="a count"),
        "fvu_without_sinks": Description("FVU without sinks", "over all rows of text but these"),
        "fvu_with_sinks": Description("FVU with sinks", "over all rows of text"),
    }

    def measure(self, batch: EvalBatch) -> dict[str, jax.Array | np.ndarray]:
        """See base.Evaluator."""
        assert batch.text is not None
        is_sink_N, is_text_N = batch.text.is_sink, batch.text.is_text
        masks = jnp.stack([is_text_N & ~is_sink_N, is_text_N & is_sink_N])
        mean_Y = jnp.asarray(self.subject.mean, jnp.float32)
        by_row_NQ = _by_row(batch.y, batch.y_hat, masks, mean_Y)
        return {
            **_sums(batch.y, batch.y_hat, masks, mean_Y),
            **base.by_unit(by_row_NQ, masks.any(0), batch.context),
        }

    def metrics(self, sums: Sums) -> Iterator[Metric]:
        """See base.Evaluator."""
        if not sums["rows"][1]:
            return
        yield Metric("n_sinks", int(sums["rows"][1]))
        for name, parts in (("fvu_without_sinks", slice(0, 1)), ("fvu_with_sinks", slice(0, 2))):
            total = {key: sums[key][parts].sum(0) for key in ("rows", "error2", "offset2", "offset")}
            variance = total["offset2"] - (total["offset"] ** 2).sum() / max(total["rows"], 1.0)
            value = float(total["error2"] / variance) if variance > 0 else float("nan")
            error_Q, offset_Q = np.zeros((2, 4))
            error_Q[:2][parts] = offset_Q[2:][parts] = 1
            yield Metric(name, value, base.interval(sums, value, error_Q, offset_Q))


@jax.jit
def _by_row(y_NY: jax.Array, y_hat_NY: jax.Array, masks_2N: jax.Array, centre_Y: jax.Array) -> jax.Array:
    """f32[N, 4]: error without and with a norm far above the others, offset likewise."""
    both = [((y_NY - other) ** 2).sum(-1) for other in (y_hat_NY, centre_Y[None])]
    return jnp.stack([jnp.where(mask_N, each_N, 0.0) for each_N in both for mask_N in masks_2N], -1)


@jax.jit
def _sums(y_NY: jax.Array, y_hat_NY: jax.Array, masks_2N: jax.Array, centre_Y: jax.Array) -> dict[str, jax.Array]:
    weight_2N, offset_NY = masks_2N.astype(jnp.float32), y_NY - centre_Y[None]
    error_N, offset2_N = ((v_NY**2).sum(-1) for v_NY in (y_NY - y_hat_NY, offset_NY))
    return {
        "rows": weight_2N.sum(-1),
        "error2": weight_2N @ error_N,
        "offset2": weight_2N @ offset2_N,
        "offset": weight_2N @ offset_NY,
    }
