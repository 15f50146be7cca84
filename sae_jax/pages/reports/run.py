"""The report of a run: what it trained, how that went, and what came out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import jax.numpy as jnp
import numpy as np

from sae_jax import artifact, config, storage, units
from sae_jax.errors import UserError
from sae_jax.evaluation.evaluate import descriptions
from sae_jax.pages import evaluation
from sae_jax.pages.about import about, without_folders
from sae_jax.pages.dashboard import is_dashboard
from sae_jax.pages.page import Cell, Charts, Facts, Lines, Page, Part, Section, Settings, Table, filled
from sae_jax.pages.reports.curves import QUANTITIES, charts
from sae_jax.record import Record, RunRecord
from sae_jax.storage import AnyPath
from sae_jax.training import checkpoint
from sae_jax.training.logs import read_metrics
from sae_jax.training.optim import share_of_rate
from sae_jax.training.settings import TrainConfig

N_DASHBOARDS = 5  # to which a page leads
SHOWN = ("fvu", "l0", "dead_fraction", "loss", "tokens_per_second")  # of the last logged step


def of_run(run: AnyPath, out: AnyPath) -> Page:
    """The page of one dictionary: a run, or a saved one. `out` is where the page goes, which links are relative to.

    Raises UserError where there is none, or its record is damaged.
    """
    if (described := artifact.read_record(run)) is not None:
        return _of_dictionary(run, described[0], out)
    record = checkpoint.read_record(run)
    log, warnings = _log(run)
    warnings = [*_state(run, record), *warnings]
    document = evaluation_of(run, warnings)
    logs = {"": _with_rate(log, record)}
    sections = [Section("What came out", _results(record, log, document))]
    drawn, constant = charts(logs)
    if drawn or constant:
        sections.append(Section("Training", [Charts(drawn), Lines(constant)]))
    if document is not None:
        sections += evaluation.sections({run.resolve().name: document})
    if attempts := storage.read_lines(run / "attempts.jsonl"):
        sections.append(Section("Attempts", [_attempts(attempts)]))
    sections.append(Section("Settings", [_settings(record.to_json())]))
    return Page(
        run.resolve().name,
        about(record.dictionary),
        warnings,
        _dashboards(run, about(record.dictionary), out),
        sections,
    )


def of_members(folders: Mapping[str, AnyPath], title: str, out: AnyPath) -> Page:
    """The page that compares dictionaries, whose folders are given by name; those that cannot be read are said."""
    warnings: list[str] = []
    records: dict[str, Record] = {}
    logs: dict[str, list[dict[str, Any]]] = {}
    documents: dict[str, Mapping[str, Any]] = {}
    rows = []
    for name, folder in folders.items():
        try:
            record, log, said = _read(folder)
        except UserError as error:
            warnings.append(f"{name}: left out: {without_folders(str(error))}")
            continue
        records[name] = record
        document = evaluation_of(folder, said)
        warnings += [f"{name}: {line}" for line in said]
        if log:
            logs[name] = log
        if document is not None:
            documents[name] = document
        rows.append(_row(name, folder, record, log, document, out))
    if not records:
        raise UserError(f"{title}: none of its dictionaries can be read: {'; '.join(warnings)}")
    columns = ("dictionary", "variant", "latents", "k", "tokens", *(QUANTITIES[n].label for n in SHOWN), "measured FVU")
    caption = "Dictionaries; quantities are of the last logged step"
    sections = [Section("Dictionaries", [filled(Table(caption, columns, rows, is_sortable=True))])]
    drawn, constant = charts(logs)
    if drawn or constant:
        sections.append(Section("Training", [Charts(drawn), Lines(constant)]))
    if documents:
        sections += evaluation.sections(documents)
    missing = [name for name in records if name not in documents]
    if documents and missing:
        warnings.append(f"not measured, so left out of what was: {', '.join(missing)}; run sae-jax evaluate on them")
    line = f"{len(records)} dictionaries: {about(next(iter(records.values())))}{' and others' * (len(records) > 1)}"
    return Page(title, line, warnings, (), sections)


def _read(folder: AnyPath) -> tuple[Record, list[dict[str, Any]], list[str]]:
    """The record of a dictionary, its log if it is a run, and what is wrong with that."""
    if (described := artifact.read_record(folder)) is not None:
        return described[0], [], []
    record = checkpoint.read_record(folder)
    log, warnings = _log(folder)
    return record.dictionary, _with_rate(log, record), [*_state(folder, record), *warnings]


def _of_dictionary(folder: AnyPath, record: Record, out: AnyPath) -> Page:
    warnings: list[str] = []
    document = evaluation_of(folder, warnings)
    facts = _facts({**record.metrics, **(document or {})})
    if not facts:
        warnings.append("nothing was measured of it; run sae-jax evaluate on the folder")
    trained = ("tokens trained on", f"{record.tokens:,}", "")
    sections = [Section("What it is", [Facts([trained, *facts])])]
    if document is not None:
        sections += evaluation.sections({folder.resolve().name: document})
    sections.append(Section("Settings", [_settings(record.to_json())]))
    return Page(folder.resolve().name, about(record), warnings, _dashboards(folder, about(record), out), sections)


def _log(run: AnyPath) -> tuple[list[dict[str, Any]], list[str]]:
    """The logged steps, and what is wrong with the file."""
    path = run / "metrics.jsonl"
    data = storage.read_bytes(path)
    if data is None:
        return [], ["no step is logged: metrics.jsonl is missing, so the run has not begun, or lost it"]
    rows = read_metrics(run)
    n_lines = sum(bool(line.strip()) for line in data.split(b"\n"))
    warnings = []
    if n_lines > len(rows):
        warnings.append(f"metrics.jsonl: {n_lines - len(rows)} of {n_lines} lines are damaged and not shown")
    if lost := [row["step"] for row in rows if row.get("fvu", 0) is None]:
        warnings.append(f"from step {lost[0]:,} on, values were not finite; such points are not drawn")
    return rows, warnings


def _state(run: AnyPath, record: RunRecord) -> list[str]:
    """A sentence for whatever keeps the run from being finished and whole."""
    n_steps, where = record.train["steps"], checkpoint.newest(run)
    latest = checkpoint.latest_step(*where)
    attempts = storage.read_lines(run / "attempts.jsonl")
    said = []
    if failures := sorted(run.glob("failure-*.json")):
        said.append(f"it failed; {failures[0].name} says at which rows")
    if latest is None:
        return [*said, f"unfinished: no checkpoint of {n_steps:,} steps yet"]
    if latest < n_steps:
        outcome = {
            "preempted": "was stopped by SIGTERM",
            "failed": "failed",
            "finished": "ended early: every dictionary of it has converged or failed",
        }.get(str(attempts[-1].get("outcome")) if attempts else "", "is running, or was killed")
        said.append(
            f"unfinished: the newest checkpoint is of step {latest:,} of {n_steps:,}; the last attempt {outcome}"
        )
    if what := checkpoint.problem(where[0]):
        said.append(f"the checkpoint of step {latest:,} is damaged: {without_folders(what)}")
    return said


def evaluation_of(folder: AnyPath, warnings: list[str]) -> Mapping[str, Any] | None:
    """What `sae-jax evaluate` found; a damaged file, and one of earlier weights, is among the warnings."""
    path = folder / "evaluation.json"
    try:
        content = storage.read_json(path)
        document = None if content is None else storage.unsealed(content, path.name)
    except UserError as error:
        warnings.append(f"evaluation.json is left out: {without_folders(str(error))}")
        return None
    if document is None:
        return None
    latest = checkpoint.latest_step(*checkpoint.newest(folder)) if (folder / "config.json").exists() else None
    if latest is not None and document.get("step") not in (None, latest):
        warnings.append(f"evaluation.json is of step {document['step']:,}, and the newest checkpoint of {latest:,}")
    return document


def _results(record: RunRecord, log: Sequence[Mapping[str, Any]], document: Mapping[str, Any] | None) -> list[Part]:
    last = log[-1] if log else {}
    n_steps, seconds = record.train["steps"], last.get("seconds")
    items = [("tokens trained on", f"{last.get('tokens', 0):,}", f"step {last.get('step', 0):,} of {n_steps:,}")]
    if isinstance(seconds, int | float):
        items.append(("time", units.duration(seconds), "of the last attempt, up to the last logged step"))
    for name in SHOWN:
        if isinstance(value := last.get(name), int | float):
            of_batch = "" if name == "tokens_per_second" else ", in the last logged batch"
            text = f"{value:.2%}" if QUANTITIES[name].axis == "share" else units.number(value)
            items.append((QUANTITIES[name].label, text, QUANTITIES[name].meaning + of_batch))
    parts: list[Part] = [Facts(items)]
    if measured := _facts(document or {}):
        told = Lines(["Measured on rows that it has not learned from:"])
        parts = [told, Facts(measured), Lines(["In training:"]), *parts]
    return parts


def _facts(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Of every metric that is one number."""
    return [
        (description.label, units.number(metrics[name]), description.text)
        for name, description in descriptions().items()
        if description.in_table and isinstance(metrics.get(name), int | float)
    ]


