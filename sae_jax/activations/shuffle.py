"""Documents in an order by seed, while they are read in a stream: files are shuffled, then documents in a buffer.

Every next document is one of those in the buffer, by chance, and the next one of the stream takes its place. A text
that fits into the buffer is shuffled altogether. The order depends on the seed and the documents alone: of Python's
random numbers those are used that are the same in every version.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

N_DOCUMENTS = 10_000  # that the buffer holds
N_CHARACTERS = 2**27  # that they have together

T = TypeVar("T")


def permuted(items: Sequence[T], seed: int) -> list[T]:
    """All items in an order by seed."""
    generator, left = _generator(seed, "files"), list(items)
    return [_take(left, generator) for _ in items]


def buffered(documents: Iterable[tuple[str, str]], seed: int) -> Iterator[tuple[str, str]]:
    """(file, document) pairs in an order by seed, of which no more than the buffer are in memory."""
    generator = _generator(seed, "documents")
    held: list[tuple[str, str]] = []
    n_characters = 0
    for pair in documents:
        held.append(pair)
        n_characters += len(pair[1])
        while len(held) > N_DOCUMENTS or (n_characters > N_CHARACTERS and held):
            taken = _take(held, generator)
            n_characters -= len(taken[1])
            yield taken
    while held:
        yield _take(held, generator)


def _generator(seed: int, what: str) -> random.Random:
    return random.Random(f"{what} {seed}")


def _take(items: list[T], generator: random.Random) -> T:
    place = int(generator.random() * len(items))
    items[place], items[-1] = items[-1], items[place]
    return items.pop()
