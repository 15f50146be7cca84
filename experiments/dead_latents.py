"""Do latents die for want of a transposed decoder at the start, of AuxK, or of both?

Question: which share of the latents of a TopK autoencoder on the bundled model is dead at the end when the decoder
begins as the transposed encoder or at random, with AuxK and without, at 2^13 latents, and at 2^15 with both and with
neither?
Guess: most without both, under 5 % with both, and each alone between.
Command: sae-jax harvest configs/demo.yaml --out SET
         python experiments/dead_latents.py --data SET --out OUT
Cost: 9 minutes on two busy cores, 4.4 of them of CPU time.
Answer: not in so short a run; the guess was wrong, and the other way round. d_model 128, k = 16, batch 512, rate 1e-3,
one seed; a latent is dead after 50,000 tokens without firing:

    latents   decoder       AuxK    tokens     dead      FVU of batch
    8,192     transposed    yes     512,000    10.0 %    0.1178
              transposed    no                  2.9 %    0.1171
              independent   yes                 0.7 %    0.1506
              independent   no                  0.6 %    0.1504
    32,768    transposed    yes     153,600     3.4 %    0.1754
              independent   no                  0.0 %    0.3836

The transposed decoder is worth a fifth of the FVU here, AuxK nothing. Shares were still rising: at 409,000 tokens those
of 8,192 latents were 1.8, 0.9, 0.1 and 0.0 %, so these are beginnings, not ends. A latent of 8,192 fires 98 times in a
window on average, but activity is uneven, and a rare latent counts as dead. That most latents die without both was
reported of far longer runs (arXiv 2406.04093); whether they do on this set with a longer window is open.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import matplotlib
import tyro

from sae_jax.activations.harvest import harvest
from sae_jax.commands import recipe
from sae_jax.commands.train import Train, train
from sae_jax.progress import console
from sae_jax.train import logs

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RECIPE = Path(__file__).parents[1] / "configs" / "demo.yaml"
# name: how the decoder begins, weight of AuxK
KINDS = {
    "both": ("transposed", 1 / 32),
    "transposed": ("transposed", 0.0),
    "auxk": ("independent", 1 / 32),
    "neither": ("independent", 0.0),
}
SHOWN = ("dead_fraction", "fvu")
SETTING = ("--sae.input-norm=layer_norm", "--train.ema=0", "--train.log-every=100")


@dataclasses.dataclass(frozen=True)
class Config:
    """Where things are, what is trained and what counts as dead."""

    out: Path = Path("build/dead_latents")
    """Folder for the runs, results.json and dead_latents.png."""
    data: Path | None = None
    """The demo's activation set; made in `out` if not given."""
    n_latents: int = 2**13
    """Of every dictionary."""
    k: int = 8
    """Active latents a token."""
    batch_size: int = 256
    """Rows a step; few, so that a latent takes many steps in few tokens."""
    rate: float = 2e-3
    """Learning rate."""
    steps: int = 7800
    """Optimiser steps."""
    window: int = 200_000
    """Tokens without firing after which a latent is dead; k / n_latents of them is how often one fires on average."""
    kinds: tuple[str, ...] = tuple(KINDS)
    """Which to train."""
    smoke: bool = False
    """Twenty steps at 256 latents on a hundredth of the text: does it run?"""


def main(config: Config) -> None:
    """Train all from one pass over the data, collect, draw."""
    n_latents, steps, window = (256, 20, 2_000) if config.smoke else (config.n_latents, config.steps, config.window)
    data, run = config.data or config.out / "set", config.out / "run"
    small = ["--harvest.tokens=20480"] if config.smoke else []
    if not data.exists():
        harvest(recipe.parse(recipe.Recipe, [str(RECIPE), *small], "dead_latents").harvest, str(data))
    members = []
    for name in config.kinds:
        decoder, coefficient = KINDS[name]
        members.append(f"{name} --sae.decoder={decoder} --sae.aux_coefficient={coefficient}")
    words = [str(RECIPE), f"--data={data}", f"--out={run}", *SETTING, f"--sae.n_latents={n_latents}"]
    words += [f"--sae.k={config.k}", f"--train.batch_size={config.batch_size}", f"--train.lr={config.rate}"]
    words += [f"--train.steps={steps}", f"--train.dead_after_tokens={window}", "--members", *members]
    train(recipe.parse_members(Train, words, "dead_latents"))
    results = []
    for name in config.kinds:
        rows = logs.read_metrics(run / "members" / name)
        results.append({"name": name, "curve": [[row[key] for key in ("tokens", *SHOWN)] for row in rows]})
        console.print("{}: {:,} tokens, {:.1%} dead, fvu {:.4f}".format(name, *results[-1]["curve"][-1]))
    (config.out / "results.json").write_text(json.dumps(results) + "\n")

    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for own in results:
        tokens, dead, _ = zip(*own["curve"], strict=True)
        axis.plot(tokens, dead, label=own["name"])
    axis.set(xlabel="tokens", ylabel=f"share of latents silent for {window:,} tokens", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(config.out / "dead_latents.png", dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Config))
