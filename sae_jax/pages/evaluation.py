"""All that was measured of some dictionaries: a table and figures, as a page or as sections of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sae_jax import figures
from sae_jax.evaluation.evaluate import COMPARED, descriptions, table_rows
from sae_jax.pages import page
from sae_jax.pages.about import without_folders
from sae_jax.pages.page import Chart, Charts, Page, Reasons, Section, Table
from sae_jax.storage import StrPath

WIDTH = 4.4  # inches, of a figure
LABEL = 24  # characters beside it
TOO_FEW = "undefined, or of one alone of what varies: a sequence, a batch, a latent or a task"


def write_report(path: StrPath, documents: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the page.

    Args:
        path: of the file, which is replaced.
        documents: {name: what evaluation.json holds} of dictionaries and baselines.
    """
    names = page.short_names(documents)
    title = f"Evaluation of {', '.join([*names.values()][:3])}{' and others' if len(documents) > 3 else ''}"
    page.write(path, Page(title, sections=sections({names[name]: documents[name] for name in documents})))


def sections(documents: Mapping[str, Mapping[str, Any]]) -> list[Section]:
    """What a page shows of {name: what evaluation.json holds}."""
    found = [Section("Evaluation", [Reasons(_sources(documents)), _table(documents)])]
    for heading, charts in (
        # Of one dictionary the table says as much.
        ("With intervals of 90 %", _intervals(documents) if len(documents) > 1 else []),
        ("By position, norm, k and scale", _curves(documents)),
    ):
        if charts:
            found.append(Section(heading, [Charts(charts)]))
    if reasons := _without_interval(documents):
        found.append(Section("Without an interval", [Reasons(reasons)]))
    if left_out := _left_out(documents):
        found.append(Section("Left out", [Reasons(left_out)]))
    return found


def _sources(documents: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What each was measured on."""
    rows = []
    for name, document in documents.items():
        sites = document.get("sites", {})
        x, y = (" + ".join(sites.get(side, [])) for side in ("x", "y"))
        place = x if x == y else f"{x} to {y}"
        text = without_folders(document.get("text"))
        rows.append((name, f"{place}, on {f'held-out text {text}' if text else 'rows of the set'}"))
    return rows


def _table(documents: Mapping[str, Mapping[str, Any]]) -> Table:
    return Table(
        "Every number, with its interval of 90 %", ("metric", *documents, "meaning"), table_rows([*documents.values()])
    )


def _without_interval(documents: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Why numbers of the table have none."""
    reasons = []
    for name, description in descriptions().items():
        has_it = [name in document.get("intervals", {}) for document in documents.values() if name in document]
        if description.in_table and not all(has_it):
            reasons.append((description.label, description.no_interval or TOO_FEW))
    return reasons


def _left_out(documents: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    return [
        (f"{name}: {study}", without_folders(reason))
        for name, document in documents.items()
        for study, reason in document.get("left_out", {}).items()
    ]


def _intervals(documents: Mapping[str, Mapping[str, Any]]) -> list[Chart]:
    """A figure for each metric that has an interval, with a point for each dictionary."""
    charts = []
    labels = [*documents]
    for name, description in descriptions().items():
        has_one = any(_is_interval(d.get("intervals", {}).get(name)) for d in documents.values())
        if not description.in_table or not has_one:
            continue
        figure = figures.new(WIDTH, 0.7 + 0.26 * len(documents))
        axes = figure.subplots()
        said = []
        for place, (label, document) in enumerate(documents.items()):
            value, interval = document.get(name), document.get("intervals", {}).get(name)
            if value is not None:
                low, high = interval or (value, value)
                axes.errorbar(value, place, xerr=_bars([value], [(low, high)]), fmt="o", markersize=4, capsize=3)
                said.append(f"{label} {value:.4g}, {low:.4g} to {high:.4g}")
        names = [figures.plain(label, LABEL) for label in labels] if len(labels) > 1 else [""] * len(labels)
        axes.set_yticks(range(len(labels)), names, fontsize=9)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x", alpha=0.5)
        charts.append(Chart.of(figure, f"{description.label}: {description.text}", "; ".join(said)))
    return charts


def _curves(documents: Mapping[str, Mapping[str, Any]]) -> list[Chart]:
    """A figure for each metric that is a number for each of several places, with a line for each dictionary."""
    charts = []
    for name, description in descriptions().items():
        curves = {label: _curve(document, name) for label, document in documents.items()}
        if name in COMPARED or not any(len(curve) > 1 for curve in curves.values()):
            continue
        figure = figures.new(WIDTH, 3.0)
        axes = figure.subplots()
        places = list(dict.fromkeys(place for curve in curves.values() for place in curve))
        places = sorted(places, key=float) if all(_is_number(place) for place in places) else places
        said = []
        for label, curve in curves.items():
            at, values = [places.index(place) for place in curve], [*curve.values()]
            if not values:
                continue
            intervals = documents[label].get("intervals", {}).get(name, {})
            bars = _bars(values, [intervals.get(place, (value, value)) for place, value in curve.items()])
            style = {"marker": "o", "markersize": 3, "linewidth": 1.2, "capsize": 2, "label": figures.plain(label)}
            axes.errorbar(at, values, yerr=bars, **style)
            said.append(f"{label}: " + ", ".join(f"{place} {value:.3g}" for place, value in curve.items()))
        shown = range(0, len(places), 1 + len(places) // 10)
        axes.set_xticks(shown, [figures.plain(places[at]) for at in shown], rotation=40, ha="right")
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(alpha=0.5)
        if len(documents) > 1:
            figure.legend(loc="outside lower center", fontsize=8, frameon=False)
        charts.append(Chart.of(figure, f"{description.label}: {description.text}", "; ".join(said)))
    return charts


def _curve(document: Mapping[str, Any], name: str) -> dict[str, float]:
    """{place: value} of a metric that is one for each of several places; else nothing."""
    value = document.get(name)
    if not isinstance(value, Mapping):
        return {}
    if "log10_edges" in value:
        lows = [f"{low:g}" for low in value["log10_edges"]]
        return {low: count for low, count in zip(lows, value["counts"], strict=False) if count}
    return {place: part for place, part in value.items() if isinstance(part, int | float)}


def _is_interval(interval: Any) -> bool:
    """Whether it is one of a number, not those of several places."""
    return isinstance(interval, Sequence) and not isinstance(interval, str)


def _bars(values: Sequence[float], intervals: Sequence[Sequence[float]]) -> list[list[float]]:
    """Lengths of error bars, below and above."""
    pairs = list(zip(values, intervals, strict=True))
    return [[max(value - low, 0) for value, (low, _) in pairs], [max(high - value, 0) for value, (_, high) in pairs]]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
