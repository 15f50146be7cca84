"""What does width buy when every autoencoder is trained until it learns no more?

Question: TopK on residual activations of the bundled language model, each run until its held-out FVU falls by less than
2 % in two million tokens: at one k, does L(n) = constant + coefficient * n^-exponent hold, and does the number of
tokens it takes grow as a power of n (Gao et al. 2024, section 3.1)?
Guess: yes; the exponent of the tokens lies between 0.3 and 0.7, as the paper's does.
Command: python experiments/scaling_latents.py --sweep SWEEP --out OUT      (SWEEP: of scaling_joint.py, OUT/sweep)
Cost: that of scaling_joint.py; 10 seconds with its sweep.
Answer: the error yes, with a constant (at a probability of 0.99 or more); the exponent of the tokens is lower. From
256 to 8,192 latents, one seed, 90 % intervals in brackets; errors and tokens of each are in scaling_joint.py (JAX
0.10.2, CPU; figures/scaling_latents.png is k = 7):

    k     constant                exponent             off at 8,192, fitted without it    tokens grow as n to the
    7     0.068 (0.063 to 0.071)  0.45 (0.43 to 0.48)  1.0 % (carried over: 12.6 %)       0.42 (0.34 to 0.51)
    10    0.067 (0.057 to 0.075)  0.51 (0.45 to 0.59)  2.3 % (10.4 %)                     0.31 (0.24 to 0.39)
    14    0.059 (0.050 to 0.067)  0.51 (0.45 to 0.61)  3.2 % (9.3 %)                      0.23 (0.11 to 0.36)
    20    0.045 (0.033 to 0.058)  0.46 (0.38 to 0.63)  6.2 % (7.3 %)                      0.26 (0.14 to 0.39)

Convergence is seen every two million tokens, of four to sixteen; the law takes each for anything between two marks.
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
