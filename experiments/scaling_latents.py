"""What does width buy when every autoencoder is trained until it learns no more?

Question: TopK on residual activations of the bundled language model, each run until its held-out FVU falls by less than
2 % in two million tokens: at one k, does L(n) = constant + coefficient * n^-exponent hold, and does the number of
tokens it takes grow as a power of n (Gao et al. 2024, section 3.1)?
Guess: yes; the exponent of the tokens lies between 0.3 and 0.7, as the paper's does.
Command: python experiments/scaling_latents.py --sweep SWEEP --out OUT      (SWEEP: of scaling_joint.py, OUT/sweep)
Cost: that of scaling_joint.py; 10 seconds with its sweep.
Answer: the error yes, with a constant (p below 0.01 at every k); the exponent of the tokens is lower, 0.2 to 0.4. From
256 to 8,192 latents, one seed, 90 % intervals in brackets; errors and tokens of each are in scaling_joint.py (JAX
0.10.2, CPU; figures/scaling_latents.png is k = 7):

    k     constant                exponent             off at 8,192, fitted without it    tokens grow as n to the
    7     0.068 (0.062 to 0.073)  0.45 (0.42 to 0.48)  1.1 % (carried over: 12.6 %)       0.37 (0.29 to 0.46)
    10    0.068 (0.059 to 0.075)  0.51 (0.45 to 0.58)  2.3 % (10.3 %)                     0.29 (0.19 to 0.39)
    14    0.060 (0.050 to 0.068)  0.52 (0.44 to 0.61)  3.1 % (9.4 %)                      0.22 (0.11 to 0.34)
    20    0.050 (0.032 to 0.060)  0.51 (0.36 to 0.67)  6.2 % (7.2 %)                      0.25 (0.14 to 0.37)

Tokens are known to two million only, where they are four to sixteen.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro
from rich.table import Table
from scaling_steps import laws_of, until_converged

from sae_jax.progress import plain_console


@dataclasses.dataclass(frozen=True)
class Config:
    """Where things are."""

    out: Path = Path("build/scaling_latents")
    """Folder for the laws and figures."""
    sweep: Path | None = None
    """That of scaling_joint.py; made in `out`, of one k, if not given."""
    data: Path | None = None
    """The set of configs/scaling_laptop.yaml; made in `out` if there is neither this nor a sweep."""
    k: int = 7
    """Active latents."""
    smoke: bool = False
    """Three narrow widths, twenty steps at most: does it run?"""


def main(config: Config) -> None:
    """Fit the points at one k; show where each width ended."""
    k = 8 if config.smoke else config.k
    sweep = config.sweep or until_converged(config.data, config.out, config.smoke, [k])
    points = laws_of(sweep, config.out / "laws", k=k)
    last = {point.n_latents: point for point in points if point.k == k}  # a run's points are in order
    shown = Table("n", "tokens", "FVU", "converged", "dead", title=f"where each run ended, at k={k}")
    for n, end in sorted(last.items()):
        cells = (f"{end.tokens:,}", f"{end.fvu:.4f}", "yes" if end.converged else "no", f"{end.dead_fraction:.1%}")
        shown.add_row(str(n), *cells)
    plain_console().print(shown)


if __name__ == "__main__":
    main(tyro.cli(Config))
