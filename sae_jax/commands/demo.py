"""`sae-jax demo [RECIPE] --out DIR`: every command in turn, on the language model that ships with the package."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sae_jax import artifact, lm, recipe, runs, storage, uses
from sae_jax.activations.harvest import harvest
from sae_jax.activations.sample import sample_rows
from sae_jax.activations.store import open_activations
from sae_jax.analysis.baselines import neuron_token_purity
from sae_jax.analysis.examples import token_purity
from sae_jax.analysis.store import Store
from sae_jax.commands import gpu
from sae_jax.commands.show import print_table
from sae_jax.evaluation import baselines
from sae_jax.evaluation.evaluate import on_rows
from sae_jax.evaluation.text import held_out
from sae_jax.pages.about import about
from sae_jax.pages.curves import plot_training
from sae_jax.pages.site import write_site
from sae_jax.progress import console
from sae_jax.training.logs import read_metrics
from sae_jax.training.run import TrainJob
from sae_jax.types import UsageError
from sae_jax.units import number

RECIPE = Path(__file__).parents[1] / "configs" / "demo.yaml"
ALL_TOKENS = 2**31  # of the held-out text
SHOWN = ("fvu", "l0", "dead_fraction", "ce_clean", "ce_sae", "ce_zero", "ce_mean", "loss_recovered", "kl")


@dataclass(frozen=True)
class Demo:
    """Harvest, train, evaluate and show, offline. Repeat the command to resume."""

    out: str = "demo"
    """directory for the activation set, the run, the summary and the site"""


def run(argv: Sequence[str]) -> None:
    """The main job from text to a page; writes DIR/summary.json."""
    if not argv or argv[0].startswith("-"):
        argv = [str(RECIPE), *argv]
    began = time.monotonic()
    given = recipe.parse(Demo, argv, "sae-jax demo").out
    if storage.is_url(given):
        raise UsageError(f"--out={given}: the demo writes on a disk; give a folder")
    out = Path(given)
    gpu.warn_of_idle_gpu()
    activations_path, run_path = str(out / "activations"), str(out / "run")
    files = itertools.takewhile(lambda token: not token.startswith("-"), argv)
    settings = recipe.parse(recipe.Recipe, list(files), "sae-jax demo")
    if settings.harvest.heldout is None:
        raise UsageError("the demo measures on held-out text; name one with harvest.heldout in the recipe")

    harvest(settings.harvest, activations_path)
    parts = {name: getattr(settings, name) for name in ("sae", "site", "reconstruct", "train", "mesh", "engine")}
    runs.run_train(TrainJob(data=activations_path, out=run_path, **parts))
    result, d = uses.evaluate(run_path)[run_path], artifact.load(run_path)
    plot_training(metrics := read_metrics(Path(run_path)), out / "training.png", about(d.record))
    write_site(d, out.resolve().name, out / "dashboard", store=out / "latents")
    table = Store(out / "latents").open()

    activations = open_activations(activations_path)
    text = held_out(activations, d.record.sites, ALL_TOKENS)
    assert text is not None
    assert isinstance(text.model, lm.LanguageModel)
    pca = baselines.pca(sample_rows(activations, d.record.sites.x[0]), round(result["l0"]))
    summary = {
        **{name: result[name] for name in SHOWN},
        "fvu_pca": on_rows(pca, text.rows())["fvu"],
        "token_purity": token_purity(table.strongest()),
        "neuron_token_purity": neuron_token_purity(text.model, text.encoded[0].layer, table),
        "tokens_per_second": float(np.median([row["tokens_per_second"] for row in metrics])),
        "seconds": round(time.monotonic() - began, 1),
    }
    storage.write_json(out / "summary.json", summary)
    print_table(("metric", "value"), [(name, number(value)) for name, value in summary.items()])
    console.print(f"open {out / 'dashboard' / 'index.html'} in a browser; {out / 'training.png'} is the training curve")
