"""Encode a sample of an activation set's text, and record which latents are active where."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from sae_jax.activations.store import ActivationSet
from sae_jax.analysis.examples import Activations, SparseBlock
from sae_jax.analysis.store import Plan, Store
from sae_jax.artifact import digest_of
from sae_jax.progress import Progress
from sae_jax.saes.base import AbstractSae

N_PLACES = 8  # the sample comes from at least so many shards, spread over the set
BLOCK = 4096  # rows encoded at once


def collect_set(
    sae: AbstractSae,
    activations: ActivationSet,
    sources: Sequence[str],
    n_tokens: int,
    path: str | os.PathLike[str],
    worker: tuple[int, int] = (0, 1),
) -> Activations | None:
    """The store at `path` of the stored rows of about `n_tokens` tokens of text: what is missing is made.

    Blocks of rows go to the devices of this process in turn.

    Args:
        sae: the dictionary, on one device.
        activations: the set.
        sources: which are encoded, side by side.
        n_tokens: how much text.
        path: of the store, new, begun or finished.
        worker: (i, n): this one makes every n-th part from the i-th on; the parts of others may be missing.

    Returns:
        What the store holds, with sequences renumbered from 0; None while parts of other workers are missing.

    Raises:
        UsageError: a set without text, or another store at `path`.
        HeldError: another process makes the same part.
    """
    store = Store.create(path, plan_sample(sae, activations, sources, n_tokens))
    todo = [part for part in store.missing() if part % worker[1] == worker[0]]
    with Progress("encode", sum(store.plan.n_sequences[part] for part in todo), "sequences") as progress:
        done = 0
        for part in todo:
            sequences = _sequences(activations, store.plan, part)
            store.write_part(part, sequences, _codes(sae, _rows(activations, store.plan, part)))
            progress.update(done := done + len(sequences))
    if store.missing():
        return None
    store.join()
    return store.open()


def plan_sample(sae: AbstractSae, activations: ActivationSet, sources: Sequence[str], n_tokens: int) -> Plan:
    """Which sequences are taken: whole ones from the start of each of several shards, spread evenly over the set."""
    activations.check_text()
    spec = activations.spec
    per_shard, context = spec.sequences_per_shard or 1, spec.context or 1
    counts = {s: c.n_sequences for s, c in activations.commits.items() if c.n_sequences}
    shards = np.array(sorted(counts))
    n_needed = max(n_tokens // context, 1)
    n_chosen = min(max(N_PLACES, -(-n_needed // per_shard)), len(shards))
    chosen = shards[np.linspace(0, len(shards) - 1, n_chosen).round().astype(int)].tolist()
    share = -(-n_needed // n_chosen)
    return Plan(
        dictionary=digest_of(sae),
        content=activations.content,
        sources=list(sources),
        n_latents=sae.b_enc.shape[0],
        context=context,
        shards=chosen,
        n_sequences=[min(share, counts[shard]) for shard in chosen],
        tokenizer=spec.tokenizer,
        tokenizer_digest=spec.tokenizer_digest,
    )


def _sequences(activations: ActivationSet, plan: Plan, part: int) -> np.ndarray:
    """The text of a part, i32[q, T]."""
    first = plan.shards[part] * (activations.spec.sequences_per_shard or 1)
    return activations.read_sequences(first + np.arange(plan.n_sequences[part]))


def _rows(activations: ActivationSet, plan: Plan, part: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(row, its place in the part) of the text of a part, chunk by chunk."""
    shard, n_sequences = plan.shards[part], plan.n_sequences[part]
    first = shard * (activations.spec.sequences_per_shard or 1)
    for chunk in np.flatnonzero(activations.chunk_shard == shard).tolist():
        index = activations.read_index(chunk)
        seq = index["seq"].astype(np.int64) - first
        is_chosen = seq < n_sequences
        parts = [activations.read_chunk(source, chunk)[is_chosen].astype(np.float32) for source in plan.sources]
        yield np.concatenate(parts, axis=1), (seq * plan.context + index["pos"])[is_chosen]


def _codes(sae: AbstractSae, rows: Iterator[tuple[np.ndarray, np.ndarray]]) -> Iterator[SparseBlock]:
    """Codes of rows, a block on each device at a time."""
    devices = jax.local_devices()
    copies: dict[int, AbstractSae] = {}
    pending: deque[tuple[jax.Array, jax.Array, np.ndarray]] = deque()
    for number, (x_ND, place) in enumerate(_in_blocks(rows)):
        at = number % len(devices)
        copy = copies.setdefault(at, sae if len(devices) == 1 else jax.device_put(sae, devices[at]))
        # Every block is filled up to one shape: each new shape would compile the encoder again.
        padded_ND = np.pad(x_ND, ((0, BLOCK - len(x_ND)), (0, 0)))
        code = copy.encode(jax.device_put(padded_ND, devices[at]))
        pending.append((code.indices, code.values, place))
        if len(pending) > len(devices):
            yield _on_host(*pending.popleft())
    while pending:
        yield _on_host(*pending.popleft())


def _on_host(indices: jax.Array, values: jax.Array, place: np.ndarray) -> SparseBlock:
    return np.asarray(indices)[: len(place)], np.asarray(values)[: len(place)], place


def _in_blocks(parts: Iterator[tuple[np.ndarray, ...]]) -> Iterator[tuple[np.ndarray, ...]]:
    """The same rows, BLOCK at a time; the last block may be shorter."""
    held: list[tuple[np.ndarray, ...]] = []
    n_held = 0
    for part in parts:
        held.append(part)
        n_held += len(part[0])
        if n_held >= BLOCK:
            joined = [np.concatenate(columns) for columns in zip(*held, strict=True)]
            n_whole = n_held // BLOCK * BLOCK
            for first in range(0, n_whole, BLOCK):
                yield tuple(column[first : first + BLOCK] for column in joined)
            held = [tuple(column[n_whole:] for column in joined)]
            n_held -= n_whole
    if n_held:
        yield tuple(np.concatenate(columns) for columns in zip(*held, strict=True))
