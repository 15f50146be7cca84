"""The store: every activation of a sample of text, by latent, on disk.

    STORE/store.json           what it is of (Plan)
    STORE/parts/00003/         the share of one shard of the set, while the store is made
        run-0000/              counts u32[F], places u32[A] within the part, values f32[A]: sorted by latent, then place
        sequences, has_row     i32[q, T], bool[q, T]
    STORE/latents/             the whole: offsets i64[F + 1], places u32[A], values f32[A], sequences, has_row

Arrays are zarr v3 with checksums.

Each part has one writer and appears whole, so a killed process costs one part. Parts may be made in any order, by any
number of processes that see the folder; whoever finds all of them there joins them. The same bytes come out, however
the work was divided.

Memory: a run holds 2^23 activations, 270 MB while they are sorted, a step of the join half as many; beside that 12
bytes a latent, and one part's text. It does not grow with the rows. On disk an activation takes 8 bytes, twice while
parts are joined.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import numpy as np
import tensorstore as ts

from sae_jax import storage
from sae_jax.analysis import examples
from sae_jax.analysis.examples import MAX_PLACES, Activations, SparseBlock
from sae_jax.storage import AnyPath, StrPath
from sae_jax.types import UsageError, UserError

VERSION = 2
RUN = 2**23  # activations
CHUNK, SHARD = 2**14, 2**23  # numbers read at once, and in a file
CACHE_BYTES = 2**26  # of chunks that were read, for neighbouring latents


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a store is of. A function of dictionary, set and number of tokens alone."""

    dictionary: str  # digest of its arrays and settings
    content: str  # of the activation set
    sources: list[str]  # that are encoded, side by side
    n_latents: int
    context: int  # T
    shards: list[int]  # of the set: one part each
    n_sequences: list[int]  # of each part, from the start of its shard
    tokenizer: str | None = None  # reference of what made tokens of the text, and its digest
    tokenizer_digest: str | None = None
    version: int = VERSION

    @property
    def first_sequence(self) -> list[int]:
        """Number of the first sequence of each part in the whole sample, and of the end."""
        return [0, *np.cumsum(self.n_sequences).tolist()]


