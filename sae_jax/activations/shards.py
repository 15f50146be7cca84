"""The rows of one shard of a set, from its token sequences: what `harvest` stores, and live data keep for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from sae_jax.activations.forward import Block
from sae_jax.activations.sinks import Sinks, keep
from sae_jax.activations.spec import SetSpec, array_specs


def empty_rows(spec: SetSpec, n: int) -> dict[str, np.ndarray]:
    """Room for n stored rows of each source: {source: [n, width]}."""
    arrays = {source.name: array_specs(spec)[f"acts/{source.name}"] for source in spec.sources}
    return {name: np.empty((n, *array.row_shape), array.dtype) for name, array in arrays.items()}


def take_shard(
    blocks: Iterator[Block],
    ids_ST: np.ndarray,
    text_ST: np.ndarray,
    max_norm_multiple: float | None,
    out: dict[str, np.ndarray],
    on_block: Callable[[int], None],
    sinks: Sinks,
) -> np.ndarray:
    """Take the activations of a shard's sequences as the models give them.

    Args:
        blocks: what `Forward` gives for these sequences, and perhaps for those of later shards.
        ids_ST: the sequences, i32[S, T].
        text_ST: bool, the positions that may have rows.
        max_norm_multiple: see HarvestConfig.
        out: {source: [S * T or more, width]}; the rows of all positions are put into its first S * T rows.
        on_block: told the tokens of each forward pass, after it.
        sinks: counts rows with large norms.

    Returns:
        Which of these rows the set holds, bool[S, T].
    """
    norms, end = [], 0
    while end < ids_ST.size:
        acts, norm_BTS = next(blocks)
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
