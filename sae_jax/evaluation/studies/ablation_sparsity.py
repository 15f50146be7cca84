"""How many of the next logits one latent moves: the sparsity of what its ablation does.

    v[t, w]   change of logit w at the token and the 15 after it, when z_i = 0 at that token alone; the dictionary's
              error stays, so that nothing else of the activation changes
    value     (||v||_1 / ||v||_2)^2 / (V T), after the median of each position was subtracted, as what moves all logits
              of a position alike moves no probability

It is the share of logits that effects of one size would touch: 1 / (V T) if a single one moves, 2 / pi for Gaussian
effects on all. The mean is over tokens and active latents: tokens are drawn at random, and one of the active latents of
each. Beside it stand two other changes at the same tokens: a random channel set to its mean, and a random direction of
the length that the latent's part had.

Source: Gao et al. 2024, arXiv 2406.04093, section 4.5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.analysis.bootstrap import mean_and_interval
from sae_jax.evaluation import run_on, study
from sae_jax.evaluation.base import Description, Metric
from sae_jax.evaluation.study import Block, Case
from sae_jax.progress import Progress

CHANGES = ("", "_channels", "_random")  # in the names of metrics
AT_ONCE = 8  # tokens, of which all changes are run on together


def effect_sparsity(v_TV: jax.Array) -> jax.Array:
    """(||v||_1 / ||v||_2)^2 / (V T) of effects f32[..., T, V] less the median of each position: f32[...].

    Between 1 / (V T) and 1. NaN where nothing is left of them.
    """
    v_TV = v_TV - jnp.median(v_TV, axis=-1, keepdims=True)
    # By the largest first: squares of small effects are below what float32 holds.
    v_TV = jnp.abs(v_TV) / jnp.abs(v_TV).max((-2, -1), keepdims=True)
    return v_TV.sum((-2, -1)) ** 2 / (v_TV**2).sum((-2, -1)) / (v_TV.shape[-2] * v_TV.shape[-1])


@dataclass(frozen=True)
class Study(study.Study):
    """Ablates latents at single tokens."""

    SUITE = "openai"
    ORDER = 130
    METRICS = {  # noqa: RUF012
        "ablation_sparsity": Description(
            "ablation sparsity", "share of the next logits that one latent moves when it is ablated; lower: fewer"
        ),
        "ablation_sparsity_channels": Description(
            "ablation sparsity, channels", "the same of single channels of the activation, set to their mean"
        ),
        "ablation_sparsity_random": Description(
            "ablation sparsity, random", "the same of random directions, of the length that the latent's part had"
        ),
        "n_ablations": Description("ablations", "tokens at which one active latent was ablated", in_table=False),
    }

    n_sequences: int = 64
    n_tokens: int = 8  # of each sequence
    n_positions: int = 16  # the token and those after it

    def metrics(self, case: Case) -> Iterator[Metric]:
        """See study.Study."""
        at = run_on.place(case.subject)
        rng = np.random.default_rng(case.seed)
        n = min(self.n_sequences, len(case.text.sequences))
        n_positions = min(self.n_positions, case.text.sequences.shape[1])
        mean_Y = _mean(case, at, n)
        values, sequences = [np.zeros((0, len(CHANGES)))], [np.zeros(0, int)]
        with Progress("ablation sparsity", n, "sequences") as progress:
            for i, block in enumerate(case.blocks(n, AT_ONCE)):
                clean = run_on.read(at.model, jnp.asarray(block.ids), at.encoded, at.reconstructed)
                sequence_N, position_N = self._draw(block, n_positions, rng)
                is_active_N, changes_NCY = _changes(at, clean, sequence_N, position_N, mean_Y, rng)
                values.append(_values(clean, sequence_N, position_N, changes_NCY, n_positions)[is_active_N])
                sequences.append(sequence_N[is_active_N] + i * AT_ONCE)
                progress.update(min((i + 1) * AT_ONCE, n))
        values_NC, sequence_N = np.concatenate(values), np.concatenate(sequences)
        has_effect_N = np.isfinite(values_NC).all(1)  # a decoder row of zeros has none
        values_NC, sequence_N = values_NC[has_effect_N], sequence_N[has_effect_N]
        if not len(values_NC):
            return
        for name, values_N in zip(CHANGES, values_NC.T, strict=True):
            yield Metric(f"ablation_sparsity{name}", *mean_and_interval(values_N, case.seed, sequence_N))
        yield Metric("n_ablations", len(values_NC))

    def _draw(self, block: Block, n_positions: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(sequence i64[N], position i64[N]) of tokens that are rows and have enough tokens after them."""
        is_row_ST = block.is_row[:, : block.ids.shape[1] - n_positions + 1]
        drawn = [
            (s, t)
            for s, is_row_T in enumerate(is_row_ST)
            for t in rng.permutation(np.flatnonzero(is_row_T))[: self.n_tokens]
        ]
        sequence_N, position_N = np.array(drawn, int).reshape(-1, 2).T
        return sequence_N, position_N


