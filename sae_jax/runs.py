"""What commands and notebooks call: from harvest to advise.

Each takes a job (the dataclass that the command of the same name parses) or keywords. They raise UserError and
UsageError, never exit, and leave logging, signal handlers, the environment and JAX's global state as they found them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sae_jax import artifact, config, lm, planning, storage
from sae_jax.activations import text as texts
from sae_jax.activations.commits import committed_shards
from sae_jax.activations.harvest import harvest as make_set
from sae_jax.activations.live import LiveConfig, LiveRows, of_model
from sae_jax.activations.memory import ArrayRows
from sae_jax.activations.settings import HarvestConfig
from sae_jax.activations.source import RowSource
from sae_jax.activations.store import ActivationSet, open_activations
from sae_jax.activations.stored import StoredRows
from sae_jax.analysis.collect import collect_set
from sae_jax.analysis.examples import Activations
from sae_jax.artifact import Dictionary
from sae_jax.autointerp import explain as autointerp
from sae_jax.autointerp.judge import JudgeConfig
from sae_jax.evaluation import baselines as evaluation_baselines
from sae_jax.evaluation import effective_compute, effects, prompts, steering, suites
from sae_jax.evaluation import evaluate as evaluation
from sae_jax.evaluation.batches import Candidate
from sae_jax.evaluation.prompts import Separation
from sae_jax.evaluation.text import open_set
from sae_jax.mesh import MeshConfig
from sae_jax.ops.tuning import EngineConfig
from sae_jax.pages.site import write_site
from sae_jax.planning import targets
from sae_jax.progress import console
from sae_jax.saes import base
from sae_jax.saes.base import SaeConfig
from sae_jax.scaling import flops, laws, plots, report, table
from sae_jax.scaling import quality as trends
from sae_jax.scaling.advise import Advice
from sae_jax.scaling.advise import advise as advise_by
from sae_jax.storage import Files, StrPath
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
    **changes: Any,
) -> Dictionary:
    """Train a sparse autoencoder: `train(rows, n_latents=4096, k=32, steps=1000, batch_size=2048)`.

    Args:
        data: rows [..., d_model] (numpy, JAX or torch) or {source: rows}; the path of an activation set, or the set;
            or any RowSource.
        out: directory of the run, with checkpoints, logs and resume as of `sae-jax train`; None: nothing is written.
        variant: a file of sae_jax/saes/, if `sae_config` is not given.
        site: the source that is encoded, or several side by side; may be left out if there is one.
        reconstruct: the source that is reconstructed, if not what is encoded.
        sae_config: the variant's config.
        train_config: length, batch and optimiser of the run.
        mesh: how devices are arranged; by default the dictionary is split over all of them.
        engine: sizes of the pieces in which ops work.
        allow_partial: train although some shards of the set are not there yet.
        cache_gib: of a local disk, for chunks of a set at a URL, each of which is then read from there once.
        **changes: fields of the variant's config and of `TrainConfig`, such as n_latents, k, steps, batch_size, lr.

    Raises:
        UsageError: an unknown or refused setting, a source that does not exist, or another run at `out`.
        UserError: the loss was not finite, or the set is damaged.
    """
    fixed = {"out": out, "variant": variant, "site": site, "reconstruct": reconstruct, "mesh": mesh, "engine": engine}
    fixed |= {"sae_config": sae_config, "train_config": train_config, "allow_partial": allow_partial}
    fixed |= {"cache_gib": cache_gib}
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
    return run.run(
        expand_members(job), as_source(job.data, job.allow_partial, job.cache_gib) if source is None else source
    ).step


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
    return table.read(Path(out))


def run_sweep(job: SweepJob, source: RowSource | None = None) -> list[str]:
    """The sweep of a job as a command parses it; a line for each thing that is wrong."""
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


def _new_job(cls: Any, data: Any, settings: Mapping[str, Any]) -> tuple[Any, RowSource]:
    """A job from keywords, those of `train`, and its rows."""
    settings = {name: value for name, value in settings.items() if value is not None}
    source = as_source(data, settings.pop("allow_partial", False), settings.pop("cache_gib", 0.0))
    sites = {name: settings.pop(name, ()) for name in ("site", "reconstruct")}
    job = cls(
        data=source.name,
        out=os.fspath(settings.pop("out", "")),
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
    trained = run.run(jobs, source)
    out = next(iter(jobs.values())).out
    if out:
        return {name: artifact.load(Path(out) / "members" / name if name else out) for name in jobs}
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


def evaluate(
    *dictionaries: Dictionary | StrPath,
    data: StrPath | None = None,
    model: str | None = None,
    heldout: str | None = None,
    tokens: int = 100_000,
    batch_tokens: int = 4096,
    ema: bool = False,
    shard: tuple[int, int] = (0, 1),
    split: int = 1,
    suite: Sequence[suites.Suite] = ("core",),
    baselines: Sequence[str] = (),
    loss_curve: StrPath | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """{folder, or number: all metrics} of dictionaries, in one pass over the rows that they share.

    Args:
        dictionaries: as `sae_jax.load` gives them, or their folders, where evaluation.json is written; the folder of a
            sweep stands for its members.
        data: another activation set to take rows, text and language model from.
        model: another reference for the language model, if it moved.
        heldout: another reference for the held-out text, if it moved or the set names none.
        tokens: tokens (or rows) to measure on, at most.
        batch_tokens: tokens of one forward pass.
        ema: of runs, the averaged weights instead of the live ones.
        shard: (i, n): measure the i-th of n shares of folders; those that are not complete yet are left out.
        split: devices of this process that the language model is split over.
        suite: what to measure beside the core: openai, probing, causal or all (evaluation/suites.py).
        baselines: identity, pca, ica, random, neurons or all, measured as dictionaries of the first one's site and L0,
            and returned under these names. Their records lie in the first folder's evaluation/.
        loss_curve: csv file with the columns compute and loss, of the language model's training, from which the
            effective compute is told (evaluation/effective_compute.py).
        seed: of the samples that studies take.
    """
    curve = None if loss_curve is None else effective_compute.read_curve(loss_curve)
    kinds, beside = suites.chosen(suite), evaluation_baselines.choose(baselines)
    dictionaries = tuple(one for given in dictionaries for one in _members_of_sweep(given))
    names = [str(i) if isinstance(d, Dictionary) else os.fspath(d) for i, d in enumerate(dictionaries)]
    if same := set(names) & set(beside):
        raise UsageError(f"{sorted(same)[0]} is a dictionary and a baseline; name the folder ./{sorted(same)[0]}")
    given = dict(zip(names, dictionaries, strict=True))
    loaded = {name: d if isinstance(d, Dictionary) else artifact.load(d, ema) for name, d in given.items()}
    path = None if data is None else os.fspath(data)
    candidates = {name: Candidate.of(d, open_set(d.record, path)) for name, d in loaded.items()}
    model, heldout = model and lm.resolve(model), heldout and texts.resolve(heldout)
    settings = evaluation.Settings(tokens, batch_tokens, model, heldout, split)
    measured = evaluation.evaluate(candidates, settings, shard, beside)
    folders = {name: None if isinstance(d, Dictionary) else Path(name) for name, d in given.items()}
    if folders and (first := next(iter(folders.values()))) is not None:
        folders |= {name: first / suites.FOLDER / name for name in beside}
    measured, missing = suites.run(measured, folders, kinds, shard, seed)
    if {"probing", "all"} & set(suite):
        measured = suites.compared(measured)
    measured = {name: dataclasses.replace(one, curve=curve) for name, one in measured.items()}
    documents: dict[str, Any] = {}
    for name, one in measured.items():
        if (folder := folders.get(name)) is None:
            documents[name] = one.to_json()
        elif (document := evaluation.finish(folder, one, settings, shard, missing[name])) is not None:
            documents[name] = document
    return documents


def collect(
    dictionary: Dictionary | StrPath,
    out: StrPath,
    *,
    data: str | None = None,
    tokens: int = 400_000,
    ema: bool = False,
    shard: tuple[int, int] = (0, 1),
) -> Activations | None:
    """Keep at `out` where in a sample of text each latent is active, and how strongly; returns it.

    What is there already is not made again, so a call that was interrupted is repeated.

    Args:
        dictionary: as `sae_jax.load` gives it, or its folder.
        out: folder of the store; `sae_jax.analysis.store.Store(out).open()` reads it later.
        data: the activation set, if not that of its training.
        tokens: tokens of the set's text, spread over its shards.
        ema: of a run, the averaged weights.
        shard: (i, n): make the i-th of n shares. None is returned while those of others are missing.
    """
    d = _load(dictionary, ema)
    return collect_set(d.sae, open_set(d.record, data), d.record.sites.x, tokens, out, shard)


def explain(
    store: StrPath,
    endpoint: str,
    model: str,
    *,
    latents: Sequence[int] = (),
    n: int | None = None,
    score: autointerp.Score | None = None,
    batch: int = 5,
    seed: int = 0,
    tokenizer: str | None = None,
    **settings: Any,
) -> autointerp.Explained:
    """Have a language model say what latents stand for, and how well that predicts them; labels land in the store.

    A call that was interrupted, or failed for some latents, is repeated: what was answered is not asked for again.

    Args:
        store: folder that `collect` made.
        endpoint: URL of an OpenAI-compatible endpoint, such as http://localhost:8000/v1.
        model: what the endpoint calls the judge.
        latents: which are explained; or
        n: so many at random, of those that fire in texts enough.
        score: "simulation" or "detection" (autointerp/explain.py); None: explanations alone.
        batch: texts in one request of a score.
        seed: of what is drawn.
        tokenizer: another reference for the tokenizer of the store's text, if it moved.
        **settings: fields of `JudgeConfig`, such as key_env, timeout, tries, per_minute, concurrency, price.

    Returns:
        The labels; why there is none, by latent; and what was asked.

    Raises:
        JudgeError, a UserError: nothing answers there, the key is refused, or the endpoint has no such model.
    """
    judge = config.replaced(JudgeConfig(endpoint, model), settings, "explain")
    return autointerp.explain(Path(store), judge, latents, n, score, batch, seed, tokenizer and lm.resolve(tokenizer))


def active(
    dictionary: Dictionary | StrPath,
    text: str,
    n: int = 10,
    *,
    data: str | None = None,
    model: str | None = None,
    ema: bool = False,
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The strongest latents at each token of a text.

    Args:
        dictionary: as `sae_jax.load` gives it, or its folder.
        text: of a token or more.
        n: latents at each token.
        data: the activation set, if it moved.
        model: another reference for the language model, if it moved.
        ema: of a run, the averaged weights.

    Returns:
        The T tokens, i32[T, n] latents and f32[T, n] values, 0 for none.
    """
    return prompts.active(_subject(dictionary, data, model, ema)[0], text, n)


