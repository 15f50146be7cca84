"""What pages and exports show of a latent: how often it fires, on what, what it promotes, and which are like it.

Tokens are ids here, and places are numbers: whoever writes a page or a file makes text of them.

`score` of a latent is its effect: root mean square over the vocabulary of its centred logit effect, at its mean active
value. Without a language model it is its energy: mean over all tokens of value^2 times the squared norm of its decoder
row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from sae_jax.analysis.examples import Activations, Coactive, Interval
from sae_jax.progress import say_once
from sae_jax.types import UsageError, UserError

BEFORE, AFTER = 20, 10  # tokens of a context around its strongest
REACH = 128  # tokens to either side of it whose values are known
N_TOP, N_INTERVALS, PER_INTERVAL = 20, 5, 4
N_LOGITS, N_NEAR, N_STRONGEST = 10, 8, 25

_PRODUCT_ENTRIES = 2**24  # entries of a block of cosines or logits: 64 MiB
_MOST_COSINES = 2**35  # of all latents shown with all others: some five minutes
_MOST_PAIRS = 2**32  # of activations on one row, that are counted: a minute or so
_AT_ONCE = 2**16  # latents whose neighbours are looked for at once


Pattern = tuple[tuple[int, ...], int]  # token ids, -1 for any; of how many contexts it was made


@dataclass(frozen=True)
class SourceRows:
    """What a dictionary of several sources writes to one of them."""

    name: str
    w_dec: np.ndarray  # f32[F, D of the source]
    scale: float = 1.0  # by which rows of the source were multiplied in training
    logit_effects: Callable[[np.ndarray], np.ndarray] | None = None  # as of Subject


@dataclass(frozen=True)
class Subject:
    """A dictionary, a sample of text in which its latents are shown, and what is known of them."""

    table: Activations
    w_dec: np.ndarray  # f32[F, D]
    n_tokens: int  # V, of the vocabulary
    # From rows f32[n, D] to their effect on the logits f32[n, V or more] at activation 1; columns from V on (padding of
    # the vocabulary) are ignored. None where there is no language model.
    logit_effects: Callable[[np.ndarray], np.ndarray] | None = None
    labels: Mapping[int, tuple[str, str]] = field(default_factory=dict)  # what a latent stands for, and who says so
    lengths: np.ndarray | None = None  # i64[Q], tokens of each sequence that are no padding; None: all
    sources: Sequence[SourceRows] = ()  # where a dictionary has several
    patterns: Mapping[int, Sequence[Pattern]] = field(default_factory=dict)  # N2G, of latents it was made for

    def __post_init__(self) -> None:
        if len(self.w_dec) != self.table.n_latents:
            n_rows, n_latents = len(self.w_dec), self.table.n_latents
            raise UserError(f"w_dec has {n_rows} rows for {n_latents} latents; give one row for each latent")
        strange = self.table.sequences[(self.table.sequences < 0) | (self.table.sequences >= self.n_tokens)]
        if strange.size:
            raise UserError(f"token id {strange[0]} has no text; give more than {self.n_tokens} token_strings")

    @cached_property
    def shares(self) -> np.ndarray:
        """f32[F, S]: of the lengths of a latent's rows to all sources, as they were trained, the share of each."""
        norms_FS = np.stack([np.linalg.norm(s.w_dec, axis=1) * s.scale for s in self.sources], axis=1)
        return (norms_FS / np.maximum(norms_FS.sum(1, keepdims=True), np.finfo(np.float32).tiny)).astype(np.float32)

    @property
    def score_name(self) -> str:
        """What `Latent.score` is."""
        return "energy" if self.logit_effects is None else "effect"

    @property
    def shown_lengths(self) -> np.ndarray:
        """i64[Q], tokens of each sequence that are shown."""
        n_sequences, n_positions = self.table.sequences.shape
        return np.full(n_sequences, n_positions) if self.lengths is None else self.lengths


@dataclass(frozen=True)
class LogitEnds:
    """The tokens a latent promotes and suppresses most at activation 1, and its spread over all tokens."""

    up: tuple[np.ndarray, np.ndarray]  # ids i64[n] and effects f32[n], largest first
    down: tuple[np.ndarray, np.ndarray]  # the same, smallest first
    spread: float  # root mean square of the centred effect


@dataclass(frozen=True)
class SourceOfLatent:
    """What a latent is to one of several sources."""

    norm: float  # of its decoder row there
    share: float  # Subject.shares
    logits: LogitEnds | None


@dataclass(frozen=True)
class Contexts:
    """Stretches of text around activations of a latent: the strongest of the sample first, then those of intervals."""

    seq: np.ndarray  # i64[E]
    pos: np.ndarray  # i64[E], of the activation that a context is about
    length: np.ndarray  # i64[E], tokens of the whole sequence
    windows: list[np.ndarray]  # of each context, ids i32 from max(0, pos - BEFORE) to pos + AFTER
    values: list[tuple[np.ndarray, np.ndarray]]  # of each, offsets i64 from pos up to REACH, and the values f32 there
    n_top: int  # so many come first, one a sequence
    intervals: list[Interval]  # of the values, highest first; their contexts follow in this order


