"""A run from its settings: rows, sites, mesh and members brought together for the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, TypeVar, get_args

from sae_jax import config as configs
from sae_jax import mesh as meshes
from sae_jax import storage
from sae_jax.activations.source import RowSource, choose_sites, sampler
from sae_jax.ops import tuning
from sae_jax.record import Normalisation, Record, RunRecord, program
from sae_jax.saes.base import AbstractSae, Learns
from sae_jax.storage import AnyPath, Lease
from sae_jax.training import checkpoint, loop, trackers
from sae_jax.training.groups import Member
from sae_jax.training.loop import Trained
from sae_jax.training.members import Measurements
from sae_jax.training.ownership import as_the_first_says
from sae_jax.training.settings import TrainConfig, settled
from sae_jax.training.start import Start
from sae_jax.types import UsageError

S = TypeVar("S")


@dataclass(frozen=True)
class TrainJob(Generic[S]):
    """Train a sparse autoencoder on an activation set. Repeat the command to resume."""

    data: str
    """activation set to train on"""
    out: str
    """directory of the run, or its URL (s3://, gs://)"""
    sae: S
    site: tuple[str, ...] = ()
    """source of the set that is encoded; may be left out if there is only one. Several stand side by side"""
    reconstruct: tuple[str, ...] = ()
    """source that is reconstructed, for transcoders; none = what is encoded"""
    d_model: int | None = None
    """width each source must have; None = whatever it has"""
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: meshes.MeshConfig = field(default_factory=meshes.MeshConfig)
    engine: tuning.EngineConfig = field(default_factory=tuning.EngineConfig)
    allow_partial: bool = False
    """train although some shards of the set are not there yet"""
    cache_gib: float = 0.0
    """local disk, in GiB, for chunks of a set at a URL, each of which is then read from there once; see docs/data.md"""
    init_from: str | None = None
    """begin with the weights of this dictionary, of the same variant and size, instead of random ones: a folder, a run,
    or hf:owner/repo[/folder][@revision]"""
    members: tuple[str, ...] = ()
    """train several SAEs at once; each is 'NAME --sae.k=16 --train.lr=1e-3 ...': what it changes"""


def run(
    jobs: dict[str, TrainJob],
    source: RowSource,
    measurements: Measurements | None = None,
    lease: Lease | None = None,
    read: Callable[[str], tuple[AbstractSae, Record]] | None = None,
) -> Trained:
    """Train the members {name: job}, or one SAE named "". The same call resumes a run that has a folder.

    Args:
        jobs: they differ in `sae` and in a member's own settings of `train`. An `out` of "" means that nothing is
            written.
        source: the rows; `data` of the jobs only says where they are.
        measurements: where members are measured on the way.
        lease: of the run, if the caller holds it already.
        read: a dictionary from what `init_from` says; called for runs without a checkpoint.
    """
    job = next(iter(jobs.values()))
    trackers.check(job.train.log, job.out)
    folder = storage.path(job.out) if job.out else None
    mesh, source = meshes.make_mesh(job.mesh, source.devices()), source.of_run(folder)
    sites, widths = choose_sites(source, job.site, job.reconstruct, job.d_model)
    for member in jobs.values():
        member.sae.check(widths, sites.x == sites.y)
    platform = mesh.devices.flat[0].platform
    start = None if job.init_from is None or read is None else Start(job.init_from, partial(read, job.init_from))
    members = [_member(name, member, folder, source, platform, start) for name, member in jobs.items()]
    rows = source.learning(learning(jobs))
    with (
        tuning.using(job.engine.on(platform)),
        rows.open(sites, job.train.batch_size, job.train.order, mesh) as batches,
    ):
        return loop.train(folder, members, mesh, batches, sampler(source, sites, widths), measurements, lease)


def learning(jobs: dict[str, TrainJob]) -> Learns:
    """What the members learn from. Raises UsageError if it is rows of the set for some and the model for others."""
    names = {job.sae.learns: name for name, job in jobs.items()}
    if "rows" in names and len(names) > 1:
        other = next(name for learns, name in names.items() if learns != "rows")
        raise UsageError(
            f"members {names['rows']} and {other}: one learns from rows, the other through the model, so not from the "
            f"same batches; train them apart"
        )
    return max(names, key=get_args(Learns).index)


def record_of(job: TrainJob, source: RowSource) -> RunRecord:
    """What config.json says of a run that has not begun."""
    sites, _ = choose_sites(source, job.site, job.reconstruct, job.d_model)
    encodes, reconstructs = (tuple(map(source.describe, names)) for names in sites)
    dictionary = Record(
        variant=job.sae.variant,
        sae=configs.to_dict(job.sae),
        encodes=encodes,
        reconstructs=reconstructs,
        normalisation=Normalisation(job.sae.input_norm, is_folded=False),
        data=source.data,
        steps=0,
        tokens=0,
        weights="live",
        metrics={},
        program=program(),
    )
    job = replace(job, train=settled(job.train, job.sae))
    settings: dict[str, Any] = {name: configs.to_dict(getattr(job, name)) for name in ("train", "mesh", "engine")}
    return RunRecord(dictionary, **settings, allow_partial=job.allow_partial, init_from=job.init_from)


def _member(
    name: str, job: TrainJob, folder: AnyPath | None, source: RowSource, platform: str, start: Start | None
) -> Member:
    if folder is not None and name:
        folder = folder / checkpoint.MEMBERS / name
    job = _as_begun(job, folder, platform)
    job = replace(job, train=settled(job.train, job.sae))
    return Member(name, job.sae, job.train, folder, record_of(job, source), start)


def _as_begun(job: TrainJob, folder: AnyPath | None, platform: str) -> TrainJob:
    """What is left out stays as it was, whatever the number of steps and the machine are now."""
    begun = None if folder is None else checkpoint.begun(folder)
    train = begun.train if begun else {}
    names = [name for name in ("lr", "dead_after_tokens") if getattr(job.train, name) is None and name in train]
    kept: dict[str, Any] = {name: train[name] for name in names}
    sae = job.sae
    if sae.dtype == "auto":
        dtype = begun.dictionary.sae["dtype"] if begun else sae.on(platform).dtype
        # Processes may be on unlike CPUs, but run one program.
        sae = replace(sae, dtype="bfloat16" if as_the_first_says(dtype == "bfloat16") else "float32")
    return replace(job, train=replace(job.train, **kept), sae=sae)
