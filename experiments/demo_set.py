"""What the experiments on the bundled language model share: the demo's recipe, and the set that it describes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import sae_jax
from sae_jax import recipe

RECIPE = Path(__file__).parents[1] / "configs" / "demo.yaml"


def demo_recipe(smoke: bool) -> recipe.Recipe:
    """configs/demo.yaml; on a hundredth of the text to see whether something runs."""
    settings = recipe.parse(recipe.Recipe, [str(RECIPE)], "experiment")
    if smoke:
        settings = dataclasses.replace(settings, harvest=dataclasses.replace(settings.harvest, tokens=20_480))
    return settings


def harvested(settings: recipe.Recipe, data: Path | None, out: Path) -> Path:
    """The activation set: `data`, or one made in `out`."""
    data = data or out / "set"
    if not data.exists():
        sae_jax.harvest(data, settings=settings.harvest)
    return data