class Store:
    """A store at a path, finished or not."""

    def __init__(self, path: StrPath):
        """UserError if there is no store, or if its record is not what was written."""
        self.path = storage.path(path)
        content = storage.read_json(self.path / "store.json")
        if content is None:
            raise UserError(f"{path} is no store of latents; make one with sae-jax collect")
        where = str(self.path / "store.json")
        if content.get("version") != VERSION:
            raise UserError(
                f"{where}: version {content.get('version')!r}, and this program reads {VERSION}; make it anew"
            )
        self.plan: Plan = storage.as_type(storage.unsealed(content, where), Plan, where)

    @classmethod
    def create(cls, path: StrPath, plan: Plan) -> Store:
        """The store of a plan: a new one, or one that was begun. UsageError if another stands there."""
        if plan.first_sequence[-1] * plan.context >= MAX_PLACES:
            raise UsageError(f"a store holds at most {MAX_PLACES:,} tokens; use fewer --tokens")
        folder = storage.path(path)
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "store.json").exists()):
            raise UsageError(f"{path} exists and is no store of latents; choose another folder")
        storage.make_folder(folder)
        storage.create(
            folder / "store.json", storage.json_text(storage.sealed(msgspec.to_builtins(plan)), path).encode()
        )
        store = cls(path)
        if differs := [name for name in Plan.__struct_fields__ if getattr(store.plan, name) != getattr(plan, name)]:
            raise UsageError(
                f"{path} is a store of another {', '.join(differs)}; use the same settings or choose another folder"
            )
        return store

    @property
    def is_finished(self) -> bool:
        """Whether all parts are joined."""
        return storage.is_whole(self.path / "latents")

    def missing(self) -> list[int]:
        """Numbers of the parts that nobody has made yet."""
        if self.is_finished:
            return []
        return [part for part in range(len(self.plan.shards)) if not storage.is_whole(self._part(part))]

    def write_part(self, part: int, sequences: np.ndarray, blocks: Iterable[SparseBlock]) -> None:
        """Make one part: its sequences i32[q, T], and the codes of its rows with their places in these.

        UserError for codes that `examples.sorted_runs` refuses, HeldError while another process makes it.
        """
        with storage.new_folder(self._part(part)) as folder:
            has_row = np.zeros(sequences.size, bool)
            for number, run in enumerate(examples.sorted_runs(blocks, self.plan.n_latents, has_row, RUN)):
                for name, array in vars(run).items():
                    _write(folder / f"run-{number:04d}" / name, array.dtype, array.shape, [array])
            _write(folder / "sequences", np.int32, sequences.shape, [sequences])
            _write(folder / "has_row", np.bool_, sequences.shape, [has_row.reshape(sequences.shape)])

    def join(self) -> None:
        """Make the whole of all parts, if it is not there, and delete them. HeldError while another process does."""
        if not self.is_finished:
            self._make_whole()
        storage.remove_folder(self.path / "parts")  # also what is left of them where a removal was cut off

    def _make_whole(self) -> None:
        with storage.new_folder(self.path / "latents") as folder:
            runs = {  # by folder, the place in the whole at which its part begins
                run: first * self.plan.context
                for part, first in enumerate(self.plan.first_sequence[:-1])
                for run in sorted(self._part(part).glob("run-*"))
            }
            offsets = np.zeros(self.plan.n_latents + 1, np.int64)
            for run in runs:
                offsets[1:] += Column(run / "counts")[:]
            np.cumsum(offsets, out=offsets)
            _write(folder / "offsets", np.int64, offsets.shape, [offsets])
            _join_codes(folder, runs, offsets)
            shape = (self.plan.first_sequence[-1], self.plan.context)
            for name, dtype in (("sequences", np.int32), ("has_row", np.bool_)):
                parts = (Column(self._part(part) / name)[:] for part in range(len(self.plan.shards)))
                _write(folder / name, dtype, shape, parts)

    def open(self) -> Activations:
        """What it holds. UserError if it is not finished, or damaged."""
        if missing := self.missing():
            raise UserError(
                f"{self.path}: {len(missing)} of {len(self.plan.shards)} parts are missing; run the same sae-jax "
                f"collect again"
            )
        if not self.is_finished:
            raise UserError(f"{self.path}: its parts are not joined yet; run the same sae-jax collect again")
        where = self.path / "latents"
        context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
        columns = {
            name: Column(where / name, context) for name in ("sequences", "has_row", "offsets", "places", "values")
        }
        whole = {name: columns[name][:] for name in ("sequences", "has_row", "offsets")}
        return Activations(places=columns["places"], values=columns["values"], **whole)

    def _part(self, part: int) -> AnyPath:
        return self.path / "parts" / f"{part:05d}"


def _join_codes(folder: AnyPath, runs: Mapping[AnyPath, int], offsets: np.ndarray) -> None:
    """Write `places` and `values` of all runs {folder: place at which it begins}, some latents at a time."""
    shape = (int(offsets[-1]),)
    places, values = (_Appender(folder / name, t, shape) for name, t in (("places", np.uint32), ("values", np.float32)))
    columns = [[Column(run / name) for name in ("counts", "places", "values")] for run in runs]
    read = [0] * len(runs)  # activations of each
    for first, last in examples.latent_blocks(offsets):
        pieces = []
        for number, (start, (of_counts, of_places, of_values)) in enumerate(zip(runs.values(), columns, strict=True)):
            counts = of_counts[first:last]
            here = slice(read[number], read[number] + int(counts.sum(dtype=np.int64)))
            pieces.append(
                (of_places[here] + np.uint32(start), of_values[here], np.repeat(np.arange(len(counts)), counts))
            )
            read[number] = here.stop
        sorted_places, sorted_values = examples.merged(*map(np.concatenate, zip(*pieces, strict=True)))
        places.append(sorted_places)
        values.append(sorted_values)
    places.close()
    values.close()


