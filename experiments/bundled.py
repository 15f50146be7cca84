"""What the experiments on the bundled language model share: the recipes they follow, and the set that one describes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

import sae_jax
from sae_jax.activations.store import open_activations
from sae_jax.evaluation.text import held_out
from sae_jax.recipe import Recipe, parse
from sae_jax.types import Sites

CONFIGS = Path(__file__).parents[1] / "configs"


def demo_recipe(smoke: bool) -> Recipe:
    """configs/demo.yaml; on a hundredth of the text to see whether something runs."""
    return _recipe("demo.yaml", smoke)


def laptop_recipe(smoke: bool) -> Recipe:
    """configs/scaling_laptop.yaml; small batches of little text to see whether something runs."""
    settings = _recipe("scaling_laptop.yaml", smoke)
    if smoke:
        train = dataclasses.replace(settings.train, batch_size=256, log_every=10)
        settings = dataclasses.replace(settings, train=train)
    return settings


def harvested(settings: Recipe, data: Path | None, out: Path) -> Path:
    """The activation set: `data`, or one made in `out`."""
    data = data or out / "set"
    if not data.exists():
        sae_jax.harvest(data, settings=settings.harvest)
    return data


def demo_run(out: Path, smoke: bool) -> Path:
    """The run of the demo's dictionary in `out`, trained unless it is there; a small one to see if something runs."""
    recipe = demo_recipe(smoke)
    data, run = harvested(recipe, None, out), out / "run"
    changed = {"steps": 20, "batch_size": 256, "n_latents": 256} if smoke else {}
    if not run.exists():
        sae_jax.train(data, out=run, sae_config=recipe.sae, train_config=recipe.train, site=recipe.site, **changed)
    return run


def held_out_rows(settings: Recipe, data: Path, smoke: bool, n_tokens: int = 2**15) -> np.ndarray:
    """Activations of text that no dictionary learns from, f32[N, d_model]; N is at most `n_tokens`."""
    text = held_out(open_activations(data), Sites(settings.site, settings.site), 2**11 if smoke else n_tokens)
    assert text is not None
    return text.rows()


def _recipe(name: str, smoke: bool) -> Recipe:
    settings = parse(Recipe, [str(CONFIGS / name)], "experiment")
    if smoke:
        settings = dataclasses.replace(settings, harvest=dataclasses.replace(settings.harvest, tokens=20_480))
    return settings
