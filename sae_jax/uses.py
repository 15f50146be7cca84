"""What commands and notebooks do with trained dictionaries: measure, search, explain, steer and show them.

Each takes dictionaries as `sae_jax.load` gives them, or their folders. They raise UserError and UsageError, never exit,
and leave logging, signal handlers, the environment and JAX's global state as they found them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sae_jax import artifact, config, lm, storage
from sae_jax.activations import text as texts
from sae_jax.activations.store import ActivationSet
from sae_jax.analysis.collect import collect_set
from sae_jax.analysis.examples import Activations
from sae_jax.artifact import Dictionary
from sae_jax.autointerp import explain as autointerp
from sae_jax.autointerp.judge import JudgeConfig
from sae_jax.evaluation import baselines as evaluation_baselines
from sae_jax.evaluation import effective_compute, effects, prompts, steering, suites, tree
from sae_jax.evaluation import evaluate as evaluation
from sae_jax.evaluation import tasks as labelled
from sae_jax.evaluation.batches import Candidate
from sae_jax.evaluation.prompts import Separation
from sae_jax.evaluation.text import open_set
from sae_jax.interchange import hub, publish
from sae_jax.pages.reports import write as reports
from sae_jax.pages.site import write_site
from sae_jax.progress import console
from sae_jax.scaling import quality as trends
from sae_jax.storage import AnyPath, StrPath
from sae_jax.sweeps import run as sweep_run
from sae_jax.types import UsageError, UserError


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
    studies: Sequence[suites.Study] = (),
    baselines: Sequence[str] = (),
    tasks: str | None = None,
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
        studies: at sizes of your own, such as `sae_jax.evaluation.studies.n2g.Study(n_latents=20)`; each takes the
            place of its kind in the suites, or is made besides.
        baselines: identity, pca, ica, random, neurons or all, measured as dictionaries of the first one's site and L0,
            and returned under these names. Their records lie in the first folder's evaluation/.
        tasks: what probes are trained on: None, properties of the held-out text; sae-probes, the sets of that package;
            or a folder of csv files with the columns prompt and target (evaluation/tasks.py).
        loss_curve: csv file with the columns compute and loss, of the language model's training, from which the
            effective compute is told (evaluation/effective_compute.py).
        seed: of the samples that studies take.
    """
    curve = None if loss_curve is None else effective_compute.read_curve(loss_curve)
    kinds, beside = suites.chosen(suite, studies), evaluation_baselines.choose(baselines)
    labelled.digest(tasks or "")  # refuses what is not there before anything runs
    if published := [given for given in dictionaries if hub.is_remote(given)]:
        raise UsageError(
            f"{published[0]}: what is measured is written beside a dictionary; import it to a folder of yours first, "
            f"with sae-jax import"
        )
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
    folders = {name: None if isinstance(d, Dictionary) else storage.path(name) for name, d in given.items()}
    if folders and (first := next(iter(folders.values()))) is not None:
        folders |= {name: first / suites.FOLDER / name for name in beside}
    measured, missing = suites.run(measured, folders, kinds, shard, seed, tasks)
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
    return autointerp.explain(store, judge, latents, n, score, batch, seed, tokenizer and lm.resolve(tokenizer))


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
        scales: multiples of the largest value of each on rows of the set; 0 ablates with `how="clamp"`. With
            `how="norm"` multiples of the norm of what is edited.
        how: "clamp" sets their values, "add" adds as much to whatever they are, "norm" adds an edit of so many times
            the row's norm along their decoder rows (evaluation/steering.py).
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


def causal_tree(
    dictionaries: Mapping[str, Dictionary | StrPath],
    prompt: str,
    name: str,
    latent: int,
    n: int = 5,
    *,
    model: str | None = None,
    ema: bool = False,
) -> tree.Tree:
    """Latents at other places that made a latent fire in a prompt, and those that it made fire (evaluation/tree.py).

    Args:
        dictionaries: by name, each as `sae_jax.load` gives it, or its folder; at different hooks of one model.
        prompt: in which it is active.
        name: whose latent it is.
        latent: which.
        n: latents to name of each other dictionary.
        model: another reference for the language model, if it moved.
        ema: of runs, the averaged weights.
    """
    subjects: dict[str, prompts.Subject] = {}
    for each, dictionary in dictionaries.items():
        d, another = _load(dictionary, ema), next(iter(subjects.values()), None)
        place = model and lm.resolve(model)
        subjects[each] = prompts.subject(d.sae, d.record, open_set(d.record), place, another=another)
    if name not in subjects:
        raise UsageError(f"dictionary {name!r} is none of {', '.join(subjects)}")
    return tree.causal_tree(subjects, subjects[name].ids(prompt), name, latent, n)


