"""`sae-jax evaluate RUN...`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from sae_jax import config
from sae_jax.commands import runtime
from sae_jax.commands.show import print_table
from sae_jax.evaluation.batches import Candidate
from sae_jax.evaluation.evaluate import Settings, finish, table_rows
from sae_jax.evaluation.evaluate import evaluate as evaluate_on
from sae_jax.training.checkpoint import load_run
from sae_jax.types import Sites, UsageError, Widths


@dataclass(frozen=True)
class Evaluate:
    """Measure dictionaries on held-out text, or on rows of a set that names none. Writes RUN/evaluation.json."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """directories of runs; those of one set are measured in one pass over the text"""
    data: str | None = None
    """another activation set to take rows, text and language model from; default: that of each run"""
    model: str | None = None
    """another reference for the language model, if it moved"""
    tokens: int = 100_000
    """tokens (or rows) to measure on, at most"""
    batch_tokens: int = 4096
    """tokens of one forward pass"""
    ema: bool = False
    """measure the averaged weights instead of the live ones"""
    shard: str = "0/1"
    """i/n: measure the i-th of n shares; the worker that finishes last merges them"""
    json: bool = False
    """print one JSON document, {run: {metric: value}}, instead of a table"""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UsageError("name at least one run to measure: sae-jax evaluate RUN")
        if self.tokens < 1 or self.batch_tokens < 1:
            raise UsageError(f"--tokens={self.tokens} and --batch-tokens={self.batch_tokens} must be at least 1")


def run(argv: Sequence[str]) -> None:
    """Parse, measure, show."""
    command = config.parse(Evaluate, argv, "sae-jax evaluate")
    runtime.warn_of_idle_gpu()
    results = evaluate(command)
    if command.json:
        sys.stdout.write(json.dumps(results, indent=2) + "\n")
    elif results:
        print_table(("metric", *results, "meaning"), table_rows(list(results.values())))


def evaluate(command: Evaluate) -> dict[str, dict[str, Any]]:
    """{run: its evaluation.json}, of those runs that no other worker still has to measure a share of."""
    shard, settings = runtime.worker(command.shard), Settings(command.tokens, command.batch_tokens, command.model)
    measured = evaluate_on({run: open_run(run, command) for run in command.runs}, settings, shard)
    documents = {run: finish(Path(run), measured[run], settings, shard) for run in command.runs}
    return {run: document for run, document in documents.items() if document is not None}


def open_run(run: str, command: Evaluate) -> Candidate:
    """The dictionary of a run, and the set to measure it on."""
    loaded = load_run(run, ema=command.ema)
    facts, sites, widths = loaded.facts, Sites.of(loaded.facts["sites"]), Widths.of(loaded.facts["widths"])
    weights = {"step": loaded.step, "weights": "ema" if command.ema else "live"}
    activations, recorded = runtime.open_set(command.data, facts), {"dead_fraction": loaded.dead_fraction}
    return Candidate(loaded.sae, sites, widths, activations, weights, recorded)
