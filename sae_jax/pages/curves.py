"""Figures of a run."""

from __future__ import annotations

from typing import Any

from sae_jax import figures
from sae_jax.storage import StrPath

PANELS = {"fvu": "FVU, share of variance left", "l0": "L0, active latents a row", "dead_fraction": "dead latents"}


def plot_training(metrics: list[dict[str, Any]], path: StrPath, about: str) -> None:
    """FVU, L0 and dead latents against tokens, as a PNG. What does not change is told in the title and not drawn.

    Args:
        metrics: rows of metrics.jsonl.
        path: of the figure.
        about: which dictionary it is.
    """
    from matplotlib import ticker

    columns = {name: [row[name] for row in metrics] for name in PANELS}
    is_constant = {name: max(values) - min(values) < 1e-9 * abs(max(values)) for name, values in columns.items()}
    shown = [name for name in PANELS if name == "fvu" or not is_constant[name]]
    millions = [row["tokens"] / 1e6 for row in metrics]
    figure = figures.new(1 + 4.2 * len(shown), 3.6)
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        axes.plot(millions, columns[name], linewidth=1.2)
        axes.set(xlabel="training tokens, millions", ylabel=PANELS[name])
        axes.grid(alpha=0.3)
        if name == "fvu":
            axes.set_yscale("log")
            figures.label_logarithmic(axes.yaxis)
        else:
            axes.set_ylim(0, max(0.05, 1.1 * max(columns[name])))
        if name == "dead_fraction":
            axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
        axes.set_title(f"{columns[name][-1]:.3g} at the end", fontsize=9)
    constant = [
        f"{PANELS[name].partition(',')[0]} {columns[name][-1]:.4g} throughout" for name in PANELS if name not in shown
    ]
    question = "What does the dictionary leave unexplained as it is trained, and how many latents die?"
    figure.suptitle(f"{question}\n{'; '.join([about, *constant])}", fontsize=10)
    figures.save(figure, path)
