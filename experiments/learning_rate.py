"""Does a power law of three widths say which learning rate is best for a fourth?

Question: TopK at k = 32 on residual activations of the bundled language model, a million tokens at a constant rate: is
the best rate of each width on a power law, and does that of 256, 1,024 and 4,096 latents find the best of 8,192?
Guess: yes, within one step (a factor of two) of the grid; the exponent is near the -1/2 that others use.
Command: python experiments/learning_rate.py --out OUT
Cost: 24 minutes on two cores that had other work.
Answer: yes, 0.3 steps apart; the exponent is -0.38 of the three, -0.31 of all four (90 % interval -0.46 to -0.13).
resid_post.2, d_model 128, batch 2048, 999,424 tokens of 3.1 million, one seed; FVU of 32,768 held-out tokens (JAX
0.10.2, CPU; figures/learning_rate.png):

    rate      256      1024     4096     8192 latents
    0.00025   0.2451   0.1759   0.1387   0.1271
    0.0005    0.2004   0.1429   0.1130   0.1047
    0.001     0.1664   0.1175   0.0943   0.0884
    0.002     0.1407   0.1033   0.0851   0.0816
    0.004     0.1249   0.0951   0.0800   0.0773
    0.008     0.1162   0.0914   0.0810   0.0793
    0.016     0.1144   0.0967   0.0936   0.0937
    0.032     0.1174   0.1136   0.1139   0.1171
    best      0.0147   0.0075   0.0051   0.0045     (of the parabola through the best three)

The law of the first three says 0.0038 for 8,192. The two largest rates were run as a sweep of their own, on the same
set and batches; a member equals its solo run.

Longer runs want lower rates, and wide autoencoders lose latents at them. After 3,000,320 tokens, dead in brackets
(`sae-jax sweep configs/scaling_laptop.yaml --data SET --out OUT --sweep.tokens=3e6` over the grid of three widths and
four rates, 16 minutes beside other work):

    rate      256             1024            4096 latents
    0.001     0.1260          0.0931          0.0732
    0.002     0.1139          0.0851          0.0670 (0.3 %)
    0.004     0.1091          0.0814          0.0659 (13.4 %)
    0.008     0.1074          0.0826 (0.5 %)  0.0725 (36.5 %)
    best      0.008 or more   0.0048          0.0031

Larger batches want higher rates and as many tokens leave more: with 8,192 rows a step (`--batch-size 8192`, 122 steps,
JAX 0.11.2, an H200) the law of the first three says 0.0059 for 8,192 latents, 0.0065 is measured, 0.14 steps apart; the
exponent is -0.36 of the three and -0.32 of all that lie within the grid (-0.44 to -0.06). Four times the rows move the
best rate 1.7 times at 1,024 latents and 1.4 times at 8,192, less than the root of four.

    rate      256      1024     4096     8192 latents
    0.001     0.2438   0.1697   0.1302   0.1180
    0.002     0.2030   0.1407   0.1095   0.1014
    0.004     0.1746   0.1216   0.0963   0.0906
    0.008     0.1527   0.1081   0.0930   0.0889
    0.016     0.1379   0.1060   0.0976   0.0958
    0.032     0.1370   0.1199   0.1159   0.1149

Very short runs are another matter, so the default rate (1.1 / (n^(1/3) steps^(1/2)), `training.settings`) stays below
100 steps what it is at 100. Held-out FVU after so many steps of 2,048 rows, all else at its default; rates as multiples
of that at 500 steps, at which the default now stands at 2.24, while it was 7.1, 4.1 and 2.24 before. `planted`: rows of
6 of 256 features in 96 dimensions, k = 6 (experiments/planted_features.py). Others were not run:

    latents              steps   0.25    0.5     1       1.41    2       2.24    2.83    4       7.07
    512                  10      0.413   0.368   0.329   0.320   0.322   0.327   0.348   0.410   0.629
                         30      0.301   0.252   0.219   0.209   0.203           0.203   0.208   0.255
                         100     0.203   0.170   0.148   0.138   0.131           0.128   0.131   0.153
    2,048                10                      0.287   0.281   0.286           0.303
                         30                      0.196   0.190   0.186           0.184
                         100                     0.128   0.120   0.115   0.114
    512, planted         10                      0.688   0.694   0.733           0.784
                         30                      0.612   0.562   0.498           0.408
                         100                     0.133   0.105   0.097   0.098
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import tyro
from bundled import harvested, laptop_recipe
from rich.table import Table
from scaling_steps import swept

from sae_jax.progress import plain_console
from sae_jax.scaling import fit, frontier, table

WIDTHS = (256, 1024, 4096, 8192)
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)


@dataclasses.dataclass(frozen=True)
class Config:
    """Where things are, and how long to train."""

    out: Path = Path("build/learning_rate")
    """Folder for the set, the sweep and result.json."""
    data: Path | None = None
    """The set of configs/scaling_laptop.yaml; made in `out` if not given."""
    tokens: float = 1e6
    """That every member learns from."""
    batch_size: int = 2048
    """Rows a step."""
    widths: tuple[int, ...] = WIDTHS
    """Numbers of latents; the law of all but the largest predicts the rate of that."""
    smoke: bool = False
    """Three rates of three narrow widths, five steps: does it run?"""


def main(config: Config) -> None:
    """Sweep, find the best rate of each width, predict the last; write OUT/result.json."""
    recipe = laptop_recipe(config.smoke)
    if not config.smoke:
        train = dataclasses.replace(recipe.train, batch_size=config.batch_size)
        recipe = dataclasses.replace(recipe, train=train)
    data = harvested(recipe, config.data, config.out)
    widths, rates = ((64, 128, 256), RATES[2:7:2]) if config.smoke else (config.widths, RATES)
    grid = {"n_latents": list(widths), "lr": list(rates)}
    tokens = 1280 if config.smoke else config.tokens
    points = table.read(swept(recipe, data, config.out, config.smoke, grid, tokens=(tokens,)))
    show(points)
    result = predicted(points)
    (config.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    plain_console().print(result)


def predicted(points: list[table.Point]) -> dict[str, float | None]:
    """The best rate of the largest width, by the law of the others and as measured."""
    best = {}
    for n in sorted({point.n_latents for point in points}):
        own = sorted((point.lr, point.fvu) for point in points if point.n_latents == n)
        lr, fvu = (np.array(column) for column in zip(*own, strict=True))
        best[n] = frontier.valley(lr, fvu)
    *known, last = best
    inner = [n for n in known if not best[n].at_edge]
    if len(inner) < 2:
        return {"exponent": None, "predicted": None, "measured": best[last].x}
    law = fit.growth(np.array(inner, float), np.array([best[n].x for n in inner]))
    return {
        "exponent": law.coefficients["exponent"],
        "predicted": law.predict(last),
        "measured": best[last].x,
        "steps_apart": float(np.log2(law.predict(last) / best[last].x)),
    }


def show(points: list[table.Point]) -> None:
    """FVU of every rate and width."""
    widths = sorted({point.n_latents for point in points})
    shown = Table("rate", *map(str, widths), title="FVU on held-out rows")
    for lr in sorted({point.lr for point in points}):
        own = {point.n_latents: point.fvu for point in points if point.lr == lr}
        shown.add_row(f"{lr:g}", *(f"{own[n]:.4f}" for n in widths))
    plain_console().print(shown)


if __name__ == "__main__":
    main(tyro.cli(Config))
