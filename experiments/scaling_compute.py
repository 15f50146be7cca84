"""How should compute be split between width and tokens, and what does it buy?

Question: TopK at k = 10 on residual activations of the bundled language model: along lines of equal compute, is there a
best width inside the grid, does it grow as a power of compute, and does the error on the frontier follow
L(C) = constant + coefficient * C^-exponent (Gao et al. 2024, section 3.1)?
Guess: yes to all three; the constant is needed, since k active latents leave something whatever the width.
Command: python experiments/scaling_compute.py --sweep SWEEP --out OUT      (SWEEP: of scaling_joint.py, OUT/sweep)
Cost: that of scaling_joint.py; 10 seconds with its sweep.
Answer, from the 60 points of k = 10, one seed (JAX 0.10.2, CPU; figures/scaling_compute.png): yes to all three, within
this range. Between 4e11 and 2.5e13 FLOP the best width lies inside the grid (410 to 3,504 latents) and grows as C^0.52
(90 % interval 0.50 to 0.55), tokens as C^0.48; on the frontier FVU = 0.062 + 210 C^-0.269 (constant 0.056 to 0.067,
exponent 0.25 to 0.29; 13 budgets, residuals 0.9 %), and without the constant the law fits worse (4.0 %). Fitted without
the largest budget it is off there by 0.6 %; the next smaller budget's error by 3.9 %.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import tyro
from rich.table import Table
from scaling_steps import laws_of, until_converged

import sae_jax
from sae_jax.progress import plain_console


@dataclasses.dataclass(frozen=True)
class Config:
    """Where things are."""

    out: Path = Path("build/scaling_compute")
    """Folder for the laws and figures."""
    sweep: Path | None = None
    """That of scaling_joint.py; made in `out`, of one k, if not given."""
    data: Path | None = None
    """The set of configs/scaling_laptop.yaml; made in `out` if there is neither this nor a sweep."""
    k: int = 10
    """Active latents."""
    smoke: bool = False
    """Three narrow widths, twenty steps at most: does it run?"""


def main(config: Config) -> None:
    """Fit the points at one k; the iso-FLOP table, and what is advised for ten times the largest budget."""
    k = 8 if config.smoke else config.k
    sweep = config.sweep or until_converged(config.data, config.out, config.smoke, [k])
    points = laws_of(sweep, config.out / "laws", k=k)
    points = [point for point in points if point.k == k and point.budget]
    widths, budgets = (sorted({getattr(p, name) for p in points}) for name in ("n_latents", "budget"))
    at = {(point.budget, point.n_latents): point.fvu for point in points}
    shown = Table("FLOP", *map(str, widths), title=f"FVU on held-out rows at k={k}, by width")
    for budget in budgets:
        own = {n: at[budget, n] for n in widths if (budget, n) in at}
        best = min(own, key=own.__getitem__)
        shown.add_row(f"{budget:.3g}", *(f"{own[n]:.4f}{' *' * (n == best)}" if n in own else "" for n in widths))
    plain_console().print(shown)
    laws = json.loads((config.out / "laws" / "fit.json").read_text())
    if laws["compute"] and laws["compute"]["best_latents"]:
        advice, _ = sae_jax.advise(10 * max(budgets), config.out / "laws" / "fit.json")
        plain_console().print(f"for {10 * max(budgets):.3g} FLOP", advice)


if __name__ == "__main__":
    main(tyro.cli(Config))
