"""One page with all that was measured of some dictionaries: a table and figures, in a file that needs no other."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_jax import figures, storage
from sae_jax.evaluation.evaluate import COMPARED, descriptions, table_rows

COLUMNS = 3  # of figures side by side
TOO_FEW = "undefined, or of one alone of what varies: a sequence, a batch, a latent or a task"
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-size: 13px; } th, td { padding: 3px 10px 3px 0; text-align: left; }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap; } tr:nth-child(even) { background: #f5f5f5; }
td.m { color: #666; } .wide { overflow-x: auto; } img { max-width: 100%; } dt { font-weight: 600; margin-top: .5em; }
"""


def write_report(path: str | Path, documents: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the page.

    Args:
        path: of the file, which is replaced.
        documents: {name: what evaluation.json holds} of dictionaries and baselines.
    """
    title = f"Evaluation of {', '.join(list(documents)[:3])}{' and others' if len(documents) > 3 else ''}"
    parts = [f"<h1>{html.escape(title)}</h1>", _sources(documents), "<h2>Numbers</h2>", _table(documents)]
    for heading, make in (("With intervals of 90 %", _intervals), ("By position, norm, k and scale", _curves)):
        if (figure := make(documents)) is not None:
            parts.append(f'<h2>{heading}</h2><img alt="{heading}" src="data:image/png;base64,{_png(figure)}">')
    if reasons := _without_interval(documents):
        parts.append(f"<h2>Without an interval</h2><dl>{reasons}</dl>")
    if left_out := _left_out(documents):
        parts.append(f"<h2>Left out</h2><dl>{left_out}</dl>")
    body = "\n".join(parts)
    storage.write_text(
        Path(path),
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n",
    )


def _sources(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """What each was measured on."""
    rows = []
    for name, document in documents.items():
        sites = document.get("sites", {})
        x, y = (" + ".join(sites.get(side, [])) for side in ("x", "y"))
        place = x if x == y else f"{x} to {y}"
        text = f"held-out text {document['text']}" if document.get("text") else "rows of the set"
        rows.append(f"<dt>{html.escape(name)}</dt><dd>{html.escape(place)}, on {html.escape(text)}</dd>")
    return f"<dl>{''.join(rows)}</dl>"


def _table(documents: Mapping[str, Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("metric", *documents, "meaning"))
    rows = []
    for label, *cells, meaning in table_rows(list(documents.values())):
        numbers = "".join(f'<td class="n">{html.escape(cell)}</td>' for cell in cells)
        rows.append(f'<tr><td>{html.escape(label)}</td>{numbers}<td class="m">{html.escape(meaning)}</td></tr>')
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _without_interval(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """Why numbers of the table have none."""
    reasons = {}
    for name, description in descriptions().items():
        has_it = [name in document.get("intervals", {}) for document in documents.values() if name in document]
        if description.in_table and not all(has_it):
            reasons[description.label] = description.no_interval or TOO_FEW
    return "".join(f"<dt>{html.escape(label)}</dt><dd>{html.escape(reason)}</dd>" for label, reason in reasons.items())


def _left_out(documents: Mapping[str, Mapping[str, Any]]) -> str:
    return "".join(
        f"<dt>{html.escape(name)}: {html.escape(study)}</dt><dd>{html.escape(reason)}</dd>"
        for name, document in documents.items()
        for study, reason in document.get("left_out", {}).items()
    )


def _intervals(documents: Mapping[str, Mapping[str, Any]]) -> Any:
    """A panel for each metric that has an interval, with a point for each dictionary."""
    names = [
        name
        for name, description in descriptions().items()
        if description.in_table and any(_is_interval(d.get("intervals", {}).get(name)) for d in documents.values())
    ]
    if not names:
        return None
    figure, panels = _panels(len(names), 0.9 + 0.22 * len(documents))
    labels = list(documents)
    for axes, name in zip(panels, names, strict=True):
        for place, document in enumerate(documents.values()):
            value, interval = document.get(name), document.get("intervals", {}).get(name)
            if value is not None:
                low, high = interval or (value, value)
                axes.errorbar(value, place, xerr=_bars([value], [(low, high)]), fmt="o", markersize=4)
        axes.set_yticks(range(len(labels)), [Path(label).name for label in labels], fontsize=8)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_title(descriptions()[name].label, fontsize=9)
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(axis="x", labelsize=8)
    return figure


def _curves(documents: Mapping[str, Mapping[str, Any]]) -> Any:
    """A panel for each metric that is a number for each of several places, with a line for each dictionary."""
    names = [
        name
        for name in descriptions()
        if name not in COMPARED and any(len(_curve(document, name)) > 1 for document in documents.values())
    ]
    if not names:
        return None
    figure, panels = _panels(len(names), 3.0)
    for axes, name in zip(panels, names, strict=True):
        curves = {label: _curve(document, name) for label, document in documents.items()}
        places = list(dict.fromkeys(place for curve in curves.values() for place in curve))
        places = sorted(places, key=float) if all(_is_number(place) for place in places) else places
        for label, curve in curves.items():
            at, values = [places.index(place) for place in curve], [*curve.values()]
            intervals = documents[label].get("intervals", {}).get(name, {})
            bars = _bars(values, [intervals.get(place, (value, value)) for place, value in curve.items()])
            style = {"marker": "o", "markersize": 3, "linewidth": 1.2, "capsize": 2, "label": Path(label).name}
            axes.errorbar(at, values, yerr=bars, **style)
        axes.set_xticks(range(len(places)), places, rotation=40, ha="right", fontsize=7)
        axes.tick_params(axis="y", labelsize=8)
        axes.set_title(f"{descriptions()[name].label}\n{descriptions()[name].text}", fontsize=8)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    return figure


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


def _panels(n: int, height: float) -> tuple[Any, Sequence[Any]]:
    rows = -(-n // COLUMNS)
    figure = figures.new(4.2 * COLUMNS, height * rows)
    panels = figure.subplots(rows, COLUMNS, squeeze=False).ravel().tolist()
    for axes in panels[n:]:
        axes.set_axis_off()
    return figure, panels[:n]


def _png(figure: Any) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return base64.b64encode(data.getvalue()).decode()
