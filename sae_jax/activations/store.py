"""The activation set on disk: written by any number of hosts, one shard at a time, and read chunk by chunk.

    dataset.json           the spec and its SHA-256
    acts/<source>/         zarr v3, [n_shards * shard_rows, width] (rows.py); a shard is one write, a chunk one read
    index/{token,seq,pos}/ int32 in the same row order, for sets with text
    sequences/             int32 [n_sequences, context], what the language model saw, by shard
    commits/<shard>.json   what the shard holds, written once its data is durable
    stats.json             count, mean and M2 of every source, reduced from the commits in shard order

A shard without commit does not exist, whatever objects it has: to redo it is always safe, so a process
killed at any moment costs one shard. Valid rows stand first in their shard, shuffled there; the rest of the
shard is zeros. Each chunk's xxh3_64 digest is in the commit and is compared on every read, over the valid
rows only.

A shard has one writer at a time, which holds its lease (storage/lease.py).
Rows are little-endian on disk and hosts are taken to be so too.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Literal, NoReturn

import numpy as np
import tensorstore as ts

from sae_jax.activations.cache import ChunkCache, chunk_cache
from sae_jax.activations.commits import (
    Commit,
    commit_key,
    committed_shards,
    digests,
    read_block,
    read_commits,
)
from sae_jax.activations.order import WRITE_ORDER, shuffled
from sae_jax.activations.rows import decode, encode
from sae_jax.activations.spec import INDEX_NAMES, ArraySpec, SetSpec, SourceSpec, array_specs, as_bits
from sae_jax.activations.stats import Stats
from sae_jax.storage import STORAGE_ERRORS, Files, Lease, context, kvstore, reason, write_error
from sae_jax.types import UsageError, UserError


class Writer:
    """Writes the shards of a set. Made by `create`; any number of processes may each have one."""

    def __init__(self, files: Files, spec: SetSpec, lease: Lease | None = None):
        """`lease`: of the whole set, if it has one writer; once that is lost, nothing more is committed."""
        self.files, self.spec = files, spec
        self.path = files.path
        self.arrays = array_specs(spec)
        self._lease = lease or Lease(None, "")

    def committed(self) -> set[int]:
        """The shards that are done, by this process or any other."""
        return committed_shards(self.files)

    def write_shard(
        self,
        shard: int,
        sources: Mapping[str, np.ndarray],
        index: Mapping[str, np.ndarray] | None = None,
        sequences: np.ndarray | None = None,
        first_row: int = 0,
    ) -> Commit:
        """Writes one shard and commits it. Returns when both are durable. Repeating it is safe.

        Args:
          shard: its number, below spec.n_shards.
          sources: name -> rows [n, d] for every source of the set, n <= shard_rows, any float dtype, or as they are
            stored, in any order: they are shuffled here, all sources and the index alike, by (spec.seed, shard).
          index: "token", "seq" (number of the sequence in the whole set) and "pos" of the rows, int [n]. Sets
            with text only.
          sequences: int [m, context], m <= sequences_per_shard: the token sequences of this shard. Sets with
            text only.
          first_row: number of the first row, for the message about a row that is not finite.

        Raises UserError when a row is not finite or the disk is full, UsageError when the shapes do not fit
        the spec, HeldError while another process writes this shard.
        """
        with Lease(self.files.at(f"commits/{shard}.owner"), f"shard {shard} of {self.path}") as lease:
            return self._write_shard(lease, shard, sources, index, sequences, first_row)

    def _write_shard(
        self,
        lease: Lease,
        shard: int,
        sources: Mapping[str, np.ndarray],
        index: Mapping[str, np.ndarray] | None,
        sequences: np.ndarray | None,
        first_row: int,
    ) -> Commit:
        blocks, stats = self._checked(shard, sources, index, sequences, first_row)
        n_rows = len(blocks[f"acts/{self.spec.sources[0].name}"])
        order = order_in_shard(self.spec, shard, n_rows)
        padded, hashes = {}, {}
        for path, block in blocks.items():
            array = self.arrays[path]
            padded[path] = np.zeros((array.shard_rows, *array.row_shape), array.dtype)
            if path == "sequences":
                padded[path][: len(block)] = block
            else:
                shuffled = as_bits(padded[path][:n_rows])
                np.take(as_bits(block), order, axis=0, out=shuffled, mode="clip")
            hashes[path] = digests(padded[path][: len(block)], array)
        commit = Commit(shard, n_rows, len(blocks.get("sequences", ())), hashes, stats)

        key = commit_key(shard)
        text = commit.to_json(self.spec.chunk_rows).encode()
        self._lease.check()
        if self.files.read(key) not in (None, text):
            self.files.delete(key)  # a kill before the new commit must not leave new data under the old one
        try:
            writes = []
            for path, rows in padded.items():
                low = shard * self.arrays[path].shard_rows
                target = open_array(self.files, self.arrays[path], "write")
                writes.append(target[low : low + len(rows)].write(rows))
            for write in writes:
                write.result()
        except STORAGE_ERRORS as error:
            raise write_error(f"shard {shard} of {self.path}", error) from error
        lease.check()
        self._lease.check()
        self.files.write(key, text)
        return commit

    def finish(self) -> None:
        """Writes stats.json, from any process the same bytes. UserError while shards are missing."""
        activations = ActivationSet(self.files, self.spec, allow_partial=False)
        self.files.write("stats.json", stats_json(reduce_stats(self.spec, activations.commits.values())).encode())
        for key in self.files.keys("commits/"):
            if re.fullmatch(r"commits/\d+\.owner\.\d+\.json", key):
                self.files.delete(key)  # of a process that was killed after its commit

    def _checked(
        self,
        shard: int,
        sources: Mapping[str, np.ndarray],
        index: Mapping[str, np.ndarray] | None,
        sequences: np.ndarray | None,
        first_row: int,
    ) -> tuple[dict[str, np.ndarray], dict[str, Stats]]:
        """The arrays to store by path, in their dtypes and the caller's order; statistics of the sources."""
        spec = self.spec
        if not 0 <= shard < spec.n_shards:
            raise UsageError(f"shard {shard} is not in a set of {spec.n_shards} shards")
        given = {f"acts/{name}": rows for name, rows in sources.items()}
        given |= {f"index/{name}": values for name, values in (index or {}).items()}
        if sequences is not None:
            given["sequences"] = sequences
        if given.keys() != self.arrays.keys():
            raise UsageError(f"a shard of this set is {', '.join(self.arrays)}; got {', '.join(given) or 'none'}")
        n_rows = len(next(iter(sources.values())))
        given |= {f"acts/{s.name}": encode(np.asarray(sources[s.name]), s.dtype) for s in spec.sources}
        blocks, stats = {}, {}
        for path, array in self.arrays.items():
            values = np.ascontiguousarray(given[path])
            n = len(values) if path == "sequences" else n_rows
            if values.shape != (n, *array.row_shape) or n > array.shard_rows:
                expected = ", ".join(map(str, (min(n, array.shard_rows), *array.row_shape)))
                raise UsageError(f"shard {shard}: {path} is {list(values.shape)}; it must be [{expected}]")
            blocks[path] = values.astype(array.dtype, copy=False)
        for source in spec.sources:
            stored = blocks[f"acts/{source.name}"]
            stats[source.name] = Stats.of_rows(stored)
            if not np.isfinite(stats[source.name].m2).all():
                refuse_not_finite(stored, source, shard, first_row)
        if spec.has_text:
            tokens_MT, seq, pos = (blocks[path] for path in ("sequences", "index/seq", "index/pos"))
            seq = seq - shard * self.arrays["sequences"].shard_rows
            known = (seq >= 0) & (seq < tokens_MT.shape[0]) & (pos >= 0) & (pos < tokens_MT.shape[1])
            if not known.all() or (tokens_MT[seq, pos] != blocks["index/token"]).any():
                raise UsageError(f"shard {shard}: its index and sequences disagree on a token")
        return blocks, stats