class Column:
    """An array on disk, of which slices along its first dimension are read: `column[a:b]`."""

    def __init__(self, path: AnyPath, context: ts.Context | None = None):
        self.path = path
        try:
            self._array = ts.open(_spec(path), context=context or storage.context(), open=True, read=True).result()
        except storage.STORAGE_ERRORS as error:
            raise UserError(f"{path} cannot be read: {storage.reason(error)}; make the store anew") from error

    def __len__(self) -> int:
        return self._array.shape[0]

    def __getitem__(self, part: slice) -> np.ndarray:
        try:
            return np.asarray(self._array[part].read().result())
        except storage.STORAGE_ERRORS as error:
            raise UserError(f"{self.path} is damaged: {storage.reason(error)}; make the store anew") from error


class _Appender:
    """Writes an array of known shape from front to back, in pieces that fill whole files."""

    def __init__(self, path: AnyPath, dtype: Any, shape: tuple[int, ...]):
        self._array, self._path = _create(path, np.dtype(dtype), shape), path
        self._per_file = _rows_per_file(shape)
        self._held: list[np.ndarray] = []
        self._n_held = self._written = 0

    def append(self, rows: np.ndarray) -> None:
        self._held.append(rows)
        self._n_held += len(rows)
        if self._n_held >= self._per_file:
            self._write(self._n_held // self._per_file * self._per_file)

    def close(self) -> None:
        if self._n_held:
            self._write(self._n_held)

    def _write(self, n: int) -> None:
        held = np.concatenate(self._held)
        self._held, self._n_held = [held[n:]], len(held) - n
        try:
            self._array[self._written : self._written + n].write(held[:n]).result()
        except storage.STORAGE_ERRORS as error:
            raise storage.write_error(str(self._path), error) from error
        self._written += n


def _write(path: AnyPath, dtype: Any, shape: tuple[int, ...], pieces: Iterable[np.ndarray]) -> None:
    """An array from pieces along its first dimension."""
    array = _Appender(path, dtype, shape)
    for piece in pieces:
        array.append(piece)
    array.close()


def _rows_per_chunk(shape: tuple[int, ...]) -> int:
    return max(1, CHUNK // math.prod(shape[1:]))


def _rows_per_file(shape: tuple[int, ...]) -> int:
    chunk = _rows_per_chunk(shape)
    return max(chunk, SHARD // math.prod(shape[1:]) // chunk * chunk)


def _create(path: AnyPath, dtype: np.dtype, shape: tuple[int, ...]) -> ts.TensorStore:
    """A new zarr array. Checksums cost little here: what is read once is shown, not learned from."""
    raw = {"name": "bytes", "configuration": {"endian": "little"}}
    codecs = [raw, {"name": "crc32c"}]
    inner = {"chunk_shape": [_rows_per_chunk(shape), *shape[1:]], "codecs": codecs, "index_codecs": codecs}
    metadata = {
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [_rows_per_file(shape), *shape[1:]]}},
        "codecs": [{"name": "sharding_indexed", "configuration": inner}],
    }
    spec = {**_spec(path), "metadata": metadata, "store_data_equal_to_fill_value": True}
    try:
        return ts.open(spec, context=storage.context(), create=True).result()
    except storage.STORAGE_ERRORS as error:
        raise storage.write_error(str(path), error) from error


def _spec(path: AnyPath) -> dict[str, Any]:
    """How tensorstore opens an array; a chunk that is missing is an error, not zeros."""
    kvstore = storage.kvstore(path if storage.is_url(path) else storage.absolute(path), "/")
    return {"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False}
