"""Measuring dictionaries: all metrics of all of them, in one pass over the rows.

    for each batch: the language model runs once, for the activations of every site
        for each site: its rows, which of them count, and the losses of the ablated model
            for each dictionary: its code and its reconstruction, for every evaluator

Rows come from the held-out text of the set that the dictionaries were trained on, or where it names none from the set
itself. Batches are dealt out to workers and processes, whose sums add up to those of a single one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import jax
import numpy as np

from sae_jax import storage
from sae_jax.evaluation import base, baselines, batches, effective_compute, shards, study
from sae_jax.evaluation.base import Description, EvalBatch, Metric, Subject, Sums
from sae_jax.evaluation.baselines import Baseline
from sae_jax.evaluation.batches import Candidate
from sae_jax.evaluation.effective_compute import Curve
from sae_jax.evaluation.study import Case
from sae_jax.evaluation.text import HeldOut, held_out
from sae_jax.progress import Progress, console
from sae_jax.saes.base import AbstractSae
from sae_jax.storage import AnyPath
from sae_jax.types import Sites, UsageError, UserError

NO_ROWS = "there is no row to measure on; give more tokens, or text that is not all special tokens"
N_NAMED = 8  # shares
COMPARED = {  # with each other (suites.py), and with the training of the model (effective_compute.py)
    "mmcs": Description(
        "MMCS", "mean over latents of the greatest cosine with a latent of that dictionary", no_interval=base.OF_WEIGHTS
    ),
    "effective_compute": Description(
        "effective compute",
        "share of its training compute after which the model predicts as well; undefined beyond the curve",
    ),
}


@dataclass(frozen=True)
class Settings:
    """On how much to measure."""

    n_tokens: int = 100_000  # or rows, at most
    batch_tokens: int = 4096  # of one forward pass of the language model
    model: str | None = None  # where the language model is now, if not where the set says
    heldout: str | None = None  # and the held-out text
    split: int = 1  # devices that the language model is split over


@dataclass(frozen=True, repr=False)
class Measured:
    """What a pass over the rows, or a share of it, says about a dictionary."""

    subject: Subject
    about: dict[str, Any]  # which weights of it, and where the rows come from
    sums: dict[str, Sums]  # of each evaluator, and under "" the number of rows
    case: Case | None = None  # for studies; None where rows come from no text
    studied: tuple[Metric, ...] = ()  # what studies found (suites.py)
    left_out: Mapping[str, str] = field(default_factory=dict)  # {study: why it says nothing}
    curve: Curve | None = None  # of the model's training, for its effective compute

    def __repr__(self) -> str:
        return "\n".join(f"{label:24}{value:24} {text}" for label, value, text in table_rows([self.to_json()]))

    def metrics(self) -> list[Metric]:
        """All metrics, in the order in which they are shown. Raises UserError if there was no row to measure on."""
        if not self.sums or not self.sums[""]["rows"]:
            raise UserError(NO_ROWS)
        evaluators = {name: kind(self.subject) for name, kind in base.evaluators().items() if name in self.sums}
        core = [metric for name, evaluator in evaluators.items() for metric in evaluator.metrics(self.sums[name])]
        return [*core, *(effective_compute.of(core, self.curve) if self.curve else ()), *self.studied]

    def to_json(self) -> dict[str, Any]:
        """{metric: value}, after what was measured, and before the intervals of metrics that have one."""
        metrics = self.metrics()
        intervals = {m.name: m.interval for m in metrics if m.interval}
        left_out = {"left_out": dict(self.left_out)} if self.left_out else {}
        return {**self.about, **{m.name: finite(m.value) for m in metrics}, "intervals": intervals, **left_out}


def evaluate(
    candidates: Mapping[str, Candidate],
    settings: Settings,
    shard: tuple[int, int] = (0, 1),
    beside: Sequence[Baseline] = (),
) -> dict[str, Measured]:
    """Measure dictionaries, by name. Those of one set share the pass over its text.

    Args:
        candidates: what to measure.
        settings: on how much.
        shard: (i, n): take the i-th of n shares of the batches. Several processes of one job divide it further.
        beside: baselines to measure with them, of the site and the L0 of the first.

    Raises UsageError for a source that a set does not have, or not in this width.
    """
    shard = (shard[0] * jax.process_count() + jax.process_index(), shard[1] * jax.process_count())
    texts: dict[tuple[str, Sites], HeldOut | None] = {}

    def text_of(candidate: Candidate) -> HeldOut | None:
        """The text of its set, with the hooks of its site."""
        path = candidate.activations.path
        if (path, candidate.sites) not in texts:
            another = next((text for (other, _), text in texts.items() if text and other == path), None)
            texts[path, candidate.sites] = _held_out(candidate, settings, another)
        return texts[path, candidate.sites]

    if beside:
        first = next(iter(candidates.values()))
        candidates = {**candidates, **baselines.of_site(first, text_of(first), beside)}
    subjects = {name: _subject(candidate) for name, candidate in candidates.items()}
    passes: dict[tuple[str, str | None], list[str]] = {}  # {(set, language model or rows of the set): names}
    for name, candidate in candidates.items():
        text = text_of(candidate)
        model = None if text is None else text.model.reference
        passes.setdefault((candidate.activations.path, model), []).append(name)
    measured = {}
    for (path, _), names in passes.items():
        here = {name: candidates[name] for name in names}
        texts_here = {c.sites: text for c in here.values() if (text := texts[path, c.sites])}
        if texts_here:
            n_batches, made = batches.of_text(here, subjects, texts_here, settings.batch_tokens, shard)
        else:
            n_batches, made = batches.of_set(here, settings.n_tokens, shard)
        with Progress("evaluate", n_batches, "batches", silent=jax.process_index() > 0) as progress:
            sums = accumulate({name: subjects[name] for name in names}, made, progress)
        for name, candidate in here.items():
            text = texts[path, candidate.sites]
            about = {
                **candidate.weights,
                "text": text.name if text else None,
                "data": path,
                "data_content": candidate.activations.content,
                "sites": candidate.sites.to_json(),
            }
            case = Case.of(candidate.sae, text, candidate.activations.spec.first_token) if text else None
            measured[name] = Measured(subjects[name], about, shards.over_processes(sums[name]), case)
    return {name: measured[name] for name in candidates}


def finish(
    folder: AnyPath,
    measured: Measured,
    settings: Settings,
    shard: tuple[int, int] = (0, 1),
    missing_studies: Sequence[str] = (),
) -> dict[str, Any] | None:
    """Write FOLDER/evaluation.json and return what it holds; or None while shares of other workers are missing.

    Args:
        folder: of the run or the dictionary.
        measured: from `evaluate`.
        settings: those given to it; shares that were measured with others do not count.
        shard: that given to it. Where there are several, each share is kept in FOLDER/evaluation/.
        missing_studies: those that other workers are still to make (suites.py).
    """
    n = shard[1]
    if n > 1:
        about = {**measured.about, **asdict(settings), "evaluators": sorted(base.evaluators())}
        for name in ("data", "split"):  # where and how a worker measures, and not what
            del about[name]
        if jax.process_index() == 0:
            shards.write(folder, shard, measured.sums, about)
        sums, missing = shards.merge(folder, n, about)
        if sums is not None and missing_studies:
            console.print(f"{folder}: shard {shard[0]}/{n} is measured; to come: {', '.join(missing_studies)}")
            return None
        if sums is None:
            names = ", ".join(f"{i}/{n}" for i in missing[:N_NAMED])
            names += f" and {len(missing) - N_NAMED} more" if len(missing) > N_NAMED else ""
            console.print(f"{folder}: shard {shard[0]}/{n} is measured; to come: {names}")
            return None
        measured = replace(measured, sums=sums)
    document = measured.to_json()
    if jax.process_index() == 0:
        storage.write_json(folder / "evaluation.json", storage.sealed(document))
    return document


def table_rows(documents: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """(label, value in each document, meaning) of every metric that is shown, from what `finish` returned."""
    rows: list[tuple[str, ...]] = []
    for name, description in descriptions().items():
        if not description.in_table or all(name not in document for document in documents):
            continue
        values = [document.get(name) for document in documents]
        intervals = [document.get("intervals", {}).get(name) for document in documents]
        sources = dict.fromkeys(source for value in values if isinstance(value, dict) for source in value)
        for source in sources:
            cells = [
                _cell(value[source], (interval or {}).get(source))
                if isinstance(value, dict) and source in value
                else ""
                for value, interval in zip(values, intervals, strict=True)
            ]
            rows.append((f"{description.label} of {source}", *cells, description.text))
        if not sources:
            cells = [
                "" if name not in document else _cell(value, interval)
                for document, value, interval in zip(documents, values, intervals, strict=True)
            ]
            rows.append((description.label, *cells, description.text))
    return rows


def descriptions() -> dict[str, Description]:
    """Of every metric that evaluators and studies make, in the order in which they are shown."""
    found = base.descriptions()
    for kind in study.studies().values():
        found |= kind.METRICS
    return {**found, **COMPARED}


def on_rows(sae: AbstractSae, x_NX: np.ndarray, block_rows: int = 4096) -> dict[str, Any]:
    """Metrics {name: value} of an autoencoder on rows [N, X] in memory: all that need no text."""
    if len(x_NX) == 0:
        raise UserError(NO_ROWS)
    subject = Subject(sae, {"rows": x_NX.shape[1]}, x_NX.mean(0, dtype=np.float64))
    blocks = (x_NX[first : first + block_rows] for first in range(0, len(x_NX), block_rows))
    made = ({"": batches.filled_up(sae, block, block, block_rows)} for block in blocks)
    return {
        metric.name: metric.value for metric in Measured(subject, {}, accumulate({"": subject}, made)[""]).metrics()
    }


def accumulate(
    subjects: Mapping[str, Subject], made: Iterable[Mapping[str, EvalBatch]], progress: Progress | None = None
) -> dict[str, dict[str, Sums]]:
    """{name: {evaluator: its sums}} over batches; each batch is {name: the batch as that dictionary sees it}."""
    evaluators = {
        (name, kind): evaluator(subject)
        for name, subject in subjects.items()
        for kind, evaluator in base.evaluators().items()
    }
    sums: dict[str, dict[str, Sums]] = {name: {} for name in subjects}
    for done, batch in enumerate(made, 1):
        parts: dict[tuple[str, str], Any] = {(name, ""): {"rows": batch[name].keep.sum()} for name in subjects}
        for (name, kind), evaluator in evaluators.items():
            if batch[name].text is not None or not evaluator.NEEDS_TEXT:
                parts[name, kind] = evaluator.measure(batch[name])
        for (name, kind), part in jax.device_get(parts).items():
            sums[name][kind] = base.add(sums[name].get(kind, {}), part)
        if progress:
            progress.update(done)
    return sums


def _held_out(candidate: Candidate, settings: Settings, another: HeldOut | None) -> HeldOut | None:
    if candidate.hook is not None:
        assert another is not None  # that of the dictionary which it stands beside
        return replace(another, encoded=(candidate.hook,), reconstructed=(candidate.hook,))
    given = (settings.n_tokens, settings.model, settings.heldout)
    return held_out(candidate.activations, candidate.sites, *given, another, settings.split)


def _subject(candidate: Candidate) -> Subject:
    activations, sites, widths = candidate.activations, candidate.sites, candidate.widths
    if candidate.mean is not None:
        return Subject(candidate.sae, dict(zip(sites.y, widths.y, strict=True)), candidate.mean)
    for name, width in (*zip(sites.x, widths.x, strict=True), *zip(sites.y, widths.y, strict=True)):
        width_there = activations.source(name).d
        if width_there != width:
            raise UsageError(f"{activations.path}: {name} has {width_there} dimensions, and the dictionary {width}")
    mean_Y = np.concatenate([activations.stats(name).mean for name in sites.y])
    return Subject(candidate.sae, dict(zip(sites.y, widths.y, strict=True)), mean_Y, candidate.recorded)


def _cell(value: float | None, interval: Sequence[float] | None) -> str:
    text = "undefined" if value is None else f"{value:.4f}"
    return f"{text} [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else text


def finite(value: Any) -> Any:
    """A value for JSON, which has no word for what is not finite: null."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
