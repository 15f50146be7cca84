"""Reading a whole set to see that it is what was written."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sae_jax.activations.commits import read_block, read_commits
from sae_jax.activations.spec import array_specs
from sae_jax.activations.store import open_array, read_spec, reduce_stats, stats_json
from sae_jax.storage import Files
from sae_jax.types import UserError


@dataclass(frozen=True)
class VerifyReport:
    """The result of `verify`."""

    n_shards: int  # committed
    n_chunks: int  # compared, of all arrays
    n_bytes: int
    damage: tuple[str, ...]  # one line for each damaged object; empty when all is well


def verify(
    path: str | os.PathLike[str], progress: Callable[[int, int], None] = lambda done, total: None
) -> VerifyReport:
    """Reads all of a set, complete or not, and compares every digest. Changes nothing.

    Args:
      path: of the set.
      progress: called after each shard with (shards done, shards committed).

    Returns all damage. Raises UserError only where dataset.json cannot be read.
    """
    files = Files(path)
    spec = read_spec(files)
    arrays = array_specs(spec)
    commits, damage = read_commits(files, spec)
    for array in arrays.values():
        try:
            open_array(files, array, "check")
        except UserError as error:
            damage.append(str(error))
    n_chunks = n_bytes = 0
    for done, commit in enumerate(commits, start=1):
        for array in arrays.values():
            n_valid = commit.n_sequences if array.path == "sequences" else commit.n_rows
            for place in range(len(commit.digests[array.path])):
                rows = min(array.chunk_rows, n_valid - place * array.chunk_rows)
                block = np.empty((rows, *array.row_shape), array.dtype)
                try:
                    read_block(files, array, commit, place, block)
                except UserError as error:
                    damage.append(str(error))
                n_chunks += 1
                n_bytes += block.nbytes
        progress(done, len(commits))
    text = None if damage else files.read("stats.json")
    if text is not None and text.decode(errors="replace") != stats_json(reduce_stats(spec, commits)):
        damage.append(f"{files.name('stats.json')} does not follow from the commits; delete it")
    return VerifyReport(len(commits), n_chunks, n_bytes, tuple(damage))
