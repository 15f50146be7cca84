"""Does a crosscoder of two models find what only one of them has, and nothing where there is nothing?

Question: a crosscoder's latents are said to be of one model alone where their decoder row in the other is small, by the
relative norm r = ||d^b|| / (||d^a|| + ||d^b||). (1) Of the bundled language model with itself, the two sides begun
independently, is r near 0.5 for all latents? (2) Of two models that share 64 directions and have 16 each of their own
(`testbeds.PlantedChange`), are these found among the latents with r < 0.3 and r > 0.7, with a precision and a recall of
at least 0.9, while the rows of shared latents keep a cosine above 0.9? With a penalty and with BatchTopK.
Guess: (1) yes, all within 0.45 and 0.55; (2) yes, fewer false ones with BatchTopK.
Command: python experiments/model_diff.py --out OUT
Cost: 6 minutes on two cores with much else running on them.
Answer: yes, to both (JAX 0.10.2, CPU; figures/model_diff.png). Latents are those active on a thousandth of the rows.
(1) After 1,000 steps on 256,000 tokens, 1,024 latents at an FVU of 0.193 with 16.0 active: r is 0.4968 to 0.5025.
(2) After 2,000 steps of 1,024 rows, 128 latents:

                  r < 0.3                 r > 0.7                 between   shared      least cosine    FVU
                  n   precision  recall   n   precision  recall   n         directions  of their rows
    relu, seed 0  21  1          1        19  1          1        78        all         0.9999          0.017
    relu, seed 1  20  1          1        22  1          1        71        all         0.9999          0.017
    batch_topk 0  16  1          1        16  1          1        64        all         1.0000          0.00002
    batch_topk 1  16  1          1        15  1          0.94     66        62 of 64    0.18            0.00005

A latent is a planted direction from a cosine of 0.9 on. No latent that looks exclusive is not. With the penalty some
directions have two latents, and values are too small (gamma 0.88 in seed 0), which is most of its FVU. BatchTopK finds
every direction once, but for seed 1: there one shared direction, one of a and one of b are mixed in three latents whose
two rows point apart, one of which (r = 0.28) counts for a, and one shared direction has two latents, the nearer one at
a cosine of 0.89998. Latent scaling of the latents of b: a's error holds nothing of them (nu within 0.006 of 0), a's
reconstruction as much as a itself, by the overlap of planted directions (within 0.11).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import tyro

import sae_jax
from sae_jax import open_activations, testbeds
from sae_jax.activations.harvest import HarvestConfig, harvest
from sae_jax.activations.sample import sample_rows
from sae_jax.evaluation import diffing
from sae_jax.evaluation.dictionaries import closest
from sae_jax.progress import console
from sae_jax.types import Sites

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BED = testbeds.PlantedChange(d_model=64, n_shared=64, n_exclusive=16)
# name: settings. The penalty is 1, not 2: rows are made of few features of known strength, which 2 shrinks by a fourth.
KINDS = {
    "relu": {"activation": "relu", "l1_coefficient": 1.0},
    "batch_topk": {"activation": "batch_topk", "k": 5, "threshold_decay": 0.999},
}
ALIVE = 1e-3  # share of rows in which a latent must be active to count; a planted feature is in 0.05 of them
SAME = 0.9  # cosine from which on a decoder row is a planted direction


@dataclasses.dataclass(frozen=True)
class Config:
    """Where things are, and how long to train."""

    out: Path = Path("build/model_diff")
    """Folder for sets, runs, results.json and model_diff.png."""
    steps: int = 2000
    """Optimiser steps on the planted rows, 1,024 rows each; half as many on the language model."""
    seeds: int = 2
    """Runs of each kind."""
    smoke: bool = False
    """Eight small steps on a hundredth of the rows: does it run?"""


def main(config: Config) -> None:
    """Train both crosscoders, split their latents, draw."""
    steps, seeds = (8, 1) if config.smoke else (config.steps, config.seeds)
    text = HarvestConfig(("a=bundled", "b=bundled"), tokens=2_560 if config.smoke else 256_000)
    itself, planted = config.out / "itself", config.out / "planted"
    if not itself.exists():
        harvest(text, str(itself))
    if not planted.exists():
        testbeds.write(BED, planted, 4_000 if config.smoke else 400_000)
    results: dict[str, Any] = {}
    size = {"batch_size": 256 if config.smoke else 1024}
    wide = {"n_latents": 128 if config.smoke else 1024, "l1_coefficient": 2.0, **size}
    for name, own in members(itself, ["a.resid_post.2", "b.resid_post.2"], steps // 2, {"itself": {}}, wide).items():
        results[name] = {"r": quantiles(own["r"]), **own["facts"]}
        plot(own["r"], "the bundled model and itself", 1)
    runs = {f"{kind}-{seed}": {**changes, "seed": seed} for kind, changes in KINDS.items() for seed in range(seeds)}
    for name, own in members(planted, ["a", "b"], steps, runs, {"n_latents": 128, **size}).items():
        results[name] = {**recovered(own), **own["facts"]}
        if name.endswith("-0"):
            plot(own["r"], f"planted, {name.removesuffix('-0')}", 2 + list(KINDS).index(name.removesuffix("-0")))
    for name, result in results.items():
        console.print(name, json.dumps(result))
    (config.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    plt.gcf().set_size_inches(12, 3.2)
    plt.tight_layout()
    plt.savefig(config.out / "model_diff.png", dpi=120)


def members(
    data: Path, sites: list[str], steps: int, runs: dict[str, dict[str, Any]], settings: dict[str, Any]
) -> dict[str, Any]:
    """{name: what is known of the latents that are alive} after a training of these runs on one pass over the rows."""
    out = data.with_name(f"{data.name}-run")
    settings = {
        "variant": "crosscoder",
        "dtype": "float32",
        "steps": steps,
        "decay": 0.2,
        **settings,
    }
    settings |= {"lr": 1e-3, "ema": 0.0, "dead_after_tokens": 100_000}
    saes = sae_jax.train_members(data, runs, out=out, site=tuple(sites), **settings)
    activations, both = open_activations(data), Sites(tuple(sites), tuple(sites))
    a, b = (diffing.side(activations, both, name) for name in sites)
    rows_NX = np.concatenate([sample_rows(activations, name) for name in sites], axis=1)
    found = {}
    for name in runs:
        sae = saes[name].sae
        code, error_NX = sae.encode(rows_NX), rows_NX - np.asarray(sae(rows_NX))
        active_NK, n_latents = np.asarray(code.values) > 0, sae.b_enc.shape[0]
        rate_F = np.bincount(np.asarray(code.indices)[active_NK], minlength=n_latents) / len(rows_NX)
        (alive,) = np.nonzero(rate_F > ALIVE)
        fvu = (error_NX**2).sum() / ((rows_NX - rows_NX.mean(0)) ** 2).sum()
        relative_F = diffing.relative_norms(sae, a, b)
        exclusive_b = alive[diffing.split(relative_F[alive]).b]
        found[name] = {
            "r": relative_F[alive],
            "cosines": diffing.decoder_cosines(sae, a, b)[alive],
            "rows": [np.asarray(sae.w_dec)[alive][:, at.columns] for at in (a, b)],
            "scaling": diffing.latent_scaling(sae, [rows_NX], exclusive_b, b, a),
            "facts": {"fvu": float(fvu), "l0": float(active_NK.sum(1).mean()), "alive": len(alive)},
        }
    return found


def quantiles(values: np.ndarray) -> dict[str, float]:
    """The least, the 1st, 50th and 99th percentile, and the greatest."""
    return {str(q): round(float(np.percentile(values, q)), 4) for q in (0, 1, 50, 99, 100)}


def recovered(own: dict[str, Any]) -> dict[str, Any]:
    """How well the split is the planted one."""
    split, result = diffing.split(own["r"]), {}
    for name, chosen, rows_FD in (("a", split.a, own["rows"][0]), ("b", split.b, own["rows"][1])):
        truth_GD = BED.directions[BED.side == name]
        if not chosen.any():
            result[name] = {"n": 0, "precision": None, "recall": 0.0}
            continue
        precision, recall = (
            closest(*pair)[1] > SAME for pair in ((rows_FD[chosen], truth_GD), (truth_GD, rows_FD[chosen]))
        )
        result[name] = {"n": int(chosen.sum()), "precision": float(precision.mean()), "recall": float(recall.mean())}
    # Of each shared direction the latent that is nearest in a.
    latent_G, cosine_G = closest(BED.directions[BED.side == "both"], own["rows"][0])
    of_found = own["cosines"][latent_G]
    result["shared"] = {
        "n": int(split.shared.sum()),
        "recall": float((split.shared[latent_G] & (cosine_G > SAME)).mean()),
        "least cosine of the planted": round(float(of_found.min()), 4),
        "cosine above 0.9, share of all": round(float((own["cosines"][split.shared] > SAME).mean()), 4),
    }
    for name in ("nu_error", "nu_reconstruction"):
        nu = getattr(own["scaling"], name)
        result[name] = quantiles(nu[np.isfinite(nu)]) if np.isfinite(nu).any() else None
    return result


def plot(relative: np.ndarray, title: str, place: int) -> None:
    """One histogram of relative norms."""
    counts, edges = diffing.histogram(relative)
    axes = plt.subplot(1, 1 + len(KINDS), place)
    axes.stairs(counts, edges, fill=True)
    for bound in (diffing.LOW, diffing.HIGH):
        axes.axvline(bound, color="0.6", linewidth=0.8)
    axes.set_title(title)
    axes.set_xlabel("relative decoder norm r")
    axes.set_ylabel("latents")


if __name__ == "__main__":
    main(tyro.cli(Config))
