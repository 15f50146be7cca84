"""Running an op on every device of the mesh in use, or once where there is no mesh.

An op is written for one device: it takes that device's blocks and speaks to the others through the collectives
below. Without a mesh, or along an axis of size 1, they do nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax import mesh
from sae_jax.ops import tuning
from sae_jax.types import Code

CODES: Any = Code(*(mesh.CODE, mesh.CODE))  # pyrefly: ignore[bad-argument-type] (specs in the shape of a code)


def per_device(local: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`local` as a function of global arrays. Backward passes are written out, so vma checks have nothing to add."""
    current = mesh.current()
    if current is None:
        return local
    # All axes, `member` too, over which every slice then does the same: lax.psum_scatter refuses a mesh of which an
    # axis is explicit still (JAX 0.11 and 0.12).
    axes = set(current.axis_names) - set(current.manual_axes)
    return jax.shard_map(local, mesh=current, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)


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


def largest(x: jax.Array) -> jax.Array:
    """Maximum over all devices: what they must agree on before one of them takes a branch with collectives."""
    names = _split(mesh.AXES)
    return lax.pmax(x, names) if names else x


def swap(x_SR: jax.Array) -> jax.Array:
    """Block i of the leading dimension goes to latent shard i; what comes back stands in order of the sender."""
    names = _split(mesh.LATENT)
    return lax.all_to_all(x_SR, names, 0, 0) if names else x_SR


def first_latent(n_local: int) -> jax.Array | int:
    """Number of the first latent of this device's latent shard, which holds `n_local` of them."""
    return index(mesh.LATENT) * n_local


def index(axis: str | tuple[str, ...]) -> jax.Array | int:
    """This device's place along `axis`."""
    names = _split(axis)
    return lax.axis_index(names) if names else 0


def _split(axis: str | tuple[str, ...]) -> tuple[str, ...]:
    """The names of `axis` along which there is more than one device."""
    return tuple(name for name in mesh.names(axis) if mesh.axis_size(name) > 1)


@dataclass(frozen=True)
class RowBlocks:
    """The rows of a data shard in blocks that are exchanged, and held, one at a time.

    A device owns `n_own` rows. A block takes `size` of them from each of the data shard's devices, so that an array of
    own rows [R, ...] becomes [n_blocks, size, ...] and one of all rows of the data shard [S*R, ...] becomes
    [n_blocks, S*size, ...]. Rows that fill up the last block are zero.
    """

    n_own: int
    n_blocks: int
    size: int

    def own(self, x_R: jax.Array) -> jax.Array:
        """[R, ...] in blocks."""
        return self._cut(x_R[None])[:, 0]

    def shared(self, x_B: jax.Array) -> jax.Array:
        """[S*R, ...] in blocks."""
        n_shards, tail = mesh.axis_size(mesh.LATENT), x_B.shape[1:]
        blocks = self._cut(x_B.reshape(n_shards, self.n_own, *tail))
        return blocks.reshape(self.n_blocks, n_shards * self.size, *tail)

    def join_own(self, y: jax.Array) -> jax.Array:
        """What `own` cut, put together."""
        return y.reshape(self.n_blocks * self.size, *y.shape[2:])[: self.n_own]

    def join_shared(self, y: jax.Array) -> jax.Array:
        """What `shared` cut, put together."""
        n_shards, tail = mesh.axis_size(mesh.LATENT), y.shape[2:]
        y_SR = y.reshape(self.n_blocks, n_shards, self.size, *tail).swapaxes(0, 1)
        y_SR = y_SR.reshape(n_shards, self.n_blocks * self.size, *tail)[:, : self.n_own]
        return y_SR.reshape(n_shards * self.n_own, *tail)

    def _cut(self, x_SR: jax.Array) -> jax.Array:
        short = self.n_blocks * self.size - self.n_own
        x_SR = jnp.pad(x_SR, ((0, 0), (0, short), *((0, 0),) * (x_SR.ndim - 2))) if short else x_SR
        return x_SR.reshape(len(x_SR), self.n_blocks, self.size, *x_SR.shape[2:]).swapaxes(0, 1)


def row_blocks(n_own: int, d_model: int) -> RowBlocks:
    """The fewest blocks whose rows, f32[S*size, D], keep to the budget of the back end."""
    budget = max(1, tuning.current().exchange_bytes // (4 * d_model * mesh.axis_size(mesh.LATENT)))
    return RowBlocks(n_own, *even(n_own, budget))


def even(n: int, max_size: int) -> tuple[int, int]:
    """(number, size) of the fewest pieces of at most `max_size`, even; with no remainder where that costs few more."""
    fewest = max(1, -(-n // max_size))
    number = next((i for i in range(fewest, min(2 * fewest, n) + 1) if n % i == 0), fewest)
    return number, -(-n // number)


def scan(body: Callable[..., Any], carry: Any, blocks: Any) -> tuple[Any, Any]:
    """`lax.scan`, without a loop around a single block.

    Blocks in bfloat16 are sliced as integers: XLA slices bfloat16 in float32 on a CPU, and would then convert the whole
    array before the loop.
    """
    if len(jax.tree.leaves(blocks)[0]) == 1:
        carry, y = body(carry, jax.tree.map(lambda x: x[0], blocks))
        return carry, jax.tree.map(lambda x: x[None], y)
    types = jax.tree.map(lambda x: x.dtype, blocks)

    def as_integers(x):
        return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x

    def unpacked(carry, blocks):
        return body(
            carry,
            jax.tree.map(lambda x, dtype: x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype), blocks, types),
        )

    return lax.scan(unpacked, carry, jax.tree.map(as_integers, blocks))
