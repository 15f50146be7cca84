"""Batches of activations in an order that depends on the set, the batch size, the seed and the step alone.

The order is in order.py. Here chunks are read by threads into one array a source, in slots of a chunk each,
and a batch is one gather of rows from it. A chunk is thus copied once between the disk and the batch, and
memory is fixed: a group of chunks for each reader of this process, and a few more slots in which the next
groups arrive.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import count, pairwise
from types import TracebackType

import numpy as np

from sae_jax.activations.order import Group, RowOrder, Run
from sae_jax.activations.spec import DTYPES, as_bits
from sae_jax.activations.store import ActivationSet
from sae_jax.types import UsageError

READS_IN_FLIGHT = 16
BATCHES_AHEAD = 2  # complete batches that wait for the consumer
STEPS_AHEAD = 256  # how far ahead groups are sought
GATHER_THREADS = min(4, os.cpu_count() or 1)
GATHER_BYTES = 1 << 20  # a smaller share of a batch is not worth a thread


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

    @property
    def steps_per_epoch(self) -> float:
        """Batches in one pass over the set; not a whole number in general."""
        return self.order.n_rows / self.batch_size

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's rows of the batch of a step, for each source: [B / P, d] in the source's dtype.

        UserError naming shard and chunk where the data is not what was written.
        """
        if self._window is None:
            self._window = _Window(self)
        return self._window.batch(step, read_ahead=False)

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
        if self._window is not None:
            self._window.close()
            self._window = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stream(self, start_step: int) -> Generator[tuple[int, dict[str, np.ndarray]], None, None]:
        ready: queue.Queue[dict[str, np.ndarray] | BaseException] = queue.Queue()
        room = threading.Semaphore(BATCHES_AHEAD)
        stopped = threading.Event()

        def produce() -> None:
            try:
                with closing(_Window(self)) as window:
                    for step in count(start_step):
                        room.acquire()
                        if stopped.is_set():
                            return
                        ready.put(window.batch(step, read_ahead=True))
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


class _Resident:
    """A group with slots of its own, whose chunks are there or on their way."""

    def __init__(self, group: Group, slots: list[int]):
        self.group, self.slots = group, slots
        self.reads: list[Future] = []
        self.index: Future | None = None  # i64[rows]: where in the arrays the rows are, in permuted order

    def wait(self) -> np.ndarray:
        """The index, once all chunks are there. Raises what a read raised."""
        for read in self.reads:
            read.result()
        self.reads.clear()
        assert self.index is not None
        return self.index.result()


