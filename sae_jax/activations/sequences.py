"""Token sequences of a set as a source of rows, for what is trained through the language model that made the set.

A batch is S sequences and the positions of them that the set keeps; in an endless stream each epoch is a fresh
permutation of all sequences. Process p of P gets its p-th part. On the devices the model runs on a batch once; its
activations at the site are the rows that dictionaries learn from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sae_jax import lm
from sae_jax.activations.order import EndlessShuffle
from sae_jax.activations.source import Batches, one_ahead, placed_array
from sae_jax.activations.store import ActivationSet
from sae_jax.activations.stored import StoredRows
from sae_jax.lm import params
from sae_jax.saes.base import Batch
from sae_jax.types import Sites, UsageError, UserError
from sae_jax.units import memory

SEQUENCE_ORDER = 4  # Philox domain; order.py has two
SHARDS_KEPT = 256  # in memory: five bytes a token


class SequenceRows(StoredRows):
    """The sequences of a set that `sae-jax harvest` made; rows are what its language model makes of them."""

    def __init__(self, activations: ActivationSet, later: bool) -> None:
        """`later`: whether batches hold the residual stream after later blocks too."""
        super().__init__(activations)
        self._later = later

    def open(self, sites: Sites, batch_size: int, seed: int, mesh: Mesh) -> Batches:
        """See RowSource; `batch_size` counts tokens. UsageError if it is no whole number of sequences a device."""
        sequences = Sequences(self.activations, batch_size, seed, mesh.size)
        return sequences.through(*model_at(self.activations, sites.x[0], mesh, self._later), self._later)


class Sequences(Batches):
    """Batches of sequences, read one ahead of use."""

    def __init__(
        self,
        activations: ActivationSet,
        batch_tokens: int,
        seed: int,
        n_devices: int,
        process: tuple[int, int] | None = None,
    ) -> None:
        """Args:
          activations: the set.
          batch_tokens: tokens of the global batch, S sequences.
          seed: of the order.
          n_devices: a batch is split over; a multiple of the number of processes.
          process: this is p of P processes; None: as JAX counts them.

        Raises UsageError for a set without text, and for a batch that is no whole number of sequences a device.
        """
        spec = activations.spec
        if spec.context is None or spec.sequences_per_shard is None:
            raise UsageError(
                f"{activations.path} has no text: its rows were written without tokens; use one of `sae-jax harvest`, "
                f"or of sae_jax.write_activations with tokens=, model= and hook="
            )
        unit = spec.context * n_devices
        if batch_tokens % unit:
            raise UsageError(
                f"train.batch_size={batch_tokens} must be whole sequences of {spec.context} tokens, equally many on "
                f"each of {n_devices} devices; use {max(round(batch_tokens / unit), 1) * unit}"
            )
        self.activations = activations
        self._rows: Any = None  # (ids, keep) -> Batch
        self._model: lm.Spec | None = None
        self._n_sequences = batch_tokens // spec.context
        index, n_processes = process or (jax.process_index(), jax.process_count())
        share = self._n_sequences // n_processes
        self._part = slice(index * share, (index + 1) * share)
        self._per_shard = spec.sequences_per_shard
        numbers = [s * self._per_shard + np.arange(c.n_sequences) for s, c in sorted(activations.commits.items())]
        self._order = EndlessShuffle(np.concatenate(numbers), self._n_sequences, seed, SEQUENCE_ORDER)
        self._shard = lru_cache(maxsize=SHARDS_KEPT)(self._read_shard)

    def row_ids(self, step: int) -> np.ndarray:
        """Numbers of the sequences in this process's part of a batch, i64[S / P]. Reads nothing."""
        return self._order.items(step, self._part)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """`ids`: i32[S / P, T], token ids; `keep`: bool[S / P, T], the positions that the set has a row of.

        UserError naming shard and chunk where the data is not what was written.
        """
        places = zip(*np.divmod(self.row_ids(step), self._per_shard), strict=True)
        pairs = [[part[place] for part in self._shard(int(shard))] for shard, place in places]
        return {name: np.stack(parts) for name, parts in zip(("ids", "keep"), zip(*pairs, strict=True), strict=True)}

    def batches(self, start_step: int = 0) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """See Batches."""
        return one_ahead(self, self.batch, start_step)

    def through(self, model: lm.LanguageModel, hook: lm.Hook, later: bool) -> Sequences:
        """These batches, placed as rows at a hook of a model (whole on each device) that is cut open there."""
        self._rows, self._model = partial(model_rows, model, hook=hook, later=later), model.spec
        return self

    def place(self, rows: Mapping[str, np.ndarray], mesh: Mesh) -> Batch:
        """See Batches."""
        return self._rows(*(placed_array(rows[name], mesh) for name in ("ids", "keep")))

    def _read_shard(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Its sequences i32[n, T], and which of their positions have a row."""
        first = shard * self._per_shard
        ids_ST = self.activations.read_sequences(first + np.arange(self.activations.commits[shard].n_sequences))
        if self._model is not None:
            lm.check_ids(ids_ST, self._model)
        keep_ST = np.zeros(ids_ST.shape, bool)
        for chunk in np.flatnonzero(self.activations.chunk_shard == shard):
            index = self.activations.read_index(int(chunk))
            keep_ST[index["seq"] - first, index["pos"]] = True
        return ids_ST, keep_ST


def model_at(activations: ActivationSet, source: str, mesh: Mesh, later: bool) -> tuple[lm.LanguageModel, lm.Hook]:
    """The language model that made a source, whole on each device, and the hook that the source is of.

    Raises UsageError for a source without model and for a model that does not fit on a device, UserError for one that
    is not the one that made the set.
    """
    spec = activations.source(source)
    if spec.model is None or spec.hook is None:
        raise UsageError(f"{source} of {activations.path} names no language model; use a set of sae-jax harvest")
    if activations.spec.backend == "torch":
        raise UsageError(
            f"{activations.path} was made with harvest.backend=torch, through which there are no gradients; train on "
            f"its rows, or harvest with harvest.backend=jax"
        )
    precision = activations.spec.precision or "float32"
    leaves = jax.tree.leaves(params.abstract(lm.read_spec(spec.model, recorded=True), precision))
    n_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    if n_bytes > (limit := _device_bytes(mesh)):
        raise UsageError(
            f"the parameters of {spec.model} take {memory(n_bytes)} in {precision}, and a device has {memory(limit)}: "
            f"what is trained through a model has all of it on each device; train on the rows of the set, or harvest "
            f"with {'a smaller model' if precision == 'bfloat16' else 'harvest.precision=bfloat16'}"
        )
    model = lm.load(spec.model, precision, recorded=True)
    if model.digest != spec.model_digest:
        raise UserError(
            f"the weights of {spec.model} are not those that {activations.path} was made with; harvest again"
        )
    hook = lm.parse_hook(spec.hook, model.spec)
    if later and not lm.later_hooks(model, hook):
        raise UsageError(f"sae.downstream needs layers after {hook}, and there are none; leave it out")
    return lm.place(model, mesh), hook


def _device_bytes(mesh: Mesh) -> float:
    """Memory of a device of this process; infinite where JAX does not know it, as on CPUs."""
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit", math.inf)


@partial(jax.jit, static_argnames=("hook", "later"))
def model_rows(model: lm.LanguageModel, ids_ST: jax.Array, keep_ST: jax.Array, hook: lm.Hook, later: bool) -> Batch:
    """What a dictionary learns from at a hook, given token ids i32[S, T] and the positions that count, bool[S, T]."""
    site = lm.replaced_site(model, ids_ST, keep_ST, hook, later)
    return Batch(site.rows, model=site)
