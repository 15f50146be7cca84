"""`sae-jax steer DICT --latent 123 --scale 5 --prompt "..."`."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tyro

from sae_jax import config, storage, uses
from sae_jax.commands import gpu
from sae_jax.commands.show import print_table
from sae_jax.errors import UsageError, printable
from sae_jax.evaluation.steering import How
from sae_jax.progress import console

DEFAULT = (5.0,)  # multiples of the largest value


@dataclass(frozen=True)
class Steer:
    """What the language model writes with latents set to multiples of their largest value, and without."""

    dictionary: tyro.conf.Positional[str]
    """directory of the run or of the saved dictionary"""
    prompt: str
    """what is continued"""
    latent: tuple[int, ...]
    """one or several, which are set together"""
    scale: tuple[float, ...] = ()
    """multiples of the largest value that each latent has on rows of the set; one text for each; default: 5"""
    how: Literal["clamp", "add"] = "clamp"
    """clamp: their values become these; add: so much is added to whatever they are"""
    norm: tuple[float, ...] = ()
    """instead of --scale: an edit along their decoder rows, of so many times the norm of what it is added to"""
    tokens: int = 40
    """to write"""
    temperature: float = 0.0
    """0 takes the likeliest token each time"""
    seed: int = 0
    """of the random numbers, with a temperature above 0"""
    chat: bool = False
    """the prompt is a user's message to an instruct model, which answers"""
    data: str | None = None
    """the activation set, if it moved; default: that of the dictionary's training"""
    model: str | None = None
    """another reference for the language model, if it moved"""
    ema: bool = False
    """use the averaged weights instead of the live ones"""
    json: bool = False
    """print JSON instead of a table"""

    def __post_init__(self) -> None:
        if not self.latent:
            raise UsageError("name at least one --latent")
        if self.norm and (self.scale or self.how != "clamp"):
            raise UsageError("--norm says by itself how much is added; leave out --scale and --how")
        for flag, values in (("scale", self.scale), ("norm", self.norm)):
            for value in values:
                if not math.isfinite(value):
                    raise UsageError(f"--{flag}={value} must be finite")


def run(argv: Sequence[str]) -> None:
    """Parse, write, show side by side."""
    command = config.parse(Steer, argv, "sae-jax steer")
    gpu.warn_of_idle_gpu()
    names = ("tokens", "temperature", "seed", "chat", "data", "model", "ema")
    settings = {name: getattr(command, name) for name in names}
    how: How = "norm" if command.norm else command.how
    scales = command.norm or command.scale or DEFAULT
    largest, written = uses.steer(command.dictionary, command.prompt, command.latent, scales, how=how, **settings)
    if command.json:
        content: dict[str, Any] = {"how": how, "largest": dict(zip(map(str, command.latent), largest, strict=True))}
        content |= {"written": [dataclasses.asdict(text) for text in written]}
        sys.stdout.write(storage.json_text(content, "--json"))
        return
    for latent, value in zip(command.latent, largest, strict=True):
        console.print(f"latent {latent}: largest value {value:.4g} on rows of the set")
    print_table(
        ("norm" if command.norm else "scale", "what the model writes"),
        [("unsteered" if text.scale is None else f"{text.scale:g}", printable(text.text)) for text in written],
    )
