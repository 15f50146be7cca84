"""`sae-jax plan RECIPE --target v5p:8x8x8`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import jax

from sae_jax import mesh as meshes
from sae_jax import recipe
from sae_jax.activations.harvest import HarvestConfig
from sae_jax.activations.spec import DTYPES
from sae_jax.ops.tuning import EngineConfig
from sae_jax.planning import analytic, compile, report, targets
from sae_jax.progress import console
from sae_jax.training.settings import TrainConfig
from sae_jax.types import UsageError, Widths

S = TypeVar("S")


@dataclass(frozen=True)
class Plan(Generic[S]):
    """Compile the train step for machines that are not there, and say whether it fits and what it does."""

    sae: S
    target: str
    """machines: v5p:8x8x8, v6e:16x16, h200:64, rtx4090:1 and the like"""
    d_model: int | None = None
    """width of each source"""
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
    mesh: meshes.MeshConfig = field(default_factory=meshes.MeshConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if self.d_model is None or self.d_model < 1:
            raise UsageError(f"d_model={self.d_model}: a plan needs the width of the rows; give --d-model")
        if self.mesh.member > 1:
            raise UsageError(
                f"mesh.member={self.mesh.member}: a plan is of one autoencoder; give --mesh.member=1 and as --target "
                f"the share of the machines that one member gets"
            )
        if not 0 < self.mfu <= 1:
            raise UsageError(f"--mfu={self.mfu} must be above 0 and at most 1")
        if self.timeout <= 0:
            raise UsageError(f"--timeout={self.timeout} must be above 0 seconds")


def run(argv: Sequence[str]) -> None:
    """Parse, plan, show."""
    command = recipe.parse(Plan, argv, "sae-jax plan")
    jax.config.update("jax_platforms", "cpu")  # the devices that are here have no part in it
    content = plan(command)
    lines = [json.dumps(content, indent=2)] if command.json else report.lines(content)
    sys.stdout.write("\n".join(lines) + "\n")


def plan(command: Plan) -> dict[str, Any]:
    """The report on what `command` describes (sae_jax/planning/report.py)."""
    if command.sae.learns != "rows":
        raise UsageError(
            f"sae.variant={command.sae.variant} is trained through a language model, which a plan knows nothing of; "
            f"plan a topk of this size, and add what the model takes"
        )
    target = targets.parse(command.target)
    mesh = meshes.abstract_mesh(command.mesh, target.n_devices)
    command.engine.on("tpu" if target.is_tpu else "gpu")
    meshes.check_divides(mesh, command.sae.n_latents, command.train.batch_size)
    assert command.d_model is not None
    n_x = len(command.site) or 1
    widths = Widths((command.d_model,) * n_x, (command.d_model,) * (len(command.reconstruct) or n_x))
    same = command.reconstruct in ((), command.site)
    command.sae.check(widths, same)
    step = analytic.step(command.sae, command.train, widths, mesh)
    rows = command.harvest.tokens or command.train.steps * command.train.batch_size
    n_sources = len({*command.site, *command.reconstruct}) or 1
    row_bytes = n_sources * command.d_model * DTYPES[command.harvest.dtype].itemsize
    run = analytic.run(command.sae, command.train, widths, step, target, command.mfu, rows, row_bytes)
    compiled = None
    if compile.is_installed(target):
        console.print(f"compiling for {target.name} ...")
        parts = (command.sae, command.train, command.mesh, command.engine)
        compiled = compile.compile_step(target, *parts, widths, same, command.timeout)
    return report.report(target, step, run, command.mfu, compiled)