def find(
    dictionary: Dictionary | StrPath,
    positive: Sequence[str],
    negative: Sequence[str],
    n: int = 10,
    *,
    data: str | None = None,
    model: str | None = None,
    ema: bool = False,
) -> list[Separation]:
    """The n latents that best tell positive texts from negative ones, judged on texts that they were not chosen by.

    Arguments as `active`; the texts should be alike in all but what is looked for (evaluation/prompts.py).
    """
    return prompts.separating(_subject(dictionary, data, model, ema)[0], positive, negative, n)


def steer(
    dictionary: Dictionary | StrPath,
    prompt: str,
    latents: Sequence[int],
    scales: Sequence[float] = (5.0,),
    *,
    how: steering.How = "clamp",
    tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    data: str | None = None,
    model: str | None = None,
    ema: bool = False,
) -> tuple[list[float], list[steering.Steered]]:
    """What the language model writes after a prompt, as it is and with latents set to multiples of their largest value.

    Args:
        dictionary: as `sae_jax.load` gives it, or its folder.
        prompt: what is continued.
        latents: which are set.
        scales: multiples of the largest value of each on rows of the set; 0 ablates with `how="clamp"`.
        how: "clamp" sets their values, "add" adds as much to whatever they are (evaluation/steering.py).
        tokens: that are written.
        temperature: 0 takes the likeliest token each time.
        seed: of the random numbers.
        chat: the prompt is a message of a user to an instruct model, which answers.
        data: the activation set, if it moved.
        model: another reference for the language model, if it moved.
        ema: of a run, the averaged weights.

    Returns:
        The largest value of each latent, and the texts: unsteered first, then one a scale.
    """
    d = _load(dictionary, ema)
    subject, activations = _subject(d, data, model, ema)
    ids_T = subject.chat_ids(prompt) if chat else subject.ids(prompt)
    steering.check(subject, latents, how)
    largest_L = steering.largest_values(subject.sae, activations, d.record.sites.x, latents)
    if silent := [latent for latent, value in zip(latents, largest_L, strict=True) if not value]:
        raise UserError(f"latent {silent[0]} fires on none of the rows that were looked at; choose another")
    written = steering.steer(subject, ids_T, latents, largest_L, scales, how, tokens, temperature, seed)
    return largest_L.tolist(), written


