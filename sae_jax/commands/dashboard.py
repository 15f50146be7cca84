"""`sae-jax dashboard RUN --out DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from sae_jax import config, uses
from sae_jax.commands import gpu
from sae_jax.progress import console
from sae_jax.types import UsageError


@dataclass(frozen=True)
class Dashboard:
    """Write a static site that shows the latents of a dictionary. Needs a set made from text."""

    run: tyro.conf.Positional[str]
    """directory of the run or of the saved dictionary"""
    out: str
    """directory of the site; open index.html in it. With --single-file, the name of that file"""
    data: str | None = None
    """the activation set, if it moved; default: that of the dictionary's training"""
    model: str | None = None
    """another reference for the language model, if it moved"""
    tokens: int = 400_000
    """tokens of the set's text to show examples from"""
    ema: bool = False
    """show the averaged weights instead of the live ones"""
    split: int = 1
    """devices that the language model is split over, as harvest.split"""
    store: str | None = None
    """folder of `sae-jax collect` with the activations to show; what is missing there is made. Default: none is kept"""
    beside: str | None = None
    """another dictionary to compare with: pages of both, and which of its latents are like each"""
    format: Literal["site", "neuronpedia", "saedashboard", "circuit-tracer"] = "site"
    """the site, or files of what it shows for another program: docs/reports.md says who reads them"""

    labels: str | None = None
    """.csv or .jsonl file with latent and label in each line; it wins over the labels of the store"""
    latents: tuple[int, ...] | None = None
    """numbers of the latents that get a page; default: all"""
    patterns: int = 64
    """so many latents, of those that write most, get patterns (N2G); 0: none"""
    single_file: bool = False
    """one page that holds everything, for the latents that --latents names"""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UsageError(f"--tokens={self.tokens} must be at least 1")


def run(argv: Sequence[str]) -> None:
    """Parse, collect, write."""
    command = config.parse(Dashboard, argv, "sae-jax dashboard")
    gpu.warn_of_idle_gpu()
    settings = {name: value for name, value in vars(command).items() if name not in ("run", "out")}
    console.print(f"{uses.dashboard(command.run, command.out, **settings)}")
