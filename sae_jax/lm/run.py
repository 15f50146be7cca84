"""The forward pass: logits, captured activations and edits, as one pure function of a model and token ids.

Layers without an edit or a capture run in `lax.scan`, so compile time does not grow with depth; the others are
traced one by one. A run without logits ends after the last layer that is captured.

`run` is traced by its caller: wrap it, with its edits, in `jax.jit` with the model as an argument. On an
explicit mesh, parameters are replicated and results are split over rows as `ids` are; edits run on that mesh
too. Parameters that are split need a mesh of Auto axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sae_jax.lm.block import Positions, Tap, block, positions_of
from sae_jax.lm.hooks import Hook, check_hook
from sae_jax.lm.logits import unembed
from sae_jax.lm.model import LanguageModel
from sae_jax.lm.spec import Spec
from sae_jax.types import UsageError, check_indices

Edits = Mapping[tuple[int, str], Callable[[jax.Array], jax.Array]]


@struct.dataclass
class Cache:
    """Keys and values of the positions seen so far: S slots, of which the first `length` are set."""

    keys: jax.Array  # [L, B, S, G, d]
    values: jax.Array  # [L, B, S, G, d]
    length: jax.Array  # i32[]


@struct.dataclass
class Output:
    """What a run returns; `None` for what was not asked for."""

    acts: dict[Hook, jax.Array]  # [B, T, width], heads apart at attn_z: [B, T, H, d]
    logits: jax.Array | None  # f32[B, T, V]
    cache: Cache | None  # the given cache with these T positions appended


def run(
    model: LanguageModel,
    ids_BT: jax.Array,
    *,
    edits: Edits | None = None,
    capture: Iterable[tuple[int, str]] = (),
    stop_at: int | None = None,
    logits: bool = True,
    logits_at: jax.Array | None = None,
    cache: Cache | None = None,
) -> Output:
    """One forward pass.

    Args:
        model: the language model.
        ids_BT: i32 token ids, T at most the model's context.
        edits: at each hook, a function of the activation that returns its replacement, shape and dtype kept.
        capture: hooks whose activations to return, after the edit if there is one.
        stop_at: run layers 0 to stop_at - 1 only; then there are no logits. By default all layers, or with
            logits=False those up to the last captured hook: edits beyond it have no effect and are skipped.
        logits: whether to compute them.
        logits_at: i32[], the one position whose logits f32[B, 1, V] to compute; None: all.
        cache: earlier positions of the same sequences; ids continue after them.

    Raises:
        UsageError: for a hook that the model does not have or that stop_at cuts off, an edit that changes shape or
            dtype, or more positions than the context.
        UserError: for ids beyond the embedding. In a traced call they are not known: see `check_ids`.
    """
    spec = model.spec
    edit_at = {check_hook(hook, spec): edit for hook, edit in (edits or {}).items()}
    captured = {check_hook(hook, spec) for hook in capture}
    n_layers = _n_layers(stop_at, logits, edit_at, captured, spec)
    n_new = ids_BT.shape[1]
    n_slots = n_new if cache is None else cache.keys.shape[2]
    if n_slots > spec.n_context:
        raise UsageError(f"{n_slots} positions exceed the model's context of {spec.n_context}; use shorter sequences")

    check_ids(ids_BT, spec)

    first = jnp.int32(0) if cache is None else cache.length
    position_T = first + jnp.arange(n_new, dtype=jnp.int32)
    x_BTD = _lookup(model.params["embed"], ids_BT)
    if spec.scaled_embedding:  # rounded to the stream's dtype, as the authors do
        x_BTD = x_BTD * jnp.asarray(spec.d_model**0.5, x_BTD.dtype)
    if spec.positions == "learned":
        x_BTD = x_BTD + model.params["positions"][position_T][None]

    acts: dict[Hook, jax.Array] = {}

    def tap(layer: int, point: str, value: jax.Array) -> jax.Array:
        hook = Hook(layer, point)
        if hook in edit_at:
            value = _same_type(edit_at[hook](value), value, hook)
        if hook in captured:
            acts[hook] = value
        return value

    taps = {hook.layer: partial(tap, hook.layer) for hook in {*edit_at, *captured} if hook.layer < n_layers}
    x_BTD, cache = _run_layers(model, x_BTD, positions_of(spec, position_T, n_slots), cache, taps, n_layers)
    if logits_at is not None:  # of a large vocabulary they are much of the work
        x_BTD = jax.lax.dynamic_slice_in_dim(x_BTD, logits_at, 1, axis=1)
    return Output(
        acts=acts,
        logits=unembed(model.params, spec, x_BTD) if logits and n_layers == spec.n_layers else None,
        cache=None if cache is None else Cache(cache.keys, cache.values, length=first + n_new),
    )


def check_ids(ids: Any, spec: Spec) -> None:
    """UserError naming a token id that the model has no row for, which a traced `run` cannot see."""
    cure = f"the embedding has {spec.n_vocab} rows; use the model whose tokens these are"
    check_indices(ids, spec.n_vocab, "token id", cure)


def _run_layers(
    model: LanguageModel,
    x_BTD: jax.Array,
    positions: Positions,
    cache: Cache | None,
    taps: Mapping[int, Tap],
    n_layers: int,
) -> tuple[jax.Array, Cache | None]:
    """The residual stream after the first `n_layers`, and the cache with the keys and values of these positions.

    Layers without a tap are scanned.
    """
    kinds = model.spec.layer_kinds
    kind_L = jnp.asarray(kinds, jnp.int32)

    def run_layer(x_BTD, cache, layer, tap):
        def extend(k_BTGd, v_BTGd):
            nonlocal cache
            if cache is None:
                return k_BTGd, v_BTGd
            keys, values = (
                jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), (layer, 0, cache.length, 0, 0))
                for old, new in ((cache.keys, k_BTGd), (cache.values, v_BTGd))
            )
            cache = Cache(keys, values, cache.length)
            return keys[layer], values[layer]

        params = jax.tree.map(lambda stack: stack[layer], model.params["layers"])
        kind = kinds[layer] if isinstance(layer, int) else kind_L[layer]
        its_positions = jax.tree.map(lambda stack: stack[kind], positions)
        return block(model.spec, params, x_BTD, its_positions, tap, extend), cache

    begin = 0
    for end in (*sorted(taps), n_layers):
        if begin < end:
            # The body indexes the stack of all layers: slicing it first would copy the segment's weights.
            (x_BTD, cache), _ = jax.lax.scan(
                lambda carry, layer: (run_layer(*carry, layer, lambda point, value: value), None),
                (x_BTD, cache),
                jnp.arange(begin, end, dtype=jnp.int32),
            )
        if end < n_layers:
            x_BTD, cache = run_layer(x_BTD, cache, end, taps[end])
        begin = end + 1
    return x_BTD, cache


def empty_cache(model: LanguageModel, ids_BT: jax.Array, n_slots: int) -> Cache:
    """A cache with no position in it, for the rows of `ids` (split as they are), of `n_slots` tokens each."""
    spec = model.spec
    shape = (spec.n_layers, ids_BT.shape[0], n_slots, spec.n_kv, spec.d_head)
    where = _explicit(ids_BT)
    sharding = None if where is None else P(None, where[0])
    keys, values = (jnp.zeros(shape, model.params["embed"].dtype, out_sharding=sharding) for _ in range(2))
    return Cache(keys=keys, values=values, length=jnp.int32(0))


def _n_layers(stop_at: int | None, logits: bool, edit_at: Iterable[Hook], captured: Iterable[Hook], spec: Spec) -> int:
    """How many layers have to run."""
    if stop_at is None:
        return spec.n_layers if logits else 1 + max((hook.layer for hook in captured), default=-1)
    if not 0 <= stop_at <= spec.n_layers:
        raise UsageError(f"stop_at={stop_at} is not a number of layers of this model; use 0 to {spec.n_layers}")
    for hook in (*edit_at, *captured):
        if hook.layer >= stop_at:
            raise UsageError(f"stop_at={stop_at} never reaches hook {hook}; use {hook.layer + 1} or more")
    return stop_at


def _same_type(new: jax.Array, old: jax.Array, hook: Hook) -> jax.Array:
    # A wrong shape may broadcast, and a wrong dtype promote, without a word.
    if new.shape != old.shape or new.dtype != old.dtype:
        raise UsageError(
            f"the edit at {hook} returned {new.dtype}{list(new.shape)}; "
            f"it must return {old.dtype}{list(old.shape)} as it got"
        )
    return new


def _lookup(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    # On an explicit mesh a gather does not say where its result lives: it lives where the ids do.
    where = _explicit(ids_BT)
    return table_VD[ids_BT] if where is None else table_VD.at[ids_BT].get(out_sharding=P(*where, None))


def _explicit(ids_BT: jax.Array) -> P | None:
    """How ids are split over a mesh of Explicit axes; None without one: then the compiler decides."""
    sharding = jax.typeof(ids_BT).sharding
    return sharding.spec if AxisType.Explicit in sharding.mesh.axis_types else None
