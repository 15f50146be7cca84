"""The words every module shares: hook, source and site, the axis key, sparse codes, the errors a user can cause.

    hook      a place in a language model where activations are read or edited: `resid_post.2`
    source    a stored column of a set: the activations of one model at one hook
    site      the sources that a dictionary reads and writes

Axis key, used as a suffix of local names (`pre_BF`, `x_hat_BD`). A small letter is a part of the axis of the capital: a
block, a tile or one device's share.

    B rows (token activations)   T positions       D d_model        F n_latents
    K active latents k           S sources         V vocabulary     N rows of a sample or a set
    R rows of one device         X width of what is encoded         Y width of what is reconstructed
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sae_jax.errors import PartialError, UsageError, UserError

__all__ = ["Code", "PartialError", "Sites", "UsageError", "UserError", "Widths", "check_indices", "refuse_masked"]

T = TypeVar("T")


class Sides(NamedTuple, Generic[T]):
    """What stands side by side in the rows that are encoded (x), and in those that are reconstructed (y)."""

    x: tuple[T, ...]
    y: tuple[T, ...]

    @classmethod
    def one(cls, item: T) -> Sides[T]:
        """Of an autoencoder of one source."""
        return cls((item,), (item,))

    @classmethod
    def from_json(cls, sides: Mapping[str, Any]) -> Sides[Any]:
        """From {"x": [...], "y": [...]}."""
        return cls(tuple(sides["x"]), tuple(sides["y"]))

    def to_json(self) -> dict[str, list[T]]:
        """What `from_json` reads."""
        return {"x": list(self.x), "y": list(self.y)}

    @property
    def all(self) -> tuple[T, ...]:
        """Both, each once."""
        return tuple(dict.fromkeys(self.x + self.y))


Sites = Sides[str]  # sources of a set, by name
Widths = Sides[int]  # and the dimensions of each


@struct.dataclass
class Code:
    """Sparse latents of a batch: for each row, which latents are active and how strongly.

    A public code has K = k slots a row in descending order of value. A slot that no latent won has value 0;
    its index is still a valid latent, so gathers never need a guard. While a step runs on a mesh each latent
    shard keeps its own k slots, so that K = k * shards and at most k of them are non-zero (ops/encode.py).
    """

    indices: jax.Array  # i32[B, K]
    values: jax.Array  # f32[B, K], >= 0

    def to_dense(self, n_latents: int) -> jax.Array:
        """The same code as f32[..., n_latents], zeros where a latent is not active."""
        lead, n_slots = self.indices.shape[:-1], self.indices.shape[-1]
        check_indices(self.indices, n_latents, "latent", "give n_latents of the dictionary whose code this is")
        rows = jnp.arange(math.prod(lead))[:, None]
        dense = jnp.zeros((math.prod(lead), n_latents), self.values.dtype)
        dense = dense.at[rows, self.indices.reshape(-1, n_slots)].add(self.values.reshape(-1, n_slots))
        return dense.reshape(*lead, n_latents)


def refuse_masked(values: Any, what: str) -> None:
    """UsageError for a masked array: what is under the mask would be taken for values."""
    if isinstance(values, np.ma.MaskedArray):
        raise UsageError(f"{what} are a masked array; leave out the masked rows and give a plain array")


def check_indices(indices: Any, n: int, what: str, cure: str) -> None:
    """UserError naming an index outside 0 to n - 1, where JAX would read another row without a word.

    Args:
        indices: integers of any shape. Those that are being traced have no values yet, and pass: check them before.
        n: rows of the table that they are for.
        what: they are, as in "token id".
        cure: what to do about it.
    """
    if isinstance(indices, jax.core.Tracer):
        return
    values = np.asarray(indices)
    if values.size and values.dtype.kind not in "iu":
        raise UserError(f"{what}s are {values.dtype}; they must be whole numbers from 0 to {n - 1}")
    if values.size and (values.min() < 0 or values.max() >= n):
        outside = values[(values < 0) | (values >= n)]
        raise UserError(f"{what} {outside[0]} is outside 0 to {n - 1}; {cure}")
