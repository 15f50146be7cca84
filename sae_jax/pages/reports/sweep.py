"""The report of a sweep: its members, the laws they follow, and what is missing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sae_jax import figures, storage
from sae_jax.errors import UserError
from sae_jax.evaluation.evaluate import descriptions
from sae_jax.pages.about import without_folders
from sae_jax.pages.page import Cell, Chart, Charts, Lines, Page, Part, Reasons, Section, Table, filled
from sae_jax.pages.reports.run import evaluation_of, link, number
from sae_jax.scaling import fit, laws, plots, quality, report, table
from sae_jax.scaling.laws import Fitted, Study
from sae_jax.scaling.table import Point
from sae_jax.storage import AnyPath

SIZE = 4.6, 3.4  # inches, of a figure without its legend
FURTHER = {"compute": 10.0, "latents": 4.0, "tokens": 4.0, "lr": 4.0, "best_latents": 10.0}  # times the largest point
NAMES = {
    "compute": ("What does compute buy?", "compute", "FLOP", "FVU"),
    "best_latents": ("Which width is best for a budget?", "budget", "FLOP", "the best width"),
    "latents": ("What does width buy?", "width", "latents", "FVU"),
    "tokens": ("How long does a width train until it converges?", "width", "latents", "the number of tokens"),
    "lr": ("Which learning rate is best for a width?", "width", "latents", "the best rate"),
    "joint": ("What do width and active latents buy together?", "width and k", "", "FVU"),
}
NUMBERS = ("exponent", "coefficient", "constant", "beta_k", "beta_n", "gamma")  # of laws in fit.json
AGREES = 1e-3  # relative, of coefficients that are fitted again


def of_sweep(folder: AnyPath, members: Mapping[str, AnyPath], out: AnyPath) -> Page:
    """The page of a sweep.

    Args:
        folder: of the sweep.
        members: {name: folder of its run} of those that have a checkpoint.
        out: where the page goes.

    Raises:
        UserError: the table of points is damaged.
    """
    warnings: list[str] = []
    points = table.read(folder) if (folder / table.FILE).exists() else []
    last = {point.name: point for point in points}  # sorted by tokens
    marks = _marks(folder, warnings)
    warnings += _missing(points, last, marks)
    sections = []
    if last:
        rows = [_row(point, members.get(name), marks.get(name), points, out) for name, point in last.items()]
        columns = ("member", "variant", "latents", "k", "learning rate", "seed", "tokens", "FLOP", "FVU", "L0")
        columns += ("dead", "measured at", "KL", "loss recovered")
        told = (
            "Members at their last point: FVU of held-out rows; KL and loss recovered where sae-jax evaluate has been"
        )
        sections.append(Section("Members", [filled(Table(told, columns, rows, is_sortable=True))]))
    if (study := _study(folder, points, warnings)) is not None:
        sections += _laws(study)
    sections += _trends(folder, members, warnings)
    variants = sorted({point.variant for point in points})
    sites = sorted({" + ".join(point.config.get("sites", {}).get("x", [])) for point in points} - {""})
    line = f"{len(last)} members of {max(len(marks), len(last))}, {len(points)} points; {', '.join(variants)}"
    line += f", of {', '.join(sites)}" * bool(sites)
    return Page(folder.resolve().name, line, warnings, (), sections)


def _marks(folder: AnyPath, warnings: list[str]) -> dict[str, list[int]]:
    """{member: steps at which it is to be measured} of the plan; nothing where there is none."""
    path = folder / "sweep.json"
    try:
        content = storage.read_json(path)
        plan = {} if content is None else storage.unsealed(content, path.name).get("members", {})
        return {name: [int(step) for step in member["marks"]] for name, member in plan.items()}
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
        warnings.append(f"sweep.json cannot be read, so nobody knows which members are missing: {error}")
        return {}


def _missing(points: Sequence[Point], last: Mapping[str, Point], marks: Mapping[str, list[int]]) -> list[str]:
    """What the plan has and the table lacks."""
    said = []
    if not points:
        said.append("no member is measured yet; let sae-jax sweep go on")
    if without := [name for name in marks if name not in last]:
        said.append(
            f"{len(without)} of {len(marks)} members have no point: they failed or are to come: {_few(without)}"
        )
    short = [
        f"{name} ({_n_done(points, name)} of {len(steps)})"
        for name, steps in marks.items()
        if name in last and not last[name].converged and last[name].steps != max(steps)
    ]
    if short:
        said.append(f"{len(short)} members lack their last points: {_few(short)}")
    if unplanned := [name for name in last if marks and name not in marks]:
        said.append(f"{len(unplanned)} members of the table are not in the plan: {_few(unplanned)}")
    return said


def _n_done(points: Sequence[Point], name: str) -> int:
    return sum(point.name == name for point in points)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _row(
    point: Point, folder: AnyPath | None, marks: Sequence[int] | None, points: Sequence[Point], out: AnyPath
) -> list[Cell | str]:
    document = evaluation_of(folder, []) if folder else None
    at = f"{_n_done(points, point.name)} points" + (f" of {len(marks)}" if marks else "")
    flops = Cell(f"{point.flops:.3g}", point.flops)
    return [
        Cell(point.name, href=link(folder, out)),
        point.variant,
        *map(number, (point.n_latents, point.k, point.lr, point.seed, point.tokens)),
        flops,
        *map(number, (point.fvu, point.l0, point.dead_fraction)),
        at + (", converged" if point.converged else ""),
        *(number((document or {}).get(name)) for name in ("kl", "loss_recovered")),
    ]


def _study(folder: AnyPath, points: Sequence[Point], warnings: list[str]) -> Study | None:
    """The laws, for what fit.json was fitted to if it is there; None, and it is said why, where nothing can be."""
    if not points:
        return None
    path = folder / "fit.json"
    try:
        content = storage.read_json(path)
        fitted = {} if content is None else storage.unsealed(content, path.name)
    except UserError as error:
        warnings.append(f"fit.json is left out: {without_folders(str(error))}")
        fitted = {}
    try:
        study = laws.study(points, fitted.get("variant"), fitted.get("site"), fitted.get("k"))
    except UserError as error:
        warnings.append(f"no laws: {without_folders(str(error))}")
        return None
    if fitted and (name := _differs(fitted, study.to_json())):
        warnings.append(
            f"fit.json has another law of {name} than shown here: it was fitted with other settings, such as "
            f"--leave-out or --tokens-per-latent, or to other points"
        )
    if len({(point.variant, str(point.config.get("sites"))) for point in points}) > 1:
        at = f" of {study.site}" if study.site else ""
        warnings.append(f"laws are of {study.variant}{at} alone; sae-jax fit --variant= or --site= chooses others")
    return study


def _differs(stored: Mapping[str, Any], fresh: Mapping[str, Any]) -> str:
    """A law whose numbers differ; "" if none does."""
    for name in ("compute", "latents", "joint", "tokens", "lr"):
        before, now = stored.get(name), fresh.get(name)
        if bool(before) != bool(now):
            return name
        for key, value in (now or {}).items():
            was = (before or {}).get(key, math.nan)
            if key in NUMBERS and not math.isclose(value, was, rel_tol=AGREES, abs_tol=1e-9):
                return name
    return ""


def _laws(study: Study) -> Iterator[Section]:
    """Laws in words and numbers, then figures."""
    k = f", k = {study.k}" if study.k is not None else ""
    of_site = f" of {study.site}" if study.site else ""
    intro = f"{study.variant}{of_site}{k}: {len(study.at_k)} points, of {len(study.points)} at any k."
    parts: list[Part] = [Lines([intro])]
    for name, formula in report.FORMULAS.items():
        if name in study.laws:
            fitted = study.laws[name]
            remarks = [line[0].upper() + line[1:] + "." for line in report.remarks(fitted) if line]
            rows = [list(row) for row in report.coefficients(fitted.law)]
            columns = ("coefficient", "value", "interval of 90 %")
            parts += [Lines([_in_words(name, fitted)], NAMES[name][0]), Table(formula, columns, rows), Lines(remarks)]
    if study.warnings:
        parts.append(Lines(study.warnings, "What the fit warns of, and what it leaves out"))
    yield Section("Laws", parts)
    charts = []
    for name, question, figure in plots.drawn(study, SIZE, for_page=True):
        fitted = study.laws.get(name)
        note = _in_words(name, fitted) if fitted else _best(study) if name == "isoflop" else ""
        charts.append(Chart.of(figure, question, f"{question} {note or 'A curve for each width.'}", note))
    if charts:
        yield Section("Figures", [Charts(charts)])
    if study.budgets:
        rows = [
            [
                Cell(f"{budget.flops:.3g}", budget.flops),
                number(len(budget.n)),
                number(round(budget.best.x)),
                number(budget.best.loss),
                "at the edge of the grid: may lie beyond" if budget.best.at_edge else "",
            ]
            for budget in study.budgets
        ]
        columns = ("FLOP", "widths", "best width", "FVU there", "remark")
        yield Section("Budgets", [Table("The best width of each budget", columns, rows, is_sortable=True)])


def _best(study: Study) -> str:
    inner = [budget for budget in study.budgets if not budget.best.at_edge]
    return (
        f"{len(inner)} of {len(study.budgets)} budgets have their best width between two others"
        + (f": {', '.join(f'{b.best.x:,.0f} at {b.flops:.2g} FLOP' for b in inner)}" if inner else "")
        + "."
    )


def _in_words(name: str, fitted: Fitted) -> str:
    """What a law says at the largest point it was fitted to, and how far beyond."""
    law = fitted.law
    if name == "joint":
        n, k = (float(each.max()) for each in fitted.x)
        return (
            f"At the largest width and k of the points, n = {n:,.0f} and k = {k:,.0f}, FVU by the law is "
            f"{_at(law, n, k)}; with twice the latents {_at(law, 2 * n, k)}, with twice the k {_at(law, n, 2 * k)}."
        )
    _, what, unit, quantity = NAMES[name]
    largest, factor = float(fitted.x[0].max()), FURTHER[name]
    at, beyond = (f"{x:,.0f}" if x < 1e7 else f"{x:.3g}" for x in (largest, factor * largest))
    return (
        f"At the largest {what} of the points, {at} {unit}, {quantity} by the law is {_at(law, largest)}; "
        f"at {beyond} {unit}, {factor:g} times as much, {_at(law, factor * largest)}, if it holds so far."
    )


def _at(law: fit.Law, *x: float) -> str:
    """A prediction with its interval."""
    value, ends = float(law.predict(*x)), fit.ends(law.draw(*x))
    return _short(value) + (f" (90 %: {_short(ends[0])} to {_short(ends[1])})" if ends else "")


def _short(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def _trends(folder: AnyPath, members: Mapping[str, AnyPath], warnings: list[str]) -> Iterator[Section]:
    """How metrics go with the sizes, of those that `sae-jax fit --metric` was asked for."""
    path = folder / "quality.json"
    try:
        content = storage.read_json(path)
        asked = [] if content is None else [*storage.unsealed(content, path.name)]
        if not asked:
            return
        measured, missing = quality.read(folder, members)
        found = quality.trends(measured, asked)
    except UserError as error:
        warnings.append(f"quality.json is left out: {without_folders(str(error))}")
        return
    if missing:
        warnings.append(f"{len(missing)} members are not measured, and do not count for trends: {_few(missing)}")
    told = "What a doubling changes, with intervals of 90 %; within the range of the sweep"
    meanings = [(name, known[name].text) for known in (descriptions(),) for name in asked if name in known]
    charts = []
    for trend in found:
        figure = figures.new(4.4, 3.2)
        axes = figure.subplots()
        quality.paint(axes, measured, trend)
        axes.set_xlabel("latents")
        if any(one.point.k for one in measured):
            figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        values = [one.metrics[trend.metric] for one in measured if trend.metric in one.metrics]
        said = (
            f"{trend.metric} of {len(values)} dictionaries against latents, from {min(values):.4g} to {max(values):.4g}"
        )
        charts.append(Chart.of(figure, trend.metric, said))
    rows = [list(row) for row in quality.rows(found)]
    yield Section("Trends of other metrics", [Table(told, quality.HEADER, rows), Reasons(meanings), Charts(charts)])
