"""`sae-jax attribute DICT --prompt "..." [--token "..."]`."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from sae_jax import config, storage, uses
from sae_jax.commands import gpu
from sae_jax.commands.show import print_table
from sae_jax.errors import UsageError, printable
from sae_jax.evaluation.effects import Attribution
from sae_jax.progress import console


@dataclass(frozen=True)
class Attribute:
    """The latents that made the language model say a token after a prompt."""

    dictionary: tyro.conf.Positional[str]
    """directory of the run or of the saved dictionary"""
    prompt: str
    """after which it is said"""
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

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UsageError(f"--n={self.n} must be at least 1")


def run(argv: Sequence[str]) -> None:
    """Parse, attribute, show."""
    command = config.parse(Attribute, argv, "sae-jax attribute")
    gpu.warn_of_idle_gpu()
    settings = {name: getattr(command, name) for name in ("n", "data", "model", "ema")}
    attributions = uses.attribute(command.dictionary, command.prompt, command.token, **settings)
    if command.json:
        sys.stdout.write(storage.json_text([dataclasses.asdict(each) for each in attributions], "--json"))
        return
    for attribution in attributions:
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
