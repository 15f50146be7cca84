"""`sae-jax evaluate RUN`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from sae_jax import config
from sae_jax.activations.store import open_activations
from sae_jax.commands import runtime
from sae_jax.evaluation.measure import measure
from sae_jax.train.checkpoint import load, read_config
from sae_jax.train.logs import read_metrics
from sae_jax.types import UsageError

SHOWN = (
    "fvu",
    "nmse_uncentered",
    "l0",
    "cosine",
    "dead_fraction",
    "silent_fraction",
    "ce_clean",
    "ce_sae",
    "ce_zero",
    "ce_mean",
    "kl",
    "loss_recovered",
)


@dataclass(frozen=True)
class Evaluate:
    """Measure a run on held-out text, or on rows of a set where there is no text. Writes RUN/evaluation.json."""

    run: tyro.conf.Positional[str]
    """directory of the run"""
    data: str | None = None
    """another activation set to take rows, text and language model from; default: the run's own"""
    model: str | None = None
    """another reference for the language model, if it moved"""
    tokens: int = 100_000
    """tokens (or rows) to measure on, at most"""
    batch_tokens: int = 4096
    """tokens of one forward pass"""
    ema: bool = False
    """measure the averaged weights instead of the live ones"""

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.batch_tokens < 1:
            raise UsageError(f"--tokens={self.tokens} and --batch-tokens={self.batch_tokens} must be at least 1")


def run(argv: Sequence[str]) -> None:
    """Parse, measure, show."""
    command = config.parse(Evaluate, argv, "sae-jax evaluate")
    runtime.warn_of_idle_gpu()
    result = evaluate(command)
    table = Table("metric", "value", title=f"{command.run} on {result['text'] or 'rows of ' + result['data']}")
    for name in SHOWN:
        if name in result:
            table.add_row(name, f"{result[name]:.4f}")
    Console().print(table)


def evaluate(command: Evaluate) -> dict[str, Any]:
    """All metrics of a run, as written to RUN/evaluation.json."""
    path = Path(command.run)
    facts = read_config(path)
    sae = load(path, ema=command.ema)
    activations = open_activations(command.data or facts["data"])
    width = activations.source(facts["site"]).d
    if width != facts["d_model"]:
        raise UsageError(f"{activations.path}: {facts['site']} has {width} dimensions, the run {facts['d_model']}")
    result = measure(sae, activations, facts["site"], command.tokens, command.batch_tokens, command.model)
    if logged := read_metrics(path):
        # Of the run, over train.dead_after_tokens; silent_fraction is over the rows measured here.
        result = {"dead_fraction": logged[-1]["dead_fraction"], **result}
    result = {"weights": "ema" if command.ema else "live", **result}
    config.write_json(path / "evaluation.json", result)
    return result