def _mean(case: Case, at: run_on.Place, n_sequences: int) -> np.ndarray:
    """Of what is reconstructed, over the rows of the text, f64[Y]."""
    total_Y, count = np.zeros(at.sae.w_dec.shape[1]), 0
    for block in case.blocks(n_sequences, AT_ONCE):
        clean = run_on.read(at.model, jnp.asarray(block.ids), at.encoded, at.reconstructed)
        total_Y += np.asarray(clean.y)[block.is_row].sum(0, dtype=np.float64)
        count += block.is_row.sum()
    return total_Y / max(count, 1)


def _changes(
    at: run_on.Place,
    clean: run_on.Clean,
    sequence_N: np.ndarray,
    position_N: np.ndarray,
    mean_Y: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """(whether any latent is active bool[N], the changes of each token f32[N, 1 + C, Y], the first of them none)."""
    x_NX, y_NY = (np.asarray(part)[sequence_N, position_N] for part in (clean.x, clean.y))
    n, width = y_NY.shape
    changes_NCY = np.zeros((n, 1 + len(CHANGES), width), np.float32)
    if not n:
        return np.zeros(0, bool), changes_NCY
    code = run_on.amounts(at.sae, x_NX)
    indices_NK, amounts_NK = np.asarray(code.indices), np.asarray(code.values)
    is_active_NK = amounts_NK > 0
    slot_N = np.argmax(np.where(is_active_NK, rng.random(is_active_NK.shape), -1.0), axis=1)
    chosen = np.arange(n), slot_N
    rows_NY = np.asarray(at.sae.w_dec[indices_NK[chosen]], np.float32)
    changes_NCY[:, 1] = -amounts_NK[chosen][:, None] * rows_NY
    channel_N = rng.integers(0, width, n)
    changes_NCY[np.arange(n), 2, channel_N] = mean_Y[channel_N] - y_NY[np.arange(n), channel_N]
    random_NY = rng.standard_normal((n, width))
    size_N = np.linalg.norm(changes_NCY[:, 1], axis=1) / np.linalg.norm(random_NY, axis=1)
    changes_NCY[:, 3] = random_NY * size_N[:, None]
    return amounts_NK.max(1) > 0, changes_NCY


def _values(
    clean: run_on.Clean, sequence_N: np.ndarray, position_N: np.ndarray, changes_NCY: np.ndarray, n_positions: int
) -> np.ndarray:
    """The value of each change but the first, f64[N, C]."""
    values = [np.zeros((0, len(CHANGES)))]
    for first in range(0, len(sequence_N), AT_ONCE):
        parts = (part[first : first + AT_ONCE] for part in (sequence_N, position_N, changes_NCY))
        # The last few are filled up, so that all share a program.
        filled = [np.pad(part, ((0, AT_ONCE - len(part)), *((0, 0),) * (part.ndim - 1))) for part in parts]
        values.append(np.asarray(_sparsity(clean, *filled, n_positions=n_positions), np.float64))
    return np.concatenate(values)[: len(sequence_N)]


@partial(jax.jit, static_argnames="n_positions")
def _sparsity(
    clean: run_on.Clean, sequence_P: jax.Array, position_P: jax.Array, changes_PCY: jax.Array, n_positions: int
) -> jax.Array:
    def of_one(token: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        logits_CWV = run_on.logits_after(clean, *token, n_positions)
        # Without a change they come of the same program, rounded alike: tiny effects are not drowned in its rounding.
        return effect_sparsity(logits_CWV[1:] - logits_CWV[:1])

    return jax.lax.map(of_one, (sequence_P, position_P, changes_PCY))
