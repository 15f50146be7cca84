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


def gather(x: jax.Array, axis: str | tuple[str, ...]) -> jax.Array:
    """Blocks of the leading dimension from all devices along `axis`, in order."""
    for name in reversed(_split(axis)):
        x = lax.all_gather(x, name, axis=0, tiled=True)
    return x


def reduce_scatter(x: jax.Array, axis: str | tuple[str, ...]) -> jax.Array:
    """Sum over `axis`, each device keeping its block of the leading dimension."""
    for name in _split(axis):
        x = lax.psum_scatter(x, name, scatter_dimension=0, tiled=True)
    return x


def total(x: jax.Array, axis: str | tuple[str, ...] = mesh.AXES) -> jax.Array:
    """Sum over `axis`, by default over all devices."""
    names = _split(axis)
    return lax.psum(x, names) if names else x


def first_latent(n_local: int) -> jax.Array | int:
    """Number of the first latent of this device's latent shard, which holds `n_local` of them."""
    return lax.axis_index(mesh.LATENT) * n_local if _split(mesh.LATENT) else 0


def _split(axis: str | tuple[str, ...]) -> tuple[str, ...]:
    """The names of `axis` along which there is more than one device."""
    return tuple(name for name in mesh.names(axis) if mesh.axis_size(name) > 1)
