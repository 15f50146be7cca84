"""`sae-jax collect DIR --out STORE`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from sae_jax import config, uses
from sae_jax.commands import gpu
from sae_jax.progress import console
from sae_jax.types import UsageError


@dataclass(frozen=True)
class Collect:
    """Keep where in a sample of text each latent is active, for pages and analyses. Repeat the command to resume."""

    dictionary: tyro.conf.Positional[str]
    """directory of the run or of the saved dictionary"""
    out: str
    """folder of the store"""
    data: str | None = None
    """the activation set, if not that of the dictionary's training; it must be made from text"""
    tokens: int = 400_000
    """tokens of the set's text; on disk an activation takes 8 bytes"""
    ema: bool = False
    """use the averaged weights instead of the live ones"""
    shard: str = "0/1"
    """i/n: make the i-th of n shares; the worker that finishes last joins them"""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UsageError(f"--tokens={self.tokens} must be at least 1")


def run(argv: Sequence[str]) -> None:
    """Parse, encode, say what the store holds."""
    command = config.parse(Collect, argv, "sae-jax collect")
    gpu.warn_of_idle_gpu()
    settings = {name: getattr(command, name) for name in ("data", "tokens", "ema")}
    found = uses.collect(command.dictionary, command.out, **settings, shard=config.share(command.shard))
    if found is None:
        console.print(f"{command.out}: done here; the shares of other workers are missing")
        return
    n_active, n_silent = int(found.offsets[-1]), int((found.counts == 0).sum())
    console.print(
        f"{command.out}: {n_active:,} activations of {found.n_latents - n_silent:,} latents on {found.n_rows:,} rows; "
        f"{n_silent:,} latents never fire"
    )
