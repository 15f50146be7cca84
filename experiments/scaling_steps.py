"""What the experiments on scaling laws share: the sweep that they all learn from, and its laws."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bundled import harvested, laptop_recipe

import sae_jax
from sae_jax.progress import plain_console
from sae_jax.recipe import Recipe
from sae_jax.scaling import report, table

WIDTHS = (256, 512, 1024, 2048, 4096, 8192)
BUDGETS = (1e11, 2e11, 4e11, 8e11, 1.6e12, 3.2e12, 6.4e12, 1.28e13, 2.56e13, 5.12e13, 1.02e14)  # FLOP
TOLERANCE, WINDOW, MOST = 0.02, 2e6, 18e6  # a run that gains less FVU in so many tokens ends; and every run ends

# The learning rate of a width n: RATE * n**EXPONENT, two thirds of the best of 1,024 and 4,096 latents at k = 32 over
# three million tokens (0.0048, 0.0031; learning_rate.py). At 0.004 13 % of 4,096 latents die there.
RATE, EXPONENT = 0.025, -0.3


def of_widths(widths: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Members of a sweep over widths, at their own learning rates."""
    return {f"n{n}": {"n_latents": n, "lr": float(f"{RATE * n**EXPONENT:.2g}")} for n in widths}


def swept(recipe: Recipe, data: Path, out: Path, smoke: bool, grid: dict[str, list], **settings: Any) -> Path:
    """The sweep over a grid, in OUT/sweep, and its laws."""
    start = {"sae_config": recipe.sae, "train_config": recipe.train, "site": recipe.site}
    held_out = {"held_out": 1024} if smoke else {}
    sae_jax.sweep(data, out=out / "sweep", grid=grid, **start, **settings, **held_out)
    fitted(out / "sweep")
    return out / "sweep"


def until_converged(data: Path | None, out: Path, smoke: bool, k: Sequence[int]) -> Path:
    """The sweep over WIDTHS by k, each run until it has converged and measured at BUDGETS on the way, and its laws."""
    widths, budgets, window, most = WIDTHS, BUDGETS, WINDOW, MOST
    if smoke:
        widths, budgets, window, most = (64, 128, 256), (2e8, 4e8), 2560.0, 5120.0
    marks = {
        "tolerance": TOLERANCE,
        "window": window,
        "max_tokens": most,
        "min_tokens": window / 20,
        "compute": budgets,
    }
    recipe = laptop_recipe(smoke)
    data = harvested(recipe, data, out)
    return swept(recipe, data, out, smoke, {"k": list(k)}, members=of_widths(widths), **marks)


def laws_of(sweep: Path, out: Path, **chosen: Any) -> list[table.Point]:
    """The points of a sweep, and what `sae_jax.fit` makes of them in OUT: the laws in their own folder stay."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(sweep / table.FILE, out / table.FILE)
    fitted(out, **chosen)
    return table.read(out)


def fitted(folder: Path, **chosen: Any) -> None:
    """Fit the laws to the points of a folder, and show them."""
    study, _ = sae_jax.fit(folder, **chosen)
    plain_console().print(report.render(study))
