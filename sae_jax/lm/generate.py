"""Text generation with a cache of keys and values, and with changes of activations (intervene.py), for steering."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sae_jax.lm import intervene
from sae_jax.lm.hooks import Hook
from sae_jax.lm.logits import unembed
from sae_jax.lm.model import LanguageModel
from sae_jax.lm.run import Cache, check_ids, empty_cache, run
from sae_jax.types import UsageError

NO_TOKEN = -1  # where logits are NaN, as after an edit of a strength beyond all bounds

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
    """Continue each row by `n_new` tokens, all in one go. Arguments and errors as `stream`.

    Returns:
        The prompts with their continuations, [B, T + n_new] in the dtype of ids; NO_TOKEN where logits were NaN.
    """
    options: Any = {"edits": edits, "edit_args": edit_args, "temperature": temperature, "block": max(n_new, 1)}
    return jnp.concatenate([ids_BT, *stream(model, ids_BT, n_new, key, **options)], axis=1)


def stream(
    model: LanguageModel,
    ids_BT: jax.Array,
    n_new: int,
    key: jax.Array,
    *,
    edits: SteeringEdits | None = None,
    edit_args: Any = None,
    temperature: float = 0.0,
    n_prompt: int | None = None,
    n_slots: int | None = None,
    block: int = 1,
) -> Iterator[jax.Array]:
    """Continue each row by `n_new` tokens, a block after the other as they are written.

    Two programs, for the prompt and for a block, are compiled once per shape of ids, number of slots, block and set of
    edit functions: keep a function and change `edit_args` to try another strength or latent, since a new function
    object compiles anew. With `n_prompt` and `n_slots` prompts of many lengths share them.

    Args:
        model: the language model.
        ids_BT: i32 prompts, all of one length.
        n_new: tokens to add, at least 1; with the prompt at most the model's context.
        key: randomness of the samples, unused at temperature 0.
        edits: at each hook, a function (activations, edit_args) -> new ones, both f32[B, T, X], applied at every
            position: `lambda x, v: intervene.add(v)(x)`, for one.
        edit_args: any pytree of arrays.
        temperature: 0 takes the most likely token, otherwise samples from softmax(logits / temperature).
        n_prompt: length of the prompts, where ids are filled up with others after it; default: all of T.
        n_slots: positions to keep room for, at least n_prompt + n_new and T; default: as many as that.
        block: tokens that are given together, after the first one, which comes alone.

    Returns:
        An iterator over tokens [B, n] in the dtype of ids; NO_TOKEN where logits were NaN.

    Raises:
        UsageError: for lengths out of range, a negative temperature, or a hook that the model does not have.
        UserError: for ids beyond the embedding.
    """
    n_prompt = ids_BT.shape[1] if n_prompt is None else n_prompt
    longest = model.spec.n_context - n_prompt
    if not 1 <= n_new <= longest:
        raise UsageError(
            f"{n_prompt} prompt tokens and n_new={n_new} do not fit the model's context of {model.spec.n_context}; use "
            f"{f'n_new from 1 to {longest}, or ' if longest > 0 else ''}a shorter prompt"
        )
    if not 0 <= temperature < math.inf:
        raise UsageError(f"temperature={temperature}; use 0 for the most likely token, or a finite number above")
    check_ids(ids_BT, model.spec)
    n_slots = max(n_slots or 0, n_prompt + n_new, ids_BT.shape[1])
    fixed_edits = tuple(sorted((edits or {}).items(), key=lambda item: item[0]))
    settings = (fixed_edits, edit_args, temperature > 0, jnp.float32(temperature))
    return _blocks(model, ids_BT, n_prompt, n_slots, jax.random.split(key, n_new), block, settings)


def _blocks(model, ids_BT, n_prompt, n_slots, keys, block, settings):
    last_B, cache = _begin(model, ids_BT, jnp.int32(n_prompt), n_slots, keys[0], *settings)
    yield last_B[:, None]
    for first in range(1, len(keys), block):
        new_BN, last_B, cache = _go_on(model, last_B, cache, keys[first : first + block], *settings)
        yield new_BN


@functools.partial(jax.jit, static_argnames=("n_slots", "fixed_edits", "sample"))
def _begin(model, ids_BT, n_prompt, n_slots, key, fixed_edits, edit_args, sample, temperature):
    """The token after prompts, and the cache of them."""
    # Only the last position has to be unembedded: of all of them the logits would outweigh all else.
    top = Hook(model.spec.n_layers - 1, "resid_post")
    cache = empty_cache(model, ids_BT, n_slots)
    out = run(model, ids_BT, edits=_edits(fixed_edits, edit_args), capture=(top,), logits=False, cache=cache)
    assert out.cache is not None
    x_B1D = jax.lax.dynamic_slice_in_dim(out.acts[top], n_prompt - 1, 1, axis=1)
    first_B = _choose(unembed(model.params, model.spec, x_B1D), key, sample, temperature, ids_BT.dtype)
    # What fills up the prompts lies in slots that new tokens overwrite before any looks there.
    return first_B, Cache(out.cache.keys, out.cache.values, n_prompt)


@functools.partial(jax.jit, static_argnames=("fixed_edits", "sample"), donate_argnames="cache")
def _go_on(model, last_B, cache, keys_N, fixed_edits, edit_args, sample, temperature):
    """The N tokens after `last_B`, the last of them, and the cache of all before it."""
    edits = _edits(fixed_edits, edit_args)

    def step(carry, key):
        new_B, cache = carry
        out = run(model, new_B[:, None], edits=edits, cache=cache)
        chosen_B = _choose(out.logits, key, sample, temperature, new_B.dtype)
        return (chosen_B, out.cache), chosen_B

    (last_B, cache), new_NB = jax.lax.scan(step, (last_B, cache), keys_N)
    return new_NB.T, last_B, cache


def _choose(logits_B1V, key, sample, temperature, dtype):
    last_BV = logits_B1V[:, -1]
    chosen_B = jax.random.categorical(key, last_BV / temperature) if sample else last_BV.argmax(axis=-1)
    return jnp.where(jnp.isnan(last_BV).any(axis=-1), NO_TOKEN, chosen_B).astype(dtype)


def _edits(fixed_edits, edit_args):
    return intervene.edits({hook: functools.partial(_apply, edit, edit_args) for hook, edit in fixed_edits})


def _apply(edit, edit_args, x_BTX):
    return edit(x_BTX, edit_args)
