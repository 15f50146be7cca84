"""What commands and notebooks call: from harvest to advise.

Each takes a job (the dataclass that the command of the same name parses) or keywords. They raise UserError and
UsageError, never exit, and leave logging, signal handlers, the environment and JAX's global state as they found them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from sae_jax import artifact, config, planning, storage
from sae_jax.activations.commits import committed_shards
from sae_jax.activations.harvest import harvest as make_set
from sae_jax.activations.live import LiveConfig, LiveRows, of_model
from sae_jax.activations.memory import ArrayRows
from sae_jax.activations.settings import HarvestConfig
from sae_jax.activations.source import RowSource
from sae_jax.activations.store import ActivationSet, open_activations
from sae_jax.activations.stored import StoredRows
from sae_jax.artifact import Dictionary
from sae_jax.interchange import publish
from sae_jax.mesh import MeshConfig
from sae_jax.ops.tuning import EngineConfig
from sae_jax.planning import targets
from sae_jax.saes import base
from sae_jax.saes.base import SaeConfig
from sae_jax.scaling import flops, laws, plots, report, table
from sae_jax.scaling.advise import Advice
from sae_jax.scaling.advise import advise as advise_by
from sae_jax.storage import AnyPath, Files, StrPath
from sae_jax.sweeps import plan as sweep_plan
from sae_jax.sweeps import run as sweep_run
from sae_jax.sweeps.grid import SweepConfig
from sae_jax.sweeps.plan import SweepJob
from sae_jax.training import run
from sae_jax.training.expand import change, expand_members
from sae_jax.training.run import TrainJob
from sae_jax.training.settings import TrainConfig
from sae_jax.types import UsageError, UserError, Widths

LIVE = "live"  # --data
TRAIN_FIELDS = tuple(f.name for f in dataclasses.fields(TrainConfig))


def harvest(out: StrPath, *, shard: tuple[int, int] = (0, 1), settings: HarvestConfig | None = None, **changes: Any):
    """Run text through a language model and store the activations of some hooks. The same call resumes.

    Args:
        out: directory or URL of the activation set.
        shard: (i, n): make every n-th shard, starting at i.
        settings: what to store.
        **changes: fields of `HarvestConfig`, such as model, text, hooks, tokens.

    Returns:
        The set, opened; None while shards are missing that other workers make.
    """
    harvest_config = config.replaced(settings or HarvestConfig(), changes, "harvest")
    spec = make_set(harvest_config, os.fspath(out), shard)
    return open_activations(out) if shard == (0, 1) or len(committed_shards(Files(out))) == spec.n_shards else None


def train(
    data: Any,
    *,
    out: StrPath | None = None,
    variant: str = "topk",
    site: str | tuple[str, ...] = (),
    reconstruct: str | tuple[str, ...] = (),
    sae_config: SaeConfig | None = None,
    train_config: TrainConfig | None = None,
    mesh: MeshConfig | None = None,
    engine: EngineConfig | None = None,
    allow_partial: bool = False,
    cache_gib: float = 0.0,
    init_from: StrPath | None = None,
    **changes: Any,
) -> Dictionary:
    """Train a sparse autoencoder: `train(rows, n_latents=4096, k=32, steps=1000, batch_size=2048)`.

    Args:
        data: rows [..., d_model] (numpy, JAX or torch) or {source: rows}; the path of an activation set, or the set;
            or any RowSource.
        out: directory of the run, or its URL, with checkpoints, logs and resume as of `sae-jax train`; None: nothing is
            written.
        variant: a file of sae_jax/saes/, if `sae_config` is not given.
        site: the source that is encoded, or several side by side; may be left out if there is one.
        reconstruct: the source that is reconstructed, if not what is encoded.
        sae_config: the variant's config.
        train_config: length, batch and optimiser of the run.
        mesh: how devices are arranged; by default the dictionary is split over all of them.
        engine: sizes of the pieces in which ops work.
        allow_partial: train although some shards of the set are not there yet.
        cache_gib: of a local disk, for chunks of a set at a URL, each of which is then read from there once.
        init_from: what `sae_jax.load` takes: the run begins with the weights of this dictionary, of the same variant
            and size, instead of random ones.
        **changes: fields of the variant's config and of `TrainConfig`, such as n_latents, k, steps, batch_size, lr.

    Raises:
        UsageError: an unknown or refused setting, a source that does not exist, or another run at `out`.
        UserError: the loss was not finite, or the set is damaged.
    """
    fixed = {"out": out, "variant": variant, "site": site, "reconstruct": reconstruct, "mesh": mesh, "engine": engine}
    fixed |= {"sae_config": sae_config, "train_config": train_config, "allow_partial": allow_partial}
    fixed |= {"cache_gib": cache_gib, "init_from": init_from}
    job, source = _new_job(TrainJob, data, {**fixed, **changes})
    return _dictionaries({"": job}, source)[""]


def train_members(data: Any, members: Mapping[str, Mapping[str, Any]], **settings: Any) -> dict[str, Dictionary]:
    """Train several SAEs from one pass over the data: `train_members(rows, {"k8": {"k": 8}, "k16": {"k": 16}}, ...)`.

    Args:
        data: as for `train`.
        members: {name: the settings that it changes}.
        **settings: as for `train`, for all members.

    Raises:
        As `train`. A member whose loss is not finite is dropped after its last good checkpoint, and UserError is raised
        once the others have ended.
    """
    job, source = _new_job(TrainJob, data, settings)
    return _dictionaries(expand_members(_with_members(job, members)), source)


def live(*, settings: HarvestConfig | None = None, live_config: LiveConfig | None = None, **changes: Any) -> RowSource:
    """Rows that a language model makes while `train` learns from them: `train(live(hooks="resid_post.1"), ...)`.

    They are those that `harvest` would store; see sae_jax/activations/live.py for their order.

    Args:
        settings: as for `harvest`.
        live_config: where rows are made and kept.
        **changes: fields of `HarvestConfig` and of `LiveConfig`, such as model, text, hooks, tokens, memory_gib.

    Raises:
        UsageError: a budget without room for two segments, or devices for the model alone where there are several
            processes; else as `harvest`.
    """
    names = {f.name for f in dataclasses.fields(LiveConfig)}
    of_live = {name: changes.pop(name) for name in names & changes.keys()}
    of_harvest = config.replaced(settings or HarvestConfig(), changes, "live")
    return of_model(of_harvest, config.replaced(live_config or LiveConfig(), of_live, "live"))


def run_train(job: TrainJob, source: RowSource | None = None) -> int:
    """The run of a job as a command parses it, with `members` if it lists some. Returns the step it stands at."""
    source = as_source(job.data, job.allow_partial, job.cache_gib) if source is None else source
    return run.run(expand_members(job), source, read=_read).step


def sweep(
    data: Any,
    *,
    out: StrPath,
    grid: Mapping[str, Any],
    members: Mapping[str, Mapping[str, Any]] | None = None,
    shard: tuple[int, int] = (0, 1),
    claim: bool = False,
    sweep: SweepConfig | None = None,
    **settings: Any,
) -> list[Any]:
    """Train every combination of a grid and measure each on the way. The same call resumes.

    Args:
        data: as for `train`.
        out: directory of the sweep.
        grid: {setting: values}, such as {"n_latents": [512, 1024], "k": [8, 16]}.
        members: {name: the settings that it changes}: the grid is trained for each.
        shard: (i, n): train the i-th of n shares.
        claim: take the passes that no other worker is at.
        sweep: when to measure, and until when to train.
        **settings: as for `train`; and fields of `SweepConfig`, such as compute, tokens, tolerance, max_tokens.

    Returns:
        The points, as `sae_jax.scaling.table.read(out)` gives them.

    Raises:
        UsageError: nothing can be trained, or another sweep is at `out`.
        PartialError: some members could not be trained; the others are done. UserError if there are no others.
    """
    of_sweep = {n: settings.pop(n) for n in {f.name for f in dataclasses.fields(SweepConfig)} & settings.keys()}
    job, source = _new_job(SweepJob, data, {"out": out, **settings})
    if isinstance(source, LiveRows):
        raise UsageError(f"{source.name}: a sweep reads the same rows in pass after pass; store them with harvest")
    plan = dataclasses.replace(config.replaced(sweep or SweepConfig(), of_sweep, "sweep"), grid=_dotted_grid(job, grid))
    job = dataclasses.replace(_with_members(job, members or {}), sweep=plan, shard="{}/{}".format(*shard), claim=claim)
    if problems := run_sweep(job, source):
        raise sweep_run.failure(os.fspath(out), problems)
    return table.read(storage.path(out))


def run_sweep(job: SweepJob, source: RowSource | None = None) -> list[str]:
    """The sweep of a job as a command parses it; a line for each thing that is wrong."""
    if job.init_from is not None:
        raise UsageError(f"--init-from={job.init_from}: the runs of a sweep begin with random weights; use train")
    source = as_source(job.data, job.allow_partial, job.cache_gib) if source is None else source
    planned, refused = sweep_plan.plan(job, source)
    return [*(f"left out: {line}" for line in refused), *sweep_run.sweep(job, planned, source)]


def as_source(data: Any, allow_partial: bool = False, cache_gib: float = 0.0) -> RowSource:
    """Rows to learn from: a RowSource, a set or its path, or arrays."""
    if isinstance(data, RowSource):
        return data
    if isinstance(data, str | os.PathLike):
        if os.fspath(data) == LIVE and not os.path.exists(LIVE):
            raise UsageError("live data are for `sae-jax train` with a recipe, and in Python sae_jax.live(...)")
        data = open_activations(data, allow_partial, cache_gib)
    return StoredRows(data) if isinstance(data, ActivationSet) else ArrayRows(data)


def _read(init_from: str) -> tuple[Any, Any]:
    """The dictionary that a run begins with."""
    dictionary = publish.load(init_from)
    return dictionary.sae, dictionary.record


def _new_job(cls: Any, data: Any, settings: Mapping[str, Any]) -> tuple[Any, RowSource]:
    """A job from keywords, those of `train`, and its rows."""
    settings = {name: value for name, value in settings.items() if value is not None}
    source = as_source(data, settings.pop("allow_partial", False), settings.pop("cache_gib", 0.0))
    sites = {name: settings.pop(name, ()) for name in ("site", "reconstruct")}
    init_from = settings.pop("init_from", None)
    job = cls(
        data=source.name,
        out=os.fspath(settings.pop("out", "")),
        init_from=None if init_from is None else os.fspath(init_from),
        sae=settings.pop("sae_config", None) or base.config_class(settings.pop("variant", "topk"))(),
        train=settings.pop("train_config", TrainConfig()),
        mesh=settings.pop("mesh", MeshConfig()),
        engine=settings.pop("engine", EngineConfig()),
        **{name: (value,) if isinstance(value, str) else tuple(value) for name, value in sites.items()},
    )
    settings.pop("variant", None)
    return change("train", job, _dotted(job, settings)), source


def _dictionaries(jobs: dict[str, TrainJob], source: RowSource) -> dict[str, Dictionary]:
    """Train, and what came of it."""
    trained = run.run(jobs, source, read=_read)
    out = next(iter(jobs.values())).out
    if out:
        return {name: artifact.load(storage.path(out) / "members" / name if name else out) for name in jobs}
    if missing := jobs.keys() - trained.states.keys():
        what = f" ({', '.join(sorted(missing))})" if "" not in missing else ""
        raise UserError(f"stopped by SIGTERM at step {trained.step}{what}, and nothing is kept without out=; give out=")
    states = trained.states
    # As they were trained: settings that the run settled are those of its state.
    jobs = {name: dataclasses.replace(job, sae=states[name].sae.config) for name, job in jobs.items()}
    return {name: artifact.from_state(states[name], run.record_of(job, source)) for name, job in jobs.items()}


def _with_members(job: Any, members: Mapping[str, Mapping[str, Any]]) -> Any:
    changed = []
    for name, settings in members.items():
        settings = dict(settings)
        variant = settings.pop("variant", None)
        switched = job if variant is None else dataclasses.replace(job, sae=base.config_class(variant)())
        dotted = _dotted(switched, settings)
        changed.append((name, dotted if variant is None else {"sae.variant": variant, **dotted}))
    return dataclasses.replace(job, members=tuple(changed))


def _dotted(job: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """{dotted key: value} of settings by their plain names: fields of the variant's config or of TrainConfig.

    Raises UsageError for a name that neither has, with the nearest one that exists.
    """
    sections = {"sae": [f.name for f in dataclasses.fields(job.sae)], "train": TRAIN_FIELDS}
    keys = {name: f"{section}.{name}" for section, names in sections.items() for name in names}
    for name in settings:
        if name not in keys:
            raise UsageError(f"{job.sae.variant} has no setting {name!r}; {config.nearest(name, keys)}")
    return {keys[name]: value for name, value in settings.items()}


def _dotted_grid(job: Any, grid: Mapping[str, Any]) -> Any:
    """A grid's settings under their dotted names; those of the whole pass, such as site, keep theirs."""
    of_job = {f.name for f in dataclasses.fields(job)}
    dotted: dict[str, Any] = {}
    for name, values in grid.items():
        if name == "variant":
            dotted["sae.variant"] = values
        elif "." in name or name in of_job:
            dotted[name] = values
        else:
            dotted |= {key: values for key in _dotted(job, {name: None})}
    return dotted


