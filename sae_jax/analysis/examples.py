"""Which contexts activate which latent.

A code lists the active latents of each token. To interpret a latent one needs the transpose: all tokens at which it
is active. `Activations` is that transpose, compressed by latent, in memory (`collect`) or on disk (store.py). What
people look at is read from it: firing rate, histograms, the strongest contexts, contexts from the whole range of
values.

A token is named by its place: sequence * T + position.

Sampling over equal-width intervals of the activation follows Bricken et al. (2023, "Towards
Monosemanticity").

Axis key of types.py, and: A activations (one latent at one row), E examples of a latent, M strongest kept, Q sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import scipy.sparse

from sae_jax.types import UserError

# indices i32[B, K], values f32[B, K] (0 = empty slot), place i64[B]
SparseBlock = tuple[np.ndarray, np.ndarray, np.ndarray]
# values [B, F], token, seq, pos i32[B]
DenseBlock = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

MAX_PLACES = 2**32  # tokens of a sample
_PAIRS = 2**23  # of activations on one row, counted at once: some 100 MB
_SORT_BLOCK = 2**22  # activations sorted at once: about 150 MB of keys and orders


@dataclass(frozen=True)
class Examples:
    """Some activations of one latent, strongest first."""

    seq: np.ndarray  # i32[E], number of the packed token sequence
    pos: np.ndarray  # i32[E], position in the sequence
    value: np.ndarray  # f32[E]


@dataclass(frozen=True)
class Interval:
    """A range of activation values of one latent, how many activations it holds, and a sample of them."""

    low: float
    high: float
    count: int
    examples: Examples


@dataclass(frozen=True)
class Strongest:
    """The M strongest positive activations of every latent, descending; value 0 marks an empty place."""

    value: np.ndarray  # f32[F, M]
    token: np.ndarray  # i32[F, M]
    seq: np.ndarray  # i32[F, M]
    pos: np.ndarray  # i32[F, M]


@dataclass(frozen=True)
class Coactive:
    """Latents that are active on the same rows as one latent, most often first."""

    latents: np.ndarray  # i64[E]
    counts: np.ndarray  # i64[E], rows on which both are active
    jaccard: np.ndarray  # f64[E], of the rows on which one of the two is active, the share on which both are


@dataclass(frozen=True)
class Activations:
    """All activations, by latent: those of latent f are `offsets[f]:offsets[f + 1]` of `places` and `values`.

    `places` and `values` are arrays in memory, or columns on disk of which slices are read.
    """

    sequences: np.ndarray  # i32[Q, T], the text
    has_row: np.ndarray  # bool[Q, T], the tokens whose rows were encoded
    offsets: np.ndarray  # i64[F + 1]
    places: Any  # u32[A], ascending within a latent
    values: Any  # f32[A], > 0
    # The latent that was read last: whatever is asked of one is asked of the same one several times.
    _last: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def n_rows(self) -> int:
        """Rows seen, with and without activations."""
        return int(np.count_nonzero(self.has_row))

    @property
    def n_latents(self) -> int:
        """Latents of the dictionary, alive or not."""
        return len(self.offsets) - 1

    @cached_property
    def counts(self) -> np.ndarray:
        """Activations of each latent, i64[F]."""
        return np.diff(self.offsets)

    @property
    def density(self) -> np.ndarray:
        """Firing rate of each latent: the share of rows where it is active, f64[F]."""
        return self.counts / max(self.n_rows, 1)

    @cached_property
    def n_pairs(self) -> int:
        """The squares of the numbers of active latents, summed over rows: how much work `coactive` is, for all."""
        return int((np.bincount(self.places[:]) ** 2).sum())

    def of_latent(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """Places u32[E] (ascending) and values f32[E] of one latent."""
        if not 0 <= latent < self.n_latents:
            raise UserError(f"latent {latent} does not exist; choose 0 to {self.n_latents - 1}")
        if (last := self._last.get(latent)) is None:
            part = slice(self.offsets[latent], self.offsets[latent + 1])
            last = self.places[part], self.values[part]
            self._last.clear()
            self._last[latent] = last
        return last

    def density_histogram(self, n_bins: int = 40) -> tuple[np.ndarray, np.ndarray]:
        """Counts i64[n_bins] and edges f64[n_bins + 1] of log10(density) over the latents that fired.

        The edges run from one activation in the whole sample to every row, whatever the latents do, so that
        two runs over equally many rows share their bins.
        """
        density = self.density[self.counts > 0]
        lowest = -np.log10(max(self.n_rows, 10))
        return np.histogram(np.maximum(np.log10(density), lowest), bins=n_bins, range=(lowest, 0.0))

    def histogram(self, latent: int, n_bins: int = 40) -> tuple[np.ndarray, np.ndarray]:
        """Counts i64[n_bins] and edges f64[n_bins + 1] of a latent's values, from 0 to its maximum."""
        _, values = self.of_latent(latent)
        return np.histogram(values, bins=n_bins, range=(0.0, float(values.max(initial=0.0)) or 1.0))

    def top(self, latent: int, m: int, *, one_per_sequence: bool = False) -> Examples:
        """The m strongest activations of a latent, or all it has; ties go to the lowest (seq, pos).

        With `one_per_sequence` only the strongest activation of each sequence is considered, so that one
        repetitive text does not fill the list.
        """
        places, values = self.of_latent(latent)
        if one_per_sequence and len(places):
            seq = places // self.sequences.shape[1]
            starts = np.append(0, np.flatnonzero(np.diff(seq)) + 1)
            ends = np.append(starts[1:], len(places))
            chosen = _largest(np.maximum.reduceat(values, starts), m)
            picks = np.array([starts[i] + np.argmax(values[starts[i] : ends[i]]) for i in chosen], int)
        else:
            picks = _largest(values, m)
        return self._examples(places[picks], values[picks])

    def quantile_samples(
        self,
        latent: int,
        n_bins: int,
        per_bin: int,
        *,
        by: Literal["width", "count"] = "width",
        seed: int = 0,
    ) -> list[Interval]:
        """Contexts sampled from a latent's whole range of values, not from its strongest alone.

        Args:
            latent: which latent.
            n_bins: number of intervals, weakest first in the answer.
            per_bin: contexts drawn without replacement from each interval (all, if it holds fewer).
            by: "width" cuts (0, maximum] into intervals of equal width, each open below and closed above;
                "count" cuts the sorted activations into parts of equal size.
            seed: the draw is a function of (seed, latent).
        """
        places, values = self.of_latent(latent)
        rng = np.random.default_rng([seed, latent])
        order = np.argsort(values, kind="stable")
        if by == "count":
            parts = np.array_split(order, n_bins)
            bounds = [(float(values[p[0]]), float(values[p[-1]])) if len(p) else (0.0, 0.0) for p in parts]
        else:
            edges = np.linspace(0.0, float(values.max(initial=0.0)), n_bins + 1)
            parts = np.split(order, np.searchsorted(values[order], edges[1:-1], side="right"))
            bounds = list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
        intervals = []
        for part, (low, high) in zip(parts, bounds, strict=True):
            drawn = rng.choice(part, min(per_bin, len(part)), replace=False)
            drawn = np.sort(drawn)
            drawn = drawn[np.argsort(-values[drawn], kind="stable")]
            intervals.append(Interval(low, high, len(part), self._examples(places[drawn], values[drawn])))
        return intervals

    def windows(self, latent: int, seq: np.ndarray, start: np.ndarray, length: int) -> np.ndarray:
        """Values of a latent on stretches of text, f32[E, length]; 0 where it is silent, and where there is no row.

        Args:
            latent: which latent.
            seq: i32[E] sequences.
            start: i32[E] first position of each stretch; it may be negative or run past the end.
            length: positions in each stretch.
        """
        places, values = self.of_latent(latent)
        n_pos = self.sequences.shape[1]
        place_A, first_E = places.astype(np.int64), seq.astype(np.int64) * n_pos
        # What lies before or behind a sequence belongs to others.
        low_E = np.searchsorted(place_A, first_E + np.clip(start, 0, n_pos))
        high_E = np.searchsorted(place_A, first_E + np.clip(start.astype(np.int64) + length, 0, n_pos))
        n_E = high_E - low_E
        context = np.repeat(np.arange(len(seq)), n_E)
        at = np.arange(n_E.sum()) + np.repeat(low_E - (np.cumsum(n_E) - n_E), n_E)
        window_ET = np.zeros((len(seq), length), np.float32)
        window_ET[context, place_A[at] - first_E[context] - start[context]] = values[at]
        return window_ET

    def strongest(self, m: int = 25) -> Strongest:
        """The m strongest activations of every latent; ties go to the lowest (seq, pos)."""
        value_FM = np.zeros((self.n_latents, m), np.float32)
        place_FM = np.zeros((self.n_latents, m), np.int64)
        for first, last in latent_blocks(self.offsets):
            part = slice(self.offsets[first], self.offsets[last])
            values_A = self.values[part]
            latent_A = np.repeat(np.arange(first, last), self.counts[first:last])
            pick, latent, rank = _best_per_latent(latent_A, values_A, m)
            value_FM[latent, rank] = values_A[pick]
            place_FM[latent, rank] = self.places[part][pick]
        seq_FM, pos_FM = np.divmod(place_FM, max(self.sequences.shape[1], 1))
        token_FM = self.sequences[seq_FM, pos_FM] if self.sequences.size else place_FM
        found = (np.where(value_FM == 0, -1, x_FM).astype(np.int32) for x_FM in (token_FM, seq_FM, pos_FM))
        return Strongest(value_FM, *found)

    def coactive(self, latents: Sequence[int] | np.ndarray, n: int) -> list[Coactive]:
        """The latents that are most often active on the same rows as each of L latents, exactly.

        Holds 16 bytes an activation and 8 a place, and works on about _PAIRS pairs of activations at a time (n_pairs).

        Args:
            latents: i64[L].
            n: how many others, fewer if there are no more.
        """
        latents = np.asarray(latents)
        n_places, n_held = self.has_row.size, int(self.offsets[-1])
        shape = (self.n_latents, n_places)
        is_active_FN = scipy.sparse.csr_array((np.ones(n_held, np.int32), self.places[:], self.offsets), shape)
        of_place_NF = is_active_FN.T.tocsr()
        n_pairs_L = (is_active_FN @ np.diff(of_place_NF.indptr))[latents]
        counts, found = self.counts, []
        for part in np.split(np.arange(len(latents)), np.flatnonzero(np.diff(np.cumsum(n_pairs_L) // _PAIRS)) + 1):
            both = (is_active_FN[latents[part]] @ of_place_NF).tocsr()
            for latent, first, last in zip(latents[part], both.indptr, both.indptr[1:], strict=False):
                others, n_both = both.indices[first:last], both.data[first:last]
                order = np.lexsort((others, -n_both))
                order = order[others[order] != latent][:n]
                others, n_both = others[order].astype(np.int64), n_both[order].astype(np.int64)
                found.append(Coactive(others, n_both, n_both / (counts[latent] + counts[others] - n_both)))
        return found

    def _examples(self, places: np.ndarray, values: np.ndarray) -> Examples:
        seq, pos = np.divmod(places, max(self.sequences.shape[1], 1))
        return Examples(seq.astype(np.int32), pos.astype(np.int32), values)


def latent_blocks(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of latents that hold about _SORT_BLOCK activations each, by offsets i64[F + 1]."""
    n_latents, first = len(offsets) - 1, 0
    while first < n_latents and offsets[-1] > 0:
        last = int(np.searchsorted(offsets, offsets[first] + _SORT_BLOCK))
        last = min(max(last, first + 1), n_latents)
        yield first, last
        first = last


@dataclass(frozen=True)
class Run:
    """Some activations, sorted by latent and place."""

    counts: np.ndarray  # u32[F], of each latent
    places: np.ndarray  # u32[A]
    values: np.ndarray  # f32[A]


def sorted_runs(
    blocks: Iterable[SparseBlock], n_latents: int, has_row: np.ndarray, n_largest: int | None = None
) -> Iterator[Run]:
    """A stream of codes as sorted runs.

    Args:
        blocks: (indices i32[B, K], values f32[B, K], place i64[B]), rows in any order; value 0 is an empty slot.
        n_latents: size of the dictionary.
        has_row: bool[places]; those that come are set here.
        n_largest: activations of a run, or a little more, since a block goes whole into one; None: all in one run. They
            are held at 12 bytes each, and at about 32 while they are sorted.

    Raises:
        UserError: a value that is negative or not finite, an index out of range, a row or a latent of a row that comes
            twice.
    """
    keys, values, n_held = [], [], 0
    for indices_BK, values_BK, place_B in blocks:
        if not (np.isfinite(values_BK).all() and (values_BK >= 0).all()):
            raise UserError("an activation is negative or not finite; values must be 0 or more")
        unique_B, times_B = np.unique(place_B, return_counts=True)
        twice = unique_B[(times_B > 1) | has_row[unique_B]]
        if twice.size:
            raise UserError(f"the row at place {twice[0]} comes twice; feed every row once")
        has_row[place_B] = True
        row_A, slot_A = np.nonzero(values_BK)
        latent_A = indices_BK[row_A, slot_A]
        if len(latent_A) and not 0 <= latent_A.min() <= latent_A.max() < n_latents:
            strange = latent_A[(latent_A < 0) | (latent_A >= n_latents)][0]
            raise UserError(f"latent index {strange} does not fit n_latents={n_latents}")
        keys.append((latent_A.astype(np.uint64) << np.uint64(32)) | place_B[row_A].astype(np.uint64))
        values.append(values_BK[row_A, slot_A].astype(np.float32))
        n_held += len(latent_A)
        if n_largest is not None and n_held >= n_largest:
            yield _sorted(_drain(keys, np.uint64), _drain(values, np.float32), n_latents)
            n_held = 0
    if n_held or n_largest is None:
        yield _sorted(_drain(keys, np.uint64), _drain(values, np.float32), n_latents)


def merged(places_A: np.ndarray, values_A: np.ndarray, latent_A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places and values of several runs, sorted by latent (any integers), then place."""
    order_A = np.argsort((latent_A.astype(np.uint64) << np.uint64(32)) | places_A)
    return places_A[order_A], values_A[order_A]


def collect(blocks: Iterable[SparseBlock], n_latents: int, sequences: np.ndarray) -> Activations:
    """A stream of codes by latent, in memory.

    Args:
        blocks: see `sorted_runs`, which also says what is refused.
        n_latents: size of the dictionary.
        sequences: i32[Q, T], the text that places are in.
    """
    has_row = np.zeros(sequences.size, bool)
    (run,) = sorted_runs(blocks, n_latents, has_row)
    offsets = np.append(0, np.cumsum(run.counts, dtype=np.int64))
    return Activations(sequences, has_row.reshape(sequences.shape), offsets, run.places, run.values)


def strongest_dense(blocks: Iterable[DenseBlock], m: int = 25) -> Strongest:
    """`Activations.strongest` for features that have a value on every row, such as the neurons of an MLP.

    Holds 16 bytes * F * m and one block, whatever the number of rows: a value enters only if it beats the
    weakest one kept. Values of 0 or less never enter; ties go to the row that was fed first.

    Args:
        blocks: (values [B, F], token, seq, pos i32[B]).
        m: activations kept for each feature.

    Raises:
        UserError: a value is not a number, or there are no blocks.
    """
    kept: Strongest | None = None
    for values_BF, *place in blocks:
        n_features = values_BF.shape[1]
        if kept is None:
            empty = [np.full((n_features, m), -1, np.int32) for _ in range(3)]
            kept = Strongest(np.zeros((n_features, m), np.float32), *empty)
        step = max(1, _SORT_BLOCK // n_features)
        for low in range(0, len(values_BF), step):
            _merge(
                kept,
                np.asarray(values_BF[low : low + step], np.float32),
                *(x[low : low + step] for x in place),
            )
    if kept is None:
        raise UserError("no rows to look at; give at least one block")
    return kept


def top_token_share(strongest: Strongest) -> np.ndarray:
    """Share of each latent's strongest activations on their commonest token, f64[F]; 0 if it has none."""
    n_places = strongest.value.shape[1]
    # Each empty place gets another token, or all of them would count as one common token.
    token_FM = np.sort(np.where(strongest.value > 0, strongest.token, -1 - np.arange(n_places)), axis=1)
    commonest_F = np.ones(len(token_FM), np.int64)
    for lag in range(1, n_places):
        commonest_F[(token_FM[:, lag:] == token_FM[:, :-lag]).any(axis=1)] = lag + 1
    n_F = (strongest.value > 0).sum(axis=1)
    return np.where(n_F > 0, commonest_F / np.maximum(n_F, 1), 0.0)


def token_purity(strongest: Strongest, share: float = 0.9, fewest: int = 5) -> float:
    """Share of latents that stand for one token: at least `share` of their strongest activations are on it.

    Latents with fewer than `fewest` activations are left out of both counts, since two activations on one
    token are no evidence; a latent with fewer than M is judged by those it has. NaN if none has enough.
    """
    enough_F = (strongest.value > 0).sum(axis=1) >= fewest
    # The margin keeps 9 of 10 at share=0.9, however that is rounded.
    pure_F = top_token_share(strongest) >= share - 1e-9
    return float(pure_F[enough_F].mean()) if enough_F.any() else float("nan")


def _largest(values: np.ndarray, m: int) -> np.ndarray:
    """Indices of the m largest values, descending, ties to the lowest index; linear in their number."""
    candidates = np.arange(len(values))
    if len(values) > m > 0:
        candidates = np.flatnonzero(values >= np.partition(values, -m)[-m])
    return candidates[np.argsort(-values[candidates], kind="stable")[:m]]


def _best_per_latent(latent_A: np.ndarray, value_A: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of each latent's m largest positive values, their latents and ranks; ties to the first."""
    # The bits of a positive float order like an integer, so one integer sort does latents and values.
    falling_A = np.uint32(0xFFFFFFFF) - value_A.view(np.uint32)
    order = np.argsort((latent_A.astype(np.uint64) << np.uint64(32)) | falling_A, kind="stable")
    latent = latent_A[order]
    starts = np.flatnonzero(np.diff(latent, prepend=-1))
    rank = np.arange(len(latent)) - np.repeat(starts, np.diff(starts, append=len(latent)))
    keep = rank < m
    return order[keep], latent[keep], rank[keep]


def _merge(kept: Strongest, values_BF: np.ndarray, token: np.ndarray, seq: np.ndarray, pos: np.ndarray) -> None:
    """Enter the values of some rows into `kept`, in place."""
    if np.isnan(values_BF).any():
        raise UserError("a feature value is not a number; check the activations")
    row, feature = np.nonzero(values_BF > kept.value[:, -1])
    if not len(row):
        return
    changed, which = np.unique(feature, return_inverse=True)
    m = kept.value.shape[1]
    # What is kept stands before what is new: a stable sort then gives ties to the row that was fed first.
    group = np.append(np.repeat(np.arange(len(changed)), m), which)
    value = np.append(kept.value[changed], values_BF[row, feature])
    pick, group, rank = _best_per_latent(group, value, m)
    kept.value[changed[group], rank] = value[pick]
    for old, new in ((kept.token, token), (kept.seq, seq), (kept.pos, pos)):
        old[changed[group], rank] = np.append(old[changed], new[row])[pick]


def _sorted(key_A: np.ndarray, values_A: np.ndarray, n_latents: int) -> Run:
    order_A = np.argsort(key_A)
    key_A = key_A[order_A]
    if (key_A[1:] == key_A[:-1]).any():
        raise UserError("a latent comes twice in one row; give each active latent one slot")
    counts = np.bincount((key_A >> np.uint64(32)).astype(np.int64), minlength=n_latents).astype(np.uint32)
    return Run(counts, key_A.astype(np.uint32), values_A[order_A])


def _drain(pieces: list[np.ndarray], dtype: type) -> np.ndarray:
    """Concatenate, and empty the list, so that the pieces do not stay in memory beside the result."""
    whole = np.concatenate([np.zeros(0, dtype), *pieces])
    pieces.clear()
    return whole
