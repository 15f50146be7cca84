"""`sae-jax evaluate DIR...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import tyro

from sae_jax import config, storage, uses
from sae_jax.commands import gpu
from sae_jax.commands.show import print_table
from sae_jax.evaluation.evaluate import table_rows
from sae_jax.evaluation.suites import Suite
from sae_jax.pages.evaluation import write_report
from sae_jax.progress import console
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
    heldout: str | None = None
    """another reference for the held-out text, if it moved or the set names none"""
    tokens: int = 100_000
    """tokens (or rows) to measure on, at most"""
    batch_tokens: int = 4096
    """tokens of one forward pass"""
    ema: bool = False
    """measure the averaged weights instead of the live ones"""
    shard: str = "0/1"
    """i/n: measure the i-th of n shares; the worker that finishes last merges them"""
    split: int = 1
    """devices that the language model is split over, as harvest.split"""
    suite: tuple[Suite, ...] = ("core",)
    """what to measure: the core alone, or openai, probing or causal studies too, or all; what is on record is not made
    again"""
    baselines: tuple[Literal["identity", "pca", "ica", "random", "neurons", "all"], ...] = ()
    """what to measure beside them, by the same code, at the site and with the L0 of the first"""
    tasks: str | None = None
    """what probes are trained on: sae-probes (the sets of that package) or a folder of csv files (prompt,
    target); default: properties of the held-out text"""
    loss_curve: str | None = None
    """csv file with the columns compute and loss, of the language model's training: tells the effective compute"""
    seed: int = 0
    """of the samples that studies take"""
    report: str | None = None
    """write all that was measured as a page with figures, to this file"""
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
    gpu.warn_of_idle_gpu()
    not_settings = ("dictionaries", "shard", "report", "json")
    settings = {field.name: getattr(command, field.name) for field in fields(command) if field.name not in not_settings}
    results = uses.evaluate(*command.dictionaries, **settings, shard=config.share(command.shard))
    if command.report and results:
        write_report(command.report, results)
        console.print(f"open {command.report} in a browser")
    if command.json:
        sys.stdout.write(storage.json_text(results, "--json"))
    elif results:
        print_table(("metric", *results, "meaning"), table_rows(list(results.values())))
