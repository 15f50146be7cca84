"""Neuron to graph (N2G): when a latent fires, as n-grams with wildcards.

From each example, a text that ends with a token on which the latent has the value v, a pattern is made:

    1. the shortest ending of the text on which the latent still has at least v / 2;
    2. a token of it becomes a wildcard if the latent keeps more than half when a neutral token takes its place;
    3. if the latent loses half or more when the neutral token comes before the ending, the pattern begins with the
       token that texts begin with: it holds at the beginning of a text alone.

The patterns of a latent form a trie, read from the last token backwards. At each token of another text the latent is
predicted to have the first value met on the way down, where an exact token is tried before the wildcard.

Source: Foote et al. 2023, arXiv 2305.19911; cut and shortened as in Gao et al. 2024, arXiv 2406.04093, section 4.3.
Deviations: every text that is run begins with the token that texts begin with. The neutral token is left to the caller,
since few tokenizers have a padding token that a model has learnt anything of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sae_jax.activations.forward import read_hooks
from sae_jax.evaluation.prompts import Subject
from sae_jax.progress import Progress

WILDCARD = -1
KEPT = 0.5  # of an activation
LENGTHS_AT_ONCE = 4  # endings of so many lengths are tried together
BATCH = 128  # texts

Pattern = tuple[int, ...]  # token ids, as they are read

# Values f32[N] of latents i64[N] at the last token of N texts i32[T].
Activation = Callable[[Sequence[np.ndarray], Sequence[int]], np.ndarray]


class Example(NamedTuple):
    """A text up to a token on which a latent fires."""

    text: np.ndarray  # i32[T], T >= 2, from the token that texts begin with
    latent: int
    value: float  # at the last token


class Trie:
    """Patterns by their tokens from the last one backwards."""

    def __init__(self) -> None:
        self._value: float | None = None  # of the pattern that ends here
        self._below: dict[int, Trie] = {}

    def add(self, pattern: Pattern, value: float) -> None:
        """Enter a pattern; of equal ones the first stays."""
        node = self
        for token in reversed(pattern):
            node = node._below.setdefault(token, Trie())
        if node._value is None:
            node._value = value

    def predict(self, text: np.ndarray) -> np.ndarray:
        """Predicted values f32[T] at the tokens of a text; 0 where no pattern fits."""
        tokens = text.tolist()
        return np.array([self._at(tokens, at) for at in range(len(tokens))], np.float32)

    def _at(self, tokens: list[int], at: int) -> float:
        if self._value is not None:
            return self._value
        if at >= 0:
            for token in (tokens[at], WILDCARD):
                if (node := self._below.get(token)) is not None and (value := node._at(tokens, at - 1)):
                    return value
        return 0.0


def make_patterns(
    examples: Sequence[Example], activation: Activation, first: int, neutral: int, longest: int
) -> list[Pattern | None]:
    """A pattern of each example; None where no ending of at most `longest` tokens keeps half of the value.

    Args:
        examples: of any latents.
        activation: runs texts.
        first: the token that texts begin with.
        neutral: the token that takes the place of others.
        longest: tokens of a pattern.
    """
    endings = _shortest_endings(examples, activation, first, longest)
    runs = [_Run(e, position, text) for e, ending in enumerate(endings) for position, text in _edited(ending, neutral)]
    values = activation([_begun(run.text, first) for run in runs], [examples[run.example].latent for run in runs])
    patterns: list[list[int] | None] = [None if ending is None else ending.tokens.tolist() for ending in endings]
    for run, value in zip(runs, values, strict=True):
        pattern, ending = patterns[run.example], endings[run.example]
        assert pattern is not None
        assert ending is not None
        is_kept = value > KEPT * ending.value
        if run.position is None:
            # The last run of its example: positions do not move any more.
            patterns[run.example] = pattern if is_kept else [first, *pattern]
        elif is_kept:
            pattern[run.position] = WILDCARD
    return [None if pattern is None else tuple(pattern) for pattern in patterns]


def in_model(subject: Subject) -> Activation:
    """The `Activation` of a dictionary in its language model."""

    def activation(texts: Sequence[np.ndarray], latents: Sequence[int]) -> np.ndarray:
        values_N = np.zeros(len(texts), np.float32)
        for batch, ids_BT in _batches(texts):
            acts, _ = read_hooks(subject.model, ids_BT, subject.encoded, "float32")
            last_B = np.zeros(BATCH, np.int64)
            last_B[: len(batch)] = [len(texts[i]) - 1 for i in batch]
            rows = [np.asarray(acts[str(hook)])[np.arange(BATCH), last_B] for hook in subject.encoded]
            code = subject.sae.encode(np.concatenate(rows, axis=-1))
            indices_BK, values_BK = np.asarray(code.indices)[: len(batch)], np.asarray(code.values)[: len(batch)]
            is_it_BK = indices_BK == np.array([latents[i] for i in batch])[:, None]
            values_N[batch] = np.where(is_it_BK, values_BK, 0).sum(axis=1)
        return values_N

    return activation


class _Ending(NamedTuple):
    tokens: np.ndarray  # i32[T]
    value: float  # of the latent, on it alone


class _Run(NamedTuple):
    """An ending with one change."""

    example: int
    position: int | None  # of the token that was replaced; None: the neutral token came before it
    text: np.ndarray


def _shortest_endings(
    examples: Sequence[Example], activation: Activation, first: int, longest: int
) -> list[_Ending | None]:
    endings: list[_Ending | None] = [None] * len(examples)
    with Progress("n2g", len(examples), "examples") as progress:
        for shortest in range(1, longest + 1, LENGTHS_AT_ONCE):
            until = min(shortest + LENGTHS_AT_ONCE, longest + 1)
            tried = [
                (e, example.text[-n:])
                for e, example in enumerate(examples)
                if endings[e] is None
                for n in range(shortest, min(until, len(example.text)))
            ]
            if not tried:
                break
            values = activation([_begun(text, first) for _, text in tried], [examples[e].latent for e, _ in tried])
            for (e, text), value in zip(tried, values, strict=True):
                if endings[e] is None and value >= KEPT * examples[e].value:
                    endings[e] = _Ending(text, float(value))
            progress.update(sum(ending is not None for ending in endings))
        progress.update(len(examples))
    return endings


def _edited(ending: _Ending | None, neutral: int) -> Iterator[tuple[int | None, np.ndarray]]:
    """(position, text) of all changes that tell what an ending needs."""
    if ending is None:
        return
    for position in range(len(ending.tokens)):
        text = ending.tokens.copy()
        text[position] = neutral
        yield position, text
    yield None, np.append(np.int32(neutral), ending.tokens)


def _begun(text: np.ndarray, first: int) -> np.ndarray:
    return np.append(np.int32(first), text)


def _batches(texts: Sequence[np.ndarray]) -> Iterator[tuple[list[int], np.ndarray]]:
    """Numbers of at most BATCH texts of about one length, and these i32[BATCH, T]: lengths are few, so programs are."""
    by_length: dict[int, list[int]] = {}
    for i, text in enumerate(texts):
        by_length.setdefault(max(8, 1 << (len(text) - 1).bit_length()), []).append(i)
    for length, members in sorted(by_length.items()):
        for begin in range(0, len(members), BATCH):
            batch = members[begin : begin + BATCH]
            ids_BT = np.zeros((BATCH, length), np.int32)
            for row, i in zip(ids_BT, batch, strict=False):
                row[: len(texts[i])] = texts[i]
            yield batch, ids_BT
