"""`sae-jax evaluate RUN`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from sae_jax import artifact, config, storage
from sae_jax.activations.store import ActivationSet, open_activations
from sae_jax.commands import runtime
from sae_jax.evaluation.measure import measure
from sae_jax.record import Record
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
    for name, fvu in result.get("fvu_by_source", {}).items():
        table.add_row(f"fvu of {name}", f"{fvu:.4f}")
    Console().print(table)


def evaluate(command: Evaluate) -> dict[str, Any]:
    """All metrics of a run, as written to RUN/evaluation.json."""
    d = artifact.load(command.run, ema=command.ema)
    record = d.record
    activations = open_set(command.data, record)
    for source in (*record.encodes, *record.reconstructs):
        if activations.source(source.name).d != source.width:
            there = activations.source(source.name).d
            raise UsageError(f"{activations.path}: {source.name} has {there} dimensions, the run {source.width}")
    result = measure(d.sae, activations, record.sites, command.tokens, command.batch_tokens, command.model)
    # dead_fraction is over the run's last train.dead_after_tokens, silent_fraction over the rows measured here.
    weights = "ema" if command.ema else "live"
    result = {"step": record.steps, "weights": weights, "dead_fraction": record.metrics["dead_fraction"], **result}
    storage.write_json(Path(command.run) / "evaluation.json", result)
    return result


def open_set(data: str | None, record: Record) -> ActivationSet:
    """The set at `data`, or else the one that a dictionary was trained on, which may be partial."""
    if data is None and (record.data is None or record.data.path is None):
        raise UsageError("the dictionary names no activation set that it was trained on; name one with --data")
    return open_activations(data or record.data.path, allow_partial=data is None)  # pyrefly: ignore
