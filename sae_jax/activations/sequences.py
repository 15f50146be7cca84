"""Batches of token sequences of a set, for what is trained through the language model that made it.

Batch t is positions [t * S, (t + 1) * S) of an endless stream of sequences: a fresh permutation of all of them for each
epoch, with no remainder dropped. It depends on the set, S, the seed and t alone; process p of P gets its p-th part.
On the devices the model runs on a batch once; its activations at the site are the rows that dictionaries learn from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sae_jax import lm
from sae_jax.activations.store import ActivationSet
from sae_jax.saes.base import Batch
from sae_jax.types import UsageError, UserError

SEQUENCE_ORDER = 4  # Philox domain; order.py has two
SHARDS_KEPT = 256  # in memory: five bytes a token


class Sequences:
    """Reads batches of sequences. Any step at any time by `batch`; steps in turn, read ahead of use, by `batches`."""

    def __init__(
        self,
        activations: ActivationSet,
        source: str,
        batch_tokens: int,
        seed: int,
        n_devices: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """Args:
          activations: the set.
          source: the site that batches are labelled with.
          batch_tokens: tokens of the global batch, S sequences.
          seed: of the order.
          n_devices: a batch is split over; a multiple of process_count.
          process_index: this process is p of P.
          process_count: P.

        Raises UsageError for a set without text, and for a batch that is no whole number of sequences a device.
        """
        spec = activations.spec
        if spec.context is None or spec.sequences_per_shard is None:
            raise UsageError(
                f"{activations.path} has no text: its rows were written without tokens; use a set of sae-jax harvest"
            )
        unit = spec.context * n_devices
        if batch_tokens % unit:
            raise UsageError(
                f"train.batch_size={batch_tokens} must be whole sequences of {spec.context} tokens, equally many on "
                f"each of {n_devices} devices; use {max(round(batch_tokens / unit), 1) * unit}"
            )
        self.activations, self.source, self.seed = activations, activations.source(source).name, seed
        self.n_sequences = batch_tokens // spec.context
        self.wait_seconds = 0.0
        share = self.n_sequences // process_count
        self._own = slice(process_index * share, (process_index + 1) * share)
        self._per_shard = spec.sequences_per_shard
        there = [s * self._per_shard + np.arange(c.n_sequences) for s, c in sorted(activations.commits.items())]
        self._numbers = np.concatenate(there)
        self._epoch = lru_cache(maxsize=2)(self._compute_epoch)
        self._shard = lru_cache(maxsize=SHARDS_KEPT)(self._read_shard)

    def row_ids(self, step: int) -> np.ndarray:
        """Numbers of the sequences in this process's part of a batch, i64[S / P]. Reads nothing."""
        positions = step * self.n_sequences + np.arange(self.n_sequences)[self._own]
        epochs, places = np.divmod(positions, len(self._numbers))
        return np.array([self._epoch(int(e))[place] for e, place in zip(epochs, places, strict=True)])

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """{source: i32[S / P, T]}: token ids, and ~id at positions that the set leaves out.

        UserError naming shard and chunk where the data is not what was written.
        """
        pairs = zip(*np.divmod(self.row_ids(step), self._per_shard), strict=True)
        return {self.source: np.stack([self._shard(int(shard))[place] for shard, place in pairs])}

    def batches(self, start_step: int = 0) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yields (step, batch) from start_step on, without end, one batch ahead."""
        with ThreadPoolExecutor(1, "sequence-read") as thread:
            ahead = thread.submit(self.batch, start_step)
            for step in count(start_step):
                began = time.perf_counter()
                found = ahead.result()
                self.wait_seconds += time.perf_counter() - began
                ahead = thread.submit(self.batch, step + 1)
                yield step, found

    def _compute_epoch(self, epoch: int) -> np.ndarray:
        bits = np.random.Philox(key=[self.seed, SEQUENCE_ORDER], counter=[0, epoch, 0, 0]).random_raw
        return self._numbers[np.argsort(bits(len(self._numbers)), kind="stable")]

    def _read_shard(self, shard: int) -> np.ndarray:
        """Its sequences, ids of positions without a row inverted."""
        first = shard * self._per_shard
        ids_ST = self.activations.read_sequences(first + np.arange(self.activations.commits[shard].n_sequences))
        coded_ST = ~ids_ST
        for chunk in np.flatnonzero(self.activations.chunk_shard == shard):
            index = self.activations.read_index(int(chunk))
            coded_ST[index["seq"] - first, index["pos"]] = index["token"]
        return coded_ST


def through_model(activations: ActivationSet, source: str, mesh: Mesh, later: bool) -> Callable[[Batch], Batch]:
    """What turns a batch of sequences on the devices into one of rows, with the model that continues from them.

    Args:
        activations: the set, which names model and site.
        source: of the set.
        mesh: the model lies whole on each device.
        later: whether to keep the residual stream after later blocks.

    Raises UsageError for a source without model, UserError for a model that is not the one that made the set.
    """
    spec = activations.source(source)
    if spec.model is None or spec.hook is None:
        raise UsageError(f"{source} of {activations.path} names no language model; use a set of sae-jax harvest")
    model = lm.load(spec.model)
    if model.digest != spec.model_digest:
        raise UserError(
            f"the weights of {spec.model} are not those that {activations.path} was made with; harvest again"
        )
    hook = lm.parse_hook(spec.hook, model.spec)
    if later and not lm.later_hooks(model, hook):
        raise UsageError(f"sae.downstream needs layers after {hook}, and there are none; leave it out")
    model = lm.place(model, mesh)
    return lambda batch: _rows(model, batch.x, hook, later)


@partial(jax.jit, static_argnames=("hook", "later"))
def _rows(model: lm.LanguageModel, coded_ST: jax.Array, hook: lm.Hook, later: bool) -> Batch:
    keep_ST = coded_ST >= 0
    site = lm.replaced_site(model, jnp.where(keep_ST, coded_ST, ~coded_ST), keep_ST, hook, later)
    return Batch(site.rows, context=site)
