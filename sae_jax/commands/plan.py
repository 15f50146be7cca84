"""`sae-jax plan RECIPE --target v5p:8x8x8`, and with `--harvest` of what comes before training."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import jax

from sae_jax import planning, recipe, storage
from sae_jax.activations.settings import HarvestConfig
from sae_jax.mesh import MeshConfig
from sae_jax.ops.tuning import EngineConfig
from sae_jax.planning import harvest_report, report
from sae_jax.planning.storage import StorageConfig
from sae_jax.training.expand import expand_members
from sae_jax.training.settings import TrainConfig

S = TypeVar("S")
OF_HARVEST = "--harvest"
PARTS = ("target", "harvest", "site", "reconstruct", "d_model", "mesh", "engine", "mfu", "timeout", "storage")


@dataclass(frozen=True)
class Plan(Generic[S]):
    """Compile the train step for machines that are not there, and say whether it fits and how long a run takes."""

    sae: S
    target: str
    """machines: v5p:8x8x8, v6e:16x16, h200:64, rtx4090:1 and the like; with --harvest the plan is of the harvest"""
    d_model: int | None = None
    """width of each source; none = that of the site, for what is trained through a language model"""
    site: tuple[str, ...] = ()
    """sources that are encoded; none = one"""
    reconstruct: tuple[str, ...] = ()
    """sources that are reconstructed, for transcoders; none = what is encoded"""
    mfu: float = 0.3
    """share of the matrix rate that the run is taken to reach"""
    json: bool = False
    """print JSON"""
    timeout: float = 600.0
    """seconds until a compiler that does not come back is killed"""
    harvest: HarvestConfig = field(default_factory=HarvestConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    members: tuple[str, ...] = ()
    """several SAEs from one pass over the data, as `train` takes them"""


@dataclass(frozen=True)
class PlanHarvest:
    """Compile the forward pass of a harvest for machines that are not there, and say whether it fits and how long it
    takes. Of the language models only config.json is read."""

    target: str
    """machines: v5p:8x8x8, v6e:16x16, h200:64, rtx4090:1 and the like"""
    mfu: float = 0.3
    """share of the matrix rate that the pass is taken to reach"""
    json: bool = False
    """print JSON"""
    timeout: float = 600.0
    """seconds until a compiler that does not come back is killed"""
    harvest: HarvestConfig = field(default_factory=HarvestConfig)


def run(argv: Sequence[str]) -> None:
    """Parse, plan, show."""
    jax.config.update("jax_platforms", "cpu")  # the devices that are here have no part in it
    if OF_HARVEST in argv:
        words = [word for word in argv if word != OF_HARVEST]
        command = recipe.parse(PlanHarvest, words, f"sae-jax plan {OF_HARVEST}")
        job = planning.HarvestJob(command.target, command.harvest, command.mfu, command.timeout)
        content, to_lines = planning.plan_harvest(job), harvest_report.lines
    else:
        members = expand_members(recipe.parse(Plan, argv, "sae-jax plan"))
        command = next(iter(members.values()))
        parts = {name: getattr(command, name) for name in PARTS}
        settings = {name: (each.sae, each.train) for name, each in members.items()}
        content, to_lines = planning.plan(planning.from_recipe(members=settings, **parts)), report.lines
    lines = [storage.json_text(content, "--json").rstrip()] if command.json else to_lines(content)
    sys.stdout.write("\n".join(lines) + "\n")
