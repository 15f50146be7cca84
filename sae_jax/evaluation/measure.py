"""All metrics of a dictionary, on held-out text where there is some, on rows of a set otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np

from sae_jax.activations.store import ActivationSet
from sae_jax.evaluation.reconstruction import Reconstruction
from sae_jax.evaluation.splice import splice
from sae_jax.evaluation.text import held_out
from sae_jax.progress import Progress, console
from sae_jax.saes.base import AbstractSae


def measure(
    sae: AbstractSae,
    activations: ActivationSet,
    source: str,
    n_tokens: int,
    batch_tokens: int = 4096,
    model: str | None = None,
) -> dict[str, Any]:
    """Reconstruction and, on text, downstream metrics (evaluation/splice.py), with `text` and `data` that say on what.

    Args:
        sae: trained on `source`.
        activations: where the text, the model or the rows come from.
        source: the site.
        n_tokens: tokens or rows, at most.
        batch_tokens: tokens of one forward pass.
        model: where the language model is now, if not where the set says.
    """
    text = held_out(activations, source, n_tokens, model)
    where = {"text": text.name if text else None, "data": activations.path, "site": source}
    if text is None:
        console.print(
            f"{activations.path} names no held-out text or no language model: metrics are on rows of the set, without "
            "effects on a model"
        )
        return {**where, **_on_rows(sae, activations, source, n_tokens)}
    with Progress("evaluate", len(text.sequences), "sequences") as progress:
        size = max(batch_tokens // text.sequences.shape[1], 1)
        mean_D = activations.stats(source).mean
        return {
            **where,
            **splice(sae, text.model, text.hook, mean_D, text.batches(size), text.keep, progress.update),
        }


def _on_rows(sae: AbstractSae, activations: ActivationSet, source: str, n_rows: int) -> dict[str, Any]:
    reconstruction = Reconstruction(sae.b_enc.shape[0])
    total, done, chunk = min(n_rows, activations.n_rows), 0, 0
    with Progress("evaluate", total, "rows") as progress:
        while done < total:
            rows_ND = activations.read_chunk(source, chunk)[: total - done].astype(np.float32)
            reconstruction.add(sae, rows_ND)
            done, chunk = done + len(rows_ND), chunk + 1
            progress.update(done)
    return reconstruction.result()