@dataclass(frozen=True)
class Latent:
    """All that is shown of one."""

    number: int
    count: int  # activations in the sample
    mean: float  # of its values where it is active
    max: float
    norm: float  # of its decoder row
    score: float
    tokens: np.ndarray  # i64[n, 2], id and count under its strongest activations, commonest first
    near: tuple[np.ndarray, np.ndarray] | None  # nearest decoder rows i64[N_NEAR] and cosines; None: not looked for
    coactive: Coactive | None  # active on the same tokens; None: not counted
    logits: LogitEnds | None
    label: tuple[str, str] | None
    histogram: np.ndarray | None  # i64[40], of its values from 0 to max; None for a silent one, as:
    contexts: Contexts | None
    sources: Sequence[SourceOfLatent]  # where there are several
    patterns: Sequence[Pattern] | None  # commonest first; None: not made


def chosen(n_latents: int, latents: Sequence[int] | np.ndarray | None) -> np.ndarray:
    """Numbers i64[L] of the latents that are shown, ascending. UsageError for one that does not exist, or none."""
    if latents is None:
        return np.arange(n_latents)
    latents = np.unique(np.asarray(latents, np.int64))
    strange = latents[(latents < 0) | (latents >= n_latents)]
    if strange.size:
        raise UsageError(f"latent {strange[0]} does not exist; choose from 0 to {n_latents - 1}")
    if not latents.size:
        raise UsageError("no latents to show; name at least one")
    return latents


def describe(subject: Subject, latents: np.ndarray) -> Iterator[Latent]:
    """All that is shown of latents i64[L], one after the other; memory does not grow with their number."""
    table = subject.table
    is_active = table.counts[latents] > 0
    with_near = np.ones(len(latents), bool)
    if len(latents) * len(subject.w_dec) > _MOST_COSINES:
        with_near = is_active & (is_active.sum() * len(subject.w_dec) <= _MOST_COSINES)
        of = "those that never fire" if with_near.any() else "all"
        say_once(f"{len(latents):,} latents are too many to compare each with all others: {of} are without neighbours")
    with_coactive = table.n_pairs <= _MOST_PAIRS
    if not with_coactive:
        say_once(f"{table.n_pairs:,} pairs of latents on one row are too many: pages are without co-activations")
    for low in range(0, len(latents), _AT_ONCE):
        at_once, active = latents[low : low + _AT_ONCE], is_active[low : low + _AT_ONCE]
        compared = at_once[with_near[low : low + _AT_ONCE]]
        rows = zip(*decoder_neighbours(subject.w_dec, compared, N_NEAR), strict=True)
        near = dict(zip(compared.tolist(), rows, strict=True))
        coactive: dict[int, Coactive] = {}
        if with_coactive:
            coactive = dict(zip(at_once[active].tolist(), table.coactive(at_once[active], N_NEAR), strict=True))
        ends = _logit_ends(subject.w_dec, subject.logit_effects, subject.n_tokens, at_once)
        to_sources = zip(*(_of_source(subject, i, at_once) for i in range(len(subject.sources))), strict=True)
        for latent, logits in zip(at_once.tolist(), ends, strict=True):
            yield _describe(subject, latent, near.get(latent), coactive.get(latent), logits, next(to_sources, ()))


