"""What does a user get who sets nothing but the variant and the width?

Question: every variant with its defaults alone, on two layers of the bundled language model: is L0 near the number that
was asked for, does every latent fire, and how much more is left unexplained than TopK leaves?
Guess: L0 within a factor of two, less than 10 % silent; BatchTopK, Matryoshka, Gated and JumpReLU within 1.3 of TopK,
L1 at 1.3 to 1.7 of it.
Command: python experiments/untuned.py --out OUT
Answer: not run in full yet.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import tyro
from bundled import demo_recipe, harvested, held_out_rows
from rich.table import Table

import sae_jax
from sae_jax.evaluation.evaluate import on_rows
from sae_jax.progress import plain_console

VARIANTS = ("topk", "batch_topk", "matryoshka", "gated", "jumprelu", "relu", "relu_norm", "tied")
SHOWN = ("l0", "fvu", "gamma", "silent_fraction")


@dataclasses.dataclass(frozen=True)
class Config:
    """Where things are, what to train and how long."""

    out: Path = Path("build/untuned")
    """Folder for the sets, the runs and results.json."""
    layers: tuple[int, ...] = (1, 2)
    """Residual layers of the bundled model."""
    variants: tuple[str, ...] = VARIANTS
    """Which to train."""
    n_latents: int = 2048
    """Of every dictionary."""
    steps: int = 500
    """Optimiser steps, of 2,048 rows."""
    smoke: bool = False
    """Twenty steps of narrow ones on a hundredth of the text: does it run?"""


def main(config: Config) -> None:
    """Train all in one pass a layer, measure them on held-out rows, write OUT/results.json."""
    steps, n_latents = (20, 128) if config.smoke else (config.steps, config.n_latents)
    results = []
    for layer in config.layers:
        recipe = demo_recipe(config.smoke)
        site = f"resid_post.{layer}"
        harvest = dataclasses.replace(recipe.harvest, hooks=(site,))
        recipe = dataclasses.replace(recipe, site=(site,), harvest=harvest)
        data = harvested(recipe, None, config.out / site)
        members = {variant: {"variant": variant} for variant in config.variants}
        settings = {"n_latents": n_latents, "steps": steps, "batch_size": 256 if config.smoke else 2048}
        saes = sae_jax.train_members(data, members, out=config.out / site / "run", ema=0.0, dtype="float32", **settings)
        rows_ND = held_out_rows(recipe, data, config.smoke)
        for variant, d in saes.items():
            found = on_rows(d.sae, rows_ND)
            results.append({"site": site, "variant": variant, **{name: found[name] for name in SHOWN}})
    (config.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    show(results)


def show(results: list[dict[str, Any]]) -> None:
    """Every dictionary, and its FVU beside TopK's on the same rows."""
    table = Table("site", "variant", "L0", "FVU", "of TopK's", "gamma", "silent")
    topk = {found["site"]: found["fvu"] for found in results if found["variant"] == "topk"}
    for found in results:
        beside = found["fvu"] / topk[found["site"]] if found["site"] in topk else float("nan")
        numbers = f"{found['l0']:.1f}", f"{found['fvu']:.4f}", f"{beside:.2f}", f"{found['gamma']:.3f}"
        table.add_row(found["site"], found["variant"], *numbers, f"{found['silent_fraction']:.1%}")
    plain_console(width=100).print(table)


if __name__ == "__main__":
    main(tyro.cli(Config))
