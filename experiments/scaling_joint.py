"""Does one law say what width and sparsity leave unexplained?

Question: TopK on residual activations of the bundled language model, six widths by four k at equal tokens: does
L(n, k) = exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n) + exp(zeta + eta ln k) (Gao et al. 2024, section
3.2.3) describe them, and does it know the largest width before it is trained?
Guess: yes: fitted without the largest width it is off there by less than half of what carrying the next smaller one
over is; gamma below 0 and eta below 0, as at the paper's scale.
Command: python experiments/scaling_joint.py --out OUT
Answer: not known yet. The sweep was stopped at 1,176 of its 1,465 steps (after 50 minutes, with much other work on two
cores): at the rates that are best for a million tokens a fifth to a third of 8,192 latents died at k = 32 and 64, and
AuxK then takes most of the time. Of the 24 members at 1.0 M tokens the law leaves residuals of 13 %: at k = 64 of 128
dimensions the error is falling to nothing, which it has no term for. A lower rate and smaller k are next.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from scaling_steps import harvested, of_widths, swept

from sae_jax.scaling import table

WIDTHS = (256, 512, 1024, 2048, 4096, 8192)
K = (8, 12, 20, 32)
BUDGETS = (1e11, 2e11, 4e11, 8e11, 1.6e12, 3.2e12, 6.4e12, 1.28e13)  # FLOP; their iso-FLOP curves: scaling_compute.py


@dataclasses.dataclass(frozen=True)
class Config:
    """Where things are, and how long to train."""

    out: Path = Path("build/scaling_joint")
    """Folder for the set, the sweep with its laws and figures, and result.json."""
    data: Path | None = None
    """The set of configs/scaling_laptop.yaml; made in `out` if not given."""
    tokens: float = 1e7
    """That every member learns from; it is measured after half of them too."""
    smoke: bool = False
    """Two narrow widths by two k, five steps: does it run?"""


def main(config: Config) -> None:
    """Sweep, fit, compare the prediction of the largest width with carrying the next smaller one over."""
    data = harvested(config.data, config.out, config.smoke)
    widths, k = ((64, 128), (4, 8)) if config.smoke else (WIDTHS, K)
    tokens, budgets = (1280, (1e8, 2e8)) if config.smoke else (config.tokens, BUDGETS)
    flags = ["--sweep.tokens", f"{tokens / 2:g}", f"{tokens:g}"]
    flags += [f"--sweep.max-tokens={tokens:g}", f"--sweep.min-tokens={tokens / 100:g}"]
    flags += ["--sweep.compute", *(f"{budget:g}" for budget in budgets)]
    sweep = swept(data, config.out, config.smoke, {"sae.k": list(k)}, *flags, *of_widths(widths))
    points = table.read(sweep)
    points = [point for point in points if point.tokens == max(point.tokens for point in points)]
    at = {(point.n_latents, point.k): point.fvu for point in points}
    shown = Table("n", *map(str, k), title=f"FVU on held-out rows after {points[0].tokens:,} tokens, by k")
    for n in widths:
        shown.add_row(str(n), *(f"{at[n, each]:.4f}" for each in k))
    Console().print(shown)
    loss = np.array([[at[n, each] for each in k] for n in widths])
    laws = json.loads((sweep / "fit.json").read_text())
    result = {
        "falls_with_n": bool((np.diff(loss, axis=0) < 0).all()),
        "falls_with_k": bool((np.diff(loss, axis=1) < 0).all()),
        "joint": laws["joint"],
    }
    (config.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    Console().print({name: value for name, value in result.items() if name != "joint"})


if __name__ == "__main__":
    main(tyro.cli(Config))