def attribute(
    dictionary: Dictionary | StrPath,
    prompt: str,
    tokens: Sequence[str] = (),
    n: int = 10,
    *,
    data: str | None = None,
    model: str | None = None,
    ema: bool = False,
) -> list[effects.Attribution]:
    """The latents that made the language model say a token after a prompt (evaluation/effects.py).

    Args:
        dictionary: as `sae_jax.load` gives it, or its folder.
        prompt: after which it is said.
        tokens: texts of one token each, with the leading space if there is one; none: the likeliest token.
        n: latents to name, the strongest for or against.
        data: the activation set, if it moved.
        model: another reference for the language model, if it moved.
        ema: of a run, the averaged weights.

    Returns:
        One for each token.
    """
    subject = _subject(dictionary, data, model, ema)[0]
    ids = [effects.token_id(subject, token) for token in tokens]
    return effects.attribute(subject, subject.ids(prompt), ids, n)


def _load(dictionary: Dictionary | StrPath, ema: bool) -> Dictionary:
    return dictionary if isinstance(dictionary, Dictionary) else artifact.load(dictionary, ema)


def _subject(
    dictionary: Dictionary | StrPath, data: str | None, model: str | None, ema: bool
) -> tuple[prompts.Subject, ActivationSet]:
    """A dictionary in its language model, and its set."""
    d = _load(dictionary, ema)
    activations = open_set(d.record, data)
    return prompts.subject(d.sae, d.record, activations, model and lm.resolve(model)), activations


