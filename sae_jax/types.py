"""The words every module shares: the axis key, sparse codes, and the errors a user can cause.

Axis key, used as a suffix of local names (`pre_BF`, `x_hat_BD`):

    B rows (token activations)   T positions       D d_model        F n_latents
    K active latents k           S sites           V vocabulary
    X width of what is encoded   Y width of what is reconstructed    (both d_model, for an autoencoder of one site)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import jax
from flax import struct

from sae_jax.errors import UsageError, UserError

__all__ = ["Code", "Sites", "UsageError", "UserError", "Widths"]

T = TypeVar("T")


class Sides(NamedTuple, Generic[T]):
    """What stands side by side in the rows that are encoded, and in those that are reconstructed."""

    x: tuple[T, ...]
    y: tuple[T, ...]

    @classmethod
    def one(cls, own: T) -> Sides[T]:
        """Of an autoencoder of one source."""
        return cls((own,), (own,))

    @classmethod
    def of(cls, sides: Mapping[str, Any]) -> Sides[Any]:
        """From JSON: {"x": [...], "y": [...]}."""
        return cls(tuple(sides["x"]), tuple(sides["y"]))

    def to_json(self) -> dict[str, list[T]]:
        """What `of` reads."""
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
