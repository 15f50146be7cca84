"""Segments: consecutive shards of a set that are made when training needs them, and kept for a while.

    shards 0 1 2 | 3 4 5 | 6 7 8 | ...       segment s = the rows of its shards, one after the other
                   in use  being made        ... in a fixed number of slots, each with room for one segment

Slots are memory or files, and never grow: that is the budget. A thread makes the segment that comes next while the
present one is used. A slot in memory is free when training has left its segment: it would not survive the process. One
on the disk keeps its segment until a checkpoint has passed it, so that a run which is killed finds again what it needs;
where training would stand still for want of a checkpoint, `awaited` says which one would do.

Of several processes each makes and keeps its share of the shards of every segment (shares.py), in slots of its own.

How many rows each shard has is known once it was made, since some rows are left out. It is noted in the folder, from
which a resumed run knows where each step lies; it makes no more segments than it needs.
"""

from __future__ import annotations

import abc
import math
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash

from sae_jax import storage
from sae_jax.activations.rows import SCALE_BYTES, row_bytes
from sae_jax.activations.shards import empty_rows
from sae_jax.activations.shares import exchange
from sae_jax.activations.spec import SetSpec, array_specs, as_bits
from sae_jax.activations.store import refuse_not_finite
from sae_jax.storage import AnyPath, disk
from sae_jax.types import UsageError, UserError
from sae_jax.units import memory, size

GIB = 1 << 30
IN_MEMORY, ON_DISK = 2, 4  # slots; on the disk two more, for segments that no checkpoint has passed yet
BESIDE_BYTES = 4 << 20  # on the disk, for what describes rows
SECONDS_BETWEEN_WORDS = 0.5
AT_WORK = 2  # shards in memory beside the slots: the one that is being made, and a copy while it is put in order

_numbers = count()  # of what makes segments: processes make them alike, and know by these what is about which


class ShardMaker(abc.ABC):
    """Makes the shards of a set, each the same whenever it is made. Used by one thread at a time."""

    spec: SetSpec

    @abc.abstractmethod
    def fill(self, shard: int, out: dict[str, np.ndarray], on_rows: Callable[[int], None]) -> np.ndarray:
        """Make a shard.

        Args:
            shard: its number.
            out: {source: [rows of a whole shard, width]}, to be filled with rows as stored (rows.py).
            on_rows: told how many rows more are made, now and then, before any is left out; raises StoppedError once
                nobody waits for the shard any more.

        Returns:
            Which rows of `out` are the shard's, in its order: i64[n].
        """

    def of_run(self, folder: AnyPath | None) -> ShardMaker:
        """The same for a run whose folder this is; it may leave something there. None: nothing is written."""
        return self


class StoppedError(Exception):
    """A shard is not made, since nobody waits for it any more."""


