"""Suites: the studies of dictionaries that belong together, each kept beside its dictionary as soon as it is done.

    core       no study: what one pass over the rows says (evaluate.py). It is always measured, as a frame for the rest
    openai     what Gao et al. 2024 (arXiv 2406.04093, section 4) judge by
    probing    whether single latents stand for labels that people gave
    causal     what latents do to the model

    DIR/evaluation/NAME.json    what one study found, and all that this depends on

A study whose record is there, of the same dictionary, text, model and sizes, is not made again: a run that was stopped
goes on where it was, and workers divide the studies between them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any, Literal, get_args

import jax
import msgspec
import numpy as np

from sae_jax import storage
from sae_jax.artifact import digest_of
from sae_jax.evaluation import dictionaries
from sae_jax.evaluation import tasks as labelled
from sae_jax.evaluation.base import Metric
from sae_jax.evaluation.evaluate import Measured, finite
from sae_jax.evaluation.study import Case, Study, studies
from sae_jax.progress import console
from sae_jax.storage import AnyPath, digests
from sae_jax.types import UsageError

Suite = Literal["core", "openai", "probing", "causal", "all"]
FOLDER = "evaluation"


class Found(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The record of a study."""

    about: dict[str, Any]
    metrics: dict[str, Any] = {}
    intervals: dict[str, tuple[float, float] | dict[str, tuple[float, float]]] = {}
    left_out: str | None = None  # why the study says nothing of this dictionary


def chosen(suites: Sequence[str], given: Sequence[Study] = ()) -> list[type[Study] | Study]:
    """The studies of these suites, in the order in which they are shown, and those given at sizes of their own.

    One that is given takes the place of its kind. UsageError for a suite or a kind that there is not,
    or a kind given twice.
    """
    if unknown := set(suites) - set(get_args(Suite)):
        raise UsageError(f"suite {sorted(unknown)[0]!r} does not exist; choose {', '.join(get_args(Suite))}")
    sized = {type(study): study for study in given}
    if foreign := sized.keys() - set(studies().values()):
        raise UsageError(f"{foreign.pop().__module__} is no study of sae_jax.evaluation.studies; give one of those")
    if len(sized) < len(given):
        raise UsageError("studies has one kind twice; give each once")
    wanted = {kind for kind in studies().values() if kind.SUITE in suites or "all" in suites}
    return [sized.get(kind, kind) for kind in studies().values() if kind in wanted or kind in sized]


def compared(measured: Mapping[str, Measured]) -> dict[str, Measured]:
    """The same dictionaries, each with its similarity to every other one that reconstructs the same sources.

    Source: MMCS: Sharkey, Braun and Millidge 2022; over seeds it says how much of a dictionary training repeats.
    """
    found = dict(measured)
    for name, one in measured.items():
        others = {
            other: dictionaries.mmcs(one.subject.sae.w_dec, two.subject.sae.w_dec)[0]
            for other, two in measured.items()
            if other != name and two.subject.sources == one.subject.sources
        }
        if others:
            found[name] = replace(one, studied=(*one.studied, Metric("mmcs", others)))
    return found


