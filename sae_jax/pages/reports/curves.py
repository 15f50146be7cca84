"""How training went: a chart for each quantity that the log of a run holds, of one dictionary or of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sae_jax import figures, units
from sae_jax.pages.page import Chart

SIZE = 4.4, 3.0  # inches: readable where a page is as narrow as a phone
MOST = 400  # points of a line; more are drawn as the median and the range of so many stretches
N_LINES = 10  # colours


@dataclass(frozen=True)
class Quantity:
    """Something that the log holds at each step."""

    label: str
    meaning: str
    axis: str = "plain"  # or "log", or "share"


QUANTITIES = {
    "fvu": Quantity("FVU", "share of the variance of a batch that is left unexplained", "log"),
    "loss": Quantity("loss", "what training minimises: the error, and penalties if the variant has some", "log"),
    "l0": Quantity("L0", "active latents a row"),
    "dead_fraction": Quantity("dead latents", "share of latents that have not fired for a while", "share"),
    "lr": Quantity("learning rate", "by the settings of the run"),
    "grad_norm": Quantity("norm of the gradient", "before it is clipped", "log"),
    "aux_loss": Quantity("auxiliary loss", "of dead latents, on what is left unexplained", "log"),
    "tokens_per_second": Quantity("tokens a second", "as far as the last logged step lies back"),
    "input_wait": Quantity("input wait", "share of the time that training waited for rows", "share"),
}
NO_QUANTITY = ("step", "tokens", "seconds")


def charts(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[list[Chart], list[str]]:
    """A chart for each quantity against tokens, and a sentence for each that never changed.

    Args:
        logs: rows of metrics.jsonl of each dictionary by name; {"": rows} of one alone.
    """
    found = dict.fromkeys(name for rows in logs.values() for row in rows for name in row if name not in NO_QUANTITY)
    names = [*(name for name in QUANTITIES if name in found), *(name for name in found if name not in QUANTITIES)]
    drawn, constant = [], []
    for name in names:
        quantity = QUANTITIES.get(name, Quantity(name.replace("_", " "), ""))
        lines = {label: line for label, rows in logs.items() if (line := _line(rows, name)) is not None}
        if not lines:
            continue
        if same := _throughout(lines):
            constant.append(f"{quantity.label}: {same} throughout.")
        else:
            drawn.append(_chart(quantity, lines, [*logs]))
    return drawn, constant


def _line(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray | None:
    """f64[N, 2] tokens and values where they are finite; None where there are none."""
    pairs = [(row.get("tokens"), row.get(name)) for row in rows]
    numbers = [(x, y) for x, y in pairs if _is_finite(x) and _is_finite(y)]
    return np.array(numbers, np.float64) if numbers else None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _throughout(lines: Mapping[str, np.ndarray]) -> str:
    """The value of lines that do not change; "" if one does."""
    values = np.concatenate([line[:, 1] for line in lines.values()])
    low, high = values.min(), values.max()
    return units.number(high) if high - low <= 1e-9 * max(abs(high), abs(low)) else ""


def _chart(quantity: Quantity, lines: Mapping[str, np.ndarray], labels: Sequence[str]) -> Chart:
    """`labels`: of all dictionaries, so that each has its colour in every chart."""
    from matplotlib import ticker

    figure = figures.new(*SIZE)
    axes = figure.subplots()
    is_thinned = any(len(line) > MOST for line in lines.values())
    for label, line in lines.items():
        i = labels.index(label)
        style = {"color": f"C{i % N_LINES}", "linestyle": ("-", "--", ":", "-.")[i // N_LINES % 4]}
        x, y, low, high = _thinned(line / (1e6, 1))
        axes.plot(x, y, linewidth=1.4, label=figures.plain(label), marker="." if len(x) < 30 else "", **style)
        if len(line) > MOST:
            axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)
    values = np.concatenate([line[:, 1] for line in lines.values()])
    axes.set_xlabel("training tokens, millions")
    axes.grid(alpha=0.5)
    if quantity.axis == "log" and values.min() > 0:
        axes.set_yscale("log")
        figures.label_logarithmic(axes.yaxis)
    elif values.min() >= 0:
        axes.set_ylim(0, max(1.1 * values.max(), 0.01 if quantity.axis == "share" else 0))
        if values.max() >= 1e4:
            axes.yaxis.set_major_formatter(ticker.EngFormatter(sep=" "))
    if quantity.axis == "share":
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
    if len(labels) > 1:
        columns = 2 if max(map(len, lines)) < 22 else 1
        figure.legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    note = _ends(quantity, lines, len(labels) == 1)
    if is_thinned:
        note += f" More than {MOST} steps are logged: the line is the median of each stretch, the band its range."
    said = f"{quantity.label} against training tokens. {note}"
    caption = f"{quantity.label}: {quantity.meaning}" if quantity.meaning else quantity.label
    return Chart.of(figure, caption, said, note)


def _ends(quantity: Quantity, lines: Mapping[str, np.ndarray], is_alone: bool) -> str:
    """What is read off at the end of the lines, in words."""

    def written(value: float) -> str:
        if quantity.axis == "share":
            return f"{value:.3g}" if value == 0 else f"{value:.2%}"
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"

    if is_alone:
        ((_, line),) = lines.items()
        lowest, highest = line[:, 1].min(), line[:, 1].max()
        return (
            f"{written(line[0, 1])} at {line[0, 0]:,.0f} tokens, {written(line[-1, 1])} at {line[-1, 0]:,.0f}; "
            f"between {written(lowest)} and {written(highest)}."
        )
    if len(lines) == 1:
        ((label, line),) = lines.items()
        return f"Of {label} alone: {written(line[-1, 1])} at the end."
    ends = sorted((line[-1, 1], label) for label, line in lines.items())
    return f"At the end from {written(ends[0][0])} ({ends[0][1]}) to {written(ends[-1][0])} ({ends[-1][1]})."


def _thinned(line: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, y, and the range of y, f64[n] each, of a line of any length; the last point stays what it is."""
    if len(line) <= MOST:
        return line[:, 0], line[:, 1], line[:, 1], line[:, 1]
    parts = [*np.array_split(line[:-1], MOST - 1), line[-1:]]
    x, y = ([np.median(part[:, i]) for part in parts] for i in (0, 1))
    low, high = ([pick(part[:, 1]) for part in parts] for pick in (np.min, np.max))
    return np.array(x), np.array(y), np.array(low), np.array(high)
