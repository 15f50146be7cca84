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
            **splice(sae, text.model, text.hook, mean_D, text.batches(size), text.keep, text.special, progress.update),
        }


def _on_rows(sae: AbstractSae, activations: ActivationSet, source: str, n_rows: int) -> dict[str, Any]:
    """Metrics on whole chunks spread evenly over the set, as few as hold `n_rows` rows."""
    reconstruction = Reconstruction(sae.b_enc.shape[0])
    size = activations.spec.chunk_rows
    wanted = min(-(-n_rows // size), activations.n_chunks)
    with Progress("evaluate", wanted, "chunks") as progress:
        chunks = np.linspace(0, activations.n_chunks - 1, wanted).round().astype(int)
        for done, chunk in enumerate(chunks, start=1):
            rows_ND = activations.read_chunk(source, int(chunk)).astype(np.float32)
            # The last chunk of a shard is short; filled up, it does not compile anew.
            keep_N = np.arange(size) < len(rows_ND)
            reconstruction.add(sae, np.pad(rows_ND, ((0, size - len(rows_ND)), (0, 0))), keep_N)
            progress.update(done)
    return reconstruction.result()
