"""Fragments of text in which a latent fires, and others: what a judge or a person is shown.

A text gives one fragment at most. Texts are ranked by the latent's largest value in them, and the fragment has that
place in its middle, as far as the text allows. What has no row at its ends (padding, a token that texts begin with) is
left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sae_jax import lm
from sae_jax.analysis.examples import Activations
from sae_jax.analysis.store import Plan, Store
from sae_jax.types import UserError, check_indices

N_TOKENS = 64  # of a fragment
N_SHOWN = 5  # for an explanation
LEVELS = 10  # that values are rounded to


class Fragment(NamedTuple):
    """A piece of text, and a latent's values on it."""

    tokens: tuple[str, ...]  # T; bytes that are no UTF-8 on their own as the handler "surrogateescape" has them
    values: np.ndarray  # f32[T]

    def levels(self, largest: float) -> np.ndarray:
        """Values as whole numbers i64[T] from 0 to LEVELS, which stands for `largest`."""
        return np.clip(np.rint(LEVELS * self.values / largest), 0, LEVELS).astype(np.int64)


@dataclass(frozen=True)
class Simulated:
    """What a simulation is made on: the texts after those that are shown, and some of the rest at random."""

    top: list[Fragment]
    random: list[Fragment]

    N_TOP, N_RANDOM = 5, 5
    N_TEXTS = N_SHOWN + N_TOP + N_RANDOM  # that it takes


@dataclass(frozen=True)
class Shuffled:
    """What a detection is made on: two more of the strongest texts, two drawn by their values, ten at random."""

    fragments: list[Fragment]

    N_TOP, N_WEIGHTED, N_RANDOM = 2, 2, 10
    N_TEXTS = N_SHOWN + N_TOP + N_WEIGHTED


class Texts:
    """Fragments of the texts of a store."""

    def __init__(self, table: Activations, token_strings: Sequence[str]) -> None:
        """UserError for tokens without a string."""
        cure = "name the tokenizer of the store's text with --tokenizer"
        check_indices(table.sequences, len(token_strings), "token id", cure)
        self.table, self._strings = table, token_strings

    @classmethod
    def of(cls, store: Store, tokenizer: str | None) -> Texts:
        """The texts of a store, whose tokenizer lies where the store says, or at `tokenizer`."""
        return cls(store.open(), strings_of(store.plan, str(store.path), tokenizer))

    def n_texts(self, latent: int) -> int:
        """In how many texts a latent fires."""
        places, _ = self.table.of_latent(latent)
        return len(np.unique(places // self.table.sequences.shape[1]))

    def largest(self, latent: int) -> float:
        """The largest value of a latent."""
        return float(self.table.of_latent(latent)[1].max(initial=0.0))

    def strongest(self, latent: int, n: int = N_SHOWN) -> list[Fragment]:
        """One fragment of each of the n texts in which a latent is strongest, strongest first."""
        top = self.table.top(latent, n, one_per_sequence=True)
        return self._fragments(latent, top.seq, top.pos)

    def simulated(self, latent: int, rng: np.random.Generator) -> Simulated:
        """Of a latent that fires in Simulated.N_TEXTS texts or more."""
        seq_E, pos_E, _ = self._ranked(latent)
        end = N_SHOWN + Simulated.N_TOP
        drawn = end + rng.choice(len(seq_E) - end, Simulated.N_RANDOM, replace=False)
        return Simulated(*(self._fragments(latent, seq_E[at], pos_E[at]) for at in (slice(N_SHOWN, end), drawn)))

    def shuffled(self, latent: int, rng: np.random.Generator) -> Shuffled:
        """Of a latent that fires in Shuffled.N_TEXTS texts or more."""
        seq_E, pos_E, value_E = self._ranked(latent)
        end = N_SHOWN + Shuffled.N_TOP
        weights = value_E[end:].astype(np.float64)
        weighted = end + rng.choice(len(weights), Shuffled.N_WEIGHTED, replace=False, p=weights / weights.sum())
        chosen = np.append(np.arange(N_SHOWN, end), weighted)
        has_row_QT = self.table.has_row
        others = np.setdiff1d(np.flatnonzero(has_row_QT.any(axis=1)), seq_E[np.append(np.arange(N_SHOWN), chosen)])
        seq_R = rng.choice(others, min(Shuffled.N_RANDOM, len(others)), replace=False)
        pos_R = np.array([rng.choice(np.flatnonzero(has_row_QT[seq])) for seq in seq_R], np.int32)
        seq, pos = np.append(seq_E[chosen], seq_R), np.append(pos_E[chosen], pos_R)
        order = rng.permutation(len(seq))
        return Shuffled(self._fragments(latent, seq[order], pos[order]))

    def _ranked(self, latent: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every text in which a latent fires: its number, the place of the largest value, and that; strongest first."""
        top = self.table.top(latent, len(self.table.sequences), one_per_sequence=True)
        return top.seq, top.pos, top.value

    def _fragments(self, latent: int, seq_E: np.ndarray, pos_E: np.ndarray) -> list[Fragment]:
        n_pos = self.table.sequences.shape[1]
        n_tokens = min(N_TOKENS, n_pos)
        start_E = np.clip(pos_E - n_tokens // 2, 0, n_pos - n_tokens)
        fragments = []
        for seq, start, value_T in zip(
            seq_E, start_E, self.table.windows(latent, seq_E, start_E, n_tokens), strict=True
        ):
            has_row = np.flatnonzero(self.table.has_row[seq, start : start + n_tokens])
            part = slice(has_row[0], has_row[-1] + 1)
            ids = self.table.sequences[seq, start : start + n_tokens][part]
            fragments.append(Fragment(tuple(self._strings[i] for i in ids), value_T[part]))
        return fragments


def strings_of(plan: Plan, where: str, tokenizer: str | None) -> list[str]:
    """The string of every token. UserError if the tokenizer is not that of the store's text."""
    reference = tokenizer or plan.tokenizer
    if reference is None:
        raise UserError(f"{where} names no tokenizer; name that of its text with --tokenizer")
    vocabulary = lm.tokenizer(reference, recorded=tokenizer is None)
    if tokenizer is None and plan.tokenizer_digest not in (None, vocabulary.digest):
        raise UserError(
            f"the tokenizer of {reference} is not that which {where} was made with; name it with --tokenizer"
        )
    return vocabulary.tokens(range(vocabulary.size))


def readable(tokens: Sequence[str]) -> str:
    """The text of tokens, with U+FFFD for bytes that are no UTF-8."""
    return "".join(tokens).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
