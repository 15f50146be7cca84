"""Every exchange between devices that the engine makes (ops/spmd.py), with numbers that are known.

Each device begins with numbers that depend on its place. They are whole, and so few that every sum of them is exact
in float32; those of a single device are exact in bfloat16 too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from sae_jax import mesh as meshes
from sae_jax.ops import spmd
from sae_jax.selftest.checks import Figures, MismatchError, Where, check, make

WIDTH = 4
PRIME = 251  # numbers are below it


def collectives(where: Where) -> Figures:
    """Gather, sum, reduce-scatter, largest and swap along the axes of the mesh; then what processes tell each other."""
    sizes = meshes.sizes(where.mesh)
    n_data, n_latent = sizes["data"], sizes["latent"]
    n, n_rows = n_data * n_latent, max(n_data, n_latent)

    def group_of(axis: Any, p: int) -> tuple[list[int], int]:
        """The devices that exchange along an axis with the one at place p, in order; and its place among them."""
        data, latent = divmod(p, n_latent)
        if axis == meshes.LATENT:
            return [data * n_latent + i for i in range(n_latent)], latent
        if axis == meshes.DATA:
            return [i * n_latent + latent for i in range(n_data)], data
        return list(range(n)), p

    def local(own_1RW: jax.Array) -> dict[str, jax.Array]:
        return {name: run(own_1RW[0])[None] for name, (run, _) in exchanges.items()}

    exchanges = dict(_exchanges(group_of))
    own_PRW = make(where.mesh, meshes.ROWS, (n, n_rows, WIDTH), lambda index: _numbers(np.arange(n)[index[0]], n_rows))
    results = meshes.in_order(jax.jit(spmd.per_device(local, (meshes.ROWS,), meshes.ROWS))(own_PRW))
    everyone = np.ravel(multihost_utils.process_allgather(np.array(3 * jax.process_index() + 1)))
    first = int(multihost_utils.broadcast_one_to_all(np.array(7 + jax.process_index())))
    for name, (_, expected) in exchanges.items():
        check(name, results[name], lambda index, expected=expected: _of_places(expected, n, n_rows, index[0]))
    in_turn = 3 * np.arange(jax.process_count()) + 1
    if (everyone != in_turn).any():
        raise MismatchError(f"gather over processes is {everyone.tolist()}", f"{in_turn.tolist()}")
    if first != 7:
        raise MismatchError(f"the number of the first process is {first} on process {jax.process_index()}", "7")
    return {"devices": n, "exchanges": len(exchanges), "processes": jax.process_count()}


def _numbers(places_P: np.ndarray, n_rows: int) -> np.ndarray:
    """f32[P, n_rows, WIDTH]: what the devices at these places hold. Neighbours, and those PRIME apart, differ."""
    rows_R1, columns_W = np.arange(n_rows)[:, None], np.arange(WIDTH)
    p_P11 = places_P[:, None, None]
    return ((p_P11 * (7 + columns_W) + p_P11 // PRIME * 13 + rows_R1 * 3 + columns_W * 11) % PRIME).astype(np.float32)


# name: (what a device does with its numbers [R, W], what the device at a place should have then)
Exchanges = dict[str, tuple[Callable[[jax.Array], jax.Array], Callable[[int, int], np.ndarray]]]


def _exchanges(group_of: Callable[[Any, int], tuple[list[int], int]]) -> Exchanges:
    def own(places: list[int], n_rows: int) -> np.ndarray:
        return _numbers(np.asarray(places), n_rows)

    found: Exchanges = {}
    for axis, along in ((meshes.LATENT, "latent"), (meshes.DATA, "data"), (meshes.AXES, "data and latent")):

        def members(p: int, axis: Any = axis) -> list[int]:
            return group_of(axis, p)[0]

        for dtype in (jnp.float32, jnp.bfloat16):
            found[f"gather of {jnp.dtype(dtype).name} over {along}"] = (
                lambda own_RW, axis=axis, dtype=dtype: spmd.gather(own_RW[:1].astype(dtype), axis),
                lambda p, r, members=members: own(members(p), r)[:, 0],
            )
        for dtype in (jnp.float32, jnp.int32):
            found[f"sum of {jnp.dtype(dtype).name} over {along}"] = (
                lambda own_RW, axis=axis, dtype=dtype: spmd.total(own_RW.astype(dtype), axis),
                lambda p, r, members=members: own(members(p), r).sum(0),
            )
        found[f"place along {along}"] = (
            lambda own_RW, axis=axis: jnp.asarray(spmd.index(axis), jnp.int32),
            lambda p, r, axis=axis: np.asarray(group_of(axis, p)[1]),
        )
    for axis, along in ((meshes.LATENT, "latent"), (meshes.DATA, "data")):
        found[f"reduce-scatter over {along}"] = (
            lambda own_RW, axis=axis: spmd.reduce_scatter(own_RW[: meshes.axis_size(axis)], axis),
            lambda p, r, axis=axis: own(group_of(axis, p)[0], r).sum(0)[group_of(axis, p)[1]][None],
        )
    found["largest over all"] = (
        spmd.largest,
        lambda p, r: own(group_of(meshes.AXES, p)[0], r).max(0),
    )
    found["swap over latent"] = (
        lambda own_RW: spmd.swap(own_RW[: meshes.axis_size(meshes.LATENT)]),
        lambda p, r: own(group_of(meshes.LATENT, p)[0], r)[:, group_of(meshes.LATENT, p)[1]],
    )
    return found


def _of_places(expected: Callable[[int, int], np.ndarray], n: int, n_rows: int, places: slice) -> np.ndarray:
    return np.stack([expected(p, n_rows) for p in range(n)[places]])
