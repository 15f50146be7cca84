"""What replacing a site's activations by their reconstruction does to the language model's predictions.

    ce_clean          cross-entropy of the model as it is                      nats per token
    ce_sae            with the site replaced by its reconstruction
    ce_zero, ce_mean  with the site replaced by zeros, by the mean of the set
    ce_added          ce_sae - ce_clean
    kl                KL(as it is || reconstruction), mean over tokens         nats
    loss_recovered    (ce_mean - ce_sae) / (ce_mean - ce_clean);  loss_recovered_zero: the same from ce_zero

Positions that the activation set leaves out (special tokens, sinks) keep their activations. Predictions from or of a
special token do not count.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np

from sae_jax.evaluation import base
from sae_jax.evaluation.base import Description, EvalBatch, Metric, Sums

QUANTITIES = ("n_predictions", "ce_clean", "ce_sae", "ce_zero", "ce_mean", "kl")  # of each sequence


class Evaluator(base.Evaluator):
    """Losses of the spliced model."""

    ORDER = 30
    NEEDS_TEXT = True
    METRICS = {  # noqa: RUF012
        "n_predictions": Description("predictions", "next-token predictions measured on", in_table=False),
        "ce_clean": Description("CE", "cross-entropy of the language model as it is, nats per token"),
        "ce_sae": Description("CE, reconstruction", "with the reconstruction in the place of the activations"),
        "ce_added": Description("CE, added", "what the reconstruction adds to it"),
        "ce_zero": Description("CE, zeros", "with zeros in their place"),
        "ce_mean": Description("CE, mean", "with their mean in their place"),
        "kl": Description("KL", "divergence of the predictions with the reconstruction from those without it, nats"),
        "loss_recovered": Description("loss recovered", "1: as good as the activations, 0: as bad as their mean"),
        "loss_recovered_zero": Description(
            "loss recovered, zeros", "1: as good as the activations, 0: as bad as zeros", in_table=False
        ),
    }

    def measure(self, batch: EvalBatch) -> dict[str, np.ndarray]:
        """See base.Evaluator."""
        text = batch.text
        assert text is not None
        ce_sae_S, kl_S = text.losses(batch.y_hat)
        per_QS = [text.counted.sum(-1), text.ce_clean, ce_sae_S, text.ce_zero, text.ce_mean, kl_S]
        # In float64: intervals are small differences of large products.
        per_QS = np.asarray(jax.device_get(per_QS), np.float64)
        return {"sequences": np.sum(per_QS[0] > 0), "sums_Q": per_QS.sum(1), "products_QQ": per_QS @ per_QS.T}

    def metrics(self, sums: Sums) -> Iterator[Metric]:
        """See base.Evaluator."""
        unit = dict(zip(QUANTITIES, np.eye(len(QUANTITIES)), strict=True))

        def metric(name: str, numerator_Q: np.ndarray, denominator_Q: np.ndarray) -> Metric:
            n = float(sums["sequences"])
            return Metric(name, *base.ratio(sums["sums_Q"], sums["products_QQ"], n, numerator_Q, denominator_Q))

        yield Metric("n_predictions", int(sums["sums_Q"][0]))
        for name in QUANTITIES[1:]:
            yield metric(name, unit[name], unit["n_predictions"])
            if name == "ce_sae":
                yield metric("ce_added", unit[name] - unit["ce_clean"], unit["n_predictions"])
        for name, ablated in (("loss_recovered", unit["ce_mean"]), ("loss_recovered_zero", unit["ce_zero"])):
            yield metric(name, ablated - unit["ce_sae"], ablated - unit["ce_clean"])
