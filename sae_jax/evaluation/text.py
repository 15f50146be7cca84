"""The held-out text of an activation set, with the language model that made the set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sae_jax import lm
from sae_jax.activations import tokens
from sae_jax.activations.harvest import keep, read_sites
from sae_jax.activations.store import ActivationSet
from sae_jax.progress import console


@dataclass(frozen=True)
class HeldOut:
    """Text that no training row came from, ready to be run through the model."""

    name: str  # the reference of the text
    model: lm.LanguageModel
    hook: lm.Hook  # the site
    sequences: np.ndarray  # i32[n, T], packed as in the set
    special: np.ndarray  # i32[...], token ids the set leaves out
    max_norm_multiple: float | None  # as in the set

    def keep(self, ids_BT: np.ndarray, norm_BT: np.ndarray) -> np.ndarray:
        """bool[B, T]: what the set would hold, norms compared with the median of these sequences, not of a shard."""
        return keep(ids_BT, norm_BT[..., None], self.special, self.max_norm_multiple)

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """The sequences, `size` at a time."""
        for first in range(0, len(self.sequences), size):
            yield self.sequences[first : first + size]

    def rows(self) -> np.ndarray:
        """Activations f32[N, D] of all positions that the set would hold."""
        blocks = []
        for ids_BT in self.batches(64):
            acts, norm_BTS = read_sites(self.model, ids_BT, (self.hook,), "float32")
            blocks.append(np.asarray(acts[str(self.hook)])[self.keep(ids_BT, np.asarray(norm_BTS)[..., 0])])
        return np.concatenate(blocks)


def held_out(activations: ActivationSet, source: str, n_tokens: int, model: str | None = None) -> HeldOut | None:
    """Held-out text for a source of a set; None where the set names no text or no model.

    Args:
        activations: the set.
        source: one of its sources.
        n_tokens: how much of the text, at most.
        model: where the language model is now, if not where the set says.
    """
    spec, site = activations.spec, activations.source(source)
    reference = model or site.model
    if spec.heldout is None or spec.context is None or reference is None or site.hook is None:
        return None
    loaded, tokenizer = lm.load(reference), lm.tokenizer(reference)
    if loaded.digest != site.model_digest:
        console.print(f"warning: the weights of {reference} are not those that {activations.path} was made with")
    wanted = max(n_tokens // spec.context, 1)
    return HeldOut(
        name=spec.heldout,
        model=loaded,
        hook=lm.parse_hook(site.hook, loaded.spec),
        sequences=np.stack(list(tokens.sequences(spec.heldout, tokenizer, spec.context, 0, wanted))),
        special=np.asarray(tokenizer.special_ids, np.int32),
        max_norm_multiple=spec.max_norm_multiple,
    )
