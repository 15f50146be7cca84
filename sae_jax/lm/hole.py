"""A model that is cut open at a site: what it does there as it is, and what it does when other rows are put in.

    clean      ids --> ... --> acts at the site --> later blocks --> logits
    with rows              rows where `keep`, acts elsewhere --> later blocks --> logits

The clean pass is run once for a batch; with other rows, only what comes after the site runs again, since what comes
before no longer reaches anything. Gradients flow to the rows. The parameters are constants.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from sae_jax.lm.hooks import Hook
from sae_jax.lm.model import LanguageModel
from sae_jax.lm.run import Edits, run


@struct.dataclass
class Hole:
    """A model on a batch of S sequences, cut open at one site. A pytree: give it to `jax.jit` as an argument."""

    model: LanguageModel
    ids: jax.Array  # i32[S, T]
    keep: jax.Array  # bool[S, T]: positions where rows may be put in; the others keep their activations
    acts: jax.Array  # f32[S, T, ...], at the site, heads apart at attn_z
    logits: jax.Array  # f32[S, T, V]
    later: tuple[jax.Array, ...]  # f32[S, T, D], the residual stream after each block that the site reaches, if asked
    site: Hook = struct.field(pytree_node=False)

    @property
    def rows(self) -> jax.Array:
        """The activations at the site, f32[S * T, width]."""
        # In two steps: on an explicit mesh one reshape may merge only one pair of axes.
        return self.acts.reshape(*self.ids.shape, -1).reshape(self.ids.size, -1)

    def shaped(self, rows_BX: jax.Array) -> jax.Array:
        """Rows f32[S * T, width] in the shape of `acts`."""
        sharding = jax.typeof(self.ids).sharding
        # Where one axis becomes two, JAX would give each a part of the devices.
        where = None if sharding.mesh.empty else P(sharding.spec[0], None, None)
        rows_STX = jax.lax.reshape(rows_BX, (*self.ids.shape, rows_BX.shape[1]), out_sharding=where)
        return rows_STX.reshape(self.acts.shape).astype(self.acts.dtype)

    def with_rows(self, rows_BX: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """(logits, later) as above, with rows f32[S * T, width] in the place of the activations."""
        keep = self.keep.reshape(*self.keep.shape, *(1,) * (self.acts.ndim - 2))
        acts = jnp.where(keep, self.shaped(rows_BX), self.acts)
        # The incoming value is not used: at a residual site nothing before it is computed again.
        edits: Edits = {self.site: lambda _: acts}
        hooks = later_hooks(self.model, self.site) if self.later else ()
        out = run(self.model, self.ids, edits=edits, capture=hooks)
        assert out.logits is not None
        return out.logits, tuple(out.acts[hook] for hook in hooks)


def cut_open(model: LanguageModel, ids_ST: jax.Array, keep_ST: jax.Array, site: Hook, later: bool) -> Hole:
    """The model on these sequences, i32[S, T] and bool[S, T], cut open at a site.

    Traced by its caller. With `later` the residual stream after later blocks is kept too: these blocks are then
    compiled one by one.
    """
    hooks = later_hooks(model, site) if later else ()
    out = run(model, ids_ST, capture=(site, *hooks))
    assert out.logits is not None
    return Hole(model, ids_ST, keep_ST, out.acts[site], out.logits, tuple(out.acts[hook] for hook in hooks), site)


def later_hooks(model: LanguageModel, site: Hook) -> tuple[Hook, ...]:
    """The residual stream after each block that a change at `site` reaches, but for the site itself."""
    after = (Hook(layer, "resid_post") for layer in range(site.layer, model.spec.n_layers))
    return tuple(hook for hook in after if hook != site)
