"""`sae-jax explore DICT`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from sae_jax import config, uses
from sae_jax.commands import gpu
from sae_jax.types import UsageError


@dataclass(frozen=True)
class Explore:
    """Look at a dictionary in a browser, with its language model at hand. Only this machine can open the address.

    Adds to the dashboard: the latents of a text as it is typed, text and chats written with latents set. From another
    machine, forward the port: ssh -L 8000:127.0.0.1:8000, with --port=8000.
    """

    dictionary: tyro.conf.Positional[str]
    """directory of the run or of the saved dictionary"""
    site: str | None = None
    """directory of its dashboard, which is written if it is not there; default: a temporary one"""
    port: int = 0
    """to listen on; 0: any that is free"""
    data: str | None = None
    """the activation set, if it moved; default: that of the dictionary's training"""
    model: str | None = None
    """another reference for the language model, if it moved"""
    tokens: int = 400_000
    """of a dashboard that is written: tokens of the set's text to show examples from"""
    ema: bool = False
    """show the averaged weights instead of the live ones"""
    split: int = 1
    """devices that the language model is split over, as harvest.split"""
    store: str | None = None
    """of a dashboard that is written: folder of `sae-jax collect` with the activations to show"""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UsageError(f"--tokens={self.tokens} must be at least 1")
        if not 0 <= self.port < 2**16:
            raise UsageError(f"--port={self.port} must be from 0 to {2**16 - 1}")


def run(argv: Sequence[str]) -> None:
    """Parse, serve."""
    command = config.parse(Explore, argv, "sae-jax explore")
    gpu.warn_of_idle_gpu()
    names = ("site", "port", "data", "model", "tokens", "ema", "split", "store")
    uses.explore(command.dictionary, **{name: getattr(command, name) for name in names})
