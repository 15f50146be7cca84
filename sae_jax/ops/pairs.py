"""Gradients of a dictionary's matrices as pairs (row of the batch, latent), added up a range of latents at a time.

    g[f] = sum of coefficient[b, k] * row[b] over the slots (b, k) of the batch with index[b, k] = f

The gradient of a matrix is as large as the matrix; its pairs are B * K numbers and the rows of the batch. So a step
that updates the matrices in place, range by range, never holds a gradient.

While an objective is traced by `value_and_pairs`, ops/encode.py, ops/sparse.py and ops/auxk_pairs.py take the matrices
as constants and `tap` what the gradients need: a value whose cotangent is a factor of pairs. This is right for an
objective that has the matrices from these ops alone; any other use of them would have no gradient, so a variant says
whether it is one (`SaeConfig.BY_PAIRS`) and a test compares.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from sae_jax import mesh
from sae_jax.mesh import CODE, ROWS
from sae_jax.ops import spmd, tuning

MATRICES = ("w_enc", "w_dec")


@struct.dataclass
class Pairs:
    """A part of the gradient of a matrix."""

    indices: jax.Array  # i32[B, K], CODE: latents
    coefficients: jax.Array  # f32[B, K], CODE; 0: no pair
    rows: jax.Array  # bf16 or f32[B, D], ROWS


SPECS: Any = Pairs(CODE, CODE, ROWS)  # pyrefly: ignore[bad-argument-type] (specs in the shape of pairs)

# (cotangent of a value that was tapped, what was saved with it) -> parts of the gradient of each matrix
Maker = Callable[[jax.Array, Any], dict[str, list[Pairs]]]


class Tape:
    """What was tapped while an objective was traced."""

    def __init__(self, probes: list[jax.Array] | None) -> None:
        """`probes`: a zero for each value, to differentiate the objective by; None: not known yet."""
        self.probes = probes
        self.values: list[Any] = []  # types
        self.saved: list[Any] = []
        self.makers: list[Maker] = []

    def tap(self, value: jax.Array, saved: Any, maker: Maker) -> jax.Array:
        """`value`, whose cotangent makes pairs."""
        self.values.append(jax.typeof(value))
        self.saved.append(lax.stop_gradient(saved))
        self.makers.append(maker)
        return value if self.probes is None else value + self.probes[len(self.values) - 1]


_tape: ContextVar[Tape | None] = ContextVar("tape", default=None)


def tape() -> Tape | None:
    """Where ops tap; None: the gradients of matrices are arrays."""
    return _tape.get()


def value_and_pairs(objective: Callable[[Any], tuple[jax.Array, Any]], sae: Any) -> tuple[tuple, Any, dict[str, list]]:
    """`jax.value_and_grad(objective, has_aux=True)` at `sae`, without gradients as large as a matrix.

    Returns:
        (loss, aux); the gradients, with None for the matrices; and the parts of the gradient of each matrix.
    """
    matrices = {name: getattr(sae, name) for name in MATRICES}
    vectors = replace(cast(Any, sae), **dict.fromkeys(MATRICES))

    def traced(vectors: Any, probes: list[jax.Array] | None) -> tuple[jax.Array, Any]:
        nonlocal used
        used = Tape(probes)
        token = _tape.set(used)
        try:
            loss, aux = objective(replace(vectors, **matrices))
        finally:
            _tape.reset(token)
        return loss, (aux, used.saved)

    used = Tape(None)
    jax.eval_shape(lambda vectors: traced(vectors, None), vectors)
    probes = [jnp.zeros(v.shape, v.dtype, out_sharding=mesh.placed(v.sharding.spec)) for v in used.values]
    (loss, (aux, saved)), (gradients, cotangents) = jax.value_and_grad(traced, (0, 1), has_aux=True)(vectors, probes)
    parts: dict[str, list[Pairs]] = {name: [] for name in MATRICES}
    for maker, cotangent, kept in zip(used.makers, cotangents, saved, strict=True):
        for name, made in maker(cotangent, kept).items():
            parts[name] += made
    return (loss, aux), gradients, parts


@struct.dataclass
class Sorted:
    """Pairs whose latents a device owns, in the order of latents. Inside `per_device`."""

    latents: jax.Array  # i32[P], ascending, counted within the device; past the last pair the number of its latents
    slots: jax.Array  # i32[P], of the code of the batch
    coefficients: jax.Array  # f32[B, K]
    rows: jax.Array  # [B, D], of the whole batch

    def add_up(self, sum_tD: jax.Array, first: jax.Array | int) -> jax.Array:
        """`sum_tD` with the pairs of the latents `first`, `first` + 1, ... added: f32[t, D].

        In pieces: a CPU writes out the rows that it adds.
        """
        n_latents, width = len(sum_tD), self.coefficients.shape[1]
        size = min(max(1, tuning.current().pair_bytes // (4 * self.rows.shape[1])), len(self.slots))
        begin, end = jnp.searchsorted(self.latents, jnp.stack([jnp.int32(first), jnp.int32(first) + n_latents]))

        def piece(i: jax.Array, sum_tD: jax.Array) -> jax.Array:
            at_P = begin + i * size + jnp.arange(size, dtype=jnp.int32)
            is_one_P, at_P = at_P < end, jnp.minimum(at_P, len(self.slots) - 1)
            slot_P = self.slots[at_P]
            latent_P = jnp.where(is_one_P, self.latents[at_P] - first, n_latents)
            rows_PD = self.rows[slot_P // width].astype(jnp.float32)
            return sum_tD.at[latent_P].add(self.coefficients.ravel()[slot_P][:, None] * rows_PD, mode="drop")

        return lax.fori_loop(0, -((begin - end) // size), piece, sum_tD)


def sort(pairs: Pairs, n_own: int) -> Sorted:
    """A device's blocks of pairs as those whose latents, `n_own`, it owns. Inside `per_device`."""
    first = spmd.first_latent(n_own * mesh.axis_size(mesh.DATA)) + spmd.index(mesh.DATA) * n_own
    indices_BK, coefficients_BK = (spmd.gather(a, mesh.DATA) for a in (pairs.indices, pairs.coefficients))
    own_BK = indices_BK - first
    is_one_BK = (coefficients_BK != 0) & (own_BK >= 0) & (own_BK < n_own)
    latent_P = jnp.where(is_one_BK, own_BK, n_own).ravel()
    # One value beside the key: with more, XLA leaves the radix sort for a comparison sort.
    latent_P, slot_P = lax.sort((latent_P, jnp.arange(latent_P.size, dtype=jnp.int32)), num_keys=1, is_stable=True)
    return Sorted(latent_P, slot_P, coefficients_BK, spmd.gather(pairs.rows, mesh.AXES))
