"""The rows of one shard of a set, from its token sequences: what `harvest` stores, and live data keep for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np

from sae_jax.activations.sinks import Sinks, keep
from sae_jax.activations.spec import DTYPES, SetSpec

# Runs sequences i32[S, T] through models, block by block: ({source: [b, T, D]}, norms f32[b, T, hooks]), on the host.
RunSequences: TypeAlias = Callable[[np.ndarray], Iterator[tuple[dict[str, np.ndarray], np.ndarray]]]


def empty_rows(spec: SetSpec, n: int) -> dict[str, np.ndarray]:
    """Room for n rows of each source: {source: [n, D]}."""
    return {source.name: np.empty((n, source.d), DTYPES[source.dtype]) for source in spec.sources}


def run_shard(
    forward: RunSequences,
    ids_ST: np.ndarray,
    text_ST: np.ndarray,
    max_norm_multiple: float | None,
    out: dict[str, np.ndarray],
    on_block: Callable[[int], None],
    sinks: Sinks,
) -> np.ndarray:
    """Run the sequences of a shard through the models.

    Args:
        forward: the models.
        ids_ST: the sequences, i32[S, T].
        text_ST: bool, the positions that may have rows.
        max_norm_multiple: see HarvestConfig.
        out: {source: [S * T or more, D]}; the activations of all positions are put into its first S * T rows.
        on_block: told the tokens of each forward pass, after it.
        sinks: counts rows with large norms.

    Returns:
        Which of these rows the set holds, bool[S, T].
    """
    norms, end = [], 0
    for acts, norm_BTS in forward(ids_ST):
        start, end = end, end + norm_BTS[..., 0].size
        for name, block in acts.items():
            out[name][start:end] = block.reshape(end - start, -1)
        norms.append(norm_BTS)
        on_block(end - start)
    if not norms:
        return text_ST
    norm_STS = np.concatenate(norms)
    sinks.add(ids_ST, text_ST, norm_STS)
    return keep(text_ST, norm_STS, max_norm_multiple)


def index_of(spec: SetSpec, shard: int, ids_ST: np.ndarray, keep_ST: np.ndarray) -> dict[str, np.ndarray]:
    """Where each row of a shard comes from, as `Writer.write_shard` takes it."""
    seq_N, pos_N = np.nonzero(keep_ST)
    return {"token": ids_ST[keep_ST], "seq": seq_N + shard * (spec.sequences_per_shard or 0), "pos": pos_N}
