"""Whether decoder rows mix features, as they do with too few active latents, or too many (ops/mixing.py).

decoder_cosine      mean of |cos| over pairs of decoder rows
decoder_projection  of each row of data the projection on unit decoder rows that n_latents / 4 others exceed, mean over
                    rows; in units of the root mean square distance of the data from their mean

They say something beside those of the same width at another k, on the same rows. Of a batch, 64 rows count.
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
from sae_jax.ops import mixing
from sae_jax.saes.normalise import PER_VECTOR, InputNorm, normalise


class Evaluator(base.Evaluator):
    """Signs of mixed features."""

    ORDER = 25
    METRICS = {  # noqa: RUF012
        "decoder_cosine": Description(
            "decoder cosine", "of pairs of decoder rows, mean size: compare over k", no_interval=base.OF_WEIGHTS
        ),
        "decoder_projection": Description(
            "decoder projection", "of rows on unit decoder rows, upper quartile, share of the rows' size"
        ),
    }

    def measure(self, batch: EvalBatch) -> dict[str, jax.Array | np.ndarray]:
        """See base.Evaluator."""
        sae = batch.sae
        sums = _sums(sae.w_dec, sae.b_dec, batch.x, batch.y, batch.keep, sae.config.input_norm)
        by_batch_1Q = jnp.stack([sums[name] for name in ("rows", "projection", "square")])[None]
        return {**sums, **base.by_unit(by_batch_1Q, by_batch_1Q[:, 0] > 0, None)}

    def metrics(self, sums: Sums) -> Iterator[Metric]:
        """See base.Evaluator."""
        n = float(sums["rows"])
        square = float(sums["square"]) / n
        yield Metric("decoder_cosine", float(mixing.pairwise_cosine(self.subject.sae.w_dec)))
        value = float(sums["projection"]) / n / math.sqrt(square) if square else math.nan
        yield Metric("decoder_projection", value, _interval(sums, value))


def _interval(sums: Sums, value: float) -> tuple[float, float] | None:
    """By the variation between batches: (P / n) / sqrt(S / n), linearised in the sums n, P and S."""
    n_units = float(sums["n_units"])
    if n_units < 2 or not math.isfinite(value) or not sums["sums_Q"].all():
        return None
    slope_Q = np.array([-0.5, 1.0, -0.5]) / sums["sums_Q"]
    variance = n_units / (n_units - 1) * max(float(slope_Q @ sums["products_QQ"] @ slope_Q), 0.0)
    half = base.NORMAL_QUANTILE * abs(value) * math.sqrt(variance)
    return value - half, value + half


@partial(jax.jit, static_argnames="norm")
def _sums(
    w_dec_FY: jax.Array, b_dec_Y: jax.Array, x_NX: jax.Array, y_NY: jax.Array, keep_N: jax.Array, norm: InputNorm
) -> dict[str, jax.Array]:
    if norm in PER_VECTOR:
        _, mean_N1, scale_N1 = normalise(x_NX, norm)
        y_NY = (y_NY - mean_N1) / scale_N1
    n_taken = min(mixing.N_ROWS, len(keep_N))
    kept_N, n_kept = jnp.argsort(~keep_N, stable=True), keep_N.sum(dtype=jnp.int32)  # kept rows first
    taken_RY = y_NY[kept_N[jnp.arange(n_taken) * n_kept // n_taken]]
    projection = mixing.nth_projections(taken_RY, w_dec_FY, b_dec_Y).mean()
    n, weight_N1 = n_kept.astype(jnp.float32), keep_N.astype(jnp.float32)[:, None]
    mean_1Y = (weight_N1 * y_NY).sum(0, keepdims=True) / jnp.maximum(n, 1.0)
    return {"rows": n, "projection": n * projection, "square": (weight_N1 * (y_NY - mean_1Y) ** 2).sum()}
