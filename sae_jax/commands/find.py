"""`sae-jax find DICT --text "..."` and `sae-jax find DICT --positive FILE --negative FILE`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from sae_jax import config, storage, uses
from sae_jax.commands import gpu
from sae_jax.commands.show import print_table
from sae_jax.errors import UsageError, UserError, printable
from sae_jax.evaluation.prompts import Separation


@dataclass(frozen=True)
class Find:
    """Find latents: the strongest at each token of a text, or those that tell two kinds of texts apart."""

    dictionary: tyro.conf.Positional[str]
    """directory of the run or of the saved dictionary"""
    text: str | None = None
    """a text to look at"""
    positive: str | None = None
    """a file of texts, one a line, that have what is looked for"""
    negative: str | None = None
    """a file of texts, one a line, that do not have it and are alike in all else"""
    n: int = 5
    """latents to show"""
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
        files = [self.positive, self.negative]
        if (self.text is None) == (files == [None, None]) or (self.text is None and None in files):
            raise UsageError("give --text, or both --positive and --negative")


def run(argv: Sequence[str]) -> None:
    """Parse, encode, show."""
    command = config.parse(Find, argv, "sae-jax find")
    gpu.warn_of_idle_gpu()
    settings = {name: getattr(command, name) for name in ("n", "data", "model", "ema")}
    if command.text is not None:
        _show_active(command.json, *uses.active(command.dictionary, command.text, **settings))
    elif command.positive is not None and command.negative is not None:
        positive, negative = _lines(command.positive), _lines(command.negative)
        _show_separating(command.json, uses.find(command.dictionary, positive, negative, **settings))


def _show_separating(as_json: bool, found: list[Separation]) -> None:
    if as_json:
        sys.stdout.write(storage.json_text([dataclasses.asdict(latent) for latent in found], "--json"))
        return
    header = ("latent", "AUC [90 %]", "mean if positive", "if negative", "fires in positive", "in negative")
    rows = [
        (
            str(latent.latent),
            f"{latent.auc:.3f} [{latent.interval[0]:.3f}, {latent.interval[1]:.3f}]",
            *(f"{value:.4g}" for value in (latent.positive, latent.negative)),
            *(f"{share:.0%}" for share in (latent.fires_in_positive, latent.fires_in_negative)),
        )
        for latent in found
    ]
    print_table(header, rows)


def _show_active(as_json: bool, tokens: list[str], latents_Tn: np.ndarray, values_Tn: np.ndarray) -> None:
    rows = [(token, _pairs(*latents)) for token, *latents in zip(tokens, latents_Tn, values_Tn, strict=True)]
    if as_json:
        content = [{"token": printable(token), "latents": pairs} for token, pairs in rows]
        sys.stdout.write(storage.json_text(content, "--json"))
        return
    shown = [
        (printable(token), "  ".join(f"{latent} ({value:.3g})" for latent, value in pairs)) for token, pairs in rows
    ]
    print_table(("token", "latent (value)"), shown)


def _pairs(latents_n: np.ndarray, values_n: np.ndarray) -> list[list[Any]]:
    return [[int(latent), float(value)] for latent, value in zip(latents_n, values_n, strict=True) if value > 0]


def _lines(path: str) -> list[str]:
    """The lines of a text file that are not blank."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({storage.one_line(error)}); save it as UTF-8") from None
    return [line for line in text.splitlines() if line.strip()]
