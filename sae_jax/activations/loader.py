"""Batches of activations in an order that depends on the set, the batch size, the seed and the step alone.

The order is in order.py. Here threads read chunks, and put each row straight into the batch, of this step
or a later one, that it is for: a row is copied once, while its chunk is in the cache of the processor.
Memory is fixed: the batches which the groups of chunks in hand reach into, as large as those groups, and a
few more.
"""

from __future__ import annotations

import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import count
from types import TracebackType

import numpy as np

from sae_jax.activations.order import Group, GroupKey, RowOrder, Run
from sae_jax.activations.spec import as_bits
from sae_jax.activations.store import ActivationSet
from sae_jax.types import UsageError

LOCAL_THREADS = (os.cpu_count() or 1) + 1  # the disk reads ahead of them; more only take turns at the processor
REMOTE_THREADS = 16  # each waits for one request
CHUNKS_AHEAD = 16  # asked for before they are needed
BATCHES_AHEAD = 2  # complete batches that wait for the consumer
MAX_LEASES = BATCHES_AHEAD + 3  # batches that the consumer has without a copy: it may keep more, as copies


class Loader:
    """Reads batches. Any step at any time by `batch`; steps in turn, read ahead of use, by `batches`."""

    def __init__(
        self,
        activations: ActivationSet,
        sources: tuple[str, ...],
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Args:
          activations: the set.
          sources: those to read, with the same rows in the same order.
          batch_size: rows of the global batch B.
          seed: of the order.
          process_index: this process is p of P; it gets rows [p * B / P, (p + 1) * B / P) of each batch.
          process_count: P, a divisor of B.

        Raises UsageError for a source that the set lacks and for a batch that does not divide.
        """
        if batch_size < 1 or batch_size % process_count:
            raise UsageError(
                f"batch_size={batch_size} does not divide over {process_count} processes; use a multiple of "
                f"{process_count}"
            )
        if not 0 <= process_index < process_count:
            raise UsageError(f"process_index={process_index} is not below process_count={process_count}")
        if not 0 <= seed < 2**64:
            raise UsageError(f"seed={seed}; it must be 0 or more and below 2^64")
        if not sources:
            raise UsageError(f"no source to read; the set has {', '.join(activations.sources)}")
        self.activations = activations
        self.sources = tuple(activations.source(name).name for name in sources)
        self.batch_size, self.process_index, self.process_count = batch_size, process_index, process_count
        # All sources of the set count, not those read: an SAE sees the same rows whatever else is trained.
        chunk_bytes = max(activations.arrays[f"acts/{name}"].chunk_bytes for name in activations.sources)
        self.order = RowOrder(activations.chunk_n_rows, chunk_bytes, batch_size, seed)
        self.wait_seconds = 0.0  # that consumers of `batches` have waited so far
        self._window: _Window | None = None
        self._streams: list[Generator[tuple[int, dict[str, np.ndarray]], None, None]] = []

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's rows of the batch of a step, for each source: [B / P, width], as stored (rows.py).

        UserError naming shard and chunk where the data is not what was written.
        """
        if self._window is None or self._window.step != step:
            self._end_window()
            self._window = _Window(self, step)
        try:
            return self._window.next(lease=False)
        except BaseException:
            self._end_window()
            raise

    def batches(self, start_step: int = 0) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yields (step, batch) from start_step on, without end, reading ahead on threads.

        Errors of the reading threads are raised here. Closing the iterator, or the loader, ends the threads.
        """
        stream = self._stream(start_step)
        self._streams.append(stream)
        return stream

    def row_ids(self, step: int) -> np.ndarray:
        """Which rows `batch` gives: shard * shard_rows + row in the shard, i64[B / P]. Reads nothing."""
        spec = self.activations.spec
        shards, places = self.activations.chunk_shard, self.activations.chunk_in_shard
        chunk_base = shards * spec.shard_rows + places * spec.chunk_rows
        runs = self.order.runs(step, self.process_index, self.process_count)
        ids = {}
        for key in {run.group for run in runs}:
            group = self.order.group(key)
            ids[key] = _rows(group, chunk_base[group.chunks])[self.order.permutation(key)]
        return np.concatenate([ids[run.group][run.low : run.high] for run in runs])

    def close(self) -> None:
        """Ends all threads and frees the memory. Iterators made by `batches` end."""
        for stream in self._streams:
            stream.close()
        self._streams.clear()
        self._end_window()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _end_window(self) -> None:
        if self._window is not None:
            self._window.close()
            self._window = None

    def _stream(self, start_step: int) -> Generator[tuple[int, dict[str, np.ndarray]], None, None]:
        ready: queue.Queue[dict[str, np.ndarray] | BaseException] = queue.Queue()
        room = threading.Semaphore(BATCHES_AHEAD)
        stopped = threading.Event()

        def produce() -> None:
            try:
                with closing(_Window(self, start_step)) as window:
                    while True:
                        room.acquire()
                        if stopped.is_set():
                            return
                        ready.put(window.next(lease=True))
            except BaseException as error:
                ready.put(error)

        producer = threading.Thread(target=produce, name="activation-loader", daemon=True)
        producer.start()
        try:
            for step in count(start_step):
                began = time.perf_counter()
                found = ready.get()
                self.wait_seconds += time.perf_counter() - began
                if isinstance(found, BaseException):
                    raise found
                room.release()
                yield step, found
        finally:
            stopped.set()
            room.release()
            producer.join()


class _Window:
    """The batches from one step on, partly filled. Used by one thread."""

    def __init__(self, loader: Loader, start_step: int):
        self.loader, self.order, self.set = loader, loader.order, loader.activations
        self.step = start_step  # of the next batch
        self.share = loader.batch_size // loader.process_count
        group_rows = self.order.group_chunks * self.set.spec.chunk_rows
        group_steps = (group_rows - 1) * self.order.n_readers // loader.batch_size + 2
        ahead_steps = -(-CHUNKS_AHEAD * self.set.spec.chunk_rows // self.share)
        self.horizon = group_steps + ahead_steps  # no group is read that reaches further
        self.free = list(range(self.horizon + MAX_LEASES))
        self.rows: dict[str, np.ndarray] = {}  # [slots * share, width]: a slot is a batch
        for name in loader.sources:
            array = self.set.arrays[f"acts/{name}"]
            self.rows[name] = np.empty((len(self.free) * self.share, *array.row_shape), array.dtype)
        self.slots: dict[int, int] = {}  # step -> slot
        self.plans: dict[int, dict[GroupKey, Run]] = {}  # step -> its pieces, in order
        self.groups: dict[GroupKey, tuple[Group, list[Future]]] = {}  # on their way, or needed again
        self.sought = start_step  # the groups of all steps before this one are on their way
        self.leases: dict[int, int] = {}  # slots that the consumer has -> arrays of it that are alive
        self.returned: deque[int] = deque()  # filled by finalizers, in whatever thread they run
        self.scratch: list[np.ndarray] = []
        n_threads = REMOTE_THREADS if self.set.files.local is None else min(LOCAL_THREADS, REMOTE_THREADS)
        self.pool = ThreadPoolExecutor(n_threads, "activation-read")

    def next(self, lease: bool) -> dict[str, np.ndarray]:
        """The next batch. With lease, its arrays may be in memory that is used again once they are gone."""
        self._read_ahead()
        for key in self.plans.pop(self.step):
            _, reads = self.groups[key]
            for read in reads:
                read.result()
            reads.clear()
        slot = self.slots.pop(self.step)
        self.step += 1
        self.groups = {key: found for key, found in self.groups.items() if found[0].last_step >= self.step}
        self._take_back()
        if lease and len(self.leases) < MAX_LEASES:
            self.leases[slot] = len(self.rows)
            return {name: self._lease(rows, slot) for name, rows in self.rows.items()}
        self.free.append(slot)
        return {name: self._batch(rows, slot).copy() for name, rows in self.rows.items()}

    def close(self) -> None:
        """Ends the threads."""
        self.pool.shutdown(cancel_futures=True)

    def _read_ahead(self) -> None:
        """Starts reading groups in the order of need, until one reaches beyond the horizon."""
        while self.sought < self.step + self.horizon:
            for key in self._plan(self.sought):
                if key not in self.groups:
                    group = self.order.group(key)
                    if group.last_step >= self.step + self.horizon:
                        return
                    self._load(key, group)
            self.sought += 1

    def _plan(self, step: int) -> dict[GroupKey, Run]:
        if step not in self.plans:
            runs = self.order.runs(step, self.loader.process_index, self.loader.process_count)
            self.plans[step] = {run.group: run for run in runs}
        return self.plans[step]

    def _load(self, key: GroupKey, group: Group) -> None:
        """Starts reading a group into the batches it reaches."""
        targets = []
        for step in range(max(group.first_step, self.step), group.last_step + 1):
            if run := self._plan(step).get(key):
                if step not in self.slots:
                    self.slots[step] = self.free.pop()
                targets.append((run, self.slots[step] * self.share + run.target))
        # Submitted first, so no thread waits for it in vain.
        places = self.pool.submit(self._places, key, int(group.n_rows.sum()), targets)
        reads: list[Future] = []
        end = 0
        for chunk, first, n_rows in zip(group.chunks, group.first_row, group.n_rows, strict=True):
            part = slice(end, end + n_rows)
            for name in self.rows:
                self.set.announce_chunk(name, chunk)
            reads += [self.pool.submit(self._read, n, chunk, first, part, places) for n in self.rows]
            end += n_rows
        self.groups[key] = (group, reads)

    def _places(self, key: GroupKey, n_rows: int, targets: list[tuple[Run, int]]) -> np.ndarray:
        """Where each row of a group goes, before the shuffle: i64[rows], -1 for those not wanted here."""
        shuffled = np.full(n_rows, -1)
        for run, target in targets:
            shuffled[run.low : run.high] = np.arange(target, target + run.high - run.low)
        places = np.empty(n_rows, np.int64)
        places[self.order.permutation(key)] = shuffled
        return places

    def _read(self, name: str, chunk: int, first_row: int, part: slice, places: Future) -> None:
        """Reads a chunk and puts rows from first_row on, which are `part` of their group, in their places."""
        target = self.rows[name]
        n_rows, n_bytes = int(self.set.chunk_n_rows[chunk]), target[0].nbytes
        try:
            scratch = self.scratch.pop()  # the last one used, which is in the cache
        except IndexError:
            scratch = np.empty(max(r[0].nbytes for r in self.rows.values()) * self.set.spec.chunk_rows, np.uint8)
        rows = scratch[: n_rows * n_bytes].view(target.dtype).reshape(n_rows, -1)
        self.set.read_chunk_into(name, chunk, rows)
        wanted = places.result()[part]
        rows = as_bits(rows)[first_row : first_row + len(wanted)]
        if (wanted < 0).any():
            rows, wanted = rows[wanted >= 0], wanted[wanted >= 0]
        as_bits(target)[wanted] = rows
        self.scratch.append(scratch)

    def _batch(self, rows: np.ndarray, slot: int) -> np.ndarray:
        return rows[slot * self.share : (slot + 1) * self.share]

    def _lease(self, rows: np.ndarray, slot: int) -> np.ndarray:
        """A batch that returns its slot when it is gone. Every view of it keeps it alive."""
        bits = as_bits(self._batch(rows, slot))
        batch = np.frombuffer(bits.data, rows.dtype)  # an array of its own: views of `rows` would refer to that
        weakref.finalize(batch, self.returned.append, slot)
        return batch.reshape(bits.shape)

    def _take_back(self) -> None:
        while self.returned:
            slot = self.returned.popleft()
            self.leases[slot] -= 1
            if self.leases[slot] == 0:
                del self.leases[slot]
                self.free.append(slot)


def _rows(group: Group, bases: np.ndarray) -> np.ndarray:
    """Numbers of a group's rows before the shuffle, row r of chunk c having bases[c] + r: i64[rows]."""
    starts = np.cumsum(group.n_rows) - group.n_rows
    return np.arange(group.n_rows.sum()) + np.repeat(bases + group.first_row - starts, group.n_rows)
