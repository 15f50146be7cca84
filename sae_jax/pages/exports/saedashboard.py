"""SAEDashboard: batch-N.json of 128 latents, as its version 0.8 writes them and Neuronpedia's converter reads them.

Latents that never fire are there, with no examples. What is not made here is an empty list, as it is there where it is
switched off: neurons and features that a latent correlates with, the histogram of all logits, shares of heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae_jax.pages.export import Example, Exported, batches, examples, json_bytes, layer_of, numbers, slug
from sae_jax.pages.latents import Latent
from sae_jax.record import Record

NAME = "saedashboard"
LATENTS_PER_FILE = 128
TOP = -1.0  # instead of the bounds of an interval, and of its share
NOT_MADE = (
    *("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    *("correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson"),
    *("correlated_features_indices", "correlated_features_l1", "correlated_features_pearson"),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist", "vector"),
)


def check(record: Record) -> None:
    """See the package."""
    layer_of(record)


def write(folder: Path, exported: Exported, latents: Iterator[Latent], earlier: Path | None) -> None:
    """See the package."""
    named = {"model_id": exported.model, "layer": exported.layer, "sae_set": slug(exported.title)}
    for i, batch in enumerate(batches(latents, LATENTS_PER_FILE)):
        content = {**named, "sae_id_suffix": None, "features": [feature(exported, latent) for latent in batch]}
        (folder / f"batch-{i}.json").write_bytes(json_bytes(content))


def feature(exported: Exported, latent: Latent) -> dict[str, Any]:
    """A latent by the names of SAEDashboard."""
    n_prompts, n_tokens = exported.site.subject.table.sequences.shape
    return {
        "feature_index": latent.number,
        **statistics(exported, latent),
        **{name: [] for name in NOT_MADE},
        "n_prompts_total": n_prompts,
        "n_tokens_in_prompt": n_tokens,
        "dataset": exported.dataset,
        "activations": [
            {
                **dict(zip(("bin_min", "bin_max", "bin_contains"), bounds(example, latent), strict=True)),
                "tokens": [exported.tokens[token] for token in example.ids.tolist()],
                "values": example.values,
                "qualifying_token_index": example.peak,
            }
            for example in examples(latent)
        ],
    }


def statistics(exported: Exported, latent: Latent) -> dict[str, Any]:
    """Density, histogram of values and ends of the logits, by names that Neuronpedia shares."""
    heights = [] if latent.histogram is None else latent.histogram.tolist()
    width = latent.max / len(heights) if heights else 0.0
    found: dict[str, Any] = {
        "frac_nonzero": latent.count / max(exported.site.subject.table.n_rows, 1),
        "freq_hist_data_bar_heights": heights,
        "freq_hist_data_bar_values": numbers([width * (i + 0.5) for i in range(len(heights))]),  # middles
    }
    for sign, end in (("pos", "up"), ("neg", "down")):
        ids, values = getattr(latent.logits, end) if latent.logits else ((), ())
        found |= {f"{sign}_str": [exported.tokens[int(token)] for token in ids], f"{sign}_values": numbers(values)}
    return found


def bounds(example: Example, latent: Latent) -> tuple[float, float, float]:
    """(low, high, share of all activations) of the interval an example is from; of the strongest, what says so."""
    if example.interval is None:
        return TOP, latent.max, TOP
    low, high, count = example.interval
    return low, high, count / max(latent.count, 1)
