"""What the parts of the self-test share: where they run, and the comparison of arrays with what they should be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from sae_jax import mesh as meshes
from sae_jax.ops.tuning import EngineConfig

Index = tuple[slice, ...]
Figures = dict[str, Any]  # what a part measured, for the report


class MismatchError(Exception):
    """Something is not as it should be."""

    def __init__(self, seen: str, expected: str) -> None:
        """`seen`: what there is, and where; `expected`: what there should be."""
        super().__init__(f"{seen}, expected {expected}")
        self.seen, self.expected = seen, expected


class LeftOutError(Exception):
    """A part that has nothing to try on this machine; the message says why."""


@dataclass(frozen=True)
class Where:
    """The machine that is tested."""

    mesh: Mesh  # the one in use, over all devices of all processes
    mesh_config: meshes.MeshConfig
    engine: EngineConfig
    folder: Path  # of this test alone, shared by all processes

    @property
    def platform(self) -> str:
        """Of the devices: cpu, gpu or tpu."""
        return self.mesh.devices.flat[0].platform


def place(mesh: Mesh, role: PartitionSpec, array: np.ndarray) -> jax.Array:
    """An array that every process has, on the devices of the mesh in use."""
    return make(mesh, role, array.shape, array.__getitem__)


def make(mesh: Mesh, role: PartitionSpec, shape: tuple[int, ...], at: Callable[[Any], np.ndarray]) -> jax.Array:
    """An array on the devices of the mesh in use, of which each process makes its parts: what is at an index."""
    return jax.make_array_from_callback(shape, meshes.sharding(mesh, role), at)


def check(
    what: str, array: jax.Array, expected: np.ndarray | Callable[[Index], np.ndarray], tolerance: float = 0.0
) -> None:
    """Compare the parts of an array that lie on this process's devices with what they should be.

    Args:
        what: the array is called.
        array: on the devices.
        expected: all of it, or what should be at an index.
        tolerance: share of the largest expected number by which numbers may differ; 0: not at all.

    Raises MismatchError, which names the first number that differs, its place and its device.
    """
    whole: Callable[[Any], Any] = expected if callable(expected) else expected.__getitem__
    for shard in array.addressable_shards:
        seen, should = (np.asarray(each).astype(np.float64) for each in (shard.data, whole(shard.index)))
        limit = tolerance * np.abs(should).max(initial=0.0)
        wrong = ~(np.abs(seen - should) <= limit)  # nan is wrong
        if wrong.any():
            at = tuple(np.argwhere(wrong)[0])
            place = [int((part.start or 0) + i) for part, i in zip(shard.index, at, strict=True)]
            more = f" and {wrong.sum() - 1:,} more numbers" if wrong.sum() > 1 else ""
            within = f" within {limit:.2g}" if tolerance else ""
            raise MismatchError(
                f"{what}{place or ''} is {seen[at]:.9g} on device {shard.device.id}{more}", f"{should[at]:.9g}{within}"
            )
