"""The dashboard of a dictionary: what its latents fire on, collected and written as a static site."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sae_jax import lm
from sae_jax.analysis.collect import collect_set
from sae_jax.analysis.examples import Activations
from sae_jax.artifact import Dictionary
from sae_jax.evaluation import base
from sae_jax.evaluation.text import open_set
from sae_jax.pages.dashboard import refuse_to_overwrite, write_dashboard
from sae_jax.progress import Progress
from sae_jax.types import UsageError


def write_site(
    d: Dictionary,
    out: str | os.PathLike[str],
    title: str,
    data: str | None = None,
    model: str | None = None,
    n_tokens: int = 400_000,
) -> tuple[Activations, np.ndarray]:
    """Write the site; returns the activations it shows and the sequences that these index, i32[n, context].

    Args:
        d: the dictionary.
        out: directory of the site; open index.html in it.
        title: what the pages are headed with.
        data: the activation set; default: the one the dictionary was trained on.
        model: another reference for the language model, if it moved.
        n_tokens: tokens of the set's text to show examples from.

    Raises:
        UsageError: a set without text, or something at `out` that is not a dashboard.
    """
    refuse_to_overwrite(Path(out))
    record, activations = d.record, open_set(d.record, data)
    tokenizer = model or activations.spec.tokenizer
    target = activations.source(record.sites.y[-1])  # what latents write to, nearest to the logits
    if tokenizer is None:
        raise UsageError(f"{activations.path} has no text to show; make the set with `sae-jax harvest`")
    with Progress("encode", min(n_tokens, activations.n_rows), "tokens") as progress:
        table, sequences = collect_set(d.sae, activations, record.sites.x, n_tokens, progress.update)
    reference = model or target.model
    with Progress("dashboard", table.n_latents, "latents", first="") as progress:
        write_dashboard(
            Path(out),
            table=table,
            sequences=sequences,
            token_strings=_token_strings(tokenizer),
            w_dec=np.asarray(d.w_dec[:, -target.d :]),
            logit_effects=_logit_effects(reference, target.hook) if reference and target.hook else None,
            title=title,
            metrics={
                description.label: record.metrics[name]
                for name, description in base.descriptions().items()
                if description.in_table and name in record.metrics
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
