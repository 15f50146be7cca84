"""The words every module shares: the axis key, sparse codes, and the errors a user can cause.

Axis key, used as a suffix of local names (`pre_BF`, `x_hat_BD`):

    B rows (token activations)   T positions       D d_model        F n_latents
    K active latents k           S sites           V vocabulary
"""

from __future__ import annotations

import jax
from flax import struct

from sae_jax.errors import UsageError, UserError

__all__ = ["Code", "UsageError", "UserError"]


@struct.dataclass
class Code:
    """Sparse latents of a batch: for each row, which latents are active and how strongly.

    A public code has K = k slots a row in descending order of value. A slot that no latent won has value 0;
    its index is still a valid latent, so gathers never need a guard. While a step runs on a mesh each latent
    shard keeps its own k slots, so that K = k * shards and at most k of them are non-zero (ops/encode.py).
    """

    indices: jax.Array  # i32[B, K]
    values: jax.Array  # f32[B, K], >= 0