def decoder_neighbours(w_dec: np.ndarray, latents: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The decoder rows nearest by cosine to those of L latents, without themselves, nearest first.

    Cosines are made 64 MiB at a time, but at least for 32 latents; 2 L F D FLOP in all.

    Args:
        w_dec: f32[F, D].
        latents: i64[L].
        n: how many; at most F - 1 are given.

    Returns:
        Numbers of the neighbours i64[L, n], and their cosines f32[L, n].
    """
    n = min(n, len(w_dec) - 1)
    near_LN = np.empty((len(latents), n), np.int64)
    cosine_LN = np.empty((len(latents), n), np.float32)
    norm_F = np.maximum(np.linalg.norm(w_dec, axis=1), np.finfo(np.float32).tiny)
    step = max(32, _PRODUCT_ENTRIES // len(w_dec))
    for low in range(0, len(latents) if n else 0, step):
        part = slice(low, low + step)
        cosine_BF = w_dec[latents[part]] @ w_dec.T
        cosine_BF /= norm_F
        cosine_BF /= norm_F[latents[part], None]
        np.put_along_axis(cosine_BF, latents[part, None], -np.inf, axis=1)
        near_LN[part], cosine_LN[part] = _largest_of_rows(cosine_BF, n)
    return near_LN, cosine_LN


def _describe(
    subject: Subject,
    latent: int,
    near: tuple[np.ndarray, np.ndarray] | None,
    coactive: Coactive | None,
    logits: LogitEnds | None,
    sources: Sequence[SourceOfLatent],
) -> Latent:
    table, norm = subject.table, float(np.linalg.norm(subject.w_dec[latent]))
    values = table.of_latent(latent)[1] if table.counts[latent] else np.zeros(0, np.float32)
    mean = float(values.mean(dtype=np.float64)) if len(values) else 0.0
    energy = float(np.square(values, dtype=np.float64).sum()) / max(table.n_rows, 1) * norm**2
    return Latent(
        number=latent,
        count=len(values),
        mean=mean,
        max=float(values.max(initial=0.0)),
        norm=norm,
        score=energy if logits is None else logits.spread * mean,
        tokens=_commonest(table, latent),
        near=near,
        coactive=coactive,
        logits=logits,
        label=subject.labels.get(latent),
        histogram=table.histogram(latent)[0] if len(values) else None,
        contexts=_contexts(subject, latent) if len(values) else None,
        sources=sources,
        patterns=subject.patterns.get(latent),
    )


def _of_source(subject: Subject, number: int, latents: np.ndarray) -> Iterator[SourceOfLatent]:
    source = subject.sources[number]
    ends = _logit_ends(source.w_dec, source.logit_effects, subject.n_tokens, latents)
    norms = np.linalg.norm(source.w_dec[latents], axis=1)
    for norm, share, logits in zip(norms, subject.shares[latents, number], ends, strict=True):
        yield SourceOfLatent(float(norm), float(share), logits)


def _contexts(subject: Subject, latent: int) -> Contexts:
    table, lengths = subject.table, subject.shown_lengths
    top = table.top(latent, N_TOP, one_per_sequence=True)
    intervals = table.quantile_samples(latent, N_INTERVALS, PER_INTERVAL)[::-1]
    groups = [top, *(interval.examples for interval in intervals)]
    seq_E = np.concatenate([group.seq for group in groups])
    pos_E = np.concatenate([group.pos for group in groups])
    first_E, end_E = np.maximum(pos_E - BEFORE, 0), np.minimum(pos_E + AFTER + 1, lengths[seq_E])
    value_ET = table.windows(latent, seq_E, pos_E - REACH, 2 * REACH + 1)
    context, offset = np.nonzero(value_ET)
    starts = np.searchsorted(context, np.arange(1, len(seq_E)))
    values = zip(np.split(offset - REACH, starts), np.split(value_ET[context, offset], starts), strict=True)
    places = zip(seq_E, first_E, end_E, strict=True)
    return Contexts(
        seq=seq_E.astype(np.int64),
        pos=pos_E.astype(np.int64),
        length=lengths[seq_E],
        windows=[table.sequences[seq, first:end] for seq, first, end in places],
        values=list(values),
        n_top=len(top.seq),
        intervals=intervals,
    )


def _logit_ends(
    w_dec: np.ndarray, logit_effects: Callable[[np.ndarray], np.ndarray] | None, n_tokens: int, latents: np.ndarray
) -> Iterator[LogitEnds | None]:
    """Of each latent; None where there is no language model."""
    if logit_effects is None:
        yield from [None] * len(latents)
        return
    step = max(1, min(256, _PRODUCT_ENTRIES // n_tokens))
    for low in range(0, len(latents), step):
        effect_LV = np.asarray(logit_effects(w_dec[latents[low : low + step]]), np.float32)[:, :n_tokens]
        effect_LV = effect_LV - effect_LV.mean(axis=1, keepdims=True)
        n_ends = min(N_LOGITS, effect_LV.shape[1])
        up, down = _largest_of_rows(effect_LV, n_ends), _largest_of_rows(-effect_LV, n_ends)
        for i, spread in enumerate(effect_LV.std(axis=1)):
            yield LogitEnds((up[0][i], up[1][i]), (down[0][i], -down[1][i]), float(spread))


def _largest_of_rows(value_BN: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and values of the n largest entries of each row, descending."""
    index_Bn = np.argpartition(-value_BN, n - 1, axis=1)[:, :n]
    value_Bn = np.take_along_axis(value_BN, index_Bn, axis=1)
    order_Bn = np.argsort(-value_Bn, axis=1, kind="stable")
    return np.take_along_axis(index_Bn, order_Bn, axis=1), np.take_along_axis(value_Bn, order_Bn, axis=1)


def _commonest(table: Activations, latent: int) -> np.ndarray:
    """i64[n, 2] id and count of the tokens under a latent's strongest activations, commonest first."""
    if not table.counts[latent]:
        return np.zeros((0, 2), np.int64)
    top = table.top(latent, N_STRONGEST)
    ids, first, counts = np.unique(table.sequences[top.seq, top.pos], return_index=True, return_counts=True)
    order = np.lexsort((first, -counts))
    return np.stack([ids[order], counts[order]], axis=1).astype(np.int64)
