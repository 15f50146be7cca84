"""`sae-jax evaluate DIR...`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from sae_jax import artifact, config
from sae_jax.commands import runtime
from sae_jax.commands.show import print_table
from sae_jax.evaluation.batches import Candidate
from sae_jax.evaluation.evaluate import Settings, finish, table_rows
from sae_jax.evaluation.evaluate import evaluate as evaluate_on
from sae_jax.evaluation.text import open_set
from sae_jax.types import UsageError


@dataclass(frozen=True)
class Evaluate:
    """Measure dictionaries on held-out text, or on rows of a set that names none. Writes DIR/evaluation.json."""

    dictionaries: tyro.conf.Positional[tuple[str, ...]]
    """directories of runs or of saved dictionaries; those of one set share the pass over its text"""
    data: str | None = None
    """another activation set to take rows, text and language model from; default: that of each dictionary's training"""
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
    """print one JSON document, {directory: {metric: value}}, instead of a table"""

    def __post_init__(self) -> None:
        if not self.dictionaries:
            raise UsageError("name at least one run or saved dictionary to measure: sae-jax evaluate RUN")
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
    """{directory: its evaluation.json}, but for those that other workers still have to measure a share of."""
    shard, settings = runtime.worker(command.shard), Settings(command.tokens, command.batch_tokens, command.model)
    loaded = {path: artifact.load(path, ema=command.ema) for path in command.dictionaries}
    candidates = {path: Candidate.of(d, open_set(d.record, command.data)) for path, d in loaded.items()}
    measured = evaluate_on(candidates, settings, shard)
    documents = {path: finish(Path(path), measured[path], settings, shard) for path in command.dictionaries}
    return {path: document for path, document in documents.items() if document is not None}
