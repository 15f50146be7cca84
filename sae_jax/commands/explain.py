"""`sae-jax explain STORE --endpoint URL --model NAME`, and `--sheet` and `--ratings` for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from sae_jax import config, uses
from sae_jax.autointerp import ratings
from sae_jax.autointerp.explain import SCORES, Explained, Score
from sae_jax.autointerp.judge import JudgeConfig
from sae_jax.commands.show import print_lines, print_table
from sae_jax.errors import PartialError, UsageError, UserError, printable
from sae_jax.progress import console


@dataclass(frozen=True)
class Explain:
    """What latents stand for: by a language model (--endpoint), or rated by people who do not know which they see."""

    store: tyro.conf.Positional[str]
    """folder that sae-jax collect made; labels.jsonl is written there"""
    endpoint: str | None = None
    """URL of an OpenAI-compatible endpoint, such as http://localhost:8000/v1"""
    model: str | None = None
    """what the endpoint calls its model"""
    latents: tuple[int, ...] = ()
    """which are explained"""
    n: int | None = None
    """or so many, drawn at random"""
    score: Score | None = None
    """also how well explanations predict: simulation of strengths, or detection of texts"""
    batch: int = 5
    """texts in one request of a score"""
    seed: int = 0
    """of what is drawn"""
    tokenizer: str | None = None
    """another reference for the tokenizer of the store's text, if it moved"""
    key_env: str = JudgeConfig.key_env
    """environment variable that has the key of the endpoint, if it wants one"""
    timeout: float = JudgeConfig.timeout
    """seconds until a request must have its whole answer"""
    tries: int = JudgeConfig.tries
    """of a request"""
    per_minute: float = JudgeConfig.per_minute
    """requests a minute; 0: as many as it answers"""
    concurrency: int = JudgeConfig.concurrency
    """requests at a time"""
    price: tuple[float, float] = JudgeConfig.price
    """of a million prompt tokens and of a million completion tokens, for the report of costs"""
    sheet: str | None = None
    """write a sheet (.csv) of these latents for people to rate, and its key beside it"""
    baseline: str | None = None
    """with --sheet: a second store, of a baseline, of which as many latents are mixed in"""
    ratings: tuple[str, ...] = ()
    """read sheets that were filled in, one of each rater"""
    key: str | None = None
    """with --ratings: the key of the sheet, if it is not in the folder of the first"""

    def __post_init__(self) -> None:
        is_judged = self.endpoint is not None or self.model is not None
        if is_judged + (self.sheet is not None) + bool(self.ratings) != 1:
            raise UsageError("give --endpoint and --model, or --sheet, or --ratings")
        if is_judged and (self.endpoint is None or self.model is None):
            raise UsageError("give both --endpoint and --model")
        if self.baseline is not None and self.sheet is None:
            raise UsageError("--baseline is for --sheet")


def run(argv: Sequence[str]) -> None:
    """Parse, ask, show."""
    command = config.parse(Explain, argv, "sae-jax explain")
    if command.ratings:
        _show_ratings(ratings.read_ratings(command.ratings, command.key))
    elif command.sheet is not None:
        settings = {name: getattr(command, name) for name in ("latents", "n", "baseline", "seed", "tokenizer")}
        key = ratings.write_sheet(command.sheet, command.store, **settings)
        console.print(f"{command.sheet}: rate each item from 1 (no pattern) to 5 (one clear pattern)")
        console.print(f"{key}: which latents they are; for nobody who rates")
    else:
        names = ("endpoint", "model", "latents", "n", "score", "batch", "seed", "tokenizer")
        names += tuple(f.name for f in dataclasses.fields(JudgeConfig) if f.name not in names)
        explained = uses.explain(command.store, **{name: getattr(command, name) for name in names})
        _show_labels(command, explained)


def _show_labels(command: Explain, explained: Explained) -> None:
    scores = SCORES[command.score] if command.score else ()
    rows = [
        (str(label["latent"]), *(f"{label[name]:.3f}" for name in scores), printable(label["explanation"]))
        for label in explained.labels
    ]
    if rows:
        print_table(("latent", *scores, "explanation"), rows)
    for name in scores if rows else ():
        value, interval = explained.mean(name)
        print_lines([f"{name}: mean {value:.3f}" + ("" if interval is None else " [{:.3f}, {:.3f}]".format(*interval))])
    console.print(explained.usage.report(command.price))
    for latent, why in explained.failures.items():
        console.print(f"latent {latent}: {why}")
    if explained.failures:
        what = f"{len(rows)} latents have a label, and {len(explained.failures)} have none; the same command asks again"
        raise PartialError(what) if rows else UserError(what)


def _show_ratings(found: ratings.Ratings) -> None:
    alpha = "cannot be told" if found.alpha is None else f"{found.alpha:.3f}"
    missing = f", {found.n_missing} ratings missing" if found.n_missing else ""
    print_lines([f"{found.n_items} items, {found.n_raters} raters{missing}; agreement (Krippendorff's alpha) {alpha}"])
    rows = [
        (kind, str(n), f"{value:.2f}" + ("" if interval is None else " [{:.2f}, {:.2f}]".format(*interval)))
        for kind, (value, interval, n) in found.means.items()
    ]
    print_table(("kind", "items", "mean rating [90 %]"), rows)
