"""Does a dictionary trained through the language model hurt it less than one trained on its activations?

Question: at the same k, on the same batches of tokens, how do autoencoders of one site that were trained end to end (on
the KL of the model's predictions, without or with later layers' errors) and locally (on the squared error at the site)
compare in the cross-entropy that the model loses, in its KL and in the variance left unexplained? Each at two learning
rates; the better one, by its own measure on held-out text, stands for its kind.
Guess: end to end loses less cross-entropy at a much larger FVU; with later layers both lie between.
Command: python experiments/end_to_end.py --data SET --out OUT
         python experiments/end_to_end.py --data SET --out OUT2 --k 16 --n-latents 2048 --batch-size 2048 --steps 300 \
             --rates 1e-3 3e-3 --kinds local 'end to end' 'with later layers'
         python experiments/end_to_end.py --data SET --out OUT3 --k 16 --n-latents 2048 --steps 2000 --rates 3e-3
Cost: 11 minutes, 28 and 29 on two cores that had other work.
Answer: yes, with many latents only after more than 2 M tokens. The bundled model, resid_post.2, SET of `sae-jax
harvest configs/demo.yaml`, one seed; 25,000 held-out tokens, on which the model's own cross-entropy is 2.654:

    k = 4 of 512, 512,000 tokens        rate    cross-entropy   recovered   KL      FVU
    local                               0.01    3.536           0.835       0.880   0.306
    end to end                          0.01    3.361           0.867       0.715   1.394

    k = 16 of 2,048, 614,400 tokens
    local                               0.003   2.894           0.955       0.248   0.134
    end to end                          0.003   2.941           0.946       0.322   0.602
    with later layers, weight 0.001     0.003   2.893           0.955       0.259   0.219

    k = 16 of 2,048, 2,048,000 tokens
    local                               0.003   2.815           0.970       0.176   0.103
    end to end                          0.003   2.839           0.965       0.221   0.436

    k = 16 of 2,048, 6,144,000 tokens (an H200, JAX 0.11.2; `--batch-size 2048 --steps 3000 --rates 3e-3`)
    local                               0.003   2.791           0.975       0.162   0.097
    end to end                          0.003   2.775           0.978       0.161   0.257

With 4 latents a token end to end loses a fifth less cross-entropy (0.706 nats for 0.882), and does so at either rate
(0.772 for 0.944 at 0.003), while it reconstructs the activations worse than their mean would. With 16 of 2,048 it
starts behind the local one, by 0.047 nats after 0.6 M tokens and 0.024 after 2 M, and is ahead of it after 6 M, two
epochs: it then loses an eighth less (0.121 nats for 0.136), at 2.7 times the FVU. With later layers the difference to
local was 0.0003 after 0.6 M. The 2 M and 6 M tokens were at one rate, the better of two before for both. So the guess
holds, given tokens enough.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import matplotlib
import tyro
from bundled import demo_recipe, harvested

import sae_jax
from sae_jax import figures
from sae_jax.progress import console

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# kind: its settings, and the measure by which its learning rate is chosen
KINDS = {
    "local": ({"objective": "local"}, "fvu"),
    "end to end": ({}, "kl"),
    "with later layers": ({"downstream": 0.001}, "kl"),
}
SHOWN = ("ce_clean", "ce_sae", "loss_recovered", "kl", "fvu", "l0", "dead_fraction")


@dataclasses.dataclass(frozen=True)
class Config:
    """Where things are, and how long to train."""

    out: Path = Path("build/end_to_end")
    """Folder for the run, results.json and the figure."""
    data: Path | None = None
    """The demo's activation set; made in `out` if not given."""
    k: int = 4
    """Active latents a token, of all."""
    n_latents: int = 512
    """Width, of all."""
    batch_size: int = 1024
    """Tokens a step."""
    rates: tuple[float, ...] = (3e-3, 1e-2)
    """Learning rates of each kind."""
    kinds: tuple[str, ...] = ("local", "end to end")
    """Of `local`, `end to end` and `with later layers`."""
    steps: int = 500
    """Optimiser steps."""
    tokens: int = 25_000
    """Held-out tokens to measure on."""
    smoke: bool = False
    """A few steps of small dictionaries on a hundredth of the text: does it run?"""


def main(config: Config) -> None:
    """Train all from one pass over the sequences, measure each, write OUT/results.json and OUT/end_to_end.png."""
    steps, tokens, rates = (8, 1024, config.rates[:1]) if config.smoke else (config.steps, config.tokens, config.rates)
    recipe = demo_recipe(config.smoke)
    data = harvested(recipe, config.data, config.out)
    run = config.out / "run"
    members = {name(kind, rate): {**KINDS[kind][0], "lr": rate} for kind in config.kinds for rate in rates}
    settings = {"k": config.k, "n_latents": config.n_latents, "batch_size": config.batch_size, "ema": 0.0}
    settings |= {"dtype": "float32", "steps": steps, "decay": 0.2, "input_norm": "none"}
    settings |= {"train_config": recipe.train, "site": recipe.site, "out": run}
    sae_jax.train_members(data, members, variant="end_to_end", **settings)
    results: dict[str, dict[str, Any]] = {}
    evaluations = sae_jax.evaluate(*(str(run / "members" / member) for member in members), tokens=tokens)
    for kind in config.kinds:
        found = []
        for rate in rates:
            measured = evaluations[str(run / "members" / name(kind, rate))]
            found.append({"lr": rate, **{key: measured[key] for key in SHOWN}})
            console.print(f"{kind}: {json.dumps(found[-1])}")
        results[kind] = {**min(found, key=lambda row: row[KINDS[kind][1]]), "all": found}
    (config.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(results, config.out / "end_to_end.png")


def name(kind: str, rate: float) -> str:
    """Of the member."""
    return f"{kind.replace(' ', '-')}-{rate}"


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """What the model loses against what is left of the activations, a point for each run, full for the chosen ones."""
    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for kind, chosen in results.items():
        colour = axes.scatter([], [], label=kind).get_facecolor()
        for row in chosen["all"]:
            face = colour if row["lr"] == chosen["lr"] else "none"
            axes.scatter(row["fvu"], row["ce_sae"] - row["ce_clean"], facecolors=face, edgecolors=colour)
    for face, label in (("0.4", "at the rate that was chosen"), ("none", "at other rates")):
        axes.scatter([], [], facecolors=face, edgecolors="0.4", label=label)
    axes.set(xlabel="FVU at the site, share of variance", ylabel="cross-entropy lost, nats a token", xscale="log")
    figures.label_logarithmic(axes.xaxis)
    axes.set_title("What does the model lose, beside what is left of the activations?", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Config))