def fit(
    folder: StrPath,
    variant: str | None = None,
    site: str | None = None,
    k: int | None = None,
    tokens_per_latent: float | None = None,
    leave_out: int | None = None,
) -> tuple[laws.Study, list[AnyPath]]:
    """Fit every scaling law that the points of a sweep can identify; writes fit.json, fit.txt and figures beside them.

    Args:
        folder: of the sweep.
        variant: whose points are fitted; None: the one with most points.
        site: likewise the source that is encoded.
        k: at which the laws of compute and latents are fitted; None: the k with most points.
        tokens_per_latent: compare widths after so many tokens a latent; None: at convergence, or else after the most
            tokens that all have.
        leave_out: how many of the smallest budgets and widths do not count for the laws of compute and latents; None:
            those that are off the law which the larger ones follow, by a test.

    Returns:
        The laws, and the files that were written.
    """
    folder = storage.path(folder)
    with storage.Lease(folder / "fit.owner", f"the fit of {folder}") as lease:
        study = laws.study(table.read(folder), variant, site, k, tokens_per_latent, leave_out)
        lease.check()
        return study, _write_fit(folder, study)


def _write_fit(folder: AnyPath, study: laws.Study) -> list[AnyPath]:
    path, content = folder / "fit.json", storage.sealed({**study.to_json(), "draws": study.draws()})
    # The draws on a line of their own: nobody reads them, and a line for each number would bury the rest.
    draws = storage.json_text(content.pop("draws"), path, indent=None).rstrip()
    text = storage.json_text(content, path).rstrip().removesuffix("\n}")
    storage.write_text(path, f'{text},\n  "draws": {draws}\n}}\n')
    storage.write_text(folder / "fit.txt", report.render(study))
    return [folder / "fit.json", folder / "fit.txt", *plots.draw(study, folder)]


