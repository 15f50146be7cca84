"""Memory, work and time of a step and of a run, by arithmetic, without a compiler.

State is exact: the sizes of the shards that `training.state` describes. Work is that of the products which cannot be
avoided. The peak is an estimate; only the compiled program knows it.

A run of several members steps them in turn on the same batch, or, where the mesh has an axis for members, one on each
slice of the devices at once. Their states lie in memory together; the working memory of a step is needed once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import AbstractMesh

from sae_jax.planning.targets import GIB, Target
from sae_jax.planning.through_model import ThroughModel
from sae_jax.saes.base import KConfig, SaeConfig
from sae_jax.scaling import flops
from sae_jax.training.settings import TrainConfig
from sae_jax.training.state import abstract
from sae_jax.types import Widths

WORKSPACE = GIB  # row blocks, tiles and pairs, whose budgets are in ops/tuning.py
PAIR_BYTES = 28  # of a row and an active latent, where gradients are made from them: index, coefficients, and sorted


@dataclass(frozen=True)
class Step:
    """One step of one member on one device of its slice."""

    state_bytes: int
    gradient_bytes: int
    flop: int  # while no latent is dead
    aux_flop: int = 0  # what AuxK adds with dead latents, at most
    dtype: str = "bfloat16"  # of the factors of products
    model_bytes: int = 0  # parameters of the language model it is trained through
    model_activation_bytes: int = 0  # an estimate
    pair_bytes: int = 0  # where gradients are made by tiles of latents; an estimate

    @property
    def working_bytes(self) -> int:
        """An estimate of what a step needs beside states and language model.

        The gradient, one of the two matrices a second time, a workspace, the language model's activations, and the
        pairs that gradients of tiles are made from. Within 0.5 GiB of the compiled peaks in configs/openai_16m*.yaml.
        """
        return 3 * self.gradient_bytes // 2 + WORKSPACE + self.model_activation_bytes + self.pair_bytes

    @property
    def peak_bytes(self) -> int:
        """An estimate for a run of this member alone."""
        return self.state_bytes + self.model_bytes + self.working_bytes


@dataclass(frozen=True)
class Run:
    """All of a run, over all devices."""

    tokens: int  # that each member learns from; the most, where they differ
    disk_bytes: int  # of the set
    flop: int
    hours: float  # at the stated share of the matrix rate, and no less than floor_hours
    floor_hours: float  # at the full matrix rate, and the full bandwidth for the state, one after the other
    step_seconds: float  # of all members, while none has ended, at the stated share
    floor_step_seconds: float


def step(
    sae: SaeConfig, train: TrainConfig, widths: Widths, mesh: AbstractMesh, model: ThroughModel | None = None
) -> Step:
    """One step of this member on one device of `mesh`, its slice of the devices."""
    with jax.sharding.use_abstract_mesh(mesh):
        state = abstract(sae, train, widths, mesh)
    flop = train.batch_size * (flops.executed(sae, widths) + (model.token_flop if model else 0))
    gradient_bytes, pair_bytes, by_pairs = _shard_bytes(state.sae), 0, train.weights != "float32"
    if by_pairs:  # a tile of both matrices
        gradient_bytes = min(2 * gradient_bytes, 2 * WORKSPACE)
        k_aux = (sae.k_aux or sum(widths.y) // 2) if isinstance(sae, KConfig) and sae.aux_coefficient else 0
        pair_bytes = PAIR_BYTES * train.batch_size * ((sae.n_active or 0) + k_aux)
    return Step(
        state_bytes=_shard_bytes(state),
        gradient_bytes=gradient_bytes,
        pair_bytes=pair_bytes,
        flop=flop // mesh.size,
        aux_flop=train.batch_size * flops.auxk(sae, widths, train.batch_size, by_pairs) // mesh.size,
        dtype=sae.product_dtype.name,
        model_bytes=model.parameter_bytes if model else 0,
        model_activation_bytes=train.batch_size // mesh.size * model.token_bytes if model else 0,
    )


def state_bytes(steps: Sequence[Step], n_slices: int) -> int:
    """Of all members, on each device."""
    return sum(step.state_bytes for step in steps) // n_slices


def peak_bytes(steps: Sequence[Step], n_slices: int) -> int:
    """An estimate: the states of all members, the language model, and the working memory of the largest step."""
    largest = max(steps, key=lambda step: step.working_bytes)
    return state_bytes(steps, n_slices) + largest.model_bytes + largest.working_bytes


def floor_seconds(step: Step, target: Target) -> float:
    """The least that a step takes: its products at the full matrix rate, then its state read and written once."""
    return step.flop / target.rate(step.dtype) + flops.optimiser_bytes(step.state_bytes) / target.chip.bandwidth


def run(steps: Sequence[tuple[Step, TrainConfig]], target: Target, n_slices: int, mfu: float, disk_bytes: int) -> Run:
    """The run of these members on all devices of a target, at `mfu` of its matrix rate."""
    floors = [floor_seconds(step, target) for step, _ in steps]
    taken = [
        max(step.flop / target.rate(step.dtype) / mfu, least) for (step, _), least in zip(steps, floors, strict=True)
    ]

    def hours(of_step: Sequence[float]) -> float:
        parts = (train.steps * seconds for seconds, (_, train) in zip(of_step, steps, strict=True))
        return sum(parts) / n_slices / 3600

    return Run(
        tokens=max(train.steps * train.batch_size for _, train in steps),
        disk_bytes=disk_bytes,
        flop=sum(train.steps * step.flop for step, train in steps) * target.n_devices // n_slices,
        hours=hours(taken),
        floor_hours=hours(floors),
        step_seconds=sum(taken) / n_slices,
        floor_step_seconds=sum(floors) / n_slices,
    )


def _shard_bytes(tree) -> int:
    """Bytes that one device holds of abstract arrays."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total
