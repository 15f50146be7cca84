"""Can one code be cut to any length?

Question: of a TopK autoencoder trained at k = 32, decoded from its k' largest latents, what is left at k' from 2 to 128
beside autoencoders trained at that very k'? And is one trained with Multi-TopK (k and 4 k at once) better at it?
Guess: TopK is near its own k' only around 32 and gets worse beyond it; Multi-TopK keeps falling up to 128, and costs
little at 32 (Gao et al. 2024, sections 5.3 and A.2: a code that is good at every length is progressive).
Command: python experiments/progressive_codes.py --out OUT
Cost: 13 minutes on two cores that had other work.
Answer: yes to both. resid_post.2 of the bundled model, d_model 128; 2,048 latents, 1,000 steps of 2,048 rows, rate
4e-3, one seed; FVU of 32,768 held-out tokens, decoded from the k' largest latents (JAX 0.10.2, CPU;
figures/progressive_codes.png):

    k'                          2       4       8       16      32      64      128
    trained at that k           0.315   0.217   0.146   0.103   0.071   0.037   0.0001
    TopK at 32                  0.638   0.441   0.257   0.132   0.071   0.074   0.108
    Multi-TopK at 32 and 128    0.656   0.475   0.293   0.154   0.078   0.050   0.040

Beyond its k TopK adds latents that it was never asked to weigh, and gets worse; Multi-TopK goes on falling. It pays for
that with a tenth at 32 and 15 % at 8. Cut short, both leave about twice what a code made for that length leaves.

The same where 4 k is far below the 128 dimensions (`--k 8 --steps 2000`, JAX 0.11.2, an H200):

    k'                          2       4       8       16      32      64      128
    trained at that k           0.285   0.198   0.137   0.097   0.064   0.030   0.0001
    TopK at 8                   0.391   0.218   0.137   0.136   0.192   0.257   0.280
    Multi-TopK at 8 and 32      0.406   0.225   0.135   0.107   0.097   0.096   0.096

Here it costs nothing at its own k (1 % less than TopK), 3 to 4 % below, and what it leaves at 4 k stays beyond: so the
tenth that it cost above was for want of dimensions.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from bundled import harvested, held_out_rows, laptop_recipe
from rich.table import Table

import sae_jax
from sae_jax.evaluation.evaluate import on_rows
from sae_jax.progress import plain_console
from sae_jax.saes.base import AbstractSae

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LENGTHS = (2, 4, 8, 16, 32, 64, 128)


@dataclasses.dataclass(frozen=True)
class Config:
    """Where things are, and how long to train."""

    out: Path = Path("build/progressive_codes")
    """Folder for the set, the run, results.json and the figure."""
    data: Path | None = None
    """The set of configs/scaling_laptop.yaml; made in `out` if not given."""
    n_latents: int = 2048
    """Of every dictionary."""
    k: int = 32
    """Active latents a row, of those whose codes are cut."""
    steps: int = 1000
    """Optimiser steps, of 2048 rows."""
    lr: float = 4e-3
    """Learning rate; it falls to 0 over the last fifth."""
    smoke: bool = False
    """A few steps of small ones: does it run?"""


def main(config: Config) -> None:
    """Train all in one pass, decode each at every length; write OUT/results.json and OUT/progressive_codes.png."""
    recipe = laptop_recipe(config.smoke)
    data = harvested(recipe, config.data, config.out)
    k, n, steps = (config.k, 256, 5) if config.smoke else (config.k, config.n_latents, config.steps)
    lengths = LENGTHS[3:5] if config.smoke else LENGTHS
    members = {f"topk{length}": {"k": length} for length in lengths} | {f"multi{k}": {"k": k, "multi_topk": 0.125}}
    settings = {"n_latents": n, "steps": steps, "decay": 0.2, "input_norm": "none", "lr": config.lr}
    start = {"sae_config": recipe.sae, "train_config": recipe.train, "site": recipe.site, "out": config.out / "run"}
    trained = sae_jax.train_members(data, members, **start, **settings)

    rows_ND = held_out_rows(recipe, data, config.smoke)

    def fvu(name: str, length: int) -> float:
        return on_rows(at_length(trained[name].sae, length), rows_ND)["fvu"]

    results = {
        "trained at that k": [fvu(f"topk{length}", length) for length in lengths],
        f"TopK at {k}": [fvu(f"topk{k}", length) for length in lengths],
        f"Multi-TopK at {k} and {4 * k}": [fvu(f"multi{k}", length) for length in lengths],
    }
    (config.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    shown = Table("trained", *map(str, lengths), title="FVU on held-out rows, decoded from the k' largest latents")
    for name, row in results.items():
        shown.add_row(name, *(f"{value:.4f}" for value in row))
    plain_console(width=120).print(shown)
    plot(lengths, results, config.out / "progressive_codes.png")


def at_length(sae: AbstractSae, k: int) -> AbstractSae:
    """The same weights, selecting k latents a row."""
    return dataclasses.replace(sae, config=dataclasses.replace(sae.config, k=k))


def plot(lengths: Sequence[int], results: dict[str, list[float]], path: Path) -> None:
    """FVU against the number of latents that are decoded."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, row in results.items():
        axis.plot(lengths, np.array(row), "o-", markersize=3, label=name)
    axis.set(xscale="log", yscale="log", xlabel="latents decoded a row", ylabel="FVU of held-out rows")
    axis.set_xticks(lengths, map(str, lengths))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Config))
