"""Are the codes the best that these latents can do, and how does the reconstruction grow with them?

    refinement_change    the active latents of a row kept, their values chosen anew to minimise the squared error, not
                         below 0: (sum of new - sum of old) / sum of old, mean over rows. Above 0: the encoder's values
                         are shrunk. A sum, since the relative change of a value near 0 is as large as you like
    fvu_refined          FVU with these values; the distance from FVU is what the encoder loses
    fvu_by_k             FVU with the k' strongest latents of each row alone, k' = 1, 2, 4, ...; of TopK dictionaries
                         also for more than they were trained with

Source: refinement: Wright and Sharkey 2024 as used by Gao et al. 2024, arXiv 2406.04093, section 5.1 and figure 9;
progressive codes: the same, section 5.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.analysis.bootstrap import mean_and_interval
from sae_jax.evaluation import study
from sae_jax.evaluation.base import Description, Metric, gathered, interval, of_units
from sae_jax.evaluation.study import Case
from sae_jax.progress import Progress
from sae_jax.saes.base import AbstractSae
from sae_jax.saes.normalise import PER_VECTOR
from sae_jax.saes.topk import TopK
from sae_jax.types import Code, UsageError

BLOCK = 16  # sequences
N_STEPS = 300  # of the accelerated projected gradient
ENTRIES = 2**25  # of decoder rows gathered at once


@dataclass(frozen=True)
class Study(study.Study):
    """Refined and progressive codes."""

    n_rows: int = 2048

    SUITE = "openai"
    VERSION = 3
    ORDER = 140
    METRICS: ClassVar[Mapping[str, Description]] = {
        "refinement_change": Description(
            "refinement",
            "relative change of a row's active values when fitted anew: above 0, they were shrunk",
        ),
        "fvu_refined": Description("FVU, refined", "with these values"),
        "fvu_by_k": Description("FVU by k", "with so many of the strongest latents of each row", in_table=False),
    }

    def metrics(self, case: Case) -> Iterator[Metric]:
        """See Study."""
        sae = case.subject.sae
        if case.subject.encoded != case.subject.reconstructed:
            raise UsageError("the dictionary writes elsewhere than it reads, so its rows are not what it reconstructs")
        if sae.config.input_norm in PER_VECTOR:
            raise UsageError(f"values in units of each row's {sae.config.input_norm} are not compared over rows")
        rows, sequences, n_rows = [], [], 0
        for i, block in enumerate(case.blocks(len(case.text.sequences), BLOCK)):
            rows.append(block.x[block.is_row])
            sequences.append(np.nonzero(block.is_row)[0] + i * BLOCK)
            n_rows += len(rows[-1])
            if n_rows >= self.n_rows:
                break
        x_NX, sequence_N = (np.concatenate(parts)[: self.n_rows] for parts in (rows, sequences))
        if not len(x_NX):
            return
        offset2_N = ((x_NX - x_NX.mean(0, dtype=np.float64)) ** 2).sum(1)

        def fvu(name: str, x_hat_NX: jax.Array) -> Metric:
            both_N2 = np.stack([((x_NX - np.asarray(x_hat_NX)) ** 2).sum(1, dtype=np.float64), offset2_N], 1)
            by_sequence_U2 = np.zeros((sequence_N.max() + 1, 2))
            np.add.at(by_sequence_U2, sequence_N, both_N2)
            error2, offset2 = both_N2.sum(0)
            value = float(error2 / offset2) if offset2 else float("nan")
            return Metric(name, value, interval(of_units(by_sequence_U2), value, (1, 0), (0, 1)))

        code = sae.encode(x_NX)
        refined_NK = self._refined(sae, code, x_NX)
        old_N, new_N = (np.asarray(values_NK, np.float64).sum(1) for values_NK in (code.values, refined_NK))
        has_any_N = old_N > 0
        if has_any_N.any():
            yield Metric("refinement_change", *mean_and_interval((new_N / old_N.clip(1e-30) - 1)[has_any_N], case.seed))
        yield fvu("fvu_refined", sae.decode(Code(code.indices, refined_NK)))
        if offset2_N.any():
            yield gathered("fvu_by_k", [fvu(str(k), x_hat_NX) for k, x_hat_NX in _by_k(sae, x_NX, code)])

    def _refined(self, sae: AbstractSae, code: Code, x_NX: np.ndarray) -> jax.Array:
        n, n_slots = code.values.shape
        size = max(min(ENTRIES // (n_slots * x_NX.shape[1]), n), 1)
        parts = []
        with Progress("refine", n, "rows") as progress:
            for first in range(0, n, size):
                here = slice(first, first + size)
                fill = size - len(x_NX[here])
                indices, values = (jnp.pad(part[here], ((0, fill), (0, 0))) for part in (code.indices, code.values))
                target = np.pad(x_NX[here], ((0, fill), (0, 0)))
                parts.append(_refine(sae, Code(indices, values), jnp.asarray(target))[: size - fill])
                progress.update(min(first + size, n))
        return jnp.concatenate(parts)


def _by_k(sae: AbstractSae, x_NX: np.ndarray, code: Code) -> Iterator[tuple[int, jax.Array]]:
    """(k, reconstruction of the k strongest latents of each row)."""
    n_slots = code.values.shape[1]
    if isinstance(sae, TopK):
        n_slots = min(4 * n_slots, sae.config.n_latents)
        code = replace(sae, config=replace(sae.config, k=n_slots, multi_topk=0.0, k_start=0, k_steps=0)).encode(x_NX)
    k = 1
    while True:
        yield min(k, n_slots), sae.decode(Code(code.indices[:, :k], code.values[:, :k]))
        if k >= n_slots:
            return
        k *= 2


@jax.jit
def _refine(sae: AbstractSae, code: Code, x_BX: jax.Array) -> jax.Array:
    """Values f32[B, K] >= 0 of the active latents of each row that minimise ||x - decode||^2; others stay 0.

    Accelerated projected gradient (Beck and Teboulle 2009), on the Gram matrix of each row's latents.
    """
    is_active_BK = code.values > 0
    rows_BKX = jnp.where(is_active_BK[..., None], sae.w_dec[code.indices].astype(jnp.float32), 0.0)
    precise = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    gram_BKK = precise("bkx,bjx->bkj", rows_BKX, rows_BKX)
    target_BX = x_BX - sae.decode_rows(Code(code.indices, jnp.zeros_like(code.values)))
    along_BK = precise("bkx,bx->bk", rows_BKX, target_BX)
    # The largest eigenvalue is at most the largest sum of sizes in a row of the matrix.
    step_B1 = 1 / jnp.maximum(jnp.abs(gram_BKK).sum(-1).max(-1), 1e-30)[:, None]

    def descend(_: int, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        z_BK, ahead_BK, t = carry
        slope_BK = precise("bkj,bj->bk", gram_BKK, ahead_BK) - along_BK
        new_BK = jnp.where(is_active_BK, jnp.maximum(ahead_BK - step_B1 * slope_BK, 0.0), 0.0)
        t_new = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
        return new_BK, new_BK + (t - 1) / t_new * (new_BK - z_BK), t_new

    return jax.lax.fori_loop(0, N_STEPS, descend, (code.values, code.values, jnp.ones(())))[0]
