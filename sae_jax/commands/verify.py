"""`sae-jax verify SET`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from sae_jax import config
from sae_jax.activations.store import read_spec
from sae_jax.activations.verify import verify
from sae_jax.progress import Progress, console
from sae_jax.storage import Files
from sae_jax.types import UserError


@dataclass(frozen=True)
class Verify:
    """Check every byte of an activation set against its commits. Changes nothing."""

    data: tyro.conf.Positional[str]
    """the activation set"""
    allow_partial: bool = False
    """accept a set some of whose shards are not there yet"""


def run(argv: Sequence[str]) -> None:
    """Parse, read everything, say what is damaged."""
    command = config.parse(Verify, argv, "sae-jax verify")
    spec = read_spec(Files(command.data))
    with Progress("verify", spec.n_shards, "shards", first="") as progress:
        report = verify(command.data, lambda done, _: progress.update(done))
    for line in report.damage:
        console.print(line)
    if report.damage:
        raise UserError(f"{command.data}: {len(report.damage)} damaged; delete these shards and harvest again")
    if report.n_shards < spec.n_shards and not command.allow_partial:
        raise UserError(
            f"{command.data}: {report.n_shards} of {spec.n_shards} shards are committed; finish the harvest with the "
            "same command or pass --allow-partial"
        )
    console.print(
        f"{command.data}: {report.n_shards} shards, {report.n_chunks} chunks, {report.n_bytes:,} bytes intact"
    )
