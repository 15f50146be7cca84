"""Where rows to learn from come from: a set on disk, arrays in memory, token sequences through a model, live data.

    RowSource                     what there is: sources by name, their statistics, a sample
      .open(sites, ...) -> Batches    batches in an order that depends on the source, the seed and the step alone

Training knows these two interfaces and nothing behind them. A new kind of rows is one new file with a subclass of each.
"""

from __future__ import annotations

import abc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import count
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sae_jax import mesh as meshes
from sae_jax.activations.rows import decode_on_device
from sae_jax.activations.sample import remarks
from sae_jax.progress import console
from sae_jax.record import DataRecord, SourceRecord
from sae_jax.saes.base import Batch, Learns
from sae_jax.saes.init import Sample, sample_statistics
from sae_jax.saes.normalise import InputNorm
from sae_jax.storage import AnyPath
from sae_jax.types import Sites, UsageError, Widths

MAX_SAMPLE_ROWS = 32_768


class Batches(abc.ABC):
    """Batches of a source in turn. A context manager; leaving it ends its threads.

    The batch of step t depends on t alone, so the step is all the state there is.
    """

    wait_seconds: float = 0.0  # that the consumer has waited for input so far

    @abc.abstractmethod
    def batches(self, start_step: int = 0) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(step, this process's part of the batch, on the host) from `start_step` on, without end."""

    @abc.abstractmethod
    def row_ids(self, step: int) -> np.ndarray:
        """i64[...]: which rows of the source this process's part of a batch holds. Reads nothing."""

    @abc.abstractmethod
    def place(self, rows: Mapping[str, np.ndarray], mesh: Mesh) -> Batch:
        """What `batches` gave, on the devices of the mesh in use: the batch that dictionaries learn from."""

    def saved(self, step: int, is_over: bool) -> None:  # noqa: B027
        """A checkpoint of `step` steps is on the disk: nobody asks for batches before it again. Nothing by default.

        Of a run that is_over, no batch will be asked for.
        """

    @property
    def needs_save(self) -> bool:
        """Whether training would soon wait for a checkpoint that lets older rows go. The same on all processes."""
        return False

    def close(self) -> None:  # noqa: B027
        """Ends what runs in the background; nothing by default."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def one_ahead(
    batches: Batches,
    make: Callable[[int], dict[str, np.ndarray]],
    start_step: int,
    between: Callable[[], None] = lambda: None,
    on_end: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(step, batch) from `start_step` on, of which a thread makes one ahead of use.

    Args:
        batches: whose consumer waits.
        make: a batch.
        start_step: the first.
        between: called after each batch, before the thread is at the next.
        on_end: called at the end, while the thread may still be at a batch that nobody needs.
    """
    with ThreadPoolExecutor(1, "batch-ahead") as thread:
        try:
            ahead = thread.submit(make, start_step)
            for step in count(start_step):
                began = time.perf_counter()
                batch = ahead.result()
                batches.wait_seconds += time.perf_counter() - began
                between()
                ahead = thread.submit(make, step + 1)
                yield step, batch
        finally:
            on_end()


class RowSource(abc.ABC):
    """Rows that dictionaries can learn from. All its sources have the same rows in the same order."""

    name: str  # for messages: a path, or what it is
    sources: tuple[str, ...]
    n_rows: int

    @property
    @abc.abstractmethod
    def data(self) -> DataRecord:
        """What identifies the rows, for the record of a run."""

    @abc.abstractmethod
    def describe(self, source: str) -> SourceRecord:
        """Width and origin of a source; its hook and language model if there is one. UsageError for an unknown name."""

    @abc.abstractmethod
    def mean_square(self, source: str) -> float:
        """Mean squared norm of the rows of a source."""

    @abc.abstractmethod
    def sample(self, source: str) -> np.ndarray:
        """f32[N, D]: at most 32,768 rows spread over the source; the same rows for each source, on every host."""

    @abc.abstractmethod
    def open(self, sites: Sites, batch_size: int, seed: int, mesh: Mesh) -> Batches:
        """Batches of `batch_size` rows of these sites for this process, one of jax.process_count()."""

    def of_run(self, folder: AnyPath | None) -> RowSource:
        """This source for a run whose folder this is, where it may keep what a resumed run needs; None: nowhere."""
        return self

    def devices(self) -> list[jax.Device]:
        """Those that dictionaries are to use: all, but for what the source has for itself."""
        return jax.devices()

    def learning(self, learns: Learns) -> RowSource:
        """This source as what learns in this way takes it. UsageError if it cannot be had from it."""
        if learns != "rows":
            raise UsageError(
                f"{self.name} holds rows alone, but this variant is trained through a language model; use a set of "
                f"sae-jax harvest"
            )
        return self


def choose_sites(
    source: RowSource, site: tuple[str, ...], reconstruct: tuple[str, ...], d_model: int | None = None
) -> tuple[Sites, Widths]:
    """The sources that are encoded and reconstructed, and their widths.

    Args:
        source: what there is.
        site: names of what is encoded; may be empty if there is one source.
        reconstruct: names of what is reconstructed; empty: what is encoded.
        d_model: the width each must have; None: whatever it has.

    Raises:
        UsageError: one does not exist, is named twice or has another width, or none was named and there are several.
    """
    if not site and len(source.sources) > 1:
        raise UsageError(f"{source.name} has {', '.join(source.sources)}; choose one with --site")
    x = site or (source.sources[0],)
    sites = Sites(x, reconstruct or x)
    for names in sites:
        if len(set(names)) < len(names):
            raise UsageError(f"{', '.join(names)}: a source may be named once")
    for name in sites.all:
        width = source.describe(name).width
        if d_model not in (None, width):
            raise UsageError(f"d_model={d_model}, but {name} of {source.name} is {width} wide; leave it out")
    return sites, Widths(*(tuple(source.describe(name).width for name in names) for names in sites))


def sampler(source: RowSource, sites: Sites, widths: Widths):
    """(input_norm) -> Sample: what initialisation needs to know of these sites. Rows are read once, when asked for."""

    rows_of = cache(source.sample)
    side_by_side = cache(lambda names: np.concatenate([rows_of(name) for name in names], axis=1))

    @cache
    def say_what_is_odd() -> None:
        for name in sites.all if jax.process_index() == 0 else ():
            for remark in remarks(rows_of(name)):
                console.print(f"source {name}: {remark}")

    @cache
    def sample(norm: InputNorm) -> Sample:
        squares = [[source.mean_square(name) for name in names] for names in sites]
        for name, square in zip(sites.x + sites.y, squares[0] + squares[1], strict=True):
            if norm.startswith("dataset_") and not 0 < square < math.inf:
                raise UsageError(
                    f"source {name}: the mean square of its rows is {square:g}, so {norm} cannot scale them; "
                    f"leave it out"
                )
        y_ND = None if sites.y == sites.x else side_by_side(sites.y)
        statistics = sample_statistics(side_by_side(sites.x), norm, y_ND, widths, (squares[0], squares[1]))
        say_what_is_odd()
        return statistics

    return sample


def place_rows(rows: Mapping[str, np.ndarray], sites: Sites, mesh: Mesh) -> Batch:
    """This process's rows as its part of the global batch: sent to all devices once, ROWS in every slice.

    Args:
        rows: [B / processes, D] of each source, or as stored (rows.py); int8 goes to the devices as it is.
        sites: what stands side by side in x and in y.
        mesh: the one in use.
    """

    def placed(sources: tuple[str, ...]) -> jax.Array:
        parts = [rows[source] for source in sources]
        if any(part.dtype == np.int8 for part in parts):
            return meshes.in_order(_side_by_side([placed_array(part, mesh) for part in parts]))
        return placed_array(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1), mesh)

    return Batch(placed(sites.x), None if sites.y == sites.x else placed(sites.y))


@jax.jit
def _side_by_side(stored: list[jax.Array]) -> jax.Array:
    """f32[B, sum of D] of rows of which some are stored in int8."""
    return jnp.concatenate([decode_on_device(part).astype(jnp.float32) for part in stored], axis=1)


def placed_array(part: np.ndarray, mesh: Mesh) -> jax.Array:
    """This process's part of an array whose leading dimension is split over all devices: ROWS in every slice."""
    array: Any = jax.make_array_from_process_local_data(meshes.sharding(mesh, meshes.input_rows(mesh)), part)
    return meshes.in_order(jax.sharding.reshard(array, meshes.sharding(mesh, meshes.ROWS)))
