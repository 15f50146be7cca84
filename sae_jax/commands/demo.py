"""`sae-jax demo [RECIPE] --out DIR`: every command in turn, on the language model that ships with the package."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from sae_jax import config, lm
from sae_jax.activations import tokens
from sae_jax.activations.harvest import harvest, keep, read_sites
from sae_jax.activations.sample import sample_rows
from sae_jax.activations.store import ActivationSet, open_activations
from sae_jax.analysis.curves import plot_training
from sae_jax.analysis.examples import Activations, strongest_dense, token_purity
from sae_jax.commands import recipe, runtime
from sae_jax.commands.dashboard import Dashboard, dashboard
from sae_jax.commands.evaluate import Evaluate, evaluate
from sae_jax.commands.train import Train, train
from sae_jax.evaluation.reconstruction import pca_fvu
from sae_jax.progress import console
from sae_jax.train.logs import read_metrics
from sae_jax.types import UsageError

RECIPE = Path(__file__).parents[2] / "configs" / "demo.yaml"
BATCH = 64  # sequences


@dataclass(frozen=True)
class Demo:
    """Harvest, train, evaluate and show, offline. Repeat the command to resume."""

    out: str = "demo"
    """directory for the activation set, the run, the summary and the site"""


def run(argv: Sequence[str]) -> None:
    """The main job from text to a page; writes DIR/summary.json."""
    if not argv or argv[0].startswith("-"):
        if not RECIPE.exists():
            raise UsageError("configs/demo.yaml is not here; run from a clone, or give a recipe: sae-jax demo RECIPE")
        argv = [str(RECIPE), *argv]
    began = time.monotonic()
    out = Path(recipe.parse(Demo, argv, "sae-jax demo").out)
    runtime.warn_of_idle_gpu()
    activations_path, run_path = str(out / "activations"), str(out / "run")
    settings = recipe.parse(recipe.Recipe, argv[:1], "sae-jax demo")

    harvest(settings.harvest, activations_path)
    train(Train(activations_path, run_path, settings.sae, settings.site, settings.train, settings.mesh))
    metrics = read_metrics(Path(run_path))
    plot_training(metrics, out / "training.png")
    result = evaluate(Evaluate(run_path))
    table, sequences = dashboard(Dashboard(run_path, str(out / "dashboard")))

    activations = open_activations(activations_path)
    hook = activations.source(result["site"]).hook
    summary = {
        **{name: result[name] for name in ("fvu", "l0", "dead_fraction", "ce_clean", "ce_sae", "ce_zero", "ce_mean")},
        **{name: result[name] for name in ("loss_recovered", "kl")},
        "fvu_pca": _pca_fvu(activations, result["site"], settings.sae.k, hook),
        "token_purity": token_purity(table.strongest()),
        "neuron_token_purity": _neuron_purity(activations, hook, table, sequences),
        "tokens_per_second": float(np.median([row["tokens_per_second"] for row in metrics])),
        "seconds": round(time.monotonic() - began, 1),
    }
    config.write_json(out / "summary.json", summary)
    shown = Table("metric", "value", title=f"{out / 'summary.json'}")
    for name, value in summary.items():
        shown.add_row(name, f"{value:,.4g}")
    Console().print(shown)
    console.print(f"open {out / 'dashboard' / 'index.html'} in a browser; {out / 'training.png'} is the training curve")


def _pca_fvu(activations: ActivationSet, site: str, rank: int, hook: str) -> float:
    """What the best linear code of as many numbers a token reaches on the same held-out text."""
    spec = activations.spec
    model, tokenizer = lm.load(spec.tokenizer), lm.tokenizer(spec.tokenizer)
    special = np.asarray(tokenizer.special_ids, np.int32)
    held_out = []
    sequences = np.stack(list(tokens.sequences(spec.heldout, tokenizer, spec.context)))
    for ids_BT, x_BTD in _read(model, hook, sequences):
        held_out.append(x_BTD[keep(ids_BT, None, special, None)])
    return pca_fvu(sample_rows(activations, site), np.concatenate(held_out), rank)


def _neuron_purity(activations: ActivationSet, hook: str, table: Activations, sequences: np.ndarray) -> float:
    """token_purity of the MLP neurons of the same layer, on the same text: what a reader had before."""
    model = lm.load(activations.spec.tokenizer)
    layer = lm.parse_hook(hook, model.spec).layer
    counted = np.zeros(sequences.shape, bool)
    counted[table.seq, table.pos] = True

    def blocks() -> Iterator[tuple[np.ndarray, ...]]:
        first = 0
        for ids_BT, x_BTF in _read(model, f"mlp_act.{layer}", sequences):
            mine = counted[first : first + len(ids_BT)]
            seq, pos = np.nonzero(mine)
            yield x_BTF[mine], ids_BT[mine], seq + first, pos
            first += len(ids_BT)

    return token_purity(strongest_dense(blocks()))


def _read(model: lm.LanguageModel, hook: str, sequences: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, activations f32) at a site, batch by batch."""
    site = lm.parse_hook(hook, model.spec)
    for first in range(0, len(sequences), BATCH):
        ids_BT = sequences[first : first + BATCH]
        acts, _ = read_sites(model, ids_BT, (site,), "float32")
        yield ids_BT, np.asarray(acts[hook])
