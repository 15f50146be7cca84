"""How evenly the active latents of a row matter to the model's loss.

    y_i = z_i (d_i . g)      g: gradient of the cross-entropy with respect to the row; d_i: decoder row of latent i
    p_i = |y_i| / sum |y|    the share of latent i in what the row's latents do, to first order
    importance_uniformity    exp(entropy of p) / (number of active latents), mean over rows: 1 if all matter equally

Source: Gao et al. 2024, arXiv 2406.04093, section 4.5 (sparsity of effects), for single rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import lm
from sae_jax.analysis.bootstrap import mean_and_interval
from sae_jax.evaluation import study
from sae_jax.evaluation.base import Description, Metric
from sae_jax.evaluation.study import Case
from sae_jax.progress import Progress
from sae_jax.types import Code, UsageError

BLOCK = 8  # sequences


@dataclass(frozen=True)
class Study(study.Study):
    """Uniformity of importance."""

    n_sequences: int = 64

    SUITE = "openai"
    ORDER = 131
    METRICS: ClassVar[Mapping[str, Description]] = {
        "importance_uniformity": Description(
            "uniformity of importance", "1: all active latents of a row matter as much to the loss"
        )
    }

    def metrics(self, case: Case) -> Iterator[Metric]:
        """See Study."""
        subject, model = case.subject, case.subject.model
        if not isinstance(model, lm.LanguageModel):
            raise UsageError(f"{model.reference} runs in torch, whose gradients are not read; use a model of JAX")
        if subject.encoded != subject.reconstructed:
            raise UsageError("the dictionary writes elsewhere than it reads: its latents have no gradient of one place")
        by_sequence: list[tuple[float, int]] = []
        n = min(self.n_sequences, len(case.text.sequences))
        with Progress("importance", n, "sequences") as progress:
            for done, block in enumerate(case.blocks(n, BLOCK), 1):
                g_STY = _gradients(model, jnp.asarray(block.ids), jnp.asarray(block.is_row), subject.encoded)
                code = subject.sae.encode(block.x)
                ratio_ST = np.asarray(uniformity(code, _along(subject.sae.decode, code, g_STY)))
                counts_ST = block.is_row & (np.asarray(code.values) > 0).any(-1)
                by_sequence += zip((ratio_ST * counts_ST).sum(1), counts_ST.sum(1), strict=True)
                progress.update(min(done * BLOCK, n))
        sums = np.array(by_sequence, np.float64)
        sums = sums[sums[:, 1] > 0]
        if len(sums):
            means = sums[:, 0] / sums[:, 1]
            yield Metric("importance_uniformity", *mean_and_interval(means, case.seed))


@jax.jit
def uniformity(code: Code, along: jax.Array) -> jax.Array:
    """exp(entropy of p) / number of active latents, f32[...]; NaN-free: 0 where no latent is active.

    Args:
        code: [..., K].
        along: f32[..., K], the gradient along the decoder row of each latent.
    """
    y = jnp.abs(code.values * along)
    p = y / jnp.maximum(y.sum(-1, keepdims=True), 1e-30)
    entropy = -(p * jnp.log(jnp.maximum(p, 1e-30))).sum(-1)
    n_active = jnp.maximum((code.values > 0).sum(-1), 1).astype(y.dtype)
    return jnp.where(y.sum(-1) > 0, jnp.exp(entropy) / n_active, 0.0)


def _along(decode, code: Code, g: jax.Array) -> jax.Array:
    """d_i . g of each slot: decoding is linear in the values, so its transpose says it without a dense product."""
    _, transpose = jax.vjp(lambda values: decode(Code(code.indices, values)), code.values)
    return transpose(g)[0]


@partial(jax.jit, static_argnames="hooks")
def _gradients(model: lm.LanguageModel, ids_ST: jax.Array, keep_ST: jax.Array, hooks: tuple[lm.Hook, ...]) -> jax.Array:
    """Of each sequence's summed cross-entropy with respect to the activations, f32[S, T, Y]."""
    out = lm.run(model, ids_ST, capture=hooks)
    assert out.logits is not None
    site = lm.ReplacedSite(model, ids_ST, jnp.ones_like(keep_ST), out.acts, out.logits, (), hooks)

    def loss(rows_NY: jax.Array) -> jax.Array:
        return lm.cross_entropy(site.with_rows(rows_NY)[0], ids_ST).sum()

    return jax.grad(loss)(site.rows).reshape(*ids_ST.shape, -1)
