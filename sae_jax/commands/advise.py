"""`sae-jax advise --compute 1e18 --fit FIT.json`: what to train for a budget, by the laws of a fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sae_jax import config, runs
from sae_jax.commands.show import print_lines, print_table
from sae_jax.errors import UsageError
from sae_jax.scaling import fit
from sae_jax.scaling.advise import Interval
from sae_jax.units import duration, size

STORED_BYTES = 2  # a number of an activation set, bfloat16


@dataclass(frozen=True)
class Advise:
    """The width, tokens and learning rate for a budget, and the error to expect."""

    compute: float
    """FLOP to spend, in the unit of the table: 12 * n_latents * d_model a token"""
    fit: str
    """fit.json, as `sae-jax fit` wrote it"""
    k: int | None = None
    """active latents; another k than the fit's goes by the joint law"""
    target: str | None = None
    """machines to give the time for: h200:8, v5p:2x2x2 and the like"""
    mfu: float = 0.3
    """share of the matrix rate that the run is taken to reach"""

    def __post_init__(self) -> None:
        if not 0 < self.compute < math.inf:
            raise UsageError(f"--compute={self.compute} must be above 0 and finite")
        if self.k is not None and self.k < 1:
            raise UsageError(f"--k={self.k} must be at least 1")
        if not 0 < self.mfu <= 1:
            raise UsageError(f"--mfu={self.mfu} must be above 0 and at most 1")


def run(argv: Sequence[str]) -> None:
    """Parse, advise, show."""
    command = config.parse(Advise, argv, "sae-jax advise")
    advice, seconds = runs.advise(command.compute, command.fit, command.k, command.target, command.mfu)
    law = f"{advice.latents} (the law says {advice.law_latents:.0f}{_within(advice.law_latents_interval, '.0f')})"
    lr_from = _within(advice.lr_interval, ".3g") if advice.lr_from_law else " (as the points had: the fit has no rule)"
    rows = [
        ("latents", law),
        ("k", "none" if advice.k is None else str(advice.k)),
        ("tokens", f"{advice.tokens:,.0f}"),
        ("learning rate", f"{advice.lr:.3g}{lr_from}"),
        ("FVU expected", f"{advice.fvu:.4g}{_within(advice.fvu_interval, '.4g')}"),
    ]
    if advice.d_model is not None:
        rows.append(("set on disk", size(advice.tokens * advice.d_model * STORED_BYTES)))
    if seconds is not None:
        rows.append((f"time on {command.target}", f"{duration(seconds)} at {command.mfu:.0%} of the matrix rate"))
    print_table((f"{command.compute:.3g} FLOP", ""), rows)
    print_lines(advice.notes)


def _within(interval: Interval, form: str) -> str:
    return f", {fit.LEVEL:.0%} interval {interval[0]:{form}} to {interval[1]:{form}}" if interval else ""
