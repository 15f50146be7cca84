"""A training run on machines that are not there: does it fit, what does a step do, how long does it take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sae_jax import lm
from sae_jax import mesh as meshes
from sae_jax.activations.rows import row_bytes
from sae_jax.activations.settings import HarvestConfig
from sae_jax.errors import UsageError
from sae_jax.ops.tuning import EngineConfig
from sae_jax.planning import analytic, compile, report, targets
from sae_jax.planning.storage import StorageConfig, demand
from sae_jax.planning.through_model import ThroughModel, check_batch
from sae_jax.progress import console
from sae_jax.saes.base import SaeConfig
from sae_jax.training.settings import TrainConfig, program, settled
from sae_jax.types import Widths

TOKEN_BYTES = 4  # of a set, that is trained on through its model


@dataclass(frozen=True)
class Job:
    """What is to be trained, and on what."""

    target: str  # machines, as planning/targets.py names them
    members: Mapping[str, tuple[SaeConfig, TrainConfig]]  # those that learn from one pass; a single one is named ""
    widths: Widths  # of the sources
    same: bool = True  # whether what is encoded is what is reconstructed
    mesh: meshes.MeshConfig = field(default_factory=meshes.MeshConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    model: ThroughModel | None = None  # where the members are trained through a language model
    disk_bytes: int = 0  # of the activation set
    row_bytes: int = 0  # that a step reads of it for each row that it learns from
    storage: StorageConfig = field(default_factory=StorageConfig)
    mfu: float = 0.3  # share of the matrix rate that the run is taken to reach
    timeout: float = 600.0  # seconds until a compiler that does not come back is killed

    def __post_init__(self) -> None:
        if not self.members:
            raise UsageError("a plan needs at least one autoencoder; give sae")
        check_settings(self.mfu, self.timeout)
        for name, (sae, _) in self.members.items():
            if (sae.learns != "rows") != (self.model is not None):
                raise UsageError(
                    f"{f'member {name}: ' * bool(name)}sae.variant={sae.variant} learns "
                    f"{'from rows' if self.model else 'through a language model'}, the rest of the plan does not; plan "
                    f"it apart"
                )


def check_settings(mfu: float, timeout: float) -> None:
    """Refuse a share of the matrix rate, or seconds, that cannot be."""
    if not 0 < mfu <= 1:
        raise UsageError(f"--mfu={mfu} must be above 0 and at most 1")
    if timeout <= 0:
        raise UsageError(f"--timeout={timeout} must be above 0 seconds")


def from_recipe(
    target: str,
    members: Mapping[str, tuple[SaeConfig, TrainConfig]],
    harvest: HarvestConfig,
    site: Sequence[str] = (),
    reconstruct: Sequence[str] = (),
    d_model: int | None = None,
    **settings: Any,
) -> Job:
    """The job that a recipe describes, on the set that its `harvest` would make.

    Args:
        target: machines.
        members: {name: (sae, train)}.
        harvest: what the set holds; its model, too, where the members are trained through it.
        site: sources that are encoded; none: one.
        reconstruct: sources that are reconstructed; none: those that are encoded.
        d_model: width of each source; not needed where a language model tells.
        settings: the other fields of `Job`.

    Raises UsageError where the width is not known, or is not that of the site.
    """
    sae, _ = next(iter(members.values()))
    model = None
    if sae.learns != "rows":
        model = _through_model(harvest, site, later=sae.learns == "through_layers")
        width = lm.hook_width(model.spec, model.hook)
        if d_model not in (None, width):
            raise UsageError(f"d_model={d_model}, but {model.hook} of {harvest.model[0]} is {width} wide; leave it out")
        d_model = width
    if d_model is None or d_model < 1:
        raise UsageError(f"d_model={d_model}: a plan needs the width of the rows; give --d-model")
    n_x = len(site) or 1
    rows = harvest.tokens or max(train.steps * train.batch_size for _, train in members.values())
    of_row = (len({*site, *reconstruct}) or 1) * row_bytes(d_model, harvest.dtype)
    return Job(
        target=target,
        members=members,
        widths=Widths((d_model,) * n_x, (d_model,) * (len(reconstruct) or n_x)),
        same=tuple(reconstruct) in ((), tuple(site)),
        model=model,
        disk_bytes=rows * of_row,
        row_bytes=TOKEN_BYTES if model else of_row,
        **settings,
    )


def _through_model(harvest: HarvestConfig, site: Sequence[str], later: bool) -> ThroughModel:
    """The model that a recipe harvests, and the hook of its source."""
    if harvest.backend == "torch":
        raise UsageError("harvest.backend=torch has no gradients; to train through the model, use harvest.backend=jax")
    source = site[0] if site else harvest.hooks[0]
    for name, reference in harvest.models().items():
        prefix = f"{name}." if name else ""
        if source.startswith(prefix):
            spec = lm.read_spec(reference)
            return ThroughModel(spec, lm.parse_hook(source.removeprefix(prefix), spec), harvest.context, later)
    raise UsageError(f"site={source}: none of the models {', '.join(harvest.models())} has it; write name.point.layer")


def plan(job: Job) -> dict[str, Any]:
    """The report on a job (planning/report.py): compiled where the target's compiler is installed, else an estimate.

    Raises UsageError for a target, mesh or batch that cannot be, UserError where the compiler fails.
    """
    target = targets.parse(job.target)
    n_slices = job.mesh.member
    meshes.abstract_mesh(job.mesh, target.n_devices)  # refuses numbers that do not multiply to the devices
    slice_mesh = meshes.abstract_mesh(replace(job.mesh, member=1), target.n_devices // n_slices)
    platform = "tpu" if target.is_tpu else "gpu"
    job.engine.on(platform)
    job = replace(job, members={name: (sae.on(platform), train) for name, (sae, train) in job.members.items()})
    _check(job, slice_mesh)
    steps = {
        name: analytic.step(sae, train, job.widths, slice_mesh, job.model) for name, (sae, train) in job.members.items()
    }
    pairs = [(steps[name], train) for name, (_, train) in job.members.items()]
    run = analytic.run(pairs, target, n_slices, job.mfu, job.disk_bytes)
    largest = max(steps, key=lambda name: steps[name].working_bytes)
    compiled = None
    if compile.is_installed(target):
        console.print(f"compiling for {target.name} ...")
        sae, train = job.members[largest]
        parts = (sae, train, job.mesh, job.engine, job.widths, job.same, job.model)
        compiled = compile.compile_step(target, *parts, timeout=job.timeout)
    _, train = job.members[largest]  # members agree on batch and checkpoints
    of_storage = demand(
        job.storage,
        input_bytes=train.batch_size * job.row_bytes,
        step_seconds=run.step_seconds,
        floor_seconds=run.floor_step_seconds,
        save_bytes=analytic.state_bytes([*steps.values()], n_slices) * target.n_devices,
        checkpoint_every=train.checkpoint_every,
    )
    return report.report(target, steps, largest, n_slices, run, job.mfu, of_storage, compiled)


def _check(job: Job, slice_mesh: Any) -> None:
    groups: dict[Any, list[str]] = {}
    for name, (sae, train) in job.members.items():
        sae.check(job.widths, job.same)
        settled(train, sae)
        meshes.check_divides(slice_mesh, sae.n_latents, train.batch_size)
        if job.model:
            check_batch(job.model, train.batch_size, slice_mesh.size)
        groups.setdefault((sae.program, program(train)), []).append(name)
    for names in groups.values():
        if len(names) % job.mesh.member:
            raise UsageError(
                f"mesh.member={job.mesh.member}: the members that share a program must fill {job.mesh.member} slices, "
                f"these do not: {', '.join(names) or 'one SAE'}; use mesh.member=1, or one that divides {len(names)}"
            )