def run(
    measured: Mapping[str, Measured],
    folders: Mapping[str, AnyPath | None],
    kinds: Sequence[type[Study] | Study],
    shard: tuple[int, int] = (0, 1),
    seed: int = 0,
    tasks: str | None = None,
) -> tuple[dict[str, Measured], dict[str, list[str]]]:
    """Study dictionaries.

    Args:
        measured: by name.
        folders: of each, where its records are kept; None: nowhere.
        kinds: of studies, or studies at sizes of their own.
        shard: (i, n): make every n-th study from the i-th on; the others may be on record.
        seed: of all samples.
        tasks: what probes of the kinds are trained on (tasks.py); None: properties of the held-out text.

    Returns:
        The same dictionaries with what was found, and {name: studies that other workers are to make}.

    Raises UsageError where rows come from no text, and in a job of several processes.
    """
    if kinds and jax.process_count() > 1:
        raise UsageError(
            f"studies run in one process, and this job has {jax.process_count()}; start workers of their own with "
            f"--shard i/n"
        )
    cases = {name: _case(name, one, seed) for name, one in measured.items()} if kinds else {}
    jobs = [(name, kind) for name in measured for kind in kinds]
    studied, missing = dict(measured), {name: [] for name in measured}
    for number, (name, kind) in enumerate(jobs):
        study, case = kind if isinstance(kind, Study) else _with_tasks(kind, tasks), cases[name]
        label = type(study).__module__.rpartition(".")[2]
        folder = folders[name]
        path = None if folder is None else folder / FOLDER / f"{label}.json"
        about = _about(case, label, study)
        found, is_mine = _read(path, about), number % shard[1] == shard[0]
        if is_mine and (found is None or found.left_out):  # what was refused may go now
            console.print(f"{name}: {label}, {number + 1} of {len(jobs)} studies")
            found = _study(study, case, about)
            if path is not None:
                storage.make_folder(path.parent)
                storage.write_json(path, storage.sealed(msgspec.to_builtins(found)))
        if found is None:
            missing[name].append(label)
            continue
        if found.left_out:
            console.print(f"{name}: {label} is left out: {found.left_out}")
        metrics = [Metric(key, value, found.intervals.get(key)) for key, value in found.metrics.items()]
        left_out = {**studied[name].left_out, **({label: found.left_out} if found.left_out else {})}
        studied[name] = replace(studied[name], studied=(*studied[name].studied, *metrics), left_out=left_out)
    return studied, missing


def _with_tasks(kind: type[Study], tasks: str | None) -> Study:
    """The study at its own sizes, on these tasks if they are given and it has any."""
    has_tasks = "tasks" in {field.name for field in fields(kind)}  # pyrefly: ignore  # studies are dataclasses
    return kind(tasks=tasks) if tasks and has_tasks else kind()  # pyrefly: ignore


def _case(name: str, measured: Measured, seed: int) -> Case:
    if measured.case is None:
        raise UsageError(
            f"{name}: its set names no held-out text, or not one language model, which studies need; name the text "
            f"with --heldout, or measure --suite core alone"
        )
    return replace(measured.case, seed=seed)


def _about(case: Case, label: str, study: Study) -> dict[str, Any]:
    """All that the result depends on. It is what a record has to agree with."""
    text = case.text
    about = {
        "study": label,
        "version": study.VERSION,
        "sizes": asdict(study),  # pyrefly: ignore  # studies are dataclasses
        "dictionary": digest_of(case.subject.sae),
        "hooks": [[str(hook) for hook in side] for side in (text.encoded, text.reconstructed)],
        "model": text.model.digest,
        "text": digests.of_bytes(np.ascontiguousarray(text.sequences).tobytes() + text.text.tobytes()),
        "max_norm_multiple": text.max_norm_multiple,
        "tasks": labelled.digest(getattr(study, "tasks", "")),
        "seed": case.seed,
    }
    return msgspec.json.decode(msgspec.json.encode(about))  # tuples as the record will have them


def _read(path: AnyPath | None, about: Mapping[str, Any]) -> Found | None:
    content = None if path is None else storage.read_json(path)
    if content is None:
        return None
    found = storage.as_type(storage.unsealed(content, str(path)), Found, str(path))
    return found if found.about == about else None


def _study(study: Study, case: Case, about: dict[str, Any]) -> Found:
    try:
        metrics = list(study.metrics(case))
    except UsageError as refusal:  # of this dictionary; the other studies can go on
        return Found(about, left_out=str(refusal))
    return Found(
        about,
        {metric.name: finite(metric.value) for metric in metrics},
        {m.name: interval for m in metrics if (interval := _finite(m.interval))},
    )


def _finite(interval: Any) -> Any:
    """An interval, or those of several places, without what is not finite."""
    if isinstance(interval, Mapping):
        return {place: part for place, each in interval.items() if (part := _finite(each))}
    return interval if interval and all(map(math.isfinite, interval)) else None
