"""A language model with random weights, a baseline for what its dictionaries find: the reference `MODEL+random:SEED`.

Every tensor of every layer, embeddings, norms and biases too, is drawn anew: normal, with the mean and the standard
deviation that its trained values have. The architecture, the tokenizer and the scale of each tensor stay.

Source: Heap et al. 2025, "Sparse autoencoders can interpret randomly initialized transformers", arXiv 2501.17727: their
re-randomised model including embeddings, not the one at step 0 of its training. Their draws are of weight matrices.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import jax
import numpy as np

from sae_jax.types import UsageError

MAX_SEED = 2**32  # not reached

_RANDOM = re.compile(r"(?P<model>.+)\+random:(?P<seed>[^:/]*)")


def parted(reference: str) -> tuple[str, int | None]:
    """(reference of the trained model, seed of its random weights or None). UsageError for a seed that is none."""
    match = _RANDOM.fullmatch(reference)
    if match is None:
        return reference, None
    seed = match["seed"]
    if not (seed.isascii() and seed.isdigit() and int(seed[:11]) < MAX_SEED):
        raise UsageError(f"model {reference!r}: the seed of random weights is a number from 0 to {MAX_SEED - 1}")
    if _RANDOM.fullmatch(match["model"]):
        raise UsageError(f"model {reference!r} says twice that weights are random; once is enough")
    return match["model"], int(seed)


def joined(reference: str, seed: int | None) -> str:
    """The reference of the model with these weights; the opposite of `parted`."""
    return reference if seed is None else f"{reference}+random:{seed}"


def moved(given: str | None, recorded: str) -> str:
    """Where a recorded model is now: at `given`, if that is not None, with weights as random as they were.

    Raises UsageError where `given` names other random weights than were recorded.
    """
    if given is None:
        return recorded
    (place, seed), (_, recorded_seed) = parted(given), parted(recorded)
    if seed not in (None, recorded_seed):
        what = "trained weights" if recorded_seed is None else f"random weights of seed {recorded_seed}"
        raise UsageError(f"model {given!r}: {recorded} was used with {what}; leave out +random:{seed}")
    return joined(place, recorded_seed)


def digest(trained: str, seed: int | None) -> str:
    """That of the model, from the digest of its trained weights."""
    return trained if seed is None else hashlib.sha256(f"{trained} random:{seed}".encode()).hexdigest()


def draw(params: dict[str, Any], seed: int) -> dict[str, Any]:
    """The parameters (params.py), drawn anew, in their dtypes and where they lie.

    They are the same on any number of devices, as the host draws them; of a parameter it holds all layers.
    """
    single = {name: leaf for name, leaf in params.items() if name != "layers"}
    drawn = {name: _drawn(leaf, leaf.ndim, (seed, name)) for name, leaf in single.items()}
    of_layers = {name: _drawn(leaf, leaf.ndim - 1, (seed, name)) for name, leaf in params["layers"].items()}
    return {**drawn, "layers": of_layers}


def _drawn(leaf: jax.Array, n_axes: int, key: tuple[int, str]) -> jax.Array:
    """A parameter; its last axes are those of one tensor."""
    trained = np.asarray(leaf)
    values, shape = np.empty_like(trained), trained.shape
    parts, drawn = (each.reshape(-1, *shape[len(shape) - n_axes :]) for each in (trained, values))
    for layer, part in enumerate(parts):
        mean, deviation = (float(each) for each in (part.mean(dtype=np.float64), part.std(dtype=np.float64)))
        seeds = np.random.SeedSequence([key[0], layer, *key[1].encode()])
        normal = np.random.default_rng(seeds).standard_normal(part.shape, np.float32)
        drawn[layer] = mean + deviation * normal
    return jax.make_array_from_callback(shape, leaf.sharding, lambda index: values[index])
