"""Arrays that users hand in: numpy, JAX, torch, and what else converts to numpy without losing its meaning."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from sae_jax.types import UsageError, refuse_masked


def as_numpy(values: Any, what: str) -> np.ndarray:
    """As a numpy array. Raises UsageError for a masked array, whose mask would be lost, and for what is no array."""
    refuse_masked(values, what)
    try:
        if hasattr(values, "detach"):  # a torch tensor, whose bfloat16 numpy does not take
            values = values.detach().cpu()
            values = values.float() if values.is_floating_point() else values
        return np.asarray(values)
    except (TypeError, ValueError) as error:  # a sparse tensor, a ragged list
        raise UsageError(f"{what} are no array ({str(error).partition(chr(10))[0]}); give a plain one") from None


def as_floats(values: Any, what: str) -> np.ndarray:
    """As a numpy array of floats [..., d]. Raises UsageError for anything else: whole numbers may stand for others."""
    array = as_numpy(values, what)
    if array.ndim < 2 or not jnp.issubdtype(array.dtype, jnp.floating):
        whole = ", and floats: rows.astype(np.float32) if these are activations" if array.dtype.kind in "iub" else ""
        raise UsageError(f"{what} are {array.dtype.name}{list(array.shape)}; give real numbers [..., d_model]{whole}")
    if not array.shape[-1]:
        raise UsageError(f"{what} are {list(array.shape)}: rows need at least 1 value")
    return array
