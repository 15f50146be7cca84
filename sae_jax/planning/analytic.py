"""What arithmetic alone says of a step and of a run, without a compiler.

State is exact: the sizes of the shards that `train.state` describes. Work is that of the products which cannot be
avoided. The peak is an estimate; only the compiled program knows it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
from jax.sharding import AbstractMesh

from sae_jax.planning.targets import GIB, Target
from sae_jax.saes.base import SaeConfig
from sae_jax.scaling import flops
from sae_jax.training.settings import TrainConfig
from sae_jax.training.state import abstract
from sae_jax.types import Widths

WORKSPACE = GIB  # row blocks, tiles and pairs, whose budgets are in ops/tuning.py


@dataclass(frozen=True)
class Step:
    """One step on one device."""

    state_bytes: int
    gradient_bytes: int
    flop: int

    @property
    def peak_bytes(self) -> int:
        """An estimate: state, gradient, one of the two matrices a second time, and a workspace.

        Within 0.5 GiB of the compiled peaks in configs/openai_16m*.yaml.
        """
        return self.state_bytes + 3 * self.gradient_bytes // 2 + WORKSPACE


@dataclass(frozen=True)
class Run:
    """All of a run, over all devices."""

    tokens: int
    disk_bytes: int  # of the set
    flop: int
    hours: float  # at the stated share of the matrix rate
    floor_hours: float  # at the full matrix rate, and the full bandwidth for the state


def step(sae: SaeConfig, train: TrainConfig, widths: Widths, mesh: AbstractMesh) -> Step:
    """One step of this run on one device of `mesh`."""
    with jax.sharding.use_abstract_mesh(mesh):
        state = abstract(sae, train, widths, mesh)
    return Step(
        state_bytes=_shard_bytes(state),
        gradient_bytes=_shard_bytes(state.sae),
        flop=train.batch_size * flops.executed(sae, widths) // mesh.size,
    )


def run(
    sae: SaeConfig, train: TrainConfig, widths: Widths, on: Step, target: Target, mfu: float, rows: int, row_bytes: int
) -> Run:
    """The run whose step is `on`, at `mfu` of the target's matrix rate, over a set of `rows` of `row_bytes`."""
    compute, memory = on.flop / target.chip.flops, flops.optimiser_bytes(on.state_bytes) / target.chip.bandwidth
    return Run(
        tokens=train.steps * train.batch_size,
        disk_bytes=rows * row_bytes,
        flop=train.steps * train.batch_size * flops.executed(sae, widths),
        hours=train.steps * compute / mfu / 3600,
        floor_hours=train.steps * (compute + memory) / 3600,
    )


def _shard_bytes(tree) -> int:
    """Bytes that one device holds of abstract arrays."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total