def dashboard(
    dictionary: Dictionary | StrPath,
    out: StrPath,
    *,
    data: str | None = None,
    model: str | None = None,
    tokens: int = 400_000,
    ema: bool = False,
    split: int = 1,
    store: StrPath | None = None,
) -> Path:
    """Write a static site of a dictionary's latents; returns the page to open.

    Args:
        dictionary: as `sae_jax.load` gives it, or its folder.
        out: directory of the site.
        data: the activation set, if it moved.
        model: another reference for the language model, if it moved.
        tokens: tokens of the set's text to show examples from.
        ema: of a run, the averaged weights instead of the live ones.
        split: devices of this process that the language model is split over.
        store: where `collect` keeps the activations of the sample; those that are there are not made again.
    """
    is_path = not isinstance(dictionary, Dictionary)
    d = artifact.load(dictionary, ema) if is_path else dictionary
    model = model and lm.resolve(model)
    title = Path(dictionary).resolve().name if is_path else d.record.variant
    write_site(d, out, title, data, model, tokens, split, store)
    return Path(out) / "index.html"


def fit(
    folder: StrPath,
    variant: str | None = None,
    site: str | None = None,
    k: int | None = None,
    tokens_per_latent: float | None = None,
    leave_out: int | None = None,
) -> tuple[laws.Study, list[Path]]:
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
    folder = Path(folder)
    with storage.Lease(folder / "fit.owner", f"the fit of {folder}") as lease:
        study = laws.study(table.read(folder), variant, site, k, tokens_per_latent, leave_out)
        lease.check()
        return study, _write_fit(folder, study)


def quality(folder: StrPath, metrics: Sequence[str]) -> tuple[list[trends.Trend], list[Path]]:
    """How metrics that `evaluate` measured of a sweep's members go with latents, k and compute (scaling/quality.py).

    Args:
        folder: of the sweep.
        metrics: as evaluation.json names them.

    Returns:
        A trend for each, and the files that were written: quality.json, quality.png.
    """
    folder = Path(folder)
    measured, missing = trends.read(folder, sweep_run.member_folders(folder))
    if missing:
        console.print(f"{len(missing)} members are not measured and do not count: {', '.join(missing[:4])} ...")
    found = trends.trends(measured, metrics)
    content = {trend.metric: dataclasses.asdict(trend) for trend in found}
    storage.write_json(folder / "quality.json", storage.sealed(content))
    trends.draw(measured, found, folder / "quality.png")
    return found, [folder / "quality.json", folder / "quality.png"]


def _members_of_sweep(given: Dictionary | StrPath) -> list[Dictionary | StrPath]:
    """The members of a sweep that are trained, if its folder is given."""
    if isinstance(given, Dictionary) or not (Path(given) / "sweep.json").is_file():
        return [given]
    folders = sweep_run.member_folders(Path(given))
    if not folders:
        raise UserError(f"{os.fspath(given)}: no member of this sweep has a checkpoint yet; let sae-jax sweep go on")
    return [str(folder) for folder in folders.values()]


def _write_fit(folder: Path, study: laws.Study) -> list[Path]:
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
