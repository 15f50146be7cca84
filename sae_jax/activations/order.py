"""The order of rows in training: which rows make the batch of step t, as a function of (set, seed, t) alone.

An epoch is a fresh permutation of the set's chunks; laid end to end, their N valid rows are its positions. V
virtual readers own equal contiguous spans of them. A reader takes the chunks of its span in groups of G and
permutes the rows within a group. The stream deals one row from each reader in turn: position q of the epoch
is row q // V of reader q % V. Epochs follow each other with no remainder dropped and batch t is positions
[t * B, (t + 1) * B) of that endless stream, so each row comes once an epoch whatever N, V and B are.

Inside a batch, rows lie reader by reader. A process that takes its contiguous share of the batch thus needs
only its own readers, and the batch is the same array, in the same order, for every number of processes. V
and G derive from the set and B, never from the number of processes.

The first group of reader v is shorter, by a share that grows with v, so that groups do not all end at once:
reading is even over time, and memory stays near one group a reader.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np

# Philox domains, which keep the random numbers of orders apart; sequences.py, memory.py and live.py have 4 to 6.
WRITE_ORDER, CHUNK_ORDER, ROW_ORDER = 1, 2, 3  # WRITE_ORDER: of the rows inside a shard

MAX_READERS = 64
MIN_CHUNKS_PER_READER = 8
MAX_GROUP_CHUNKS = 16
MIN_GROUP_BYTES, MAX_GROUP_BYTES = 128 << 20, 1 << 30  # the current groups of all readers, of one source
GROUP_SHARE = 64  # between these limits, the share of the set that is in memory: large sets, large machines


GroupKey: TypeAlias = tuple[int, int, int]  # epoch, reader, number of the group in the reader's span


@dataclass(frozen=True)
class Run:
    """Rows [low, high) of one group, in its permuted order: a piece of a batch."""

    group: GroupKey
    low: int
    high: int
    target: int  # where these rows begin in the process's share of the batch


@dataclass(frozen=True, eq=False)
class Group:
    """The rows which one reader shuffles together, before the shuffle, and when they are wanted."""

    chunks: np.ndarray  # i64[at most G]
    first_row: np.ndarray  # i64, in each chunk; above 0 only where another reader has the head of the chunk
    n_rows: np.ndarray  # i64, of each chunk
    first_step: int
    last_step: int


class RowOrder:
    """The order of one set for one batch size and seed. Holds no data."""

    def __init__(self, chunk_n_rows: np.ndarray, chunk_bytes: int, batch_size: int, seed: int):
        """chunk_n_rows: i64[n_chunks], all > 0. chunk_bytes: of a full chunk of the widest source."""
        self.chunk_n_rows, self.batch_size, self.seed = chunk_n_rows, batch_size, seed
        self.n_rows = int(chunk_n_rows.sum())
        n_chunks = len(chunk_n_rows)
        budget = min(max(n_chunks * chunk_bytes // GROUP_SHARE, MIN_GROUP_BYTES), MAX_GROUP_BYTES) // chunk_bytes
        self.n_readers = _n_readers(min(n_chunks // MIN_CHUNKS_PER_READER, budget // 2), batch_size)
        # At most half a reader's chunks: the next epoch is read while the last groups are used.
        most = min(n_chunks, 2 * budget) // (2 * self.n_readers)
        self.group_chunks = max(1, min(MAX_GROUP_CHUNKS, most))
        self._epoch = lru_cache(maxsize=3)(self._compute_epoch)
        self._span = lru_cache(maxsize=4 * self.n_readers)(self._compute_span)

    def runs(self, step: int, process_index: int, process_count: int) -> list[Run]:
        """The pieces of a process's rows [B / P] of the batch of a step, in order."""
        share = self.batch_size // process_count
        low, high = process_index * share, (process_index + 1) * share
        spans = self._epoch_spans(step)
        n = self.n_readers
        readers = np.arange(n + 1)
        # Rows of readers 0 ... v - 1 in a prefix of length q of an epoch: position i belongs to reader i % V.
        before = [(q // n) * readers + np.minimum(q % n, readers) for _, bounds in spans for q in bounds]
        dealt = np.sum(before[1::2], axis=0) - np.sum(before[::2], axis=0)
        first = int(np.searchsorted(dealt, low, side="right")) - 1
        runs: list[Run] = []
        at = int(dealt[first])
        for reader in range(first, n):
            for epoch, (start, end) in spans:
                row = (start - reader + n - 1) // n
                stop = (end - reader + n - 1) // n
                skip, keep = max(0, low - at), min(stop - row, high - at)
                if skip < keep:
                    runs += self._split(epoch, reader, row + skip, row + keep, at + skip - low)
                at += stop - row
            if at >= high:
                break
        return runs

    def group(self, key: GroupKey) -> Group:
        """What a group is made of."""
        epoch, reader, number = key
        order, ends = self._epoch(epoch)
        start, bounds = self._span(epoch, reader)
        low, high = int(bounds[number]), int(bounds[number + 1])
        chunks = slice(np.searchsorted(ends, low, side="right"), np.searchsorted(ends, high, side="left") + 1)
        begins = ends[chunks] - self.chunk_n_rows[order[chunks]]
        first_row = np.maximum(low - begins, 0)
        n_rows = np.minimum(high, ends[chunks]) - begins - first_row
        positions = (epoch * self.n_rows + (row - start) * self.n_readers + reader for row in (low, high - 1))
        first_step, last_step = (position // self.batch_size for position in positions)
        return Group(order[chunks], first_row, n_rows, first_step, last_step)

    def permutation(self, key: GroupKey) -> np.ndarray:
        """The order of a group's rows: i64[rows], into its chunks' rows laid end to end."""
        epoch, reader, number = key
        _, bounds = self._span(epoch, reader)
        return self._sorted(ROW_ORDER, int(bounds[number + 1] - bounds[number]), epoch, reader, number)

    def _epoch_spans(self, step: int) -> list[tuple[int, tuple[int, int]]]:
        """The positions of a batch as (epoch, (from, to)): several where it crosses an epoch's end."""
        spans = []
        position, end = step * self.batch_size, (step + 1) * self.batch_size
        while position < end:
            epoch, low = divmod(position, self.n_rows)
            high = min(self.n_rows, low + end - position)
            spans.append((epoch, (low, high)))
            position += high - low
        return spans

    def _split(self, epoch: int, reader: int, low: int, high: int, target: int) -> list[Run]:
        """Rows [low, high) of a reader's epoch, cut at the ends of its groups."""
        start, bounds = self._span(epoch, reader)
        low, high = low + start, high + start
        number = int(np.searchsorted(bounds, low, side="right")) - 1
        runs = []
        while low < high:
            begin, end = int(bounds[number]), min(int(bounds[number + 1]), high)
            runs.append(Run((epoch, reader, number), low - begin, end - begin, target))
            low, target, number = end, target + end - low, number + 1
        return runs

    def _compute_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The chunks of an epoch in order, and the position after the last row of each: i64[n_chunks]."""
        order = self._sorted(CHUNK_ORDER, len(self.chunk_n_rows), epoch)
        return order, np.cumsum(self.chunk_n_rows[order])

    def _compute_span(self, epoch: int, reader: int) -> tuple[int, np.ndarray]:
        """Where a reader's span of an epoch starts, and the bounds of its groups: i64[groups + 1]."""
        _, ends = self._epoch(epoch)
        per_reader, extra = divmod(self.n_rows, self.n_readers)
        low = reader * per_reader + min(reader, extra)
        high = low + per_reader + (reader < extra)
        first_chunk = int(np.searchsorted(ends, low, side="right"))
        end_chunk = int(np.searchsorted(ends, high, side="left")) + 1
        second = first_chunk + 1 + reader * self.group_chunks // self.n_readers
        inner = ends[np.arange(second, end_chunk, self.group_chunks) - 1]
        return low, np.concatenate([[low], inner, [high]])

    def _sorted(self, domain: int, n: int, epoch: int, reader: int = 0, number: int = 0) -> np.ndarray:
        return shuffled(n, self.seed, domain, epoch, reader, number)


def _n_readers(limit: int, batch_size: int) -> int:
    """A power of two up to limit, dividing the batch unless that means too few."""
    most = 1
    while most * 2 <= min(MAX_READERS, limit, batch_size):
        most *= 2
    dividing = min(most, batch_size & -batch_size)
    return dividing if dividing * 8 >= most else most


def shuffled(n: int, seed: int, domain: int, a: int, b: int = 0, c: int = 0) -> np.ndarray:
    """A permutation of 0 ... n - 1, i64[n], that depends on these numbers alone."""
    # The bits of Philox are the same in every numpy version; Generator.permutation is not promised to be.
    return np.argsort(np.random.Philox(key=[seed, domain], counter=[0, a, b, c]).random_raw(n), kind="stable")


class EndlessShuffle:
    """Batches of items without end: a fresh permutation of all of them each epoch, with no remainder dropped."""

    def __init__(self, items: np.ndarray, batch_size: int, seed: int, domain: int) -> None:
        """`items` in batches of `batch_size`; `domain` keeps random numbers apart from those of other orders."""
        self._items, self._batch_size, self._seed, self._domain = items, batch_size, seed, domain
        self._epoch = lru_cache(maxsize=2)(self._compute_epoch)

    def items(self, step: int, part: slice) -> np.ndarray:
        """A part of the batch of a step."""
        positions = step * self._batch_size + np.arange(self._batch_size)[part]
        epochs, places = np.divmod(positions, len(self._items))
        chosen = np.empty(len(positions), self._items.dtype)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = self._epoch(int(epoch))[places[here]]
        return chosen

    def _compute_epoch(self, epoch: int) -> np.ndarray:
        return self._items[shuffled(len(self._items), self._seed, self._domain, epoch)]
