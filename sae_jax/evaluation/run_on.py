"""A language model run on from activations that were changed: what the studies of a latent's effects share.

    place(subject)             the hook that a dictionary reads and the one it writes, in a model that is edited here
    amounts(sae, x)            how much of each decoder row is in the reconstruction, in the units of the activations
    read(...)                  sequences through the model as it is, with the keys and values of every position
    logits_after(...)          logits at a token and the few that follow it, after changes at that token alone

A change at one token moves nothing before it, and nothing at later tokens of the same hook. So the tokens from there on
run with the keys and values of those before them, which are at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sae_jax import lm
from sae_jax.evaluation.prompts import Subject
from sae_jax.saes.base import AbstractSae
from sae_jax.saes.normalise import PER_VECTOR, normalise
from sae_jax.types import Code, UsageError


@dataclass(frozen=True)
class Place:
    """Where one dictionary stands in its model."""

    sae: AbstractSae
    model: lm.LanguageModel
    encoded: lm.Hook
    reconstructed: lm.Hook


@struct.dataclass
class Clean:
    """A model on S sequences as it is."""

    model: lm.LanguageModel
    ids: jax.Array  # i32[S, T]
    x: jax.Array  # f32[S, T, X], at the hook that is encoded
    y: jax.Array  # f32[S, T, Y], at the hook that is reconstructed
    cache: lm.Cache  # of all T positions
    hook: lm.Hook = struct.field(pytree_node=False)  # that is reconstructed


def place(subject: Subject) -> Place:
    """The one place of a dictionary. UsageError if it has several, or stands in a model that cannot be edited here."""
    model = subject.model
    if not isinstance(model, lm.LanguageModel):
        raise UsageError(f"{model.reference} runs in torch, where nothing is edited; use a model that JAX runs here")
    if len(subject.encoded) > 1 or len(subject.reconstructed) > 1:
        hooks = ", ".join(str(hook) for hook in dict.fromkeys(subject.encoded + subject.reconstructed))
        raise UsageError(f"the dictionary is of several hooks ({hooks}); effects are measured at one: use one of each")
    (encoded,), (reconstructed,) = subject.encoded, subject.reconstructed
    if encoded != reconstructed and (kind := subject.sae.config.input_norm) in PER_VECTOR:
        raise UsageError(
            f"the dictionary reads another place than it writes, in units of each vector's {kind}; nothing says how "
            f"large its values are there"
        )
    return Place(subject.sae, model, encoded, reconstructed)


def encode(sae: AbstractSae, x_NX: np.ndarray | jax.Array) -> tuple[Code, jax.Array]:
    """The code [N, K] of rows, and what brings its values to the units of the rows, f32[N, 1] or f32[]."""
    return sae.encode(x_NX), normalise(jnp.asarray(x_NX, jnp.float32), sae.config.input_norm)[2]


def amounts(sae: AbstractSae, x_NX: np.ndarray | jax.Array) -> Code:
    """The code [N, K] of rows, its values in units of the rows: y_hat = sum of value times decoder row, and biases."""
    code, scale_N1 = encode(sae, x_NX)
    return Code(code.indices, code.values * scale_N1)


@partial(jax.jit, static_argnames=("encoded", "reconstructed"))
def read(model: lm.LanguageModel, ids_ST: jax.Array, encoded: lm.Hook, reconstructed: lm.Hook) -> Clean:
    """The model as it is on sequences i32[S, T]."""
    cache = lm.empty_cache(model, ids_ST, ids_ST.shape[1])
    hooks, n_layers = (encoded, reconstructed), model.spec.n_layers
    out = lm.run(model, ids_ST, capture=hooks, stop_at=n_layers, logits=False, cache=cache)
    assert out.cache is not None
    x_STX, y_STY = (out.acts[hook].reshape(*ids_ST.shape, -1).astype(jnp.float32) for hook in hooks)
    return Clean(model, ids_ST, x_STX, y_STY, out.cache, reconstructed)


def logits_after(
    clean: Clean, sequence: jax.Array, position: jax.Array, changes_CY: jax.Array, n_positions: int
) -> jax.Array:
    """Logits f32[C, W, V] at W = n_positions positions, after each of C changes to the activations at the first one.

    Traced by its caller, who goes through many tokens with `jax.lax.map`: each needs the keys and values C times.

    Args:
        clean: the model on the sequences.
        sequence: i32[], of which sequence.
        position: i32[], at most T - W.
        changes_CY: f32[C, Y], what is added to the activations there; a change of 0 gives the logits as they are.
        n_positions: W, of the sequence from that position on.
    """
    n = len(changes_CY)
    ids_W, y_WY = (jax.lax.dynamic_slice_in_dim(part[sequence], position, n_positions) for part in (clean.ids, clean.y))
    y_CWY = jnp.broadcast_to(y_WY, (n, *y_WY.shape)).at[:, 0].add(changes_CY)
    keys, values = (
        jnp.repeat(part[:, sequence][:, None], n, axis=1) for part in (clean.cache.keys, clean.cache.values)
    )
    edits = lm.intervene.edits({clean.hook: lm.intervene.replace(y_CWY)})
    ids_CW = jnp.broadcast_to(ids_W, (n, n_positions))
    logits_CWV = lm.run(clean.model, ids_CW, edits=edits, cache=lm.Cache(keys, values, position)).logits
    assert logits_CWV is not None
    return logits_CWV