@dataclass(frozen=True)
class Cut:
    """How a set is cut into segments, and where they are kept."""

    n_shards: int  # of the set
    per_segment: int  # shards, but for the last segment, which may have fewer
    n_slots: int
    on_disk: bool
    process: int = 0  # of n_processes
    n_processes: int = 1

    @property
    def n_segments(self) -> int:
        """Segments of one pass over the text."""
        return -(-self.n_shards // self.per_segment)

    def shards(self, segment: int) -> range:
        """The shards of a segment."""
        first = segment * self.per_segment
        return range(first, min(first + self.per_segment, self.n_shards))

    def mine(self, segment: int) -> range:
        """Those of them that this process makes."""
        shards = self.shards(segment)
        return range(shards.start + (self.process - shards.start) % self.n_processes, shards.stop, self.n_processes)

    @property
    def slot_shards(self) -> int:
        """Shards that a slot has room for."""
        return -(-self.per_segment // self.n_processes)


def cut(spec: SetSpec, memory_gib: float, disk_gib: float, process: int = 0, n_processes: int = 1) -> Cut:
    """The largest segments that a budget has room for, as equal as can be. UsageError if it has room for none.

    Args:
        spec: of the set.
        memory_gib: for rows in the memory of each process.
        disk_gib: for segments of each process, and the first shard, on the disk; 0: segments are in memory.
        process: this one, of n_processes that share the shards.
        n_processes: how many there are. All of their budgets together cut the set.
    """
    shard_bytes = shard_rows(spec) * sum(row_bytes(source.d, source.dtype) for source in spec.sources)
    first_bytes = sum(array.shard_bytes for array in array_specs(spec).values())
    budget, beside, n_slots = memory_gib * GIB, AT_WORK * shard_bytes, IN_MEMORY
    if disk_gib:
        budget, beside, n_slots = disk_gib * GIB, first_bytes + BESIDE_BYTES, ON_DISK
    most = int((budget - beside) // (n_slots * shard_bytes))
    if most < 1:
        name, value = ("disk", disk_gib) if disk_gib else ("memory", memory_gib)
        shown, least = (size if disk_gib else memory)(shard_bytes), (beside + n_slots * shard_bytes) / GIB
        raise UsageError(
            f"live.{name}_gib={value:g} has no room for {n_slots} segments of one shard, {shown} each; use "
            f"{_rounded_up(least):g} or more, or fewer harvest.hooks"
        )
    n_segments = -(-spec.n_shards // (most * n_processes))
    return Cut(spec.n_shards, -(-spec.n_shards // n_segments), n_slots, bool(disk_gib), process, n_processes)


def shard_rows(spec: SetSpec) -> int:
    """Rows of a shard before any is left out."""
    return (spec.sequences_per_shard or 0) * (spec.context or 0) or spec.shard_rows


class _Kept(msgspec.Struct, forbid_unknown_fields=True):
    """What a slot on the disk holds."""

    segment: int
    xxh3_64: dict[str, str]  # of the rows of each source


class _Notes(msgspec.Struct, forbid_unknown_fields=True):
    """FOLDER/segments.json."""

    content: str  # what the rows are: notes of others do not count
    n_rows: list[int]  # of the first shards
    slots: list[_Kept | None]
    share: tuple[int, int] = (0, 1)  # (p, P) of the process whose slots they are


class Segments:
    """The segments of one run. `use`, `n_rows` are called by one thread, `saved` and `awaited` by another."""

    def __init__(self, maker: ShardMaker, cut: Cut, content: str, folder: AnyPath | None) -> None:
        """`content`: identifies the rows; `folder`: for the notes, and for slots on the disk.

        All processes make theirs alike. Raises UserError where they would not make rows of the same set.
        """
        self.cut = cut
        self.n_made = 0  # rows of the segment that is being made, before any is left out
        if folder is not None and cut.process:
            folder = folder / f"process-{cut.process}"
        elif isinstance(folder, Path):
            for path in folder.glob("process-*"):  # of an attempt that had more processes
                if int(path.name.removeprefix("process-")) >= cut.n_processes:
                    shutil.rmtree(path)
        self._maker, self._folder, self._name = maker, folder, str(next(_numbers))
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._notes = _read_notes(folder, content, cut) or _Notes(content, [], [None] * cut.n_slots)
        self._notes.share = (cut.process, cut.n_processes)
        first, *_ = self._exchange("begun", [content, self._notes.n_rows])
        if first[0] != content:
            raise UserError(
                f"process {cut.process} would make rows of another set than process 0: its model, text or tokenizer is "
                f"not the same; give all processes the same files"
            )
        self._notes.n_rows = first[1]  # or some would wait for rows that others know of
        for slot, kept in enumerate(
            self._notes.slots
        ):  # of a process that was killed after it wrote, and the first before
            if kept is not None and cut.shards(kept.segment).stop > len(first[1]):
                self._notes.slots[slot] = None
        self._thread = ThreadPoolExecutor(1, "segment-maker")
        self._buffers: dict[int, dict[str, np.ndarray]] = {}
        self._scratch: dict[str, np.ndarray] = {}
        self._slot: dict[int, int] = {}  # of the segments that are there, or on their way
        self._made: dict[int, Future[dict[str, np.ndarray]]] = {}
        self._left: dict[int, int] = {}  # segments that training has left -> steps after which nobody needs them
        self._saved = 0  # steps of the newest checkpoint
        self._waiting: int | None = None  # a segment that waits for a checkpoint to have a slot

    def use(self, segment: int, step: int, on_wait: Callable[[], None] | None = None) -> dict[str, np.ndarray]:
        """The rows of a segment, {source: [n, width]}, for the batch of a step; waits until they are made.

        They are to be read before the next call, which may make another segment in their place. `on_wait` is called now
        and then until they are there.
        """
        following = (segment + 1) % self.cut.n_segments
        with self._lock:
            for other in self._slot:
                if other not in (segment, following):
                    self._left.setdefault(other, step + 1)
            for needed in (segment, following):
                self._left.pop(needed, None)
            made = self._request(segment, must=True)
            assert made is not None
            self._waiting = following if self._request(following, must=False) is None else None
        while on_wait is not None and not made.done():
            futures.wait([made], SECONDS_BETWEEN_WORDS)
            on_wait()
        return made.result()

    def n_rows(self, segment: int, step: int, on_wait: Callable[[], None] | None = None) -> int:
        """Rows of a segment, which is made if that is not known yet, as by `use`."""
        shards = self.cut.shards(segment)
        if len(self._notes.n_rows) < shards.stop:
            self.use(segment, step, on_wait)
        return sum(self._notes.n_rows[shards.start : shards.stop])

    def find(self, segment: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of rows of a segment, i64[n]: their shards, the rows of these, and the places in what their process has.

        What `use` gives of a segment is the rows of this process's shards.
        """
        shards, n_processes = self.cut.shards(segment), self.cut.n_processes
        counts = np.array(self._notes.n_rows[shards.start : shards.stop])
        ends, places = np.cumsum(counts), np.empty(len(counts), np.int64)
        for first in range(min(n_processes, len(counts))):
            of_one = counts[first::n_processes]
            places[first::n_processes] = np.cumsum(of_one) - of_one
        which = np.searchsorted(ends, rows, side="right")
        row = rows - (ends - counts)[which]
        return shards.start + which, row, places[which] + row

    def is_there(self, segment: int) -> bool:
        """Whether a segment is made."""
        with self._lock:
            return segment in self._made and self._made[segment].done()

    def saved(self, step: int) -> None:
        """A checkpoint of `step` steps is on the disk."""
        with self._lock:
            self._saved = step
            if self._waiting is not None and self._request(self._waiting, must=False) is not None:
                self._waiting = None

    @property
    def awaited(self) -> int | None:
        """The steps of the checkpoint that the segment which comes next waits for; None: it does not."""
        return None if self._waiting is None else min(self._left.values(), default=0)

    @property
    def is_closed(self) -> bool:
        """Whether no more segments are made."""
        return self._closing.is_set()

    def close(self) -> None:
        """Ends the thread."""
        self._closing.set()
        self._thread.shutdown(cancel_futures=True)

    def remove(self) -> None:
        """The slots on the disk go: the run is over."""
        self.close()
        if any(self._notes.slots):
            self._notes.slots = [None] * self.cut.n_slots
            self._write_notes()
        for path in self._slot_files():
            path.unlink()
        if self._folder is not None and self.cut.process:
            if isinstance(self._folder, Path):
                shutil.rmtree(self._folder, ignore_errors=True)  # what the first process has noted is left
            else:
                storage.delete(_notes_path(self._folder))

    def _request(self, segment: int, must: bool) -> Future[dict[str, np.ndarray]] | None:
        """The segment, or its making; None if it has to wait for a slot, which it never has if it `must`."""
        if segment in self._made:
            return self._made[segment]
        slot = self._free_slot(segment)
        if slot is None:
            passed = [s for s, needed in self._left.items() if not self.cut.on_disk or needed <= self._saved]
            if not (candidates := passed or list(self._left) * must):
                return None
            slot = self._slot.pop(candidates[0])
            self._made.pop(candidates[0]).cancel()
            del self._left[candidates[0]]
        self._slot[segment] = slot
        self._made[segment] = self._thread.submit(self._make, segment, slot)
        return self._made[segment]

    def _free_slot(self, segment: int) -> int | None:
        """A slot that nobody has: the one that holds the segment from before, one that holds nothing, or any."""
        free = [slot for slot in range(self.cut.n_slots) if slot not in self._slot.values()]
        held = {slot: kept.segment if (kept := self._notes.slots[slot]) else None for slot in free}
        return min(free, key=lambda slot: (held[slot] != segment, held[slot] is not None, slot), default=None)

    def _make(self, segment: int, slot: int) -> dict[str, np.ndarray]:
        """In the thread of the maker."""
        if not self._buffers and isinstance(self._folder, Path) and self._folder.is_dir():
            disk.remove_leftovers(self._folder, lambda name: True, seconds=0)  # of this run, which has one owner
        rows = self._buffer(slot)
        kept = self._notes.slots[slot]
        if kept is not None and kept.segment == segment:
            n = sum(self._notes.n_rows[shard] for shard in self.cut.mine(segment))
            found = {name: part[:n] for name, part in rows.items()}
            if _digests(found) == kept.xxh3_64:
                return found
        if kept is not None:
            self._notes.slots[slot] = None
            self._write_notes()
        spec, shards, end, counts = self._maker.spec, self.cut.mine(segment), 0, []
        self.n_made = 0
        self._scratch = self._scratch or empty_rows(spec, shard_rows(spec))
        for shard in shards:
            places = self._maker.fill(shard, self._scratch, self._on_rows)
            start, end = end, end + len(places)
            counts.append(len(places))
            for source in spec.sources:
                part = rows[source.name][start:end]
                np.take(as_bits(self._scratch[source.name]), places, axis=0, out=as_bits(part), mode="clip")
                if not _is_finite(part):
                    refuse_not_finite(part, source, shard, 0)
        made = {name: part[:end] for name, part in rows.items()}
        self._note(segment, slot, counts, made)
        return made

    def _on_rows(self, n: int) -> None:
        self.n_made += n
        self._poll()

    def _poll(self) -> None:
        if self._closing.is_set():
            raise StoppedError

    def _exchange(self, what: str, value: Any) -> list[Any]:
        """What each process says about it."""
        return exchange(f"{self._name}/{what}", value, self.cut.process, self.cut.n_processes, self._poll)

    def _note(self, segment: int, slot: int, counts: list[int], made: dict[str, np.ndarray]) -> None:
        shards, mine, notes = self.cut.shards(segment), self.cut.mine(segment), self._notes
        known = [notes.n_rows[shard] for shard in mine if shard < len(notes.n_rows)]
        if known and known != counts:
            raise UserError(
                f"segment {segment} has {sum(counts)} rows here and had {sum(known)} when it was made first: the model "
                f"computes otherwise on this machine, and harvest.max_norm_multiple leaves other rows out; resume "
                f"where the run began, or give another --out"
            )
        is_new = len(notes.n_rows) < shards.stop
        if is_new:
            assert len(notes.n_rows) == shards.start
            of_all = dict(
                pair
                for each in self._exchange(f"segment-{segment}", list(zip(mine, counts, strict=True)))
                for pair in each
            )
            notes.n_rows = notes.n_rows + [of_all[shard] for shard in shards]
        if self.cut.on_disk:
            notes.slots[slot] = _Kept(segment, _digests(made))
        if self.cut.on_disk or is_new:
            self._write_notes()

    def _write_notes(self) -> None:
        if self._folder is not None:
            storage.write_json(_notes_path(self._folder), storage.sealed(msgspec.to_builtins(self._notes)))

    def _slot_files(self) -> list[Path]:
        return list(self._folder.glob(_slot_name("*", "*"))) if isinstance(self._folder, Path) else []

    def _buffer(self, slot: int) -> dict[str, np.ndarray]:
        """Room for the rows of a segment, {source: [n, width]}: the same each time."""
        spec, n = self._maker.spec, self.cut.slot_shards * shard_rows(self._maker.spec)
        if slot not in self._buffers and self.cut.on_disk:
            assert isinstance(self._folder, Path)
            known = {_slot_name(i, source.name) for i in range(self.cut.n_slots) for source in spec.sources}
            for path in self._slot_files():
                if path.name not in known:  # of other rows
                    path.unlink()
            self._buffers[slot] = {
                name: _row_file(self._folder / _slot_name(slot, name), (n, *row.shape[1:]), row.dtype)
                for name, row in empty_rows(spec, 1).items()
            }
        if slot not in self._buffers:
            self._buffers[slot] = empty_rows(spec, n)
        return self._buffers[slot]


def _slot_name(slot: object, source: str) -> str:
    return f"slot-{slot}-{source}.rows"


def _row_file(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A file as an array in memory, with its place on the disk taken. OSError that names it where there is too little.

    Without its place a full disk would end the process when a row is put into it.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    disk.make_folder(path.parent)
    with disk.naming(path), open(path, "ab") as file:
        file.truncate(n_bytes)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, n_bytes)
    return np.asarray(np.memmap(path, np.uint8, "r+", shape=(n_bytes,))).view(dtype).reshape(shape)


def _notes_path(folder: AnyPath) -> AnyPath:
    return folder / "segments.json"


def _read_notes(folder: AnyPath | None, content: str, cut: Cut) -> _Notes | None:
    """What was noted of the same rows. UserError where the file is damaged."""
    path = None if folder is None else _notes_path(folder)
    found: dict[str, Any] | None = None if path is None else storage.read_json(path)
    if found is None or path is None:
        return None
    notes = storage.as_type(storage.unsealed(found, path), _Notes, path)
    if notes.content != content:
        return None
    # They were elsewhere, or other processes shared the segments.
    if len(notes.slots) != cut.n_slots or notes.share != (cut.process, cut.n_processes):
        notes.slots = [None] * cut.n_slots
    return notes


def noted(folder: AnyPath) -> str:
    """What the rows are that the notes in a folder are of; "" where there are none."""
    return str((storage.read_json(_notes_path(folder)) or {}).get("content", ""))


def _digests(rows: Mapping[str, np.ndarray]) -> dict[str, str]:
    return {
        name: xxhash.xxh3_64_hexdigest(np.ascontiguousarray(part).view(np.uint8).data) for name, part in rows.items()
    }


def _is_finite(rows_ND: np.ndarray) -> bool:
    """Of stored rows. Looks at the bits: numpy is slow with bfloat16."""
    if rows_ND.dtype == np.int8:
        return bool(np.isfinite(np.ascontiguousarray(rows_ND[:, -SCALE_BYTES:]).view(np.float32)).all())
    infinity = as_bits(np.array([np.inf], rows_ND.dtype))[0]
    block = max((1 << 20) // max(rows_ND[:1].nbytes, 1), 1)
    parts = (as_bits(rows_ND[low : low + block]) for low in range(0, len(rows_ND), block))
    return not any(((part & infinity) == infinity).any() for part in parts)


def _rounded_up(gib: float) -> float:
    """To three digits, never below."""
    step = 10.0 ** (np.floor(np.log10(gib)) - 2)
    return float(np.ceil(gib / step) * step)
