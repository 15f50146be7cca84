"""How should compute be split between width and tokens, and what does it buy?

Question: TopK at k = 32 on residual activations of the bundled language model: along lines of equal compute, is there a
best width inside the grid, does it grow as a power of compute, and does the error on the frontier follow
L(C) = constant + coefficient * C^-exponent (Gao et al. 2024, section 3.1)?
Guess: yes to all three; the constant is needed, since k = 32 leaves something whatever the width.
Command: python experiments/scaling_compute.py --sweep SWEEP --out OUT      (SWEEP: of scaling_joint.py, OUT/sweep)
Cost: that of scaling_joint.py; 10 seconds with its sweep.
Answer, from the 38 points of k = 32 with up to five million tokens, one seed (JAX 0.10.2, CPU;
figures/scaling_compute.png): yes to all three, within this range. Between 8e11 and 7.9e12 FLOP the best width lies
inside the grid (481, 874, 1,258, 1,686 latents) and grows as C^0.55 (90 % interval 0.44 to 0.66), tokens as C^0.45; on
the frontier FVU = 0.035 + 141 C^-0.275 (constant 0.023 to 0.044, exponent 0.22 to 0.33; 10 budgets, residuals 2.0 %),
and without the constant the law fits worse (AICc -55.5 against -62.0). Fitted without the largest budget it is off
there by 0.8 %; the next smaller budget's error by 5.3 %.
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
