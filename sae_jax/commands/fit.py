"""`sae-jax fit DIR`: scaling laws from the table of a sweep."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from sae_jax import config, runs, uses
from sae_jax.commands.show import print_table
from sae_jax.errors import UsageError
from sae_jax.progress import console
from sae_jax.scaling import quality, report


@dataclass(frozen=True)
class Fit:
    """Fit scaling laws to DIR/results.jsonl. Writes fit.json, fit.txt and figures beside it."""

    dir: tyro.conf.Positional[str]
    """directory of the sweep"""
    k: int | None = None
    """active latents at which the laws of compute and latents are fitted; default: the k with most points"""
    variant: str | None = None
    """variant whose points are fitted; default: the one with most points"""
    site: str | None = None
    """likewise the source that is encoded; several side by side as a+b"""
    tokens_per_latent: float | None = None
    """fit the laws of latents, and of latents and k, to points after so many tokens a latent; default: to converged
    points, or else to those after the most tokens that all have"""

    leave_out: int | None = None
    """how many of the smallest budgets and widths do not count for the laws of compute and latents; default: those that
    are off the law which the larger ones follow, by a test"""

    metric: tuple[str, ...] = ()
    """instead of the laws of FVU: how these metrics, which sae-jax evaluate DIR measured, go with latents, k and
    compute. Writes quality.json and quality.png"""

    def __post_init__(self) -> None:
        if self.tokens_per_latent is not None and not 0 < self.tokens_per_latent < math.inf:
            raise UsageError(f"--tokens-per-latent={self.tokens_per_latent} must be above 0 and finite")
        if self.leave_out is not None and self.leave_out < 0:
            raise UsageError(f"--leave-out={self.leave_out} must be at least 0")


def run(argv: Sequence[str]) -> None:
    """Parse, fit, write, show."""
    command = config.parse(Fit, argv, "sae-jax fit")
    if command.metric:
        found, written = uses.quality(command.dir, command.metric)
        print_table(quality.HEADER, quality.rows(found))
        console.print(f"{command.dir}: {', '.join(path.name for path in written)}")
        return
    study, written = runs.fit(
        command.dir, command.variant, command.site, command.k, command.tokens_per_latent, command.leave_out
    )
    sys.stdout.write(report.render(study))
    console.print(f"{command.dir}: {', '.join(path.name for path in written)}")
