"""Commits: the record of each shard, written last, and the checks that need nothing else.

A commit holds the counts, digests and moments of a shard. Opening a set reads all commits and the tail of
every committed object, which tells a missing or truncated object from a whole one at the price of one small
request.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
import xxhash

from sae_jax.activations.cache import ChunkCache
from sae_jax.activations.spec import ArraySpec, SetSpec, array_specs, as_bits
from sae_jax.activations.stats import Stats
from sae_jax.storage import DAMAGED, Files, as_type, parse_json, sealed, unsealed
from sae_jax.types import UserError


class _Moments(msgspec.Struct, forbid_unknown_fields=True):
    sum: list[float]  # of the valid rows, per dimension
    m2: list[float]  # squared deviations from their mean


class _Record(msgspec.Struct, forbid_unknown_fields=True):
    """A commit as JSON."""

    shard: int
    n_rows: int
    chunk_n_rows: list[int]
    n_sequences: int
    xxh3_64: dict[str, list[Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]]]
    moments: dict[str, _Moments]


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
        record = _Record(
            shard=self.shard,
            n_rows=self.n_rows,
            chunk_n_rows=[min(chunk_rows, self.n_rows - c * chunk_rows) for c in range(n_chunks)],
            n_sequences=self.n_sequences,
            xxh3_64={path: [f"{d:016x}" for d in digests] for path, digests in self.digests.items()},
            moments={
                name: _Moments((stats.mean * stats.count).tolist(), stats.m2.tolist())
                for name, stats in self.stats.items()
            },
        )
        return json.dumps(sealed(msgspec.to_builtins(record)), allow_nan=False)

    @classmethod
    def from_json(cls, text: bytes, shard: int, spec: SetSpec, where: str) -> Commit:
        """Parses a commit and checks it against the spec. UserError naming `where` if it is not what was written."""
        content = parse_json(text, where, dict[str, Any])
        record = as_type(unsealed(content, where), _Record, where)
        n_chunks = -(-record.n_rows // spec.chunk_rows)
        if record.shard != shard or not 0 <= record.n_rows <= spec.shard_rows:
            raise UserError(f"{where}: it is of shard {record.shard} with {record.n_rows} rows; {DAMAGED}")
        if record.xxh3_64.keys() != array_specs(spec).keys() or record.moments.keys() != {s.name for s in spec.sources}:
            raise UserError(f"{where}: it is of other sources than the set's; {DAMAGED}")
        if not 0 <= record.n_sequences <= (spec.sequences_per_shard or 0) or sum(record.chunk_n_rows) != record.n_rows:
            raise UserError(f"{where}: its counts do not add up; {DAMAGED}")
        for path, values in record.xxh3_64.items():
            if len(values) != (n_chunks if path != "sequences" else record.n_sequences > 0):
                raise UserError(f"{where}: {len(values)} digests of {path} for {record.n_rows} rows; {DAMAGED}")
        digests = {path: np.array([int(digest, 16) for digest in ds], np.uint64) for path, ds in record.xxh3_64.items()}
        stats = {}
        for source in spec.sources:
            moments = record.moments[source.name]
            total, m2 = (np.array(values, np.float64) for values in (moments.sum, moments.m2))
            if total.shape != (source.d,) or m2.shape != (source.d,):
                raise UserError(f"{where}: moments of {source.name} are not {source.d} wide; {DAMAGED}")
            most = float(np.finfo(np.float32).max)  # of the type with the widest range; twice that, for rounding
            is_sum, is_m2 = abs(total) <= 2 * most * record.n_rows, (m2 >= 0) & (m2 <= 8 * most**2 * record.n_rows)
            if not (is_sum & is_m2).all():
                raise UserError(f"{where}: moments of {source.name} are not those of float32 rows; {DAMAGED}")
            stats[source.name] = Stats(record.n_rows, total / max(record.n_rows, 1), m2)
        return cls(shard, record.n_rows, record.n_sequences, digests, stats)


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
                raise UserError(f"{name}: the set has {spec.n_shards} shards; {DAMAGED}")
            commits.append(Commit.from_json(text or b"", shard, spec, name))
        except UserError as error:
            problems.append(str(error))
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


def read_block(
    files: Files, array: ArraySpec, commit: Commit, place: int, out: np.ndarray, cache: ChunkCache | None = None
) -> None:
    """Fills out with the valid rows of a chunk. UserError naming object and chunk when the digest differs.

    `cache`: where it is looked for first, and kept; of threads that want the same chunk one asks for it.
    """
    key, digest = array.shard_key(commit.shard), int(commit.digests[array.path][place])
    name = f"{files.name(key)} {place} {out.nbytes} {digest:016x}"
    with contextlib.nullcontext() if cache is None else cache.alone(name):
        if cache is not None and cache.read_into(name, out) and _digest(out) == digest:
            return
        files.read_into(key, place * array.chunk_bytes, out)
        if _digest(out) != digest:
            raise UserError(
                f"{files.name(key)}: chunk {place} is not what was written, its digest differs; delete "
                f"{commit_key(commit.shard)} and run the harvest again"
            )
        if cache is not None:
            cache.keep(name, out)


def _digest(values: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(as_bits(values).data)
