"""`sae-jax export DICT --format NAME --out DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from sae_jax import config, interchange
from sae_jax.progress import console


@dataclass(frozen=True)
class Export:
    """Write a dictionary for another program."""

    dictionary: tyro.conf.Positional[str]
    """directory of the run or of the saved dictionary"""
    format: str
    """for which program; --help of the docs lists them"""
    out: str
    """directory to write, where there is nothing yet"""
    calibrate: str | None = None
    """activation set from whose rows thresholds are taken, for programs that know no selection of k latents"""


def run(argv: Sequence[str]) -> None:
    """Parse, convert."""
    command = config.parse(Export, argv, "sae-jax export")
    interchange.export(command.dictionary, command.format, command.out, command.calibrate)
    console.print(f"{command.out}: {command.format}")
