"""A small, spread-out sample of a set, for what must be known before training starts."""

from __future__ import annotations

import numpy as np

from sae_jax.activations.store import ActivationSet

MAX_SHARDS = 32
MAX_ROWS = 32_768


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
