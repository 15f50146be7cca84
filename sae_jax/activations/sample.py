"""A small, spread-out sample of a set, for what must be known before training starts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import xxhash

from sae_jax.activations.store import ActivationSet

MAX_SHARDS = 32
MAX_ROWS = 32_768
FEW = 0.01  # of the rows
MUCH = 0.5  # of the variance, in few rows
MANY = 0.05  # of the rows, zero or equal


def sample_rows(activations: ActivationSet, source: str) -> np.ndarray:
    """Rows f32[N, D], N at most 32,768, from the first chunks of up to 32 shards spread over the set.

    Rows are shuffled inside their shard, so a chunk is a fair draw from it. The same on every host.
    """
    shards = np.unique(activations.chunk_shard)
    chosen = shards[np.linspace(0, len(shards) - 1, min(MAX_SHARDS, len(shards))).round().astype(int)]
    blocks: list[np.ndarray] = []
    per_shard = MAX_ROWS // len(chosen)
    for shard in chosen:
        left = per_shard
        for chunk in np.flatnonzero(activations.chunk_shard == shard):
            rows = activations.read_chunk(source, int(chunk))[:left]
            blocks.append(rows.astype(np.float32))
            left -= len(rows)
            if left == 0:
                break
    return np.concatenate(blocks)


def remarks(rows_ND: np.ndarray) -> list[str]:
    """What a sample of rows shows that its user should know before training, a line each; usually nothing."""
    found = []
    if (zero := float((~rows_ND.any(1)).mean())) > MANY:
        found.append(f"{zero:.0%} of its rows are zero, which teaches nothing; leave them out of the set")
    seen = Counter(xxhash.xxh3_64_intdigest(row.tobytes()) for row in rows_ND if row.any())
    if (same := max(seen.values(), default=0) / max(len(rows_ND), 1)) > MANY:
        found.append(f"{same:.0%} of its rows are one and the same, such as those of a first or padding token")
    mean_D = rows_ND.mean(0, dtype=np.float64)
    square_N = np.concatenate([((part - mean_D) ** 2).sum(1) for part in np.array_split(rows_ND, 32)])
    n_few = max(round(FEW * len(square_N)), 1)
    if len(square_N) > n_few and (share := np.sort(square_N)[-n_few:].sum() / max(square_N.sum(), 1e-300)) > MUCH:
        found.append(
            f"{n_few / len(square_N):.1%} of its rows hold {share:.0%} of the variance, so FVU is theirs; leave them "
            f"out (harvest.max_norm_multiple) if they are attention sinks"
        )
    return found
