"""How a row of activations is stored: as its D numbers in a float dtype, or in int8 with a scale of its own.

An int8 row is D + 4 bytes: D whole numbers and, in the last four, the float32 scale s that they are multiples of:

    s = max |x| / 127        number = round(x / s)        read as number * s, within s / 2 of x

(scaling by the largest magnitude of a row: Dettmers et al. 2022, arXiv 2208.07339, section 2.1). A row of zeros has
s = 0. A row with a number that is not finite has such a scale, so whoever reads it gets no finite row. Scales are kept
above the smallest normal float32, since devices take smaller ones for 0, and below the largest of which 127 are finite.

All that is known elsewhere is that a stored row has another width: an array of int8 rows is stored ones everywhere.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

# What the numbers of a stored row are.
DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "int8": np.dtype(np.int8),
}
SCALE_BYTES = 4
MOST = 127  # -128 has no counterpart
BLOCK_ROWS = 1024  # the f32 copies of a block stay in cache up to D of a few thousand

_TINY = np.finfo(np.float32).tiny
_LARGEST = np.nextafter(np.finfo(np.float32).max / np.float32(MOST), np.float32(0))

Array = TypeVar("Array", np.ndarray, jax.Array)


def stored_width(d: int, dtype: str) -> int:
    """Numbers of a stored row of d activations."""
    return d + SCALE_BYTES * (dtype == "int8")


def row_bytes(d: int, dtype: str) -> int:
    """Bytes of a stored row of d activations."""
    return stored_width(d, dtype) * DTYPES[dtype].itemsize


def width(rows: Any) -> int:
    """D of rows, stored or not."""
    return rows.shape[-1] - SCALE_BYTES * (rows.dtype == np.int8)


def encode(rows: np.ndarray, dtype: str, *, copy: bool = False) -> np.ndarray:
    """Rows [..., D] of any float dtype as they are stored; what is too large for `dtype` becomes infinite.

    Int8 rows are taken for stored ones, and rows of the right dtype are returned as they are, or as a `copy`.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "int8" or rows.dtype == np.int8:
            return rows.astype(DTYPES[dtype], copy=copy)
        rows_ND = rows.reshape(-1, rows.shape[-1])
        stored = np.empty((len(rows_ND), stored_width(rows.shape[-1], dtype)), np.int8)
        for low in range(0, len(rows_ND), BLOCK_ROWS):
            part = slice(low, low + BLOCK_ROWS)
            numbers, scale_N1 = _numbers(rows_ND[part].astype(np.float32), np)
            stored[part, :-SCALE_BYTES], stored[part, -SCALE_BYTES:] = numbers, scale_N1.view(np.int8)
    return stored.reshape(*rows.shape[:-1], -1)


def encode_on_device(rows: jax.Array, dtype: str) -> jax.Array:
    """As `encode`, traced."""
    if dtype != "int8":
        return rows.astype(dtype)
    numbers, scale = _numbers(rows.astype(jnp.float32), jnp)
    return jnp.concatenate([numbers.astype(jnp.int8), jax.lax.bitcast_convert_type(scale[..., 0], jnp.int8)], axis=-1)


def decode(stored: np.ndarray) -> np.ndarray:
    """Stored rows as numbers [..., D]: int8 ones in float32, others as they are."""
    if stored.dtype != np.int8:
        return stored
    scale = np.ascontiguousarray(stored[..., -SCALE_BYTES:]).view(np.float32)
    with np.errstate(invalid="ignore"):
        return stored[..., :-SCALE_BYTES] * scale


def decode_on_device(stored: jax.Array) -> jax.Array:
    """As `decode`, traced."""
    if stored.dtype != jnp.int8:
        return stored
    scale = jax.lax.bitcast_convert_type(stored[..., -SCALE_BYTES:], jnp.float32)
    return stored[..., :-SCALE_BYTES].astype(jnp.float32) * scale[..., None]


def _numbers(x: Array, xp: ModuleType) -> tuple[Array, Array]:
    """Whole numbers f32[..., D] of x, and the scale f32[..., 1]."""
    most = abs(x).max(axis=-1, keepdims=True)
    scale = xp.where(xp.isfinite(most) & (most > 0), xp.clip(most / np.float32(MOST), _TINY, _LARGEST), most)
    return xp.rint(x / xp.where(scale > 0, scale, np.float32(1))), scale
