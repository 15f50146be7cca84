"""How should compute be split between width and tokens, and what does it buy?

Question: TopK at k = 32 on residual activations of the bundled language model: along lines of equal compute, is there a
best width inside the grid, does it grow as a power of compute, and does the error on the frontier follow
L(C) = constant + coefficient * C^-exponent (Gao et al. 2024, section 3.1)?
Guess: yes to all three; the constant is needed, since k = 32 leaves something whatever the width.
Command: python experiments/scaling_compute.py --sweep SWEEP --out OUT      (SWEEP: of scaling_joint.py, OUT/sweep)
Cost: 50 minutes for the 1,176 of 1,465 steps of that sweep, with much other work on two cores.
Answer, from the 112 of its 136 points that there were then, budgets to 6.4e12 FLOP, one seed (JAX 0.10.2, CPU;
figures/scaling_compute.png): yes to all three, within this range. Between 4e11 and 3.2e12 FLOP the best width lies
inside the grid (421, 726, 1,037, 1,533 latents) and grows as C^0.61 (90 % interval 0.52 to 0.71), tokens as C^0.39;
on the frontier of 28 points FVU = 0.041 + 65 C^-0.255 (constant 0.026 to 0.051, exponent 0.20 to 0.31; 8 budgets,
residuals 0.9 %), and without the constant the law fits worse (AICc -51.4 against -54.9), which is no great difference.
Fitted without the largest budget it is off there by 2.2 %; the next smaller budget's error by 9.3 %.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table
from scaling_joint import BUDGETS, WIDTHS
from scaling_steps import harvested, of_widths, sae_jax, swept

from sae_jax.scaling import table


@dataclasses.dataclass(frozen=True)
class Config:
    """Where things are."""

    out: Path = Path("build/scaling_compute")
    """Folder for the laws and figures."""
    sweep: Path | None = None
    """A sweep with budgets, that of scaling_joint.py; made in `out` if not given."""
    data: Path | None = None
    """The set of configs/scaling_laptop.yaml; made in `out` if there is neither this nor a sweep."""
    k: int = 32
    """Active latents."""
    smoke: bool = False
    """Three narrow widths, a few steps: does it run?"""


def main(config: Config) -> None:
    """Fit the points at one k; the iso-FLOP table, and what is advised for ten times the largest budget."""
    sweep = config.sweep or made(config)
    config.out.mkdir(parents=True, exist_ok=True)
    shutil.copy(sweep / table.FILE, config.out / table.FILE)
    k = 8 if config.smoke else config.k
    sae_jax("fit", config.out, f"--k={k}")
    points = [point for point in table.read(config.out) if point.k == k and point.budget]
    widths, budgets = (sorted({getattr(p, name) for p in points}) for name in ("n_latents", "budget"))
    at = {(point.budget, point.n_latents): point.fvu for point in points}
    shown = Table("FLOP", *map(str, widths), title=f"FVU on held-out rows at k={k}, by width")
    for budget in budgets:
        own = {n: at[budget, n] for n in widths if (budget, n) in at}
        best = min(own, key=own.__getitem__)
        shown.add_row(f"{budget:.3g}", *(f"{own[n]:.4f}{' *' * (n == best)}" if n in own else "" for n in widths))
    Console().print(shown)
    laws = json.loads((config.out / "fit.json").read_text())
    if laws["compute"] and laws["compute"]["best_latents"]:
        sae_jax("advise", f"--compute={10 * max(budgets):g}", f"--fit={config.out / 'fit.json'}", "--target=h200:1")


def made(config: Config) -> Path:
    """The sweep, where none is given."""
    data = harvested(config.data, config.out, config.smoke)
    widths, k, tokens = ((64, 128, 256), 8, 5120.0) if config.smoke else (WIDTHS, config.k, 5e6)
    budgets = (2e8, 4e8) if config.smoke else BUDGETS
    flags = [f"--sweep.max-tokens={tokens:g}", f"--sweep.min-tokens={tokens / 50:g}"]
    flags += ["--sweep.compute", *(f"{budget:g}" for budget in budgets)]
    return swept(data, config.out, config.smoke, {"sae.k": [k]}, *flags, *of_widths(widths))


if __name__ == "__main__":
    main(tyro.cli(Config))
