"""Rows far larger than the others: which positions to leave out of a set, and what was left out.

The first token of a sequence draws attention from everywhere and can carry a hundred times the usual norm; a few such
rows would make up most of the variance, and the error of a dictionary would be theirs.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from sae_jax.lm import Tokenizer

MULTIPLE = 10.0  # of the median norm: what is beyond it is called a sink
N_NAMED = 3  # positions and tokens that are told


def keep(ids_ST: np.ndarray, norm_STS: np.ndarray | None, special: np.ndarray, multiple: float | None) -> np.ndarray:
    """Which positions count, bool [S, T]: no special tokens, and no norms far above the median at any hook.

    Args:
        ids_ST: i32, token ids.
        norm_STS: f32, of the activations at each hook.
        special: ids that stand for no text.
        multiple: of the median over positions that count; None: all norms do.
    """
    keep_ST = ~np.isin(ids_ST, special)
    if multiple is None or norm_STS is None:
        return keep_ST
    return keep_ST & ~above(norm_STS, keep_ST, multiple)


def above(norm_STS: np.ndarray, keep_ST: np.ndarray, multiple: float) -> np.ndarray:
    """bool[S, T]: whether a norm exceeds `multiple` of the median over `keep_ST`, at any hook."""
    if not keep_ST.any():
        return np.zeros_like(keep_ST)
    return np.any(norm_STS > multiple * np.median(norm_STS[keep_ST], axis=0), axis=-1)


class Sinks:
    """Counts rows above MULTIPLE of the median norm by position and token."""

    def __init__(self, special: np.ndarray) -> None:
        self._special = special
        self._positions: Counter[int] = Counter()
        self._tokens: Counter[int] = Counter()
        self._n_rows = self.n = 0

    def add(self, ids_ST: np.ndarray, norm_STS: np.ndarray) -> None:
        """The sequences of a shard, or of a sample."""
        text_ST = keep(ids_ST, None, self._special, None)
        sink_ST = text_ST & above(norm_STS, text_ST, MULTIPLE)
        self._n_rows += int(text_ST.sum())
        self.n += int(sink_ST.sum())
        self._positions.update(np.nonzero(sink_ST)[1].tolist())
        self._tokens.update(ids_ST[sink_ST].tolist())

    def told(self, tokenizer: Tokenizer) -> str:
        """How many there are and where, for a person."""
        positions = ", ".join(f"{n:,} at position {position}" for position, n in self._positions.most_common(N_NAMED))
        common = self._tokens.most_common(N_NAMED)
        texts = tokenizer.tokens([i for i, _ in common])
        tokens = ", ".join(f"{text!r} {n:,} times" for text, (_, n) in zip(texts, common, strict=True))
        return (
            f"{self.n:,} of {self._n_rows:,} rows have over {MULTIPLE:g} times the median norm: most often "
            f"{positions}; tokens {tokens}"
        )
