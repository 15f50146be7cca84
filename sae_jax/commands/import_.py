"""`sae-jax import PATH --out DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from sae_jax import config, interchange
from sae_jax.progress import console


@dataclass(frozen=True)
class Import:
    """Turn a dictionary of another program into one that all commands take."""

    path: tyro.conf.Positional[str]
    """its folder, or its file; or hf:owner/repo[/folder][@revision], or saelens:RELEASE/ID"""
    out: str
    """directory of the dictionary, where there is nothing yet"""
    format: str = "auto"
    """whose format it is; auto: told from its files"""
    k: int | None = None
    """active latents a token, for formats whose files do not say"""
    calibrate: str | None = None
    """activation set from whose rows a threshold is taken, for a selection over a batch that has none stored"""


def run(argv: Sequence[str]) -> None:
    """Parse, convert, say what was changed."""
    command = config.parse(Import, argv, "sae-jax import")
    record = interchange.import_dictionary(command.path, command.out, command.format, command.k, command.calibrate)
    widths = " -> ".join(f"d={sum(side)}" for side in dict.fromkeys(record.widths))
    name = record.origin.format if record.origin else command.format
    console.print(f"{command.out}: {record.variant}, {record.sae['n_latents']:,} latents, {widths}, from {name}")
    for change in record.origin.changes if record.origin else ():
        console.print(f"  {change}")
    if record.origin and not record.origin.unit_rows and record.variant != "transcoder":
        console.print("  decoder rows keep their norms, which are not 1: codes are those of the original")
