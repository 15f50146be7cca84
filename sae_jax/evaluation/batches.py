"""The batches that dictionaries are measured on: token sequences through the language model, or rows of a set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import lm
from sae_jax import mesh as meshes
from sae_jax.activations.forward import Hooks
from sae_jax.activations.sinks import MULTIPLE, above
from sae_jax.activations.store import ActivationSet
from sae_jax.artifact import Dictionary
from sae_jax.evaluation.base import EvalBatch, Subject, TextBatch
from sae_jax.evaluation.text import HeldOut, spread_chunks
from sae_jax.progress import console
from sae_jax.saes.base import AbstractSae
from sae_jax.types import Sites, Widths


@dataclass(frozen=True)
class Candidate:
    """A dictionary to measure."""

    sae: AbstractSae
    sites: Sites
    widths: Widths
    activations: ActivationSet  # where the text and the model, or the rows, come from
    weights: Mapping[str, Any] = field(default_factory=dict)  # which weights of a run these are
    recorded: Mapping[str, float] = field(default_factory=dict)  # metrics of its training
    hook: Any = None  # where it stands, if not at a source of the set; then also
    mean: np.ndarray | None = None  # f64[Y], of what is there

    @classmethod
    def of(cls, dictionary: Dictionary, activations: ActivationSet) -> Candidate:
        """A dictionary as `sae_jax.load` gives it."""
        record = dictionary.record
        weights = {"step": record.steps, "weights": record.weights}
        return cls(dictionary.sae, record.sites, record.widths, activations, weights, record.metrics)


def of_set(
    candidates: Mapping[str, Candidate], n_rows: int, shard: tuple[int, int]
) -> tuple[int, Iterator[dict[str, EvalBatch]]]:
    """(number, batches): whole chunks spread evenly over the set of all candidates, as few as hold `n_rows` rows."""
    activations = next(iter(candidates.values())).activations
    if jax.process_index() == 0:
        console.print(
            f"{activations.path} names no held-out text, or not one language model: metrics are on rows of the set, "
            "without effects on a model"
        )
    chunks = spread_chunks(activations, n_rows)[shard[0] :: shard[1]]

    def batches() -> Iterator[dict[str, EvalBatch]]:
        for chunk in chunks:
            read = cache(lambda name, chunk=chunk: activations.read_chunk(name, chunk).astype(np.float32))
            batch = {}
            for name, candidate in candidates.items():
                x_NX, y_NY = (np.concatenate([read(source) for source in side], axis=1) for side in candidate.sites)
                batch[name] = filled_up(candidate.sae, x_NX, y_NY, activations.spec.chunk_rows)
            yield batch

    return len(chunks), batches()


def filled_up(sae: AbstractSae, x_NX: np.ndarray, y_NY: np.ndarray, size: int) -> EvalBatch:
    """Rows as a batch of `size`: the last one is short, and of another size it would compile anew."""
    fill = ((0, size - len(x_NX)), (0, 0))
    x, y = (jnp.asarray(np.pad(rows_NX, fill), jnp.float32) for rows_NX in (x_NX, y_NY))
    return EvalBatch(sae, x, y, jnp.arange(size) < len(x_NX), None)


def of_text(
    candidates: Mapping[str, Candidate],
    subjects: Mapping[str, Subject],
    texts: Mapping[Sites, HeldOut],
    batch_tokens: int,
    shard: tuple[int, int],
) -> tuple[int, Iterator[dict[str, EvalBatch]]]:
    """(number, batches) of token sequences; `texts` has one text and model, at each site."""
    first = next(iter(texts.values()))
    n_sequences, context = first.sequences.shape
    size = min(max(batch_tokens // context, 1), n_sequences)
    starts = range(0, n_sequences, size)[shard[0] :: shard[1]]
    hooks = tuple(dict.fromkeys(hook for text in texts.values() for hook in text.encoded + text.reconstructed))

    def batches() -> Iterator[dict[str, EvalBatch]]:
        for start in starts:
            ids_ST = first.sequences[start : start + size]
            filled_ST = np.pad(ids_ST, ((0, size - len(ids_ST)), (0, 0)))
            if isinstance(first.model, lm.TorchModel):
                acts, logits_STV = first.model.run(filled_ST, hooks)
            else:
                acts, logits_STV = _run(first.model, jnp.asarray(filled_ST, jnp.int32), hooks)
            batch = {}
            for sites, text in texts.items():
                here = [name for name, candidate in candidates.items() if candidate.sites == sites]
                text_ST = text.text[start : start + size]
                site, x_NX, y_NY, is_sink_ST = _at_site(text, text_ST, filled_ST, acts, logits_STV)
                text_batch = TextBatch(
                    model=site,
                    is_text=_as_rows(text_ST, len(filled_ST)),
                    is_sink=_as_rows(is_sink_ST, len(filled_ST)),
                    counted=_counted(text_ST, len(filled_ST)),
                    mean=subjects[here[0]].mean,
                )
                for name in here:
                    batch[name] = EvalBatch(candidates[name].sae, x_NX, y_NY, meshes.reshape(site.keep, -1), text_batch)
            yield batch

    return len(starts), batches()


def _at_site(
    text: HeldOut, text_ST: np.ndarray, filled_ST: np.ndarray, acts: dict[Any, jax.Array], logits_STV: jax.Array
) -> tuple[lm.ReplacedSite | lm.TorchSite, jax.Array, jax.Array, np.ndarray]:
    """(the model, ready for other rows where a dictionary writes; its rows x and y; which positions are sinks)."""
    hooks = tuple(dict.fromkeys(text.encoded + text.reconstructed))
    norms = [_norms(acts[hook])[: len(text_ST)] for hook in hooks]
    norm_STS = np.stack(jax.device_get(norms), axis=-1)
    is_sink_ST = above(norm_STS, text_ST, MULTIPLE)
    keep_ST = text.keep(text_ST, norm_STS)
    keep_ST = np.pad(keep_ST, ((0, len(filled_ST) - len(text_ST)), (0, 0)))  # what is filled up counts nowhere

    where = meshes.everywhere(logits_STV)

    def site(hooks: Hooks) -> lm.ReplacedSite | lm.TorchSite:
        here = {hook: acts[hook] for hook in hooks}
        ids, keep, model = jax.device_put(filled_ST, where), jnp.asarray(keep_ST), text.model
        if isinstance(model, lm.TorchModel):
            return lm.TorchSite(model, ids, keep, here, logits_STV, hooks)
        return lm.ReplacedSite(model, ids, keep, here, logits_STV, (), hooks)

    x, y = site(text.encoded), site(text.reconstructed)
    return y, _on_one_device(x.rows), _on_one_device(y.rows), is_sink_ST


def _on_one_device(rows_NX: jax.Array) -> jax.Array:
    """Rows where dictionaries lie, over however many devices the language model is split."""
    return rows_NX if len(rows_NX.devices()) == 1 else jnp.asarray(jax.device_get(rows_NX))


def _as_rows(mask_ST: np.ndarray, size: int) -> jax.Array:
    """bool[size * T]: what is filled up counts nowhere."""
    return jnp.asarray(np.pad(mask_ST, ((0, size - len(mask_ST)), (0, 0)))).reshape(-1)


def _counted(text_ST: np.ndarray, size: int) -> jax.Array:
    """f32[size, T - 1]: 1 for the prediction of text from text."""
    counted_ST = text_ST[:, :-1] & text_ST[:, 1:]
    return jnp.asarray(np.pad(counted_ST, ((0, size - len(text_ST)), (0, 0))), jnp.float32)


@partial(jax.jit, static_argnames="hooks")
def _run(
    model: lm.LanguageModel, ids_ST: jax.Array, hooks: tuple[lm.Hook, ...]
) -> tuple[dict[lm.Hook, jax.Array], jax.Array]:
    out = lm.run(model, ids_ST, capture=hooks)
    assert out.logits is not None
    return out.acts, out.logits


@jax.jit
def _norms(acts: jax.Array) -> jax.Array:
    """Norm at each position, f32[S, T], heads joined."""
    return jnp.linalg.norm(meshes.reshape(acts, *acts.shape[:2], -1).astype(jnp.float32), axis=-1)
