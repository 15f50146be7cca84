"""`sae-jax attribute DICT... --prompt "..." [--token "..." | --latent NAME:ID]`."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from sae_jax import config, storage, uses
from sae_jax.commands import gpu
from sae_jax.commands.show import print_lines, print_table
from sae_jax.errors import UsageError, printable
from sae_jax.evaluation.effects import Attribution
from sae_jax.evaluation.tree import Tree
from sae_jax.progress import console


@dataclass(frozen=True)
class Attribute:
    """The latents that made the language model say a token after a prompt, or those that made one latent fire in it."""

    dictionaries: tyro.conf.Positional[tuple[str, ...]]
    """directory of the run or of the saved dictionary; with --latent two or more, at different places of one model"""
    prompt: str
    """after which it is said"""
    latent: str | None = None
    """NAME:ID, of the dictionary whose directory is NAME or ends in it: which latents of the others made this one fire
    in the prompt, and which it made fire"""
    token: tuple[str, ...] = ()
    """one or several, each with the space before it if it has one; default: the likeliest"""
    n: int = 10
    """latents to show, the strongest for or against"""
    data: str | None = None
    """the activation set, if it moved; default: that of the dictionary's training"""
    model: str | None = None
    """another reference for the language model, if it moved"""
    ema: bool = False
    """use the averaged weights instead of the live ones"""
    json: bool = False
    """print JSON instead of a table"""
    out: str | None = None
    """write JSON to this file, too"""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UsageError(f"--n={self.n} must be at least 1")
        if self.latent is None and len(self.dictionaries) != 1:
            raise UsageError(
                f"{len(self.dictionaries)} dictionaries: name one, or the latent of one with --latent NAME:ID"
            )
        if self.latent is not None:
            if self.token or self.data:
                raise UsageError("--latent asks about a latent; leave out --token and --data")
            self.chosen()

    def chosen(self) -> tuple[str, int]:
        """The dictionary and the number that --latent names. UsageError if it names none, or several."""
        name, _, number = (self.latent or "").rpartition(":")
        named = [each for each in self.dictionaries if name in (each, Path(each).name)]
        if not (number.isascii() and number.isdigit() and len(number) < 10) or len(named) != 1:
            names = ", ".join(self.dictionaries) or "the directories"
            raise UsageError(f"--latent={self.latent}: use NAME:ID, with NAME one of {names}")
        return named[0], int(number)


def run(argv: Sequence[str]) -> None:
    """Parse, attribute, show."""
    command = config.parse(Attribute, argv, "sae-jax attribute")
    gpu.warn_of_idle_gpu()
    settings = {name: getattr(command, name) for name in ("n", "model", "ema")}
    if command.latent is not None:
        given = {name: name for name in command.dictionaries}
        found: Any = uses.causal_tree(given, command.prompt, *command.chosen(), **settings)
        content: Any = dataclasses.asdict(found)
    else:
        settings["data"] = command.data
        found = uses.attribute(command.dictionaries[0], command.prompt, command.token, **settings)
        content = [dataclasses.asdict(each) for each in found]
    if command.out:
        storage.write_json(command.out, content)
    if command.json:
        sys.stdout.write(storage.json_text(content, "--json"))
    elif isinstance(found, Tree):
        print_lines(str(found).splitlines())
    else:
        for attribution in found:
            _show(attribution)


def _show(attribution: Attribution) -> None:
    probability = math.exp(attribution.log_prob)
    console.print(f"{printable(attribution.text)!r} has probability {probability:.3g}. What speaks for it, in nats:")
    rows = [
        (
            str(share.latent),
            f"{share.attribution:+.3f}",
            f"{share.ablated:+.3f}",
            f"{share.position}: {printable(attribution.prompt[share.position])}",
            f"{share.value:.3g}",
        )
        for share in attribution.latents
    ]
    rows.append(("others", f"{attribution.others:+.3f}", "", "", ""))
    rows.append(("error", f"{attribution.error:+.3f}", "", "", ""))
    print_table(("latent", "attribution", "lost without it", "most at", "value there"), rows)