class ActivationSet:
    """A set opened for reading. Made by `open_activations`. Threads may share it."""

    def __init__(self, files: Files, spec: SetSpec, allow_partial: bool, cache: ChunkCache | None = None):
        """`cache`: where chunks are kept that come from a URL."""
        commits, problems = read_commits(files, spec)
        if problems:
            more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
            raise UserError(problems[0] + more)
        if len(commits) < spec.n_shards and not allow_partial:
            raise UserError(
                f"{files.path}: {len(commits)} of {spec.n_shards} shards are committed; finish the harvest "
                "with the same command or pass --allow-partial"
            )
        self.files, self.spec, self.path = files, spec, files.path
        self._cache = cache if files.local is None else None
        self.arrays = array_specs(spec)
        self.sources: tuple[str, ...] = tuple(source.name for source in spec.sources)
        self.commits = {commit.shard: commit for commit in commits}
        self.n_rows = sum(commit.n_rows for commit in commits)
        if self.n_rows == 0:
            raise UserError(f"{files.path}: no committed shard has rows; nothing can be read from it")
        counts = [-(-commit.n_rows // spec.chunk_rows) for commit in commits]
        # The chunks that hold valid rows, in order: shard, place in the shard, valid rows. All i64[n_chunks].
        self.chunk_shard = np.repeat([commit.shard for commit in commits], counts)
        self.chunk_in_shard = np.concatenate([np.arange(count) for count in counts])
        shard_n_rows = np.repeat([commit.n_rows for commit in commits], counts)
        self.chunk_n_rows = np.minimum(spec.chunk_rows, shard_n_rows - self.chunk_in_shard * spec.chunk_rows)
        self._stats = reduce_stats(spec, commits)
        self._sequence_block = lru_cache(maxsize=4)(self._read_sequence_block)

    @property
    def content(self) -> str:
        """SHA-256, hex, of the spec and of the digests of all committed shards: what a run was trained on."""
        sha = hashlib.sha256(self.spec.sha256.encode())
        for shard, commit in sorted(self.commits.items()):
            sha.update(f"{shard} {commit.n_rows}".encode())
            for path, digests_C in sorted(commit.digests.items()):
                sha.update(path.encode() + digests_C.tobytes())
        return sha.hexdigest()

    @property
    def n_chunks(self) -> int:
        """Chunks that hold valid rows."""
        return len(self.chunk_n_rows)

    def source(self, name: str) -> SourceSpec:
        """The source of that name. UsageError naming those which exist otherwise."""
        return self.spec.source(name)

    def stats(self, source: str) -> Stats:
        """Count, mean and M2 of all valid rows of a source, reduced from the commits in shard order."""
        return self._stats[self.source(source).name]

    def read_chunk(self, source: str, chunk: int) -> np.ndarray:
        """The valid rows of chunk `chunk` of 0 ... n_chunks - 1: [n, d] in the source's dtype, int8 rows in float32.

        Raises UserError naming the shard's object and the chunk when its bytes are not those that were
        written.
        """
        array = self.arrays[f"acts/{self.source(source).name}"]
        self._check_chunk(chunk)
        rows = np.empty((self.chunk_n_rows[chunk], *array.row_shape), array.dtype)
        self.read_chunk_into(source, chunk, rows)
        return decode(rows)

    def read_chunk_into(self, source: str, chunk: int, out: np.ndarray) -> None:
        """The same as stored, into a contiguous array of n rows. Holds no lock: many threads read at once."""
        shard, place = int(self.chunk_shard[chunk]), int(self.chunk_in_shard[chunk])
        self._read_block(f"acts/{source}", shard, place, out)

    def announce_chunk(self, source: str, chunk: int) -> None:
        """Tells a local disk that `read_chunk` will come soon, so that it fetches many chunks at once."""
        array = self.arrays[f"acts/{source}"]
        shard, place = int(self.chunk_shard[chunk]), int(self.chunk_in_shard[chunk])
        self.files.announce(array.shard_key(shard), place * array.chunk_bytes, array.chunk_bytes)

    def read_index(self, chunk: int) -> dict[str, np.ndarray]:
        """Origin of the rows of a chunk: "token", "seq", "pos", each int32 [n]. UsageError without text."""
        self.check_text()
        self._check_chunk(chunk)
        shard, place = int(self.chunk_shard[chunk]), int(self.chunk_in_shard[chunk])
        index = {name: np.empty(self.chunk_n_rows[chunk], np.int32) for name in INDEX_NAMES}
        for name, values in index.items():
            self._read_block(f"index/{name}", shard, place, values)
        return index

    def read_sequences(self, seq: Iterable[int] | np.ndarray) -> np.ndarray:
        """The token sequences of those numbers: int32 [len(seq), context]. UsageError without text."""
        self.check_text()
        seq = np.asarray(seq)
        if seq.size and seq.dtype.kind not in "iu":
            raise UsageError(f"sequences {seq.ravel()[:1]} are {seq.dtype}; give whole numbers")
        seq = seq.astype(np.int64)
        array = self.arrays["sequences"]
        shards, local = np.divmod(seq, array.shard_rows)
        result = np.empty((len(seq), *array.row_shape), np.int32)
        for shard in np.unique(shards):
            commit, here = self.commits.get(int(shard)), shards == shard
            if commit is None or local[here].max() >= commit.n_sequences:
                raise UsageError(f"{self.path} has no sequence {int(seq[here].max())}")
            result[here] = self._sequence_block(int(shard))[local[here]]
        return result

    def _check_chunk(self, chunk: int) -> None:
        if not 0 <= operator.index(chunk) < self.n_chunks:
            raise UsageError(f"{self.path} has no chunk {chunk}; there are 0 to {self.n_chunks - 1}")

    def _read_sequence_block(self, shard: int) -> np.ndarray:
        block = np.empty((self.commits[shard].n_sequences, *self.arrays["sequences"].row_shape), np.int32)
        self._read_block("sequences", shard, 0, block)
        return block

    def _read_block(self, path: str, shard: int, place: int, out: np.ndarray) -> None:
        read_block(self.files, self.arrays[path], self.commits[shard], place, out, self._cache)

    def check_text(self) -> None:
        """Raises UsageError, with the way out, for a set whose rows come from no text."""
        if not self.spec.has_text:
            raise UsageError(
                f"{self.path} has no text: its rows were written without tokens; use `sae-jax harvest`, or give "
                f"tokens= and tokenizer= to sae_jax.write_activations"
            )


def order_in_shard(spec: SetSpec, shard: int, n_rows: int) -> np.ndarray:
    """Which of the rows that a shard is written from stands where in it: i64[n_rows]."""
    return shuffled(n_rows, spec.seed, WRITE_ORDER, shard)


def create(path: str | os.PathLike[str], spec: SetSpec) -> Writer:
    """Creates a set, or joins it: any number of hosts may call it with the same spec, at any time.

    Where text or models lie elsewhere now, the set names the new place from then on.

    Raises UsageError when another spec is there already, naming the first field that differs, and HeldError while
    `write_activations` is at work there, which makes dataset.json last.
    """
    files = Files(path)
    lease = Lease(files.at("owner"), path)
    if lease.holder():
        with lease:
            pass  # it was dead
    for array in array_specs(spec).values() if files.read("dataset.json") is None else ():
        if files.keys("commits/"):
            raise UserError(f"{files.path} holds shards but no dataset.json: its writing was cut off; delete it")
        open_array(files, array, "create")
    if not files.create("dataset.json", spec.to_json().encode()):
        stored = read_spec(files)
        if difference := stored.first_difference(spec):
            raise UsageError(
                f"{files.path} is already a set in which {difference}; use the same settings or another path"
            )
        if stored != spec:
            files.write("dataset.json", spec.to_json().encode())
    return Writer(files, spec)


def open_activations(
    path: str | os.PathLike[str], allow_partial: bool = False, cache_gib: float = 0.0
) -> ActivationSet:
    """Opens a set for reading.

    Args:
      path: a folder, or a URL that tensorstore knows (gs://, s3://).
      allow_partial: open a set of which some shards are not committed yet, as it is now.
      cache_gib: GiB of a local disk (cache.py) in which chunks of a set at a URL are kept once they were read.

    Raises UserError in one line naming the object: not a set, a damaged commit, a committed shard with
    missing or truncated data, an incomplete set without allow_partial. Digests of data are compared when
    chunks are read.
    """
    cache = chunk_cache(cache_gib)
    files = Files(path)
    return ActivationSet(files, read_spec(files), allow_partial, cache)


def read_spec(files: Files) -> SetSpec:
    """The spec of the set under a root. UserError where there is none or dataset.json is damaged."""
    text = files.read("dataset.json")
    if text is not None:
        return _parse(files, text)
    if files.keys("commits/"):
        raise UserError(f"{files.path} has shards but no dataset.json: its writing was cut off; write it again")
    raise UserError(f"{files.path} is not an activation set: it has no dataset.json")


def open_array(files: Files, array: ArraySpec, mode: Literal["create", "check", "write"]) -> ts.TensorStore:
    """Opens a zarr array to create or check its metadata, or to write shards without reading it."""
    spec = {
        "driver": "zarr3",
        "kvstore": kvstore(files.at(array.path), "/"),
        "metadata": array.metadata(),
        # A missing chunk reads as zeros, and a chunk of zeros is not written, unless told otherwise.
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }
    new, assume = mode == "create", mode == "write"
    try:
        return ts.open(spec, context=context(), open=True, create=new, assume_metadata=assume).result()
    except STORAGE_ERRORS as error:
        if mode == "create":
            raise write_error(files.name(array.path), error) from error
        raise UserError(f"{files.name(array.path)}/zarr.json is damaged: {reason(error)}") from error


def reduce_stats(spec: SetSpec, commits: Iterable[Commit]) -> dict[str, Stats]:
    """Statistics of every source from commits in shard order: the same bits wherever they are computed."""
    stats = {source.name: Stats.empty(source.d) for source in spec.sources}
    for commit in commits:
        stats = {name: part.join(commit.stats[name]) for name, part in stats.items()}
    return stats


def stats_json(stats: Mapping[str, Stats]) -> str:
    """The text of stats.json."""
    return json.dumps({name: part.to_json() for name, part in stats.items()}, allow_nan=False)


def _parse(files: Files, text: bytes) -> SetSpec:
    try:
        return SetSpec.from_json(text)
    except ValueError as error:
        raise UserError(f"{files.name('dataset.json')} cannot be used: {error}") from error


def refuse_not_finite(rows_BD: np.ndarray, source: SourceSpec, shard: int, first_row: int) -> NoReturn:
    """UserError that names the first of these stored rows which is not finite."""
    bad_B = ~np.isfinite(decode(rows_BD).astype(np.float32)).all(axis=1)
    row = first_row + int(np.argmax(bad_B))
    raise UserError(
        f"row {row} (shard {shard}) of source {source.name} is not finite in {source.dtype}; leave such "
        "rows out, or store float32 if they overflow"
    )
