"""When does a toy model put features in superposition, and do sparse autoencoders take them out again?

Question: 80 features of falling importance in 20 dimensions: how many does the model keep, and what share of a
dimension has each, as they become rarer? Are the directions of those it keeps found by TopK and ReLU autoencoders
trained on its hidden layer?
Guess: dense features get a dimension each and the rest none; rare ones share, half a dimension each at first, then
less. Autoencoders find them above 0.9 where features are rare, and not where they are dense; PCA and ICA never.
Command: python experiments/superposition.py --out OUT
Cost: 11 minutes on two cores with much else running on them.
Answer: features that are kept (squared norm above 0.5), their mean share of a dimension, and the mean greatest cosine
of their directions with the decoders of 80 latents (TopK with k = the mean number of active features; ReLU by
coefficient) and of baselines (JAX 0.10.2, CPU; figures/superposition.png):

    density   kept   share    TopK    ReLU 0.03   0.1     0.3     random   PCA     ICA
    1         20     0.992
    0.5       23     0.869
    0.3       26     0.769    0.893   0.895       1.000   0.998   0.493    0.629   0.978
    0.2       28     0.714
    0.1       33     0.606    1.000   0.980       1.000   1.000   0.513    0.700   1.000
    0.05      38     0.526    0.999   0.918       0.996   1.000   0.533    0.782   0.946
    0.03      42     0.475
    0.02      46     0.431    1.000   0.828       0.980   1.000   0.515    0.729   0.916
    0.01      48     0.410

The picture is as guessed: from 20 features with a dimension each, over pairs in opposite directions, to more than two
on a dimension. Autoencoders find what the model keeps, also where 24 of 80 features are active on a row: only TopK,
which has to choose 24 of 26, and the smallest penalty fall below 0.9 there. ICA was guessed wrong: opposite directions
are one axis with two signs, and as long as there are no more axes than dimensions it finds them; it loses ground when
there are. PCA never finds them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import tyro

import sae_jax
from sae_jax import testbeds
from sae_jax.evaluation import baselines
from sae_jax.evaluation.dictionaries import mmcs
from sae_jax.progress import console

matplotlib.use("Agg")
import matplotlib.pyplot as plt

N_FEATURES, D_MODEL = 80, 20
DENSITIES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01)
LEARNT = (0.3, 0.1, 0.05, 0.02)  # densities at which autoencoders are trained
COEFFICIENTS = (0.03, 0.1, 0.3)
KEPT = 0.5  # squared norm of a feature that the model represents


@dataclasses.dataclass(frozen=True)
class Config:
    """Where things are, and how long to train."""

    out: Path = Path("build/superposition")
    """Folder for the sets, the runs, results.json and the figure."""
    rows: int = 200_000
    """Of each set."""
    steps: int = 2000
    """Optimiser steps of the autoencoders, of 512 rows."""
    smoke: bool = False
    """One density of a small model, few rows and steps: does it run?"""


def main(config: Config) -> None:
    """The picture of the models, then autoencoders and baselines at each density."""
    densities, learnt = ((0.1,), (0.1,)) if config.smoke else (DENSITIES, LEARNT)
    rows, steps = (8192, 20) if config.smoke else (config.rows, config.steps)
    d_model, n_features = (4, 8) if config.smoke else (D_MODEL, N_FEATURES)
    beds = {density: testbeds.Superposition(d_model, n_features, density) for density in densities}
    results: dict[str, dict[str, float]] = {}
    for density, bed in beds.items():
        kept = (bed.weights**2).sum(1) > KEPT
        results[f"{density:g}"] = {"kept": int(kept.sum()), "dimensionality": float(bed.dimensionality[kept].mean())}
    for density in learnt:
        results[f"{density:g}"] |= recovery(beds[density], config.out / f"{density:g}", rows, steps)
    for density, found in results.items():
        console.print(f"density {density:5}" + "".join(f"  {name} {value:.3g}" for name, value in found.items()))
    (config.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(list(beds.values()), results, config.out / "superposition.png")


def recovery(bed: testbeds.Superposition, out: Path, rows: int, steps: int) -> dict[str, float]:
    """MMCS of the directions that the model keeps with each dictionary for its hidden layer."""
    if not (out / "set").exists():
        testbeds.write(bed, out / "set", rows)
    k = math.ceil(bed.density * bed.n_features)
    members = {"topk": {"variant": "topk", "k": k}}
    members |= {f"relu-{c:g}": {"variant": "relu", "l1_coefficient": c, "sparsity_warmup": 0.0} for c in COEFFICIENTS}
    settings = {"n_latents": bed.n_features, "dtype": "float32", "steps": steps, "decay": 0.5}
    settings |= {
        "input_norm": "none",
        "batch_size": 512,
        "lr": 3e-3,
        "ema": 0.0,
        "dead_after_tokens": 50_000,
        "log_every": 500,
    }
    # Without k of its own, topk would begin with more than there are latents.
    saes: dict[str, Any] = sae_jax.train_members(out / "set", members, out=out / "run", k=k, **settings)
    sample_ND = bed.draw(16_384, np.random.default_rng(1)).rows
    saes |= {"random": baselines.random(sample_ND, bed.n_features), "PCA": baselines.pca(sample_ND)}
    saes["ICA"] = baselines.ica(sample_ND)
    truth_GD = bed.directions[(bed.weights**2).sum(1) > KEPT]
    return {name: mmcs(truth_GD, sae.w_dec)[0] for name, sae in saes.items()}


def plot(beds: list[testbeds.Superposition], results: dict[str, dict[str, float]], path: Path) -> None:
    """Left: the share of a dimension of every feature at every density. Right: what was found."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    shares_GS = np.stack([bed.dimensionality * ((bed.weights**2).sum(1) > KEPT) for bed in beds], axis=1)
    image = left.imshow(shares_GS, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    left.set_xticks(range(len(beds)), [f"{bed.density:g}" for bed in beds])
    left.set(xlabel="density", ylabel="feature, most important first", title="share of a dimension")
    figure.colorbar(image, ax=left)
    learnt = [density for density, found in results.items() if "topk" in found]
    for name in [name for name in results[learnt[0]] if name not in ("kept", "dimensionality")]:
        right.plot([float(d) for d in learnt], [results[d][name] for d in learnt], "o-", label=name, markersize=4)
    right.set(xscale="log", xlabel="density", ylabel="MMCS of features that are kept", ylim=(0, 1.02))
    right.set_xticks([float(density) for density in learnt], learnt)
    right.minorticks_off()
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Config))
