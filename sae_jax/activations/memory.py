"""Arrays in memory as a source of rows: for notebooks, and for rows that are made as they are needed once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

import jax
import numpy as np
import xxhash
from jax.sharding import Mesh

from sae_jax.activations.arrays import as_floats
from sae_jax.activations.order import EndlessShuffle
from sae_jax.activations.source import MAX_SAMPLE_ROWS, Batches, RowSource, place_rows
from sae_jax.record import DataRecord, SourceRecord
from sae_jax.saes.base import Batch
from sae_jax.types import Sites, UsageError, UserError

ARRAY_ORDER = 5  # Philox domain; order.py has two, sequences.py one


class ArrayRows(RowSource):
    """Rows [N, D] of one or several sources, held as they are given: numpy, JAX or torch, of any float type."""

    def __init__(self, rows: Any, name: str = "acts") -> None:
        """`rows`: an array [..., D], or a dict {source: array}; `name`: of the source, if it is one array.

        Raises UsageError for shapes that do not fit, UserError for rows that are not finite.
        """
        named = rows if isinstance(rows, Mapping) else {name: rows}
        self._rows = {source: _as_matrix(source, values) for source, values in named.items()}
        lengths = {source: len(values) for source, values in self._rows.items()}
        if not lengths or min(lengths.values()) == 0:
            raise UsageError("there are no rows; give an array [rows, d_model], or {source: array}")
        if len(set(lengths.values())) > 1:
            raise UsageError(f"all sources need the same rows, they have {lengths}")
        self.name, self.sources = "the rows in memory", tuple(self._rows)
        self.n_rows = next(iter(lengths.values()))

    @property
    def data(self) -> DataRecord:
        """See RowSource; the hash is over names, shapes and bytes."""
        hashed = xxhash.xxh3_128()
        for source, rows in self._rows.items():
            hashed.update(f"{source} {rows.dtype.name} {rows.shape}".encode())
            hashed.update(np.ascontiguousarray(rows).view(np.uint8).data)
        return DataRecord(hashed.hexdigest())

    def describe(self, source: str) -> SourceRecord:
        """See RowSource."""
        return SourceRecord(source, self._of(source).shape[1])

    def mean_square(self, source: str) -> float:
        """See RowSource."""
        rows, block = self._of(source), 1 << 16
        total = sum(float((rows[i : i + block].astype(np.float64) ** 2).sum()) for i in range(0, len(rows), block))
        return total / len(rows)

    def sample(self, source: str) -> np.ndarray:
        """See RowSource."""
        rows = self._of(source)
        chosen = np.linspace(0, len(rows) - 1, min(len(rows), MAX_SAMPLE_ROWS)).round().astype(int)
        return rows[chosen].astype(np.float32)

    def open(self, sites: Sites, batch_size: int, seed: int, mesh: Mesh) -> Batches:
        """See RowSource."""
        return _ArrayBatches({name: self._of(name) for name in sites.all}, sites, batch_size, seed)

    def _of(self, source: str) -> np.ndarray:
        if source not in self._rows:
            raise UsageError(f"there is no source {source!r}; there are: {', '.join(self._rows)}")
        return self._rows[source]


class _ArrayBatches(Batches):
    def __init__(self, rows: dict[str, np.ndarray], sites: Sites, batch_size: int, seed: int) -> None:
        if batch_size % jax.process_count():
            raise UsageError(f"batch_size={batch_size} does not divide over {jax.process_count()} processes")
        self._rows, self._sites = rows, sites
        n_rows = len(next(iter(rows.values())))
        self._order = EndlessShuffle(np.arange(n_rows), batch_size, seed, ARRAY_ORDER)
        share = batch_size // jax.process_count()
        self._part = slice(jax.process_index() * share, (jax.process_index() + 1) * share)

    def batches(self, start_step: int = 0) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        for step in count(start_step):
            ids = self.row_ids(step)
            yield step, {name: rows[ids] for name, rows in self._rows.items()}

    def row_ids(self, step: int) -> np.ndarray:
        return self._order.items(step, self._part)

    def place(self, rows: Mapping[str, np.ndarray], mesh: Mesh) -> Batch:
        return place_rows(rows, self._sites, mesh)


def _as_matrix(source: str, values: Any) -> np.ndarray:
    rows = as_floats(values, f"rows of {source}")
    rows = rows.reshape(-1, rows.shape[-1])
    if rows.dtype == np.float64:
        rows = rows.astype(np.float32)
    for first in range(0, len(rows), 1 << 16):
        finite = np.isfinite(rows[first : first + (1 << 16)].astype(np.float32)).all(axis=1)
        if not finite.all():
            raise UserError(f"row {first + int(np.argmin(finite))} of {source} is not finite; leave such rows out")
    return rows
