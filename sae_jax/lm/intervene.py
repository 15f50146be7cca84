"""Changing what a model computes at its hooks: for splicing in a dictionary, training through it, steering, patching.

    replace   x' = v                                           ablation, with v = 0 or the mean; patching
    add       x' = x + v                                       steering along a direction
    clamp     x' = decode(z') + e,  z' = z but for z_i = c     steering by latents
    ablate    the same with c = 0

where z = encode(x), and e = x - decode(z) is the dictionary's error, kept or left out. A change is a function from
activations f32[B, T, X], the heads of attn_z side by side, to new ones; `edits` makes of it what `run` and `generate`
take, at chosen positions only. All of it is differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sae_jax.lm.hooks import POINTS, Hook, hook_width
from sae_jax.lm.model import LanguageModel
from sae_jax.lm.run import Edits, run
from sae_jax.mesh import reshape
from sae_jax.types import Code, UsageError, check_indices

MAX_LATENT = 2**31 - 1  # its dictionary, which knows how many it has, is behind a function

Change = Callable[[jax.Array], jax.Array]


def replace(values: jax.Array | float) -> Change:
    """Put `values` in the place of activations: one number, [X] or [B, T, X]."""
    return lambda x_BTX: jnp.broadcast_to(values, x_BTX.shape)


def add(values: jax.Array | float) -> Change:
    """Add `values` to activations: one number, [X] or [B, T, X]."""
    return lambda x_BTX: x_BTX + jnp.broadcast_to(values, x_BTX.shape)


def clamp(
    encode: Callable[[jax.Array], Code],
    decode: Callable[[Code], jax.Array],
    latents_L: jax.Array,
    values_L: jax.Array,
    keep_error: bool = True,
) -> Change:
    """Set latents of a dictionary to given values, whatever they are.

    Args:
        encode: the code [B, T, K] of activations. It is traced: give a dictionary of no set K a fixed number of slots.
        decode: the activations that a code stands for, in their units (not those of normalised vectors).
        latents_L: i32[L], different ones.
        values_L: f32[L].
        keep_error: add what the dictionary does not reconstruct, so that nothing but these latents changes.
    """

    def change(x_BTX: jax.Array) -> jax.Array:
        code = encode(x_BTX)
        changed_BTX = decode(set_latents(code, latents_L, values_L))
        return changed_BTX + (x_BTX - decode(code)) if keep_error else changed_BTX

    return change


def ablate(
    encode: Callable[[jax.Array], Code],
    decode: Callable[[Code], jax.Array],
    latents_L: jax.Array,
    keep_error: bool = True,
) -> Change:
    """Set latents to 0; arguments as `clamp`. To ablate all of a hook, `replace` it by 0 or by its mean."""
    return clamp(encode, decode, latents_L, jnp.zeros(len(latents_L)), keep_error)


def set_latents(code: Code, latents_L: jax.Array, values_L: jax.Array) -> Code:
    """A code [..., K] with these latents at these values: fields [..., K + L], in no order.

    UserError for what cannot be a latent, UsageError for one that is there twice.
    """
    check_indices(latents_L, MAX_LATENT, "latent", "give latents of the dictionary")
    if not isinstance(latents_L, jax.core.Tracer) and len(set(np.asarray(latents_L).tolist())) < len(latents_L):
        raise UsageError(f"latents {np.asarray(latents_L).tolist()}: one is there twice; name each once")
    latents, values = (part_L.reshape(*(1,) * (code.indices.ndim - 1), -1) for part_L in (latents_L, values_L))
    is_set = (code.indices[..., None] == latents[..., None, :]).any(-1)
    # A sum, unlike a broadcast, lies on a mesh as the code does.
    indices = jnp.zeros_like(code.indices[..., :1]) + latents.astype(code.indices.dtype)
    values = jnp.zeros_like(code.values[..., :1]) + values.astype(code.values.dtype)
    kept = jnp.where(is_set, 0.0, code.values)
    return Code(jnp.concatenate([code.indices, indices], -1), jnp.concatenate([kept, values], -1))


def edits(changes: Mapping[tuple[int, str], Change], keep_BT: jax.Array | None = None) -> Edits:
    """Edits for `run` that make each change at its hook: at positions where `keep_BT` (bool) is True, or at all."""
    return {hook: partial(_edit, change, keep_BT) for hook, change in changes.items()}


@struct.dataclass
class ReplacedSite:
    """A model on a batch of S sequences, ready to run on with other activations at the hooks of one site.

        as it is      ids --> ... --> activations at the hooks --> later blocks --> logits
        with rows                     rows where `keep`, else the activations --> later blocks --> logits

    The pass as it is was made once; with rows, what comes before the site is not computed again where it no longer
    reaches anything. Gradients flow to the rows; the parameters are constants. A pytree: give it to `jax.jit`.
    """

    model: LanguageModel
    ids: jax.Array  # i32[S, T]
    keep: jax.Array  # bool[S, T]: positions that rows are put in at
    acts: dict[Hook, jax.Array]  # [S, T, ...], heads apart at attn_z
    logits: jax.Array  # f32[S, T, V]
    later: tuple[jax.Array, ...]  # f32[S, T, D], the residual stream after each block that the site reaches, if asked
    hooks: tuple[Hook, ...] = struct.field(pytree_node=False)  # side by side in rows, in this order

    @property
    def rows(self) -> jax.Array:
        """The activations, f32[S * T, X]."""
        # In two steps: on an explicit mesh one reshape may merge only one pair of axes.
        parts = [reshape(self.acts[hook], *self.ids.shape, -1).astype(jnp.float32) for hook in self.hooks]
        return reshape(jnp.concatenate(parts, axis=-1), self.ids.size, -1)

    def by_hook(self, rows_BX: jax.Array) -> dict[Hook, jax.Array]:
        """Rows f32[S * T, X] as activations f32[S, T, width] of each hook."""
        rows_STX = reshape(rows_BX, *self.ids.shape, -1)
        parts, first = {}, 0
        for hook in self.hooks:
            parts[hook] = rows_STX[..., first : first + hook_width(self.model.spec, hook)]
            first += parts[hook].shape[-1]
        return parts

    def with_rows(
        self, rows_BX: jax.Array, logits_at: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """(logits, later) with rows f32[S * T, X] in the place of the activations, where `keep` says so.

        Logits are f32[S, T, V]; with `logits_at`, a position, f32[S, 1, V] of that one alone.
        """
        parts = self.by_hook(rows_BX)
        edit_at = dict(edits({hook: replace(parts[hook]) for hook in self.hooks}, self.keep))
        # Nothing has changed before the first hook: its activations are those at hand, and to use them instead of the
        # incoming ones spares computing all that comes before.
        first = min(self.hooks, key=lambda hook: (hook.layer, POINTS.index(hook.point)))
        edit_first = edit_at[first]
        edit_at[first] = lambda _: edit_first(self.acts[first])
        hooks = later_hooks(self.model, self.hooks[0]) if self.later else ()
        out = run(self.model, self.ids, edits=edit_at, capture=hooks, logits_at=logits_at)
        assert out.logits is not None
        return out.logits, tuple(out.acts[hook] for hook in hooks)


def replaced_site(
    model: LanguageModel, ids_ST: jax.Array, keep_ST: jax.Array, hook: Hook, with_later: bool
) -> ReplacedSite:
    """The model on sequences i32[S, T], ready for other activations at one hook, at positions bool[S, T].

    Traced by its caller. `with_later` keeps the residual stream after later blocks too: these are then compiled one by
    one.
    """
    hooks = later_hooks(model, hook) if with_later else ()
    out = run(model, ids_ST, capture=(hook, *hooks))
    assert out.logits is not None
    later = tuple(out.acts[other] for other in hooks)
    return ReplacedSite(model, ids_ST, keep_ST, {hook: out.acts[hook]}, out.logits, later, (hook,))


def later_hooks(model: LanguageModel, hook: Hook) -> tuple[Hook, ...]:
    """The residual stream after each block that a change at `hook` reaches, but for the hook itself."""
    after = (Hook(layer, "resid_post") for layer in range(hook.layer, model.spec.n_layers))
    return tuple(other for other in after if other != hook)


def _edit(change: Change, keep_BT: jax.Array | None, x: jax.Array) -> jax.Array:
    """One change to activations [B, T, ...] of any dtype, heads apart at attn_z."""
    new_BTX = change(reshape(x, *x.shape[:2], -1).astype(jnp.float32))
    new = reshape(new_BTX, *x.shape).astype(x.dtype)
    return new if keep_BT is None else jnp.where(reshape(keep_BT, *keep_BT.shape, *(1,) * (x.ndim - 2)), new, x)
