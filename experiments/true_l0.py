"""Do decoders say how many latents should be active?

Question: rows are sums of correlated features, a known number of them at a time. TopK autoencoders as wide as there are
features, untuned, at six k. Where are two signs of mixed decoder rows least, the mean |cos| of their pairs and the
projection of rows on them (sae_jax/ops/mixing.py, after Chanin and Garriga-Alonso 2025, arXiv 2508.16560)? Is that the
mean number of active features, to a factor of 1.5? Does it matter whether there is room for features to be orthogonal?
Guess: both are least within 1.5 of it.
Command: python experiments/true_l0.py --out OUT; and with --variant=batch_topk
Cost: 12 minutes on one core of a busy machine; BatchTopK, of the first three beds, 25.
Answer: only where there are fewer features than dimensions, and only |cos|. One seed, 1,500 steps of 512 rows (JAX
0.10.2, CPU; figures/true_l0.png); |cos| is of pairs of decoder rows, `found` the mean cosine of a feature with the
nearest row, and k over the mean number of active features (10, and 6 of 256, where k is rounded):

                            0.4     0.6     1       1.5     2.4     3.6
    TopK
    50 in 64, pairs    |cos|  0.153   0.074   0.026   0.008*  0.035   0.060
                       found  0.833   0.885   0.993   0.999*  0.860   0.637
    50 in 100          |cos|  0.133   0.099   0.084   0.082*  0.089   0.083
                       found  0.901   0.954   0.995   0.999*  0.797   0.586
    128 in 64          |cos|  0.115   0.106   0.101   0.099   0.074   0.059*
                       found  0.897   0.911   0.943   0.963*  0.738   0.499
    256 in 128         |cos|  0.093   0.080   0.076   0.073   0.071   0.070*
                       found  0.785   0.846   0.889   0.917   0.945   0.975*
    BatchTopK
    50 in 64, pairs    |cos|  0.018   0.015   0.001*  0.028   0.074   0.076
                       found  0.854   0.882   1.000*  0.867   0.661   0.520
    50 in 100          |cos|  0.098   0.086*  0.090   0.088   0.102   0.090
                       found  0.942   0.981*  0.936   0.871   0.657   0.498
    128 in 64          |cos|  0.109   0.102   0.099   0.094   0.074   0.072*
                       found  0.903   0.951   0.964*  0.934   0.626   0.475

With fewer features than dimensions |cos| is least just where the features are best found: for TopK at 1.5 times their
mean number, which is its 90th percentile, as TopK gives each row as many; for BatchTopK at 1 and 0.6 times. The
projection (in results.json) is least there for the pairs alone; on 50 in 100 it falls to the largest k. With twice as
many features as dimensions both fall to the largest k: on 256 in 128 features are found ever better up to there, but on
128 in 64 ever worse beyond 1.5 (BatchTopK: 1), where rows come to be less alike than the features, whose own |cos| is
0.101. They also fall all the way in the bundled model (512 latents at resid_post.1, k from 2 to 64: 0.129, 0.100,
0.091, 0.084, 0.078, 0.071). So a least value between the k tried is guidance, and where there is none nothing follows.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.table import Table

import sae_jax
from sae_jax import figures
from sae_jax.evaluation.dictionaries import closest
from sae_jax.evaluation.evaluate import on_rows
from sae_jax.progress import plain_console
from sae_jax.testbeds import Pairs, SparseFeatures

BEDS: dict[str, tuple[Any, int]] = {  # and how many features are active, on average
    "50 in 64": (Pairs(d_model=64, n_pairs=25, rate=0.2, correlation=0.5), 10),
    "50 in 100": (SparseFeatures(100, 50, mean_active=10, decay=0.97, correlation_rank=10), 10),
    "128 in 64": (SparseFeatures(64, 128, mean_active=10, decay=0.99, correlation_rank=10), 10),
    "256 in 128": (SparseFeatures(128, 256, mean_active=6, decay=0.99, correlation_rank=10), 6),
}
SHARES = (0.4, 0.6, 1.0, 1.5, 2.4, 3.6)  # k, of the active features
SIGNS = {"decoder_cosine": "mean |cos| of decoder rows", "decoder_projection": "projection, share of the rows' size"}
UNSEEN = 4096


@dataclasses.dataclass(frozen=True)
class Config:
    """Where things go, and how long to train."""

    out: Path = Path("build/true_l0")
    """Folder for results.json and the figure."""
    beds: tuple[str, ...] = tuple(BEDS)
    """Which."""
    variant: str = "topk"
    """topk, batch_topk or matryoshka."""
    rows: int = 262_144
    """Of each bed."""
    steps: int = 1500
    """Optimiser steps, of 512 rows."""
    smoke: bool = False
    """Few steps at two k on the first bed: does it run?"""


def main(config: Config) -> None:
    """Train at every k on each bed in one pass; write OUT/results.json and OUT/true_l0.png."""
    steps, n_rows, shares, beds = config.steps, config.rows, SHARES, config.beds
    if config.smoke:
        steps, n_rows, shares, beds = 20, 4096, SHARES[:2], beds[:1]
    config.out.mkdir(parents=True, exist_ok=True)
    results = []
    for name in beds:
        (bed, active), rng = BEDS[name], np.random.default_rng(1)
        ks = [round(share * active) for share in shares]
        rows_ND, unseen = bed.draw(n_rows, rng).rows, bed.draw(UNSEEN, rng)
        members = {f"k{k}": {"variant": config.variant, "k": k} for k in ks}
        settings = {"n_latents": len(bed.directions), "steps": steps, "batch_size": 512, "ema": 0.0}
        for k, d in zip(ks, sae_jax.train_members(rows_ND, members, dtype="float32", **settings).values(), strict=True):
            found = on_rows(d.sae, unseen.rows)
            cosine = float(closest(bed.directions, np.asarray(d.w_dec))[1].mean())
            measured = {name: found[name] for name in ("fvu", "l0", *SIGNS)}
            results.append({"bed": name, "active": active, "k": k, "cosine": cosine, **measured})
        (config.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    show(results)
    plot(results, config.out / "true_l0.png", config.variant)


def show(results: list[dict[str, Any]]) -> None:
    """A line each."""
    table = Table("bed", "k", "FVU", "L0", "found", *SIGNS)
    for row in results:
        numbers = (f"{row[name]:.4f}" for name in ("cosine", *SIGNS))
        table.add_row(row["bed"], str(row["k"]), f"{row['fvu']:.4f}", f"{row['l0']:.1f}", *numbers)
    plain_console(width=110).print(table)


def plot(results: list[dict[str, Any]], path: Path, variant: str) -> None:
    """Both signs over k, and how well the features are found."""
    figure = figures.new(11, 3.8)
    panels = {**SIGNS, "cosine": "features found, mean cosine"}
    for axis, (name, label) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for bed in dict.fromkeys(row["bed"] for row in results):
            rows = [row for row in results if row["bed"] == bed]
            shares, values = [row["k"] / row["active"] for row in rows], [row[name] for row in rows]
            axis.plot(shares, values, "o-", label=bed, markersize=4)
        axis.axvline(1, color="0.4", linestyle="--", linewidth=1)
        axis.set(xscale="log", xlabel="k / mean number of active features", ylabel=label)
        axis.set_xticks(SHARES, SHARES)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(f"Do decoders say how many latents should be active?\n{variant}, as many latents as features")
    figures.save(figure, path)


if __name__ == "__main__":
    main(tyro.cli(Config))
