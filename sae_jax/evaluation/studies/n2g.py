"""How well n-grams with wildcards tell when a latent fires (n2g.py).

Latents are drawn from those that fire in both halves of the text. The first half gives each latent's strongest
activations, one a sequence, of which patterns are made; on all rows of the second, with P rows at which a pattern fits
and A rows on which the latent is active,

    precision = both / P      recall = both / A      F1 = 2 both / (P + A)

averaged over latents, the precision over those that have a pattern which fits somewhere. The neutral token is the
commonest one of the first half that is not special.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sae_jax.analysis.bootstrap import mean_and_interval
from sae_jax.evaluation import study
from sae_jax.evaluation.base import Description, Metric
from sae_jax.evaluation.n2g import Example, Trie, in_model, make_patterns
from sae_jax.evaluation.study import Case


@dataclass(frozen=True)
class Study(study.Study):
    """Neuron to graph."""

    n_latents: int = 50
    n_examples: int = 16  # of each latent
    n_sequences: int = 512  # half of which patterns are made of
    longest: int = 32  # tokens of a pattern

    SUITE: ClassVar[str] = "openai"
    ORDER = 120
    VERSION = 2
    METRICS: ClassVar[dict[str, Description]] = {
        "n2g_precision": Description("N2G precision", "share of the places fitting a latent's n-grams where it fires"),
        "n2g_recall": Description("N2G recall", "share of a latent's activations on places that fit its n-grams"),
        "n2g_f1": Description("N2G F1", "harmonic mean of precision and recall of n-grams, mean over latents"),
        "n2g_too_long": Description(
            "N2G too long", "share of examples in which a latent needs more tokens than an n-gram may have"
        ),
    }

    def metrics(self, case: Case) -> Iterator[Metric]:
        """See study.Study. Nothing where no latent fires in both halves of the text."""
        n = min(self.n_sequences, len(case.text.sequences)) // 2 * 2
        both_F = np.flatnonzero(_counts(case, n).min(axis=0)) if n else np.zeros(0, int)
        if not len(both_F):
            return
        rng = np.random.default_rng(case.seed)
        latents_L = np.sort(rng.choice(both_F, min(self.n_latents, len(both_F)), replace=False))
        values_QTL, is_row_QT = _values(case, n, latents_L)
        first, half = case.subject.first, n // 2
        texts = [ids_T if ids_T[0] == first else np.append(np.int32(first), ids_T) for ids_T in case.text.sequences[:n]]
        examples = [
            example
            for latent, values_QT in zip(latents_L.tolist(), np.moveaxis(values_QTL[:half], -1, 0), strict=True)
            for example in _strongest(latent, values_QT, texts, self.n_examples)
        ]
        room = (case.subject.model.spec.n_context or self.longest + 2) - 2  # what stands before a pattern
        neutral = _commonest(case, half)
        patterns = make_patterns(examples, in_model(case.subject), first, neutral, min(self.longest, room))
        tries = {latent: Trie() for latent in latents_L.tolist()}
        for example, pattern in zip(examples, patterns, strict=True):
            if pattern is not None:
                tries[example.latent].add(pattern, example.value)
        counts_L3 = np.array(
            [
                _agreement(tries[latent], values_QT > 0, texts[half:], is_row_QT[half:])
                for latent, values_QT in zip(latents_L.tolist(), np.moveaxis(values_QTL[half:], -1, 0), strict=True)
            ]
        )
        both_L, fits_L, active_L = counts_L3.T
        if fits_L.any():
            precision_L = (both_L / np.maximum(fits_L, 1))[fits_L > 0]
            yield Metric("n2g_precision", *mean_and_interval(precision_L, case.seed))
        yield Metric("n2g_recall", *mean_and_interval(both_L / active_L, case.seed))
        yield Metric("n2g_f1", *mean_and_interval(2 * both_L / (fits_L + active_L), case.seed))
        is_too_long = [pattern is None for pattern in patterns]
        of_latent = np.array([example.latent for example in examples])
        yield Metric("n2g_too_long", *mean_and_interval(np.array(is_too_long), case.seed, of_latent))


def _counts(case: Case, n: int) -> np.ndarray:
    """Activations of each latent in the first and in the second half of n sequences, i64[2, F]."""
    n_latents = case.subject.sae.b_enc.shape[0]
    counts_2F = np.zeros((2, n_latents), np.int64)
    for seq_S, is_row_ST, indices_STK, values_STK in _codes(case, n):
        for half, is_in_S in enumerate((seq_S < n // 2, seq_S >= n // 2)):
            is_active_STK = (values_STK > 0) & (is_row_ST & is_in_S[:, None])[:, :, None]
            counts_2F[half] += np.bincount(indices_STK[is_active_STK], minlength=n_latents)
    return counts_2F


def _values(case: Case, n: int, latents_L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values f32[n, T, L] of some latents, 0 where there is no row; and where there is one, bool[n, T]."""
    is_row_QT = np.zeros((n, case.text.sequences.shape[1]), bool)
    values_QTL = np.zeros((*is_row_QT.shape, len(latents_L)), np.float32)
    slot_F = np.full(case.subject.sae.b_enc.shape[0], -1)
    slot_F[latents_L] = np.arange(len(latents_L))
    for seq_S, is_row_ST, indices_STK, values_STK in _codes(case, n):
        is_row_QT[seq_S] = is_row_ST
        slot_STK = slot_F[indices_STK]
        s, t, k = np.nonzero((slot_STK >= 0) & (values_STK > 0) & is_row_ST[:, :, None])
        values_QTL[seq_S[s], t, slot_STK[s, t, k]] = values_STK[s, t, k]
    return values_QTL, is_row_QT


def _codes(case: Case, n: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Numbers [S] of sequences, their rows bool[S, T], and latents and values [S, T, K], block by block."""
    begin = 0
    for block in case.blocks(n):
        seq_S = np.arange(begin, min(begin + len(block.ids), n))
        begin += len(seq_S)
        code = case.subject.sae.encode(block.x)
        is_row, indices, values = (np.asarray(x)[: len(seq_S)] for x in (block.is_row, code.indices, code.values))
        yield seq_S, is_row, indices, values


def _strongest(latent: int, values_QT: np.ndarray, texts: list[np.ndarray], n: int) -> Iterator[Example]:
    """The strongest activation of the latent in each of n sequences, strongest first."""
    at_Q, value_Q = values_QT.argmax(axis=1), values_QT.max(axis=1)
    for q in np.argsort(-value_Q, kind="stable")[:n].tolist():
        if value_Q[q] > 0:
            text = texts[q]
            end = len(text) - values_QT.shape[1] + int(at_Q[q]) + 1  # a first token may stand before the sequence
            yield Example(text[:end], latent, float(value_Q[q]))


def _commonest(case: Case, half: int) -> int:
    ids = case.text.sequences[:half]
    ids = ids[~np.isin(ids, case.subject.tokenizer.special_ids)]
    return int(np.bincount(ids).argmax())


def _agreement(
    trie: Trie, is_active_QT: np.ndarray, texts: list[np.ndarray], is_row_QT: np.ndarray
) -> tuple[int, int, int]:
    """(rows that are active and fit, that fit, that are active)."""
    n_pos = is_row_QT.shape[1]
    fits_QT = np.stack([trie.predict(text)[-n_pos:] > 0 for text in texts]) & is_row_QT
    return int((fits_QT & is_active_QT).sum()), int(fits_QT.sum()), int(is_active_QT.sum())
