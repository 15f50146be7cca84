"""`sae-jax export DICT --format NAME --out DIR [--push OWNER/REPO]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from sae_jax import config, interchange, storage
from sae_jax.interchange import hub
from sae_jax.progress import console
from sae_jax.types import UsageError


@dataclass(frozen=True)
class Export:
    """Write a dictionary for another program."""

    dictionary: tyro.conf.Positional[tuple[str, ...]]
    """directory of the run or of the saved dictionary; several, one of each layer, for circuit_tracer"""
    format: str
    """for which program; docs/interchange.md lists them. sae_jax: ours"""
    out: str
    """directory to write, where there is nothing yet"""
    calibrate: str | None = None
    """activation set from whose rows thresholds are taken, for programs that know no selection of k latents"""
    push: str | None = None
    """owner/name[/folder] on the hub to publish it at, with a card; log in with `hf auth login`, or set HF_TOKEN"""
    private: bool = False
    """with push: a repository that is made is seen by its owner alone"""
    revision: str | None = None
    """with push: the branch, made if it is not there"""
    licence: str | None = None
    """with push: as the hub names it, such as apache-2.0"""

    def __post_init__(self) -> None:
        if not self.dictionary:
            raise UsageError("name the dictionary: sae-jax export DIR --format NAME --out DIR")
        if self.push is None and (self.private or self.revision or self.licence):
            raise UsageError("--private, --revision and --licence say how to publish; give --push, too")
        if self.push is not None:
            hub.destination(self.push)
            if storage.is_url(self.out):
                raise UsageError(f"--out={self.out}: what is pushed is written on a disk first; give a folder")


def run(argv: Sequence[str]) -> None:
    """Parse, convert."""
    command = config.parse(Export, argv, "sae-jax export")
    record = interchange.export(command.dictionary, command.format, command.out, command.calibrate)
    console.print(f"{command.out}: {command.format}")
    if command.push is not None:
        settings = (command.format, command.private, command.revision, command.licence)
        console.print(f"published as {hub.upload(Path(command.out), command.push, record, *settings)}")
