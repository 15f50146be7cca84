"""How rows are scaled before a dictionary sees them, and how that is undone.

    none                            rows as they are
    layer_norm, unit_norm           each vector by itself; outputs are mapped back
    vector_sqrt_d                   so, too: each vector to norm sqrt(d), its mean left in
    dataset_rms, dataset_sqrt_d     one constant a source, fixed when a run starts and folded into the weights by `load`

Nothing else in saes/ knows about it: a variant sees normalised rows only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

InputNorm = Literal["none", "layer_norm", "unit_norm", "vector_sqrt_d", "dataset_rms", "dataset_sqrt_d"]
PER_VECTOR = ("layer_norm", "unit_norm", "vector_sqrt_d")


@struct.dataclass
class Scale:
    """What rows are multiplied by before a dictionary sees them: one constant a source, fixed when a run starts."""

    x: jax.Array  # f32[X]
    y: jax.Array  # f32[Y]


def normalise_pair(
    x_BX: jax.Array, y_BY: jax.Array | None, kind: InputNorm, scale: Scale
) -> tuple[jax.Array, jax.Array, Callable[[jax.Array], jax.Array]]:
    """Rows as a dictionary sees them, and the way back.

    Args:
        x_BX: rows that are encoded, in the units of the set.
        y_BY: rows that are reconstructed; None: x.
        kind: how to normalise.
        scale: the constants of a run, for the dataset_* kinds.

    Returns:
        x and y normalised, and a function that takes rows [B, Y] to the units in which errors are measured: those of
        the set for one source. Sources that were scaled stay scaled, so that they weigh alike.
    """
    if kind in PER_VECTOR:
        x_BX, mean_B1, scale_B1 = normalise(x_BX, kind)
        y_BY = x_BX if y_BY is None else (y_BY.astype(jnp.float32) - mean_B1) / scale_B1
        return x_BX, y_BY, lambda rows_BY: rows_BY * scale_B1 + mean_B1
    if kind == "none":
        return x_BX, x_BX if y_BY is None else y_BY, lambda rows_BY: rows_BY
    x_BX = x_BX.astype(jnp.float32) * scale.x[None]
    y_BY = x_BX if y_BY is None else y_BY.astype(jnp.float32) * scale.y[None]
    return x_BX, y_BY, lambda rows_BY: rows_BY


def normalise(x_BD: jax.Array, kind: InputNorm) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalisation of each vector: (normalised x, mean [B, 1], scale [B, 1]); undo with x * scale + mean.

    In f32, except that the other kinds leave x as it is, in its type: the ops take it from there a block at a time.
    """
    if kind not in PER_VECTOR:
        return x_BD, jnp.float32(0), jnp.float32(1)
    x_BD = x_BD.astype(jnp.float32)
    if kind == "vector_sqrt_d":
        norm_B1 = jnp.sqrt((x_BD**2).sum(-1, keepdims=True))
        scale_B1 = jnp.maximum(norm_B1, 1e-12) / math.sqrt(x_BD.shape[-1])
        return x_BD / scale_B1, jnp.zeros_like(scale_B1), scale_B1
    mean_B1 = x_BD.mean(-1, keepdims=True)
    centred_BD = x_BD - mean_B1
    square_B1 = (centred_BD**2).sum(-1, keepdims=True)
    if kind == "unit_norm":
        scale_B1 = jnp.maximum(jnp.sqrt(square_B1), 1e-12)
    else:  # layer_norm, with the unbiased estimator that the released TopK autoencoders were trained on
        scale_B1 = jnp.sqrt(square_B1 / (x_BD.shape[-1] - 1)) + 1e-5
    return centred_BD / scale_B1, mean_B1, scale_B1


def factor(kind: InputNorm, mean_square: float, width: int) -> float:
    """What the rows of a source are multiplied by, given the mean of their squared norms."""
    target = {"dataset_rms": 1.0, "dataset_sqrt_d": float(width)}.get(kind)
    return 1.0 if target is None else math.sqrt(target / mean_square)
