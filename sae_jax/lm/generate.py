"""Text generation with a cache of keys and values, and with changes of activations (intervene.py), for steering."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sae_jax.lm import intervene
from sae_jax.lm.model import LanguageModel
from sae_jax.lm.run import check_ids, empty_cache, run
from sae_jax.types import UsageError

SteeringEdits = Mapping[tuple[int, str], Callable[[jax.Array, Any], jax.Array]]


def generate(
    model: LanguageModel,
    ids_BT: jax.Array,
    n_new: int,
    key: jax.Array,
    *,
    edits: SteeringEdits | None = None,
    edit_args: Any = None,
    temperature: float = 0.0,
) -> jax.Array:
    """Continue each row by `n_new` tokens.

    The program is compiled once per shape of ids, n_new and set of edit functions: keep a function and change
    `edit_args` to try another strength or latent, since a new function object compiles anew.

    Args:
        model: the language model.
        ids_BT: i32 prompts, all of length T.
        n_new: tokens to add, at least 1; T + n_new is at most the model's context.
        key: randomness of the samples, unused at temperature 0.
        edits: at each hook, a function (activations, edit_args) -> new ones, both f32[B, T, X], applied at every
            position: `lambda x, v: intervene.add(v)(x)`, for one.
        edit_args: any pytree of arrays.
        temperature: 0 takes the most likely token, otherwise samples from softmax(logits / temperature).

    Returns:
        The prompts with their continuations, [B, T + n_new] in the dtype of ids.

    Raises:
        UsageError: for lengths out of range, a negative temperature, or a hook that the model does not have.
        UserError: for ids beyond the embedding.
    """
    longest = model.spec.n_context - ids_BT.shape[1]
    if not 1 <= n_new <= longest:
        raise UsageError(
            f"{ids_BT.shape[1]} prompt tokens and n_new={n_new} do not fit the model's context of "
            f"{model.spec.n_context}; use n_new from 1 to {longest}, or a shorter prompt"
        )
    if not 0 <= temperature < math.inf:
        raise UsageError(f"temperature={temperature}; use 0 for the most likely token, or a finite number above")
    check_ids(ids_BT, model.spec)
    fixed_edits = tuple(sorted((edits or {}).items(), key=lambda item: item[0]))
    return _generate(model, ids_BT, n_new, key, fixed_edits, edit_args, temperature > 0, jnp.float32(temperature))


@functools.partial(jax.jit, static_argnames=("n_new", "fixed_edits", "sample"))
def _generate(model, ids_BT, n_new, key, fixed_edits, edit_args, sample, temperature):
    edits = intervene.edits({hook: functools.partial(_apply, edit, edit_args) for hook, edit in fixed_edits})

    def choose(logits_BTV, key):
        last_BV = logits_BTV[:, -1]
        chosen_B = jax.random.categorical(key, last_BV / temperature) if sample else last_BV.argmax(axis=-1)
        return chosen_B.astype(ids_BT.dtype)

    def step(carry, key):
        new_B, cache = carry
        out = run(model, new_B[:, None], edits=edits, cache=cache)
        return (choose(out.logits, key), out.cache), new_B

    keys = jax.random.split(key, n_new)
    prefill = run(model, ids_BT, edits=edits, cache=empty_cache(model, ids_BT, ids_BT.shape[1] + n_new))
    first_B = choose(prefill.logits, keys[0])
    (last_B, _), new_NB = jax.lax.scan(step, (first_B, prefill.cache), keys[1:])
    return jnp.concatenate([ids_BT, new_NB.T, last_B[:, None]], axis=1)


def _apply(edit, edit_args, x_BTX):
    return edit(x_BTX, edit_args)