def _load(dictionary: Dictionary | StrPath, ema: bool) -> Dictionary:
    return dictionary if isinstance(dictionary, Dictionary) else publish.load(dictionary, ema)


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
    beside: Dictionary | StrPath | None = None,
    format: str = "site",
    labels: StrPath | None = None,
    latents: Sequence[int] | None = None,
    patterns: int = 64,
    single_file: bool = False,
) -> AnyPath:
    """Write a static site of a dictionary's latents; returns the page to open, or the folder of another format.

    Args:
        dictionary: as `sae_jax.load` gives it, or its folder.
        out: directory of the site.
        data: the activation set, if it moved.
        model: another reference for the language model, if it moved.
        tokens: tokens of the set's text to show examples from.
        ema: of a run, the averaged weights instead of the live ones.
        split: devices of this process that the language model is split over.
        store: where `collect` keeps the activations of the sample; those that are there are not made again.
        beside: another dictionary to compare with: which of its latents are like each, in decoder and in firing.
        format: site, or what other programs read: neuronpedia, saedashboard or circuit-tracer (pages/exports).
        labels: a .csv or .jsonl file with latent and label in each line; it wins over the labels of the store.
        latents: those that get a page; None: all.
        patterns: so many latents, of those that write most, get N2G patterns; each takes some hundred short texts
            through the language model.
        single_file: write one page that holds all, `out` being its name; for some latents alone.
    """
    shown, model = _titled(dictionary, ema), model and lm.resolve(model)
    other = None if beside is None else _titled(beside, ema)
    more = {"labels": labels, "latents": latents, "n_patterns": patterns, "single_file": single_file, "format": format}
    write_site(*shown, out, data, model, tokens, split, store, other, **more)
    return storage.path(out) if single_file or format != "site" else storage.path(out) / "index.html"


def explore(
    dictionary: Dictionary | StrPath,
    *,
    site: StrPath | None = None,
    port: int = 0,
    data: str | None = None,
    model: str | None = None,
    tokens: int = 400_000,
    ema: bool = False,
    split: int = 1,
    store: StrPath | None = None,
) -> None:
    """Serve a dictionary's dashboard on this machine, with the views that need its language model, until Ctrl-C.

    Args:
        dictionary: as `sae_jax.load` gives it, or its folder.
        site: a dashboard of it, which is written if it is not there; None: one in a temporary folder.
        port: to listen on; 0: any that is free.
        data: the activation set, if it moved.
        model: another reference for the language model, if it moved.
        tokens: as `dashboard`, of a site that is written.
        ema: of a run, the averaged weights instead of the live ones.
        split: devices of this process that the language model is split over.
        store: as `dashboard`, of a site that is written.
    """
    from sae_jax.pages import explore as server  # a web server, which nothing else needs

    options: dict[str, Any] = {"site": site, "port": port, "data": data, "model": model and lm.resolve(model)}
    server.explore(*_titled(dictionary, ema), **options, n_tokens=tokens, split=split, store=store)


def _titled(dictionary: Dictionary | StrPath, ema: bool) -> tuple[Dictionary, str]:
    """A dictionary, and what pages are headed with."""
    d = _load(dictionary, ema)
    return d, d.record.variant if isinstance(dictionary, Dictionary) else storage.path(dictionary).resolve().name


def report(*paths: StrPath, out: StrPath | None = None) -> AnyPath:
    """Write a page about a run, a sweep or dictionaries: curves, laws, tables and figures in one file; returns it.

    Args:
        paths: folder of a run, of a sweep or of a saved dictionary; several runs or dictionaries are compared.
        out: the file; None: report.html in the folder, if it is one.
    """
    folders = [*dict.fromkeys(storage.path(path) for path in paths)]
    if not folders:
        raise UsageError("report() was given nothing; name a run, a sweep or a saved dictionary")
    if len(folders) > 1 and out is None:
        raise UsageError(f"{len(folders)} folders are compared in one page; say where it goes, with out")
    file = folders[0] / "report.html" if out is None else storage.path(out)
    members = {folder: sweep_run.member_folders(folder) for folder in folders if reports.is_sweep(folder)}
    reports.write_report(folders, members, file)
    return file


def quality(folder: StrPath, metrics: Sequence[str]) -> tuple[list[trends.Trend], list[AnyPath]]:
    """How metrics that `evaluate` measured of a sweep's members go with latents, k and compute (scaling/quality.py).

    Args:
        folder: of the sweep.
        metrics: as evaluation.json names them.

    Returns:
        A trend for each, and the files that were written: quality.json, quality.png.
    """
    folder = storage.path(folder)
    measured, missing = trends.read(folder, sweep_run.member_folders(folder))
    if missing:
        names = ", ".join(missing[:4]) + (" and others" if len(missing) > 4 else "")
        console.print(f"{len(missing)} members are not measured and do not count: {names}")
    found = trends.trends(measured, metrics)
    content = {trend.metric: dataclasses.asdict(trend) for trend in found}
    storage.write_json(folder / "quality.json", storage.sealed(content))
    trends.draw(measured, found, folder / "quality.png")
    return found, [folder / "quality.json", folder / "quality.png"]


def _members_of_sweep(given: Dictionary | StrPath) -> list[Dictionary | StrPath]:
    """The members of a sweep that are trained, if its folder is given."""
    if isinstance(given, Dictionary) or not (storage.path(given) / "sweep.json").is_file():
        return [given]
    folders = sweep_run.member_folders(storage.path(given))
    if not folders:
        raise UserError(f"{os.fspath(given)}: no member of this sweep has a checkpoint yet; let sae-jax sweep go on")
    return [str(folder) for folder in folders.values()]
