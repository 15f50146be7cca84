"""Running an op on every device of the mesh in use, or once where there is no mesh.

An op is written for one device: it takes that device's blocks and speaks to the others through the collectives
below. Without a mesh, or along an axis of size 1, they do nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from sae_jax import mesh
from sae_jax.types import Code

CODES: Any = Code(*(mesh.CODE, mesh.CODE))  # pyrefly: ignore[bad-argument-type] (specs in the shape of a code)


def per_device(local: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`local` as a function of global arrays. Backward passes are written out, so vma checks have nothing to add."""
    current = mesh.current()
    if current is None:
        return local
    return jax.shard_map(local, mesh=current, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def gather(x: jax.Array, axis: str) -> jax.Array:
    """Blocks of the leading dimension from all devices along `axis`, in order."""
    return x if mesh.axis_size(axis) == 1 else lax.all_gather(x, axis, axis=0, tiled=True)


def reduce_scatter(x: jax.Array, axis: str) -> jax.Array:
    """Sum over `axis`, each device keeping its block of the leading dimension."""
    return x if mesh.axis_size(axis) == 1 else lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True)


def total(x: jax.Array) -> jax.Array:
    """Sum over all devices."""
    axes = tuple(name for name in (mesh.DATA, mesh.LATENT) if mesh.axis_size(name) > 1)
    return lax.psum(x, axes) if axes else x


def first_latent(n_local: int) -> jax.Array | int:
    """Number of the first latent of this device's latent shard, which holds `n_local` of them."""
    return 0 if mesh.axis_size(mesh.LATENT) == 1 else lax.axis_index(mesh.LATENT) * n_local
