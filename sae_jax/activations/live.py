"""Live data: rows that a language model makes in the process that trains on them, and that nobody stores.

    text -> language model -> segment s+1, while training uses segment s -> batches

The rows are those of the set that `harvest` would make of the same settings, shard by shard, to the bit. A segment
(segments.py) is as many of its shards as there is room for. Within a segment rows come in an order of their own each
time; segments follow each other as in the text, and after the last the text begins again. Laid end to end these rows
are one endless stream, and batch t is its rows [t B, (t + 1) B): each row comes once an epoch, and none is left over.

So the batch of step t depends on the rows, the size of segments, the batch size, the seed and t. Unlike those of a set,
rows are not shuffled over the whole text, only within a segment. Of several processes each runs the model on its share
of the shards (shares.py); what they make, and the batches, are those of a single one.

A run's folder holds a little of it: `live/segments.json` says how many rows the shards have, and `set` is an activation
set that has the first shard alone, in which evaluation and pages find model, text and examples.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from sae_jax.activations import shares, store
from sae_jax.activations.harvest import prepare, shards_of_text
from sae_jax.activations.order import shuffled
from sae_jax.activations.rows import decode
from sae_jax.activations.segments import Segments, ShardMaker, cut, noted, shard_rows
from sae_jax.activations.settings import HarvestConfig
from sae_jax.activations.shards import empty_rows, index_of, take_shard
from sae_jax.activations.sinks import Sinks
from sae_jax.activations.source import MAX_SAMPLE_ROWS, Batches, RowSource, one_ahead, place_rows
from sae_jax.activations.spec import SetSpec, as_bits
from sae_jax.activations.stats import Stats
from sae_jax.progress import Progress
from sae_jax.record import DataRecord, SourceRecord
from sae_jax.saes.base import Batch
from sae_jax.storage import AnyPath, Url, absolute, is_url
from sae_jax.types import Sites, UsageError, UserError

LIVE_ORDER = 6  # Philox domain; order.py lists the others
OWNERS = "process of each row"  # beside the rows of a batch, where there are several processes; no hook is named so


@dataclass(frozen=True)
class LiveConfig:
    """Where live rows are made and kept."""

    memory_gib: float = 4.0
    """for rows in the memory of each process: a segment that is used, one that is made, and two shards"""
    disk_gib: float = 0.0
    """keep segments in RUN/live until a checkpoint has passed them, at most so much with RUN/set for each process; 0 =
    in memory"""
    devices: int = 0
    """of a single process: so many devices, the last ones, are the language model's own; 0 = it shares those of the
    dictionary"""

    def __post_init__(self) -> None:
        for name in ("memory_gib", "disk_gib"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"live.{name}={getattr(self, name)} must be a finite number, 0 or more")
        if self.devices < 0:
            raise UsageError(f"live.devices={self.devices} must be 0 or more")


class LiveRows(RowSource):
    """The rows of a set that is made as training needs it."""

    def __init__(self, maker: ShardMaker, config: LiveConfig, name: str = "live data", folder: AnyPath | None = None):
        """`folder`: of the run; None: nothing is written.

        Raises UsageError for a budget that has no room for segments, and for devices that are not there.
        """
        self._process, self._n_processes = jax.process_index(), jax.process_count()
        if config.devices and self._n_processes > 1:
            raise UsageError(
                f"live.devices={config.devices} needs one process, and this job has {self._n_processes}; leave it out: "
                f"in each process the model then shares the devices of the dictionary"
            )
        if config.devices >= jax.device_count() and config.devices:
            raise UsageError(
                f"live.devices={config.devices} leaves none of {jax.device_count()} devices to the dictionary; use less"
            )
        self._maker, self._config, self._folder = maker, config, folder
        self._cut = cut(maker.spec, config.memory_gib, config.disk_gib, self._process, self._n_processes)
        self._running: Segments | None = None
        self.name, self.spec = name, maker.spec
        self.sources = tuple(source.name for source in self.spec.sources)
        self.n_rows = self.spec.n_shards * shard_rows(self.spec)  # at most

    @property
    def data(self) -> DataRecord:
        """See RowSource. The content is known before there is a row: it is that of the spec, and how it is cut."""
        content = f"{self.spec.sha256}/{self._cut.per_segment}"
        path = None if self._folder is None else os.fspath(self._folder / "set")
        path = path if path is None or is_url(path) else str(absolute(path))
        return DataRecord(content, path, self.spec.tokenizer, self.spec.text)

    def describe(self, source: str) -> SourceRecord:
        """See RowSource."""
        spec = self.spec.source(source)
        return SourceRecord(spec.name, spec.d, spec.hook, spec.model, spec.model_digest)

    def mean_square(self, source: str) -> float:
        """See RowSource; of the sample."""
        return Stats.of_rows(self._sampled(source)).mean_square

    def sample(self, source: str) -> np.ndarray:
        """See RowSource; spread over the first segment."""
        return decode(self._sampled(source)).astype(np.float32)

    def open(self, sites: Sites, batch_size: int, seed: int, mesh: Mesh) -> Batches:
        """See RowSource."""
        return LiveBatches(self._segments, self.spec, sites, batch_size, seed)

    def of_run(self, folder: AnyPath | None) -> RowSource:
        """See RowSource."""
        if folder is None and self._config.disk_gib:
            raise UsageError(f"live.disk_gib={self._config.disk_gib:g} needs the folder of a run; give out=")
        if isinstance(folder, Url) and self._config.disk_gib:
            raise UsageError(
                f"live.disk_gib={self._config.disk_gib:g} needs a run on a disk, and {folder} is a URL; keep rows in "
                f"memory (live.memory_gib)"
            )
        if folder is not None and (folder / "config.json").exists():
            rows, _, before = noted(folder / "live").partition("/")
            if rows == self.spec.sha256 and before != str(self._cut.per_segment):
                of_all = f", of all {self._n_processes} processes together," if self._n_processes > 1 else ""
                raise UsageError(
                    f"{folder} was started with {before} of {self.spec.n_shards} shards in a segment, and "
                    f"live.memory_gib and live.disk_gib{of_all} now put {self._cut.per_segment} in one; keep these to "
                    f"resume, or give another --out"
                )
        return LiveRows(self._maker.of_run(folder), self._config, self.name, folder)

    def devices(self) -> list[jax.Device]:
        """See RowSource."""
        return jax.devices()[: jax.device_count() - self._config.devices]

    def _segments(self) -> Segments:
        """What makes and keeps the segments; a new one where the last was closed."""
        if self._running is None or self._running.is_closed:
            folder = None if self._folder is None else self._folder / "live"
            self._running = Segments(self._maker, self._cut, self.data.content, folder)
        return self._running

    def _sampled(self, source: str) -> np.ndarray:
        """Stored rows of the first segment that has some, spread over it; the same in all processes."""
        segments, name = self._segments(), self.spec.source(source).name
        n_rows = len(self._cut.mine(0)) * shard_rows(self.spec)
        is_silent = segments.is_there(0) or self._process > 0
        with Progress("first segment", n_rows, "rows", silent=is_silent) as progress:

            def show() -> None:
                if segments.n_made:
                    progress.update(segments.n_made)

            for segment in range(self._cut.n_segments):
                if n := segments.n_rows(segment, 0, show):
                    rows = segments.use(segment, 0, show)[name]
                    chosen = np.linspace(0, n - 1, min(n, MAX_SAMPLE_ROWS)).round().astype(int)
                    shards, _, places = segments.find(segment, chosen)
                    owners = shards % self._n_processes
                    return shares.gathered(rows[places[owners == self._process]], owners, self._n_processes)
        raise _no_rows(self.name)


class Piece(NamedTuple):
    """Rows [low, high) of a segment, in its order in this epoch: part of a batch."""

    epoch: int
    segment: int
    low: int
    high: int


class LiveBatches(Batches):
    """Batches of the stream of segments, put together one ahead of use."""

    def __init__(
        self, segments: Callable[[], Segments], spec: SetSpec, sites: Sites, batch_size: int, seed: int
    ) -> None:
        """`segments`: gives those in use, or new ones where they are closed."""
        self._open_segments, self._segments = segments, segments()
        self._spec, self._sites = spec, sites
        self._batch_size, self._seed = batch_size, seed
        self._saved = 0  # steps of the newest checkpoint
        self._awaited: int | None = None  # those of the one that the next segment waits for
        self._starts = [0]  # first row of each segment in an epoch, as far as it is known
        self._order = lru_cache(maxsize=2)(self._compute_order)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """{source: [B, width]}, as stored (rows.py). UserError where the text leaves no rows.

        Of several processes: the rows of the batch that this one has, and as many more as all can give alike; OWNERS
        says which process has each row of the batch, i64[B].
        """
        room, cut = empty_rows(self._spec, self._batch_size), self._segments.cut
        batch = {name: room[name] for name in self._sites.all}
        end, owners = 0, []
        for piece in self._pieces(step):
            rows = self._segments.use(piece.segment, step)
            shards, _, places = self._segments.find(piece.segment, self._chosen(piece))
            owners.append(shards % cut.n_processes)
            places = places[owners[-1] == cut.process]
            start, end = end, end + len(places)
            for name, target in batch.items():
                np.take(as_bits(rows[name]), places, axis=0, out=as_bits(target[start:end]), mode="clip")
        if cut.n_processes == 1:
            return batch
        of_all = np.concatenate(owners)
        n = shares.room_for(of_all, cut.n_processes)
        return {**{name: target[:n] for name, target in batch.items()}, OWNERS: of_all}

    def batches(self, start_step: int = 0) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """See Batches."""
        self._segments = self._open_segments()
        # Segments are closed at the end, or the thread might wait for one that nobody needs.
        return one_ahead(self, self.batch, start_step, self._hand_over, self._segments.close)

    def row_ids(self, step: int) -> np.ndarray:
        """See Batches: shard * shard_rows + row in the shard, as of a set."""
        cut, ids = self._segments.cut, []
        for piece in self._pieces(step):
            shards, rows, _ = self._segments.find(piece.segment, self._chosen(piece))
            ids.append(shards * self._spec.shard_rows + rows)
        share = self._batch_size // cut.n_processes
        return np.concatenate(ids)[cut.process * share : (cut.process + 1) * share]

    def place(self, rows: Mapping[str, np.ndarray], mesh: Mesh) -> Batch:
        """See Batches."""
        batch = place_rows(rows, self._sites, mesh)
        return shares.in_order(batch, rows[OWNERS], mesh) if OWNERS in rows else batch

    def saved(self, step: int, is_over: bool) -> None:
        """See Batches."""
        self._saved = step
        if is_over:
            self._segments.remove()

    @property
    def needs_save(self) -> bool:  # pyrefly: ignore[bad-override] (read alone)
        """See Batches."""
        return self._awaited is not None and self._saved < self._awaited

    def _hand_over(self) -> None:
        """Tell segments of checkpoints, and ask for what they wait: between batches, when all processes know the same.

        While a batch is made, it would depend on how far that is.
        """
        self._segments.saved(self._saved)
        self._awaited = self._segments.awaited

    def close(self) -> None:
        """See Batches."""
        self._segments.close()

    def _pieces(self, step: int) -> Iterator[Piece]:
        """What the batch of a step is made of, in order."""
        position, end = step * self._batch_size, (step + 1) * self._batch_size
        while position < end:
            epoch, place = self._in_epoch(position, step)
            segment = bisect_right(self._starts, place) - 1
            low = place - self._starts[segment]
            high = min(self._starts[segment + 1] - self._starts[segment], low + end - position)
            yield Piece(epoch, segment, low, high)
            position += high - low

    def _in_epoch(self, position: int, step: int) -> tuple[int, int]:
        """(epoch, row of the epoch) of a row of the stream. Segments before it whose rows are not known are made."""
        segments = self._segments
        while len(self._starts) <= segments.cut.n_segments and self._starts[-1] <= position:
            self._starts.append(self._starts[-1] + segments.n_rows(len(self._starts) - 1, step))
        if self._starts[-1] > position:
            return 0, position
        if self._starts[-1] == 0:
            raise _no_rows(self._spec.text)
        return divmod(position, self._starts[-1])

    def _chosen(self, piece: Piece) -> np.ndarray:
        return self._order(piece.epoch, piece.segment)[piece.low : piece.high]

    def _compute_order(self, epoch: int, segment: int) -> np.ndarray:
        n = self._starts[segment + 1] - self._starts[segment]
        return shuffled(n, self._seed, LIVE_ORDER, epoch, segment)


class ModelShards(ShardMaker):
    """The shards that `harvest` would make of these settings, from the language model itself."""

    def __init__(self, config: HarvestConfig, devices: list[jax.Device] | None = None) -> None:
        """Reads models, tokenizer and text. `devices`: those that the models run on; None: all of this process.

        Raises as `harvest`.
        """
        self._config = config
        self.spec, _, self._text, self._forward, _ = prepare(config, devices=devices)
        self._shards: Iterator[tuple[int, np.ndarray, np.ndarray]] = iter(())
        self._next = -1  # shard that the text is at
        self._on_rows: Callable[[int], None] = lambda n: None
        self._folder: AnyPath | None = None

    def of_run(self, folder: AnyPath | None) -> ShardMaker:
        """See ShardMaker: the first shard is stored in FOLDER/set."""
        self._folder = folder
        return self

    def fill(self, shard: int, out: dict[str, np.ndarray], on_rows: Callable[[int], None]) -> np.ndarray:
        """See ShardMaker."""
        self._on_rows = on_rows
        ids_ST, text_ST = self._sequences(shard)
        keep_ST = take_shard(
            self._forward([ids_ST]), ids_ST, text_ST, self.spec.max_norm_multiple, out, on_rows, Sinks()
        )
        kept = np.flatnonzero(keep_ST)
        if shard == 0 and self._folder is not None:
            writer = store.create(self._folder / "set", self.spec)
            if shard not in writer.committed():
                rows = {name: x_ND[kept] for name, x_ND in out.items()}
                writer.write_shard(shard, rows, index_of(self.spec, shard, ids_ST, keep_ST), ids_ST)
        return kept[store.order_in_shard(self.spec, shard, len(kept))]

    def _sequences(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Of a shard: ids i32[S, T], and which of them are text, bool[S, T].

        The text is read on from the shard before; for another shard, from its beginning.
        """
        if shard != self._next:
            todo = range(shard, self.spec.n_shards, jax.process_count())
            self._shards = shards_of_text(self._config, self._text, todo, self.spec, lambda file: self._on_rows(0))
        self._next = -1  # should this fail
        _, ids_ST, text_ST = next(self._shards)
        self._next = shard + jax.process_count()
        return ids_ST, text_ST


def of_model(harvest: HarvestConfig, live: LiveConfig) -> LiveRows:
    """Live rows of a language model on text. Raises as `harvest` and LiveRows."""
    devices = jax.local_devices()
    maker = ModelShards(harvest, devices[len(devices) - live.devices :] if live.devices else None)
    models = ", ".join(source.model or "" for source in maker.spec.sources[:1])
    return LiveRows(maker, live, f"live data of {models}")


def _no_rows(name: str | None) -> UserError:
    return UserError(f"{name}: the text leaves no rows; use more text, or a larger harvest.max_norm_multiple")
