"""What steering costs: how much worse a model predicts text that nobody wanted to steer.

    y'[t] = y[t] + s (c m_i - z_i[t]) d_i       at every token of held-out text: latent i is held at c times its largest
                                                value m_i on the text (s: the scale of a norm of each vector, else 1)

for c of 0 (ablated), 1 and more, one latent at a time. Latents are drawn from equal strata of those that fire, sorted
by how often they do. What is lost is the mean over them, with an interval by the variation between them; with a random
direction in the place of d_i, of its length, stands beside it. Predictions count as in metrics/model_loss.py.

Source: Templeton et al. 2024, "Scaling Monosemanticity", methodological details (clamping with the error kept).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import lm
from sae_jax.analysis.bootstrap import mean_and_interval
from sae_jax.evaluation import run_on, study
from sae_jax.evaluation.base import Description, Metric, gathered
from sae_jax.evaluation.study import Case
from sae_jax.progress import Progress

AT_ONCE = 8  # sequences


class Firing(NamedTuple):
    """How often and how strongly each latent fires."""

    density: np.ndarray  # f64[F], share of rows
    largest: np.ndarray  # f32[F]


@dataclass(frozen=True)
class Study(study.Study):
    """Holds latents at multiples of their largest value, on any text."""

    SUITE = "causal"
    ORDER = 310
    VERSION = 2
    METRICS = {  # noqa: RUF012
        "steering_ce": Description(
            "CE lost by steering, scale", "on any text, with a latent held at so many times its largest value"
        ),
        "steering_ce_random": Description(
            "CE lost by random directions, scale", "the same with a random direction of the same length in its place"
        ),
        "steering_kl": Description("KL by steering, scale", "of the predictions steered from those as they are, nats"),
        "steering_kl_random": Description("KL by random directions, scale", "the same with a random direction"),
        "steering_by_latent": Description(
            "steering of each latent", "its density, its largest value, and what each scale costs", in_table=False
        ),
    }

    scales: tuple[float, ...] = (0.0, 1.0, 2.0, 5.0, 10.0)
    n_latents: int = 10
    n_sequences: int = 64  # to see how often latents fire, and how strongly
    n_steered: int = 16  # of these, that the cost is measured on

    def metrics(self, case: Case) -> Iterator[Metric]:
        """See study.Study."""
        at = run_on.place(case.subject)
        rng = np.random.default_rng(case.seed)
        firing = _firing(case, self.n_sequences)
        alive = np.flatnonzero(firing.density)
        strata = np.array_split(alive[np.argsort(firing.density[alive], kind="stable")], self.n_latents)
        latents_L = np.array([rng.choice(stratum) for stratum in strata if len(stratum)], int)
        if not len(latents_L):
            return
        rows_LY = np.asarray(at.sae.w_dec[latents_L], np.float32)
        random_LY = rng.standard_normal(rows_LY.shape)
        random_LY *= (np.linalg.norm(rows_LY, axis=1) / np.linalg.norm(random_LY, axis=1))[:, None]
        directions_2LY = np.stack([rows_LY, random_LY.astype(np.float32)])
        lost_2LCQ = self._lost(case, at, latents_L, firing.largest[latents_L], directions_2LY)
        names = [f"{scale:g}" for scale in self.scales]
        for q, quantity in enumerate(("ce", "kl")):
            for kind, suffix in enumerate(("", "_random")):
                values_LC = lost_2LCQ[kind, :, :, q]
                of_scales = zip(names, values_LC.T, strict=True)
                parts = [Metric(name, *mean_and_interval(values_L, case.seed)) for name, values_L in of_scales]
                yield gathered(f"steering_{quantity}{suffix}", parts)
        yield Metric(
            "steering_by_latent",
            [
                {
                    "latent": int(latent),
                    "density": float(firing.density[latent]),
                    "largest": float(firing.largest[latent]),
                    "ce": dict(zip(names, lost_CQ[:, 0].tolist(), strict=True)),
                    "kl": dict(zip(names, lost_CQ[:, 1].tolist(), strict=True)),
                }
                for latent, lost_CQ in zip(latents_L, lost_2LCQ[0], strict=True)
            ],
        )

    def _lost(
        self, case: Case, at: run_on.Place, latents_L: np.ndarray, largest_L: np.ndarray, directions_2LY: np.ndarray
    ) -> np.ndarray:
        """(cross-entropy lost, KL) a prediction, by latents and random directions at each scale: f64[2, L, C, 2]."""
        shape = (2, len(latents_L), len(self.scales))
        sums_2LCQ, n_predictions, done = np.zeros((*shape, 2)), 0.0, 0
        n_blocks = -(-min(self.n_steered, len(case.text.sequences)) // AT_ONCE)
        with Progress("side effects", n_blocks * len(latents_L), "latents") as progress:
            for block, text_ST in _with_text(case, self.n_steered):
                counted_ST = jnp.asarray(text_ST[:, :-1] & text_ST[:, 1:], jnp.float32)
                clean = _clean(at.model, jnp.asarray(block.ids), jnp.asarray(block.is_row), at.reconstructed)
                values_LN, scale_N1 = _values(at, block.x, latents_L)
                n_predictions += float(counted_ST.sum())
                for i, value_N in enumerate(values_LN):
                    for kind, direction_Y in enumerate(directions_2LY[:, i]):
                        targets_C = jnp.asarray(self.scales, jnp.float32) * largest_L[i]
                        args = clean, counted_ST, value_N, scale_N1, direction_Y, targets_C
                        sums_2LCQ[kind, i] += np.asarray(_steered(*args), np.float64)
                    done += 1
                    progress.update(done)
        return sums_2LCQ / max(n_predictions, 1.0)


def _with_text(case: Case, n_sequences: int) -> Iterator[tuple[study.Block, np.ndarray]]:
    """Blocks, and what of them is text, bool[S, T]."""
    for i, block in enumerate(case.blocks(n_sequences, AT_ONCE)):
        size = len(block.ids)
        text_ST = case.text.text[: min(n_sequences, len(case.text.text))][i * size : (i + 1) * size]
        yield block, np.pad(text_ST, ((0, size - len(text_ST)), (0, 0)))


def _firing(case: Case, n_sequences: int) -> Firing:
    n_latents, n_rows = case.subject.sae.b_enc.shape[0], 0
    count_F, largest_F = np.zeros(n_latents), np.zeros(n_latents, np.float32)
    for block in case.blocks(n_sequences, AT_ONCE):
        code = case.subject.sae.encode(block.x[block.is_row])
        indices, values = np.asarray(code.indices), np.asarray(code.values)
        n_rows += len(indices)
        count_F += np.bincount(indices[values > 0], minlength=n_latents)
        np.maximum.at(largest_F, indices, values)
    return Firing(count_F / max(n_rows, 1), largest_F)


def _values(at: run_on.Place, x_STX: np.ndarray, latents_L: np.ndarray) -> tuple[np.ndarray, jax.Array]:
    """Values of these latents, f32[L, N], and what they are to be multiplied by, f32[N, 1] or f32[]."""
    code, scale_N1 = run_on.encode(at.sae, x_STX.reshape(-1, x_STX.shape[-1]))
    indices_NK, values_NK = np.asarray(code.indices), np.asarray(code.values)
    values_LN = np.stack([np.where(indices_NK == latent, values_NK, 0.0).sum(1) for latent in latents_L])
    return values_LN, scale_N1


@partial(jax.jit, static_argnames="hook")
def _clean(model: lm.LanguageModel, ids_ST: jax.Array, is_row_ST: jax.Array, hook: lm.Hook) -> lm.ReplacedSite:
    return lm.replaced_site(model, ids_ST, is_row_ST, hook, with_later=False)


@jax.jit
def _steered(
    clean: lm.ReplacedSite,
    counted_ST: jax.Array,
    value_N: jax.Array,
    scale_N1: jax.Array,
    direction_Y: jax.Array,
    targets_C: jax.Array,
) -> jax.Array:
    """(cross-entropy lost, KL) with a latent held at each target, sums over what counts: f32[C, 2]."""

    def of_one(target: jax.Array) -> jax.Array:
        change_NY = scale_N1 * (target - value_N)[:, None] * direction_Y[None]
        logits_STV, _ = clean.with_rows(clean.rows + change_NY)
        lost_ST = lm.cross_entropy(logits_STV, clean.ids) - lm.cross_entropy(clean.logits, clean.ids)
        kl_ST = lm.kl_divergence(clean.logits[:, :-1], logits_STV[:, :-1])
        return jnp.stack([(lost_ST * counted_ST).sum(), (kl_ST * counted_ST).sum()])

    return jax.lax.map(of_one, targets_C)
