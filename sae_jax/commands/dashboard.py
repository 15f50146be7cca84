"""`sae-jax dashboard RUN --out DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from sae_jax import artifact, config, lm, storage
from sae_jax.analysis.collect import collect_set
from sae_jax.analysis.examples import Activations
from sae_jax.commands import runtime
from sae_jax.evaluation import base
from sae_jax.evaluation.text import open_set
from sae_jax.pages.dashboard import refuse_to_overwrite, write_dashboard
from sae_jax.progress import Progress, console
from sae_jax.types import UsageError


@dataclass(frozen=True)
class Dashboard:
    """Write a static site that shows the latents of a run. Needs a set made from text."""

    run: tyro.conf.Positional[str]
    """directory of the run"""
    out: str
    """directory of the site; open index.html in it"""
    data: str | None = None
    """the activation set, if it moved; default: the run's own"""
    model: str | None = None
    """another reference for the language model, if it moved"""
    tokens: int = 400_000
    """tokens of the set's text to show examples from"""
    ema: bool = False
    """show the averaged weights instead of the live ones"""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UsageError(f"--tokens={self.tokens} must be at least 1")


def run(argv: Sequence[str]) -> None:
    """Parse, collect, write."""
    command = config.parse(Dashboard, argv, "sae-jax dashboard")
    runtime.warn_of_idle_gpu()
    dashboard(command)
    console.print(f"{Path(command.out) / 'index.html'}")


def dashboard(command: Dashboard) -> tuple[Activations, np.ndarray]:
    """Write the site; returns the activations it shows and the sequences that these index, i32[n, context]."""
    refuse_to_overwrite(Path(command.out))
    d = artifact.load(command.run, ema=command.ema)
    sae, record = d.sae, d.record
    activations = open_set(record, command.data)
    sites, tokenizer = record.sites, command.model or activations.spec.tokenizer
    target = activations.source(sites.y[-1])  # what latents write to, nearest to the logits
    if tokenizer is None:
        raise UsageError(f"{activations.path} has no text to show; make the set with `sae-jax harvest`")
    with Progress("encode", min(command.tokens, activations.n_rows), "tokens") as progress:
        table, sequences = collect_set(sae, activations, sites.x, command.tokens, progress.update)
    evaluation = storage.read_json(Path(command.run) / "evaluation.json") or {}
    if (evaluation.get("step"), evaluation.get("weights")) != (record.steps, record.weights):
        evaluation = {}  # of other weights than are shown
    reference = command.model or target.model
    with Progress("dashboard", table.n_latents, "latents") as progress:
        write_dashboard(
            command.out,
            table=table,
            sequences=sequences,
            token_strings=_token_strings(tokenizer),
            w_dec=np.asarray(sae.w_dec[:, -target.d :]),
            logit_effects=_logit_effects(reference, target.hook) if reference and target.hook else None,
            title=command.run,
            metrics={
                description.label: evaluation[name]
                for name, description in base.descriptions().items()
                if description.in_table and isinstance(evaluation.get(name), float)
            },
            config=record.to_json(),
            progress=lambda done, _: progress.update(done),
        )
    return table, sequences


def _token_strings(reference: str) -> list[str]:
    tokenizer = lm.tokenizer(reference)
    return tokenizer.tokens(range(tokenizer.size))


def _logit_effects(reference: str, hook: str) -> Any:
    model = lm.load(reference)
    effect = jax.jit(lm.logit_effect, static_argnums=1)
    site = lm.parse_hook(hook, model.spec)
    return lambda rows_ND: np.asarray(effect(model, site, rows_ND))