def _row(
    name: str, folder: AnyPath, record: Record, log: Sequence[Mapping[str, Any]], document: Any, out: AnyPath
) -> list[Cell | str]:
    last = log[-1] if log else {}
    k, tokens = record.sae.get("k"), last.get("tokens", record.tokens)
    cells = [
        Cell(name, href=link(folder, out)),
        record.variant,
        number(record.sae["n_latents"]),
        number(k),
        number(tokens),
    ]
    cells += [number(last.get(quantity)) for quantity in SHOWN]
    return [*cells, number((document or {}).get("fvu"))]


def number(value: Any) -> Cell | str:
    """A cell that sorts by its number; an empty one for None."""
    return Cell(units.number(value), float(value)) if isinstance(value, int | float) else ""


def link(folder: AnyPath | None, out: AnyPath) -> str | None:
    """To the report of a dictionary, from `out`; None where it has none."""
    report = folder / "report.html" if folder else None
    return _relative(report, out) if report and report.is_file() and report.resolve() != out.resolve() else None


def _attempts(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("attempt", "from step", "to step", "outcome", "processes", "mesh")
    told = {"running": "running, or killed"}
    cells = []
    for row in rows:
        mesh = row.get("mesh")
        sizes = ", ".join(f"{name} {size}" for name, size in mesh.items()) if isinstance(mesh, Mapping) else ""
        outcome = str(row.get("outcome", ""))
        numbers = [number(row.get(name)) for name in ("attempt", "start_step", "end_step")]
        cells.append([*numbers, told.get(outcome, outcome), number(row.get("n_processes")), sizes])
    return Table("Every start of the run, and how far it came", columns, cells)


def _settings(content: Any) -> Settings:
    """Every setting of a record by its dotted name, without folders of its author."""
    flat = config.flatten(without_folders(storage.unsealed(content, "record")))
    return Settings([(name, _written(value)) for name, value in flat if name not in ("kind", "schema")])


def _written(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_written(part) for part in value)
    if isinstance(value, dict):
        return "; ".join(f"{name} {_written(part)}" for name, part in value.items())
    return "\u2013" if value is None else str(value)


def _with_rate(log: Sequence[Mapping[str, Any]], record: RunRecord) -> list[dict[str, Any]]:
    """Rows of the log with the learning rate, which the settings determine."""
    settings = config.from_dict(TrainConfig, record.train)
    if not log or settings.lr is None:
        return [dict(row) for row in log]
    steps = jnp.array([row["step"] for row in log])
    share = np.broadcast_to(np.asarray(share_of_rate(settings, steps, jnp.array(settings.steps))), steps.shape)
    return [{**row, "lr": float(settings.lr * part)} for row, part in zip(log, share, strict=True)]


def _dashboards(run: AnyPath, about_it: str, out: AnyPath) -> list[tuple[str, str]]:
    """Dashboards in the folder, or beside it of what is told in the same words."""
    found = [path for path in sorted(run.glob("*/index.html")) if is_dashboard(path)]
    found += [path for path in sorted(run.resolve().parent.glob("*/index.html")) if is_dashboard(path, about_it)]
    return [(f"dashboard: {path.parent.name}", _relative(path, out)) for path in found[:N_DASHBOARDS]]


def _relative(path: AnyPath, out: AnyPath) -> str:
    return quote(os.path.relpath(path.resolve(), out.resolve().parent))
