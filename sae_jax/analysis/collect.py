"""Encode a sample of an activation set's text, and record which latents are active where."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from sae_jax.activations.store import ActivationSet
from sae_jax.analysis.examples import Activations, SparseBlock, collect
from sae_jax.saes.base import AbstractSae

N_PLACES = 8  # the sample comes from at least so many shards, spread over the set
BLOCK = 4096  # rows encoded at once


def collect_set(
    sae: AbstractSae, activations: ActivationSet, sources: Sequence[str], n_tokens: int, progress: Callable[[int], None]
) -> tuple[Activations, np.ndarray]:
    """Encode the stored rows of about `n_tokens` tokens of text, `sources` side by side.

    Returns:
        the activations by latent, with sequences renumbered from 0, and these sequences i32[n, context].

    Raises:
        UsageError: a set without text.
    """
    spec = activations.spec
    per_shard, context = spec.sequences_per_shard or 1, spec.context or 1
    counts = {s: c.n_sequences for s, c in activations.commits.items() if c.n_sequences}
    shards = np.array(sorted(counts))
    n_needed = max(n_tokens // context, 1)
    n_chosen = min(max(N_PLACES, -(-n_needed // per_shard)), len(shards))
    chosen = shards[np.linspace(0, len(shards) - 1, n_chosen).round().astype(int)]
    # Whole sequences from the start of each chosen shard, so that every context is complete.
    share = -(-n_needed // n_chosen)
    numbers = np.concatenate([s * per_shard + np.arange(min(share, counts[int(s)])) for s in chosen])
    sequences = activations.read_sequences(numbers)
    renumbered = {
        int(s): offset for s, offset in zip(chosen, np.searchsorted(numbers, chosen * per_shard), strict=True)
    }

    def rows() -> Iterator[tuple[np.ndarray, ...]]:
        """(row, token, sequence, position) of the chosen text, chunk by chunk."""
        for chunk in np.flatnonzero(np.isin(activations.chunk_shard, chosen)):
            index = activations.read_index(int(chunk))
            shard = int(activations.chunk_shard[chunk])
            local = index["seq"] - shard * per_shard
            is_chosen = local < share
            parts = [activations.read_chunk(source, int(chunk))[is_chosen].astype(np.float32) for source in sources]
            x_ND = np.concatenate(parts, axis=1)
            yield x_ND, index["token"][is_chosen], local[is_chosen] + renumbered[shard], index["pos"][is_chosen]

    def codes() -> Iterator[SparseBlock]:
        done = 0
        for x_ND, token, seq, pos in _in_blocks(rows()):
            # Every block is filled up to one shape: each new shape would compile the encoder again.
            padded_ND = np.pad(x_ND, ((0, BLOCK - len(x_ND)), (0, 0)))
            code = sae.encode(padded_ND)
            indices, values = (np.asarray(field)[: len(x_ND)] for field in (code.indices, code.values))
            yield indices, values, token, seq, pos
            done += len(x_ND)
            progress(done)

    return collect(codes(), sae.b_enc.shape[0]), sequences


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
