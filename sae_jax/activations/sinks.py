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


def keep(text_ST: np.ndarray, norm_STS: np.ndarray, multiple: float | None) -> np.ndarray:
    """Which positions count, bool [S, T]: those of text, without norms far above the median at any hook.

    Args:
        text_ST: bool, positions of text.
        norm_STS: f32, of the activations at each hook.
        multiple: of the median over positions of text; None: all norms count.
    """
    return text_ST if multiple is None else text_ST & ~above(norm_STS, text_ST, multiple)


def above(norm_STS: np.ndarray, text_ST: np.ndarray, multiple: float) -> np.ndarray:
    """bool[S, T]: whether a norm exceeds `multiple` of the median over `text_ST`, at any hook."""
    if not text_ST.any():
        return np.zeros_like(text_ST)
    return np.any(norm_STS > multiple * np.median(norm_STS[text_ST], axis=0), axis=-1)


class Sinks:
    """Counts rows above MULTIPLE of the median norm by position and token."""

    def __init__(self) -> None:
        self._positions: Counter[int] = Counter()
        self._tokens: Counter[int] = Counter()
        self._n_rows = self.n = 0

    def add(self, ids_ST: np.ndarray, text_ST: np.ndarray, norm_STS: np.ndarray) -> None:
        """The sequences of a shard, or of a sample; see `keep`."""
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
