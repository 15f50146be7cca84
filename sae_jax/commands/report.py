"""`sae-jax report PATH...`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from sae_jax import config, uses
from sae_jax.progress import console
from sae_jax.types import UsageError


@dataclass(frozen=True)
class Report:
    """Write a page about a run, a sweep or dictionaries, for those who would rather look than read JSON."""

    paths: tyro.conf.Positional[tuple[str, ...]]
    """directory of a run, of a sweep or of a saved dictionary; several runs or dictionaries are compared"""
    out: str | None = None
    """the file; default: report.html in the directory"""

    def __post_init__(self) -> None:
        if not self.paths:
            raise UsageError("name a run, a sweep or a saved dictionary: sae-jax report RUN")


def run(argv: Sequence[str]) -> None:
    """Parse, write, say where."""
    command = config.parse(Report, argv, "sae-jax report")
    console.print(f"{uses.report(*command.paths, out=command.out)}")
