"""All metrics of a dictionary, on held-out text where there is some, on rows of a set otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np

from sae_jax.activations.store import ActivationSet
from sae_jax.evaluation.reconstruction import Reconstruction
from sae_jax.evaluation.splice import splice
from sae_jax.evaluation.text import held_out, spread_chunks
from sae_jax.progress import Progress, console
from sae_jax.saes.base import AbstractSae
from sae_jax.types import Sites


def measure(
    sae: AbstractSae,
    activations: ActivationSet,
    sites: Sites,
    n_tokens: int,
    batch_tokens: int = 4096,
    model: str | None = None,
) -> dict[str, Any]:
    """Reconstruction and, on text, downstream metrics (evaluation/splice.py), with `text` and `data` that say on what.

    Args:
        sae: trained on `sites`.
        activations: where the text, the model or the rows come from.
        sites: what it encodes and reconstructs.
        n_tokens: tokens or rows, at most.
        batch_tokens: tokens of one forward pass.
        model: where the language model is now, if not where the set says.
    """
    text = held_out(activations, sites, n_tokens, model)
    where = {"text": text.name if text else None, "data": activations.path, "sites": sites.to_json()}
    if text is None:
        console.print(
            f"{activations.path} names no held-out text, or not one language model: metrics are on rows of the set, "
            "without effects on a model"
        )
        return {**where, **_on_rows(sae, activations, sites, n_tokens)}
    with Progress("evaluate", len(text.sequences), "sequences") as progress:
        size = max(batch_tokens // text.sequences.shape[1], 1)
        means = {name: activations.stats(name).mean for name in sites.y}
        return {**where, **splice(sae, text, means, text.batches(size), progress.update)}


def _on_rows(sae: AbstractSae, activations: ActivationSet, sites: Sites, n_rows: int) -> dict[str, Any]:
    """Metrics on whole chunks spread evenly over the set, as few as hold `n_rows` rows."""
    reconstruction = Reconstruction(sae.b_enc.shape[0])
    size = activations.spec.chunk_rows
    chunks = spread_chunks(activations, n_rows)
    with Progress("evaluate", len(chunks), "chunks") as progress:
        for done, chunk in enumerate(chunks, start=1):
            x_NX, y_NY = (
                np.concatenate([activations.read_chunk(name, chunk).astype(np.float32) for name in names], axis=1)
                for names in sites
            )
            # The last chunk of a shard is short; filled up, it does not compile anew.
            keep_N, fill = np.arange(size) < len(x_NX), ((0, size - len(x_NX)), (0, 0))
            reconstruction.add(sae, np.pad(x_NX, fill), keep_N, np.pad(y_NY, fill))
            progress.update(done)
    return reconstruction.result({name: activations.source(name).d for name in sites.y})
