"""What does width buy when every autoencoder is trained until it learns no more?

Question: TopK at k = 32 on residual activations of the bundled language model, each trained until its held-out FVU
changes by less than 1 % over a million tokens: does L(n) = constant + coefficient * n^-exponent hold, and does the
number of tokens it takes grow as a power of n (Gao et al. 2024, section 3.2.1)?
Guess: yes; the exponent of the tokens lies between 0.3 and 0.7, as the paper's does.
Command: python experiments/scaling_latents.py --out OUT
Answer: not known yet; only its smoke has run.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table
from scaling_steps import harvested, of_widths, swept

from sae_jax.scaling import table

WIDTHS = (256, 512, 1024, 2048, 4096)
K = 32


@dataclasses.dataclass(frozen=True)
class Config:
    """Where things are, and when a run has converged."""

    out: Path = Path("build/scaling_latents")
    """Folder for the set, the sweep with its laws and figures."""
    data: Path | None = None
    """The set of configs/scaling_laptop.yaml; made in `out` if not given."""
    tolerance: float = 0.01
    """Share of the FVU that a window must change for a run to go on."""
    window: float = 1e6
    """Tokens."""
    max_tokens: float = 24e6
    """Of a run that does not converge."""
    smoke: bool = False
    """Three narrow widths, a few steps: does it run?"""


def main(config: Config) -> None:
    """Sweep until convergence, fit, show where each width ended."""
    data = harvested(config.data, config.out, config.smoke)
    widths, window, most = (64, 128, 256), 1280.0, 6400.0
    if not config.smoke:
        widths, window, most = WIDTHS, config.window, config.max_tokens
    flags = [f"--sweep.tolerance={config.tolerance}", f"--sweep.window={window:g}", f"--sweep.max-tokens={most:g}"]
    sweep = swept(data, config.out, config.smoke, {"sae.k": [8 if config.smoke else K]}, *flags, *of_widths(widths))
    shown = Table("n", "tokens", "FVU", "converged", "dead", title="where each run ended")
    points = table.read(sweep)
    for n in widths:
        last = max((point for point in points if point.n_latents == n), key=lambda point: point.tokens)
        cells = (f"{last.tokens:,}", f"{last.fvu:.4f}", "yes" if last.converged else "no", f"{last.dead_fraction:.1%}")
        shown.add_row(str(n), *cells)
    Console().print(shown)


if __name__ == "__main__":
    main(tyro.cli(Config))
