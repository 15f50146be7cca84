"""`sae-jax fit DIR`: scaling laws from the table of a sweep."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from sae_jax import config, storage
from sae_jax.errors import UsageError
from sae_jax.progress import console
from sae_jax.scaling import laws, plots, report, table


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

    def __post_init__(self) -> None:
        if self.tokens_per_latent is not None and not 0 < self.tokens_per_latent < math.inf:
            raise UsageError(f"--tokens-per-latent={self.tokens_per_latent} must be above 0 and finite")


def run(argv: Sequence[str]) -> None:
    """Parse, fit, write, show."""
    command = config.parse(Fit, argv, "sae-jax fit")
    folder = Path(command.dir)
    study = laws.study(table.read(folder), command.variant, command.site, command.k, command.tokens_per_latent)
    text = report.render(study)
    # The draws on a line of their own: nobody reads them, and a line for each number would bury the rest.
    facts = json.dumps(study.to_json(), indent=2).removesuffix("\n}")
    storage.write_text(folder / "fit.json", f'{facts},\n  "draws": {json.dumps(study.draws())}\n}}\n')
    storage.write_text(folder / "fit.txt", text)
    drawn = plots.draw(study, folder)
    sys.stdout.write(text)
    console.print(f"{folder}: fit.json, fit.txt, {', '.join(path.name for path in drawn)}")
