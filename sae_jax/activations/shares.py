"""Live data of several processes: each makes every P-th shard, and a batch is put together on the devices.

    process p makes the shards s with s % P = p, of each segment
    batch t   the rows that one process would take, in its order; each process sends those of them that it has made

Processes tell each other how many rows their shards have through JAX's coordination service: from a thread, where a
collective would meet those of training. Rows themselves go through collectives, in the thread that trains.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sae_jax import mesh as meshes
from sae_jax.activations.spec import as_bits
from sae_jax.saes.base import Batch

KEY = "sae_jax/live"
POLL_SECONDS = 0.05
STEPS_OF_ROOM = 8  # rooms for rows grow by this part of an even share: few programs, little that fills them up


def exchange(what: str, value: Any, process: int, n_processes: int, poll: Callable[[], None]) -> list[Any]:
    """What each process says about `what`, in their order, once all have; JSON. `poll` is called meanwhile."""
    if n_processes == 1:
        return [value]
    client, prefix = distributed.global_state.client, f"{KEY}/{what}/"
    assert client is not None  # there are other processes
    client.key_value_set(f"{prefix}{process}", json.dumps(value), allow_overwrite=True)
    while True:
        found = dict(client.key_value_dir_get(prefix))
        said = {key.rpartition("/")[2]: text for key, text in found.items() if key.startswith(prefix)}
        if len(said) == n_processes:
            return [json.loads(said[str(p)]) for p in range(n_processes)]
        poll()
        time.sleep(POLL_SECONDS)


def gathered(rows: np.ndarray, owners: np.ndarray, n_processes: int) -> np.ndarray:
    """Rows [n, width] of which process `owners[i]` has row i; each gives those that it has, in their order.

    Called by all processes at once, in the thread that trains.
    """
    if n_processes == 1:
        return rows
    most = int(np.bincount(owners, minlength=n_processes).max())
    room = np.zeros((most, *rows.shape[1:]), rows.dtype)
    room[: len(rows)] = rows
    everyone = np.asarray(multihost_utils.process_allgather(as_bits(room).view(np.uint8)))
    everyone = np.ascontiguousarray(everyone).view(as_bits(room).dtype).view(rows.dtype)
    return everyone[owners, ranks(owners)]


def ranks(owners: np.ndarray) -> np.ndarray:
    """i64[n]: how many rows before row i have the same owner."""
    order = np.argsort(owners, kind="stable")
    first = np.searchsorted(owners[order], owners[order])  # in that order, of the same owner
    rank = np.empty(len(owners), np.int64)
    rank[order] = np.arange(len(owners)) - first
    return rank


def room_for(owners: np.ndarray, n_processes: int) -> int:
    """Rows that every process gives to a batch: as many as the one that has most, rounded up, at most the batch."""
    even = len(owners) // n_processes
    unit = max(even // STEPS_OF_ROOM // jax.local_device_count(), 1) * jax.local_device_count()
    return min(-(-int(np.bincount(owners).max()) // unit) * unit, len(owners))


def in_order(batch: Batch, owners: np.ndarray, mesh: Mesh) -> Batch:
    """The batch whose row i process `owners[i]` has, of one in which each process gave its rows and some more."""
    return meshes.in_order(_take(batch, _places(mesh, len(batch.x))[owners, ranks(owners)]))


@lru_cache(maxsize=64)
def _places(mesh: Mesh, n_rows: int) -> np.ndarray:
    """i32[P, n_rows / P]: which rows of a batch each process gave. On a torus they need not be one piece."""
    spans: dict[int, set[tuple[int, int]]] = {}
    for device, place in meshes.sharding(mesh, meshes.input_rows(mesh)).devices_indices_map((n_rows,)).items():
        spans.setdefault(device.process_index, set()).add(place[0].indices(n_rows)[:2])
    of_each = [[np.arange(*span, dtype=np.int32) for span in sorted(spans[process])] for process in sorted(spans)]
    return np.stack([np.concatenate(of_one) for of_one in of_each])


@jax.jit
def _take(batch: Batch, index_B: jax.Array) -> Batch:
    """Rows of the whole batch are on each device for a moment, as they are in the step (ops/)."""

    def take(rows: jax.Array) -> jax.Array:
        everywhere = jax.sharding.reshard(rows, meshes.REPLICATED)
        return jax.sharding.reshard(everywhere[index_B], meshes.ROWS)

    return jax.tree.map(take, batch)
