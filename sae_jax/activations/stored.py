"""An activation set on disk as a source of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from sae_jax.activations.loader import Loader
from sae_jax.activations.sample import sample_rows
from sae_jax.activations.source import Batches, RowSource, place_rows
from sae_jax.activations.store import ActivationSet
from sae_jax.record import DataRecord, SourceRecord
from sae_jax.saes.base import Batch, Learns
from sae_jax.types import Sites


class StoredRows(RowSource):
    """The rows of an activation set."""

    def __init__(self, activations: ActivationSet) -> None:
        """`activations`: as `open_activations` returns it."""
        self.activations = activations
        self.name, self.sources, self.n_rows = activations.path, activations.sources, activations.n_rows

    @property
    def data(self) -> DataRecord:
        """See RowSource."""
        path = str(self.activations.files.local or self.name)
        spec = self.activations.spec
        return DataRecord(self.activations.content, path, spec.tokenizer, spec.text)

    def describe(self, source: str) -> SourceRecord:
        """See RowSource."""
        spec = self.activations.source(source)
        return SourceRecord(spec.name, spec.d, spec.hook, spec.model, spec.model_digest)

    def mean_square(self, source: str) -> float:
        """See RowSource."""
        return self.activations.stats(source).mean_square

    def sample(self, source: str) -> np.ndarray:
        """See RowSource."""
        return sample_rows(self.activations, source)

    def open(self, sites: Sites, batch_size: int, seed: int, mesh: Mesh) -> Batches:
        """See RowSource."""
        return _StoredBatches(self.activations, sites, batch_size, seed)

    def learning(self, learns: Learns) -> RowSource:
        """See RowSource: what learns through the model takes the set's token sequences."""
        if learns == "rows":
            return self
        from sae_jax.activations.sequences import SequenceRows

        return SequenceRows(self.activations, later=learns == "through_layers")


class _StoredBatches(Batches):
    def __init__(self, activations: ActivationSet, sites: Sites, batch_size: int, seed: int) -> None:
        self._sites = sites
        self._loader = Loader(activations, sites.all, batch_size, seed, jax.process_index(), jax.process_count())

    @property
    def wait_seconds(self) -> float:  # pyrefly: ignore[bad-override] (read alone)
        return self._loader.wait_seconds

    def batches(self, start_step: int = 0) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        return self._loader.batches(start_step)

    def row_ids(self, step: int) -> np.ndarray:
        return self._loader.row_ids(step)

    def place(self, rows: Mapping[str, np.ndarray], mesh: Mesh) -> Batch:
        return place_rows(rows, self._sites, mesh)

    def close(self) -> None:
        self._loader.close()