def advise(
    compute: float, fit: StrPath, k: int | None = None, target: str | None = None, mfu: float = 0.3
) -> tuple[Advice, float | None]:
    """What to train for a budget of `compute` FLOP by the laws in a fit.json; and the seconds it takes on `target`.

    Args:
        compute: FLOP to spend.
        fit: the file that `fit` wrote.
        k: active latents; None: that of the fit.
        target: machines such as h200:8; None: no time is told.
        mfu: share of the matrix rate that the run is taken to reach.
    """
    machines = targets.parse(target) if target else None
    advice = advise_by(compute, os.fspath(fit), k)
    if machines is None:
        return advice, None
    if advice.d_model is None:
        raise UsageError(f"target={target}: {os.fspath(fit)} has no d_model, as its table had none; leave it out")
    work = advice.tokens * flops.executed(advice.sae, Widths.one(advice.d_model))
    return advice, work / (machines.chip.flops * machines.n_devices * mfu)


def plan(target: str, **settings: Any) -> dict[str, Any]:
    """Whether a training run fits on machines that are not there, and how long it takes (planning/report.py).

    Without members it is the harvest that is planned (planning/harvest_report.py).

    Args:
        target: machines: v5p:8x8x8, h200:64 and the like.
        **settings: of `planning.from_recipe`: members {name: (sae, train)}, harvest, site, d_model, mesh, engine, mfu;
            or of `planning.HarvestJob`: harvest, mfu.
    """
    if "members" not in settings:
        return planning.plan_harvest(planning.HarvestJob(target, **settings))
    return planning.plan(planning.from_recipe(target, **settings))
