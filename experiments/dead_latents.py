"""Do latents die for want of a transposed decoder at the start, of AuxK, or of both?

Question: which share of the latents of a TopK autoencoder on the bundled model is dead at the end when the decoder
begins as the transposed encoder or at random, with AuxK and without?
Guess: most without both, under 5 % with both, and each alone between.
Command: sae-jax harvest configs/demo.yaml --out SET
         python experiments/dead_latents.py --data SET --out OUT
         python experiments/dead_latents.py --data SET --out OUT2 --rate 2e-3
Cost: 22 minutes (run as two pairs of kinds) and 27 on two cores with much other work.
Answer: yes, for want of AuxK above all. resid_post.2, d_model 128, layer_norm; 8,192 latents, k = 8, 256 rows a step,
one epoch, one seed; dead: silent for 200,000 tokens, in which a latent fires 195 times on average; FVU: mean of the
last ten batches that were logged (JAX 0.10.2, CPU; figures/dead_latents.png is rate 1e-3). AuxK looked at all rows:
what is now `--kinds all_rows`, beside which `both` looks at a sample of them while many are dead; see the end.

    rate   decoder       AuxK   dead after 0.5 M   1.0 M    1.5 M    2.0 M tokens   FVU
    1e-3   transposed    yes            0.1 %      1.2 %    0.9 %     0.9 %         0.118
           transposed    no             0.1 %     23.2 %   47.0 %    54.4 %         0.120
           independent   yes            0.2 %      6.0 %    1.2 %     1.1 %         0.135
           independent   no             0.2 %     30.3 %   58.3 %    67.0 %         0.153
    2e-3   transposed    yes            0.9 %      4.4 %   13.3 %    25.1 %         0.129
           transposed    no            13.5 %     52.4 %   60.9 %    63.0 %         0.130
           independent   yes            3.9 %      2.8 %    5.1 %    13.9 %         0.141
           independent   no            12.0 %     45.5 %   58.4 %    63.8 %         0.158

AuxK keeps latents alive, and the transposed decoder is worth more of the FVU. At twice the rate AuxK loses its latents
again. Of those silent on 4,096 rows most then have no pre-activation above 0 on any of them (median of their largest:
-0.14; at 1e-3: 0.62), and a ReLU passes such a latent no gradient. So k_aux makes no difference: at k = 16, rate 4e-3,
512 rows a step, 27.4, 27.5 and 28.1 % were dead after 0.8 M tokens with 16, 64 and 512 (44.5 % with neither).

Whether latents die hangs on the rate and on how many rows reach one in a step, k * rows / latents: with k = 16 and 1024
rows none had died after 0.8 M tokens at 1e-3, with both or neither, but 11.8 and 35.1 % at 4e-3. And the window must be
long. At 50,000 tokens (k = 16, 512 rows, 1e-3, no layer_norm, 0.5 M tokens) the order was the other way round, 10.0 %
dead with both and 0.6 % with neither: AuxK then seems to pull away latents that are only rare. Of 32,768 latents none
or 3.4 % were dead so (neither, both), but after 0.15 M tokens, before any die; longer was not run.

The window and AuxK's rows at the defaults of short runs: resid_post.2, k = 32, ema 0, else only what is named; silent:
on 32,768 held-out tokens; firings: of a latent in the window, on average; dead: at most, in the log (`train_members(
SET, {"a": {"dead_after_tokens": 40_000, "aux_rows": "all"}}, n_latents=..., k=32, steps=..., batch_size=..., ema=0.0)`;
one seed, JAX 0.10.2, CPU):

    latents  steps, batch   window            firings   rows      FVU      silent   dead
    4,096    976, 512       50 k (a tenth)    390       sampled   0.0779    7.9 %    2.7 %
                            20 k              156                 0.0777    1.5 %    1.6 %
                            10 k               78                 0.0775    0.2 %    1.6 %
                             5 k               39                 0.0769    0.0 %    4.7 %
    8,192    488, 1,024     20 k               78       sampled   0.0790   11.4 %   13.6 %
                                               78       all       0.0786    5.9 %   26.5 %
                            10 k               39       sampled   0.0796   28.2 %   31.4 %
                                               39       all       0.0790   14.3 %   44.3 %
    16,384   488, 2,048     100 k (a tenth)   195       sampled   0.0712   26.8 %   13.7 %
                            40 k               78       sampled   0.0715   37.9 %   32.9 %
                                               78       all       0.0709   41.4 %   42.7 %
                            20 k               39       sampled   0.0722   46.8 %   46.0 %
             at 0.7 of the rate       100 k   195       sampled   0.0759   16.9 %    9.6 %

A tenth of the run is too long for 4,096 latents, two thirds of whose silent ones it never sees; a shorter window, which
helps them, is worse at 16,384: a share of the run is right for none but by chance, and so is a number of firings.
A lower rate loses fewer and leaves more unexplained: 0.0818 for 0.0779 at 4,096 (2.5 % silent), 0.0759 for 0.0712 here.
What goes wrong differs. With 16,384 and a tenth, hardly any latent dies in the first 200 steps; those silent at the end
are still near the threshold (median of their largest pre-activation 1.80, of the 32nd largest of a row 1.87). With
short windows latents that were only rare count as dead from step 30 on, AuxK moves them, and half of those silent at
the end have a largest pre-activation below 0.17 (20 k): it loses what it was to save. So the default stayed. Sampled
rows bring back fewer than all at 8,192 (twice as many silent with either window; with 10,240 tokens in place of 10 k
26.2 %), but not at 16,384, where both lose them.

Wider, with windows to fit: a million tokens at 2^15 latents, two million at 2^17, in which one fires 488 times on
average (the set of configs/scaling_laptop.yaml, one seed, JAX 0.11.2, an H200 with other runs beside; `--n-latents
32768 --k 16 --batch-size 1024 --rate 5e-4 --steps 4880 --window 1000000 --kinds both neither`, and `--n-latents 131072
--k 32 --batch-size 2048 --rate 2.5e-4 --steps 2440 --window 2000000 --kinds both`):

    latents            dead after 2.0 M   3.0 M    4.0 M    5.0 M tokens   FVU
    32,768   both             0.0 %       0.1 %    4.2 %     8.8 %         0.075
             neither          0.0 %       2.7 %   26.2 %    46.2 %         0.095
    131,072  both             0.0 %       0.0 %    0.0 %     0.0 %         0.059

At 2^15 AuxK and the transposed decoder lose a fifth of what is lost without, but not less than 5 %, and the share still
rises. At 2^17 two and a half windows are too few for a verdict.

What else may keep 16,384 latents alive in a short run (as in the table before: 488 steps of 2,048 rows, k = 32, ema 0,
a window of a tenth; one setting changed each time; one seed, JAX 0.11.2, an H200):

                                            FVU      silent
    as it is                                0.0729   28.0 %
    aux_coefficient 1/4 for 1/32            0.0743    9.5 %
    aux_coefficient 1/8, k_aux 512 for 64   0.0733   14.2 %
    k_aux 512                               0.0731   25.7 %
    warmup 0.3                              0.0765   14.5 %
    beta1 0                                 0.0780   15.6 %
    beta2 0.99                              0.0720   36.1 %
    eps 1e-4                                0.1265    0.0 %
    k from 64 down to 32 over 250 steps     0.0788   32.6 %
    decay over 0.5, over all of the run     0.0749   32.5 %    0.0826   19.0 %
    decay over all of it, AuxK on all rows, k_aux 512   0.0824   18.9 %

The rate is what kills, and what the dictionary learns by: at 0.7 of it, falling from the first step, 6 % are silent
and FVU is 0.0903. Of what was tried a stronger AuxK costs least: eight times the paper's weight leaves a third of the
silent latents for 2 % of the FVU. It is no default: other widths, seeds and longer runs were not tried with it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import matplotlib
import tyro
from bundled import demo_recipe, harvested

import sae_jax
from sae_jax.progress import console
from sae_jax.training import logs

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# name: how the decoder begins, weight of AuxK, rows that it looks at
KINDS = {
    "both": ("transposed", 1 / 32, "sampled"),
    "transposed": ("transposed", 0.0, "sampled"),
    "auxk": ("independent", 1 / 32, "sampled"),
    "neither": ("independent", 0.0, "sampled"),
    "all_rows": ("transposed", 1 / 32, "all"),
}
SETTINGS = ("decoder", "aux_coefficient", "aux_rows")
SHOWN = ("dead_fraction", "fvu")


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
    rate: float = 1e-3
    """Learning rate."""
    steps: int = 7800
    """Optimiser steps."""
    window: int = 200_000
    """Tokens without firing after which a latent is dead; k / n_latents of them is how often one fires on average."""
    kinds: tuple[str, ...] = ("both", "transposed", "auxk", "neither")
    """Which to train; `all_rows` is `both` with AuxK of all rows instead of a sample."""
    smoke: bool = False
    """Twenty steps at 256 latents on a hundredth of the text: does it run?"""


def main(config: Config) -> None:
    """Train all from one pass over the data, collect, draw."""
    n_latents, steps, window = (256, 20, 2_000) if config.smoke else (config.n_latents, config.steps, config.window)
    run = config.out / "run"
    recipe = demo_recipe(config.smoke)
    data = harvested(recipe, config.data, config.out)
    members = {name: dict(zip(SETTINGS, KINDS[name], strict=True)) for name in config.kinds}
    settings = {"n_latents": n_latents, "k": config.k, "batch_size": config.batch_size, "lr": config.rate}
    settings |= {
        "steps": steps,
        "decay": 0.0,
        "dead_after_tokens": window,
        "input_norm": "layer_norm",
        "ema": 0.0,
        "log_every": 100,
    }
    start = {"sae_config": recipe.sae, "train_config": recipe.train, "site": recipe.site, "out": run}
    sae_jax.train_members(data, members, **start, **settings)
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
