"""Figures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_training(metrics: list[dict[str, Any]], path: Path) -> None:
    """FVU, L0 and dead latents against tokens, from the rows of metrics.jsonl, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tokens = [row["tokens"] for row in metrics]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for axis, name, label in zip(axes, ("fvu", "l0", "dead_fraction"), ("FVU", "L0", "dead latents"), strict=True):
        axis.plot(tokens, [row[name] for row in metrics], linewidth=1.2)
        axis.set(xlabel="tokens", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].set_ylim(0, 1.1 * max(row["l0"] for row in metrics))
    axes[2].set_ylim(0, max(0.05, 1.1 * max(row["dead_fraction"] for row in metrics)))
    axes[2].yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    figure.savefig(path, dpi=110)
    plt.close(figure)
