"""Commits: the record of each shard, written last, and the checks that need nothing else.

A commit holds the counts, digests and moments of a shard. Opening a set reads all commits and the tail of
every committed object, which tells a missing or truncated object from a whole one at the price of one small
request.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import numpy as np
import xxhash

from sae_jax.activations.spec import ArraySpec, SetSpec, array_specs, as_bits
from sae_jax.activations.stats import Stats
from sae_jax.storage import Files
from sae_jax.types import UserError


@dataclass(frozen=True, eq=False)
class Commit:
    """What one shard holds."""

    shard: int
    n_rows: int  # valid rows, first in the shard
    n_sequences: int  # 0 for sets without text
    digests: dict[str, np.ndarray]  # array path -> u64[chunks that hold valid rows]
    stats: dict[str, Stats]  # source -> statistics of the valid rows, as stored

    def to_json(self, chunk_rows: int) -> str:
        """The text of commits/<shard>.json."""
        n_chunks = -(-self.n_rows // chunk_rows)
        return json.dumps(
            {
                "shard": self.shard,
                "n_rows": self.n_rows,
                "chunk_n_rows": [min(chunk_rows, self.n_rows - c * chunk_rows) for c in range(n_chunks)],
                "n_sequences": self.n_sequences,
                "xxh3_64": {path: [f"{d:016x}" for d in digests] for path, digests in self.digests.items()},
                "moments": {
                    name: {"sum": (stats.mean * stats.count).tolist(), "m2": stats.m2.tolist()}
                    for name, stats in self.stats.items()
                },
            }
        )

    @classmethod
    def from_json(cls, text: bytes, shard: int, spec: SetSpec) -> Commit:
        """Parses a commit and checks it against the spec. ValueError or KeyError where they do not agree."""
        record = json.loads(text)
        n_rows, n_sequences = int(record["n_rows"]), int(record["n_sequences"])
        n_chunks = -(-n_rows // spec.chunk_rows)
        digests = {
            path: np.array([int(digest, 16) for digest in record["xxh3_64"][path]], np.uint64)
            for path in array_specs(spec)
        }
        stats = {}
        for source in spec.sources:
            moments = record["moments"][source.name]
            total, m2 = (np.array(moments[key], np.float64) for key in ("sum", "m2"))
            if total.shape != (source.d,) or m2.shape != (source.d,):
                raise ValueError(f"moments of {source.name} are not {source.d} wide")
            stats[source.name] = Stats(n_rows, total / max(n_rows, 1), m2)
        if record["shard"] != shard or not 0 <= n_rows <= spec.shard_rows:
            raise ValueError(f"it is of shard {record['shard']} with {n_rows} rows")
        if not 0 <= n_sequences <= (spec.sequences_per_shard or 0) or sum(record["chunk_n_rows"]) != n_rows:
            raise ValueError("its counts do not add up")
        for path, values in digests.items():
            if len(values) != (n_chunks if path != "sequences" else n_sequences > 0):
                raise ValueError(f"{len(values)} digests of {path} for {n_rows} rows")
        return cls(shard, n_rows, n_sequences, digests, stats)


def commit_key(shard: int) -> str:
    """The key of a shard's commit."""
    return f"commits/{shard}.json"


def committed_shards(files: Files) -> set[int]:
    """The shards that have a commit."""
    matches = (re.fullmatch(r"commits/(\d+)\.json", key) for key in files.keys("commits/"))
    return {int(match[1]) for match in matches if match}


def read_commits(files: Files, spec: SetSpec) -> tuple[list[Commit], list[str]]:
    """The sound commits in shard order, and a line for each that is damaged or lacks its data."""
    commits, problems = [], []
    shards = sorted(committed_shards(files))
    for shard, text in zip(shards, files.read_many(map(commit_key, shards)), strict=True):
        name = files.name(commit_key(shard))
        try:
            if shard >= spec.n_shards:
                raise ValueError(f"the set has {spec.n_shards} shards")
            commits.append(Commit.from_json(text or b"", shard, spec))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{name} is damaged ({_first_line(error)}); delete it and run the harvest again")
    for array in array_specs(spec).values():
        keys = [array.shard_key(commit.shard) for commit in commits]
        tails = files.tails_equal(keys, array.shard_bytes - len(array.shard_index), array.shard_index)
        for key, commit, equal in zip(keys, commits, tails, strict=True):
            if not equal:
                what = "is missing" if equal is None else "does not have the size it was written with"
                cure = f"delete {commit_key(commit.shard)} and run the harvest again"
                problems.append(f"{files.name(key)} {what}; {cure}")
    return commits, problems


def digests(values: np.ndarray, array: ArraySpec) -> np.ndarray:
    """xxh3_64 of each chunk of an array's valid rows: u64[chunks]."""
    chunks = (values[low : low + array.chunk_rows] for low in range(0, len(values), array.chunk_rows))
    return np.array([_digest(chunk) for chunk in chunks], np.uint64)


def read_block(files: Files, array: ArraySpec, commit: Commit, place: int, out: np.ndarray) -> None:
    """Fills out with the valid rows of a chunk. UserError naming object and chunk when the digest differs."""
    key = array.shard_key(commit.shard)
    files.read_into(key, place * array.chunk_bytes, out)
    if _digest(out) != int(commit.digests[array.path][place]):
        raise UserError(
            f"{files.name(key)}: chunk {place} is not what was written, its digest differs; delete "
            f"{commit_key(commit.shard)} and run the harvest again"
        )


def _digest(values: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(as_bits(values).data)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")