class _Window:
    """The groups in memory while a stream moves over the set. Used by one thread."""

    def __init__(self, loader: Loader):
        self.loader, self.order, self.set = loader, loader.order, loader.activations
        self.chunk_rows = self.set.spec.chunk_rows
        readers = min(self.order.n_readers, -(-self.order.n_readers // loader.process_count) + 1)
        n_slots = min(readers * self.order.group_chunks + READS_IN_FLIGHT, 2 * self.set.n_chunks)
        self.free = list(range(n_slots))
        self.arrays = {name: self._allocate(name, n_slots) for name in loader.sources}
        self.resident: dict[tuple[int, int, int], _Resident] = {}
        self.planned: deque[tuple[int, list[Run]]] = deque()  # steps from the next one on, in turn
        self.readers = ThreadPoolExecutor(READS_IN_FLIGHT, "activation-read")
        self.gatherers = ThreadPoolExecutor(GATHER_THREADS, "activation-gather")

    def batch(self, step: int, read_ahead: bool) -> dict[str, np.ndarray]:
        """The batch of a step; with read_ahead, later groups are on their way when it returns."""
        if not self.planned or self.planned[0][0] != step:
            self.planned.clear()
            self._plan(step)
        _, runs = self.planned.popleft()
        last_planned = self.planned[-1][0] if self.planned else step
        for key, resident in list(self.resident.items()):
            if resident.group.last_step < step or resident.group.first_step > last_planned:
                self._retire(key)
        for run in runs:
            if run.group not in self.resident:
                self._load(run.group, grow=True)
        if read_ahead:
            self._read_ahead(step)
        index = np.concatenate([self.resident[run.group].wait()[run.low : run.high] for run in runs])
        return {name: self._gather(name, index) for name in self.loader.sources}

    def close(self) -> None:
        """Ends the threads."""
        self.readers.shutdown(cancel_futures=True)
        self.gatherers.shutdown()

    def _plan(self, step: int) -> list[Run]:
        runs = self.order.runs(step, self.loader.process_index, self.loader.process_count)
        self.planned.append((step, runs))
        return runs

    def _read_ahead(self, step: int) -> None:
        """Starts reading groups of later steps in the order of need, while there are slots for them."""
        for _, runs in self.planned:
            if not self._load_all(runs):
                return
        for later in range(step + 1 + len(self.planned), step + STEPS_AHEAD):
            if not self._load_all(self._plan(later)):
                return

    def _load_all(self, runs: list[Run]) -> bool:
        return all(run.group in self.resident or self._load(run.group, grow=False) for run in runs)

    def _load(self, key: tuple[int, int, int], grow: bool) -> bool:
        """Starts reading a group; False if there are not enough slots and they may not grow."""
        group = self.order.group(key)
        if len(self.free) < len(group.chunks):
            if not grow:
                return False
            self._grow(len(group.chunks))
        slots = [self.free.pop() for _ in group.chunks]
        resident = self.resident[key] = _Resident(group, slots)
        bases = np.array(slots) * self.chunk_rows
        for chunk, base in zip(group.chunks.tolist(), bases.tolist(), strict=True):
            n_rows = int(self.set.chunk_n_rows[chunk])
            for name, array in self.arrays.items():
                rows = array[base : base + n_rows]
                resident.reads.append(self.readers.submit(self.set.read_chunk_into, name, chunk, rows))
        resident.index = self.gatherers.submit(lambda: _rows(group, bases)[self.order.permutation(key)])
        return True

    def _retire(self, key: tuple[int, int, int]) -> None:
        resident = self.resident.pop(key)
        for read in resident.reads:  # a slot is free only when nothing writes to it
            if not read.cancel():
                read.exception()
        self.free += resident.slots

    def _grow(self, n_slots: int) -> None:
        """Makes room for a batch that needs more groups at once than there are slots, as of a tiny set."""
        for resident in self.resident.values():
            resident.wait()
        old = next(iter(self.arrays.values())).shape[0] // self.chunk_rows
        new = 2 * old + n_slots
        for name, array in self.arrays.items():
            self.arrays[name] = self._allocate(name, new)
            as_bits(self.arrays[name])[: len(array)] = as_bits(array)
        self.free += range(old, new)

    def _allocate(self, name: str, n_slots: int) -> np.ndarray:
        source = self.set.source(name)
        return np.empty((n_slots * self.chunk_rows, source.d), DTYPES[source.dtype])

    def _gather(self, name: str, index: np.ndarray) -> np.ndarray:
        rows = self.arrays[name]
        out = np.empty((len(index), rows.shape[1]), rows.dtype)
        parts = max(1, min(GATHER_THREADS, out.nbytes // GATHER_BYTES))
        cuts = np.linspace(0, len(index), parts + 1).astype(int)

        def take(low: int, high: int) -> None:
            # mode="clip": with "raise", numpy gathers into a temporary first.
            np.take(as_bits(rows), index[low:high], axis=0, out=as_bits(out[low:high]), mode="clip")

        for done in [self.gatherers.submit(take, *cut) for cut in pairwise(cuts)]:
            done.result()
        return out


def _rows(group: Group, bases: np.ndarray) -> np.ndarray:
    """Numbers of a group's rows before the shuffle, row r of chunk c having bases[c] + r: i64[rows]."""
    starts = np.cumsum(group.n_rows) - group.n_rows
    return np.arange(group.n_rows.sum()) + np.repeat(bases + group.first_row - starts, group.n_rows)
