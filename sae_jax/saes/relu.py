"""ReLU autoencoder with an L1 penalty and a decoder of unit rows.

    z = ReLU(W_enc (x - b_dec) + b_enc)      x_hat = W_dec^T z + b_dec
    loss = mean ||x - x_hat||^2 + l1_coefficient * mean ||z||_1,      ||W_dec row|| = 1

Squared errors are summed over d_model and averaged over rows. Any number of latents may be active, so the objective
runs in tiles (ops/tiled.py). Decoder rows have unit norm, or the penalty could be evaded by small values and long
rows: their gradient is projected before the moments see it, the rows renormalised after the step.

Source: Bricken et al. 2023, "Towards Monosemanticity". Left out: resampling of dead latents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from sae_jax import mesh
from sae_jax.ops import sparse, tiled
from sae_jax.saes import base, losses
from sae_jax.saes.base import AbstractSae, Batch, Outcome, SaeConfig, Sample, Scale, Statistics
from sae_jax.types import Code, UsageError


@dataclass(frozen=True)
class Config(SaeConfig):
    """ReLU with an L1 penalty."""

    variant: Literal["relu"] = "relu"
    l1_coefficient: float = 5.0
    """weight of ||z||_1; for the same sparsity it grows with the norm of the activations"""
    l1_convention: Literal["summed"] = "summed"
    """l1_coefficient stands beside the squared error summed over d_model; beside its mean, divide by d_model"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.l1_coefficient < math.inf:
            raise UsageError(f"sae.l1_coefficient={self.l1_coefficient} must be >= 0 and finite; 0 turns it off")

    def init(self, key: jax.Array, sample: Sample) -> Relu:
        """Encoder and decoder independent and Kaiming-uniform, decoder rows then of norm 1; bias = geometric median."""
        enc_key, dec_key = jax.random.split(key)
        d_model = sample.median.shape[0]
        return Relu(
            w_enc=math.sqrt(6) * base.linear_rows(enc_key, self.n_latents, d_model),  # U(-sqrt(6/D), sqrt(6/D))
            b_enc=base.zeros((self.n_latents,), mesh.DICT),
            w_dec=base.unit_rows(base.linear_rows(dec_key, self.n_latents, d_model)),
            b_dec=sample.median,
            config=self,
        )


@struct.dataclass
class Relu(AbstractSae):
    """A ReLU autoencoder; frozen, so training makes a new one each step."""

    w_enc: jax.Array  # f32[F@(latent,data), D]
    b_enc: jax.Array  # f32[F@(latent,data)]
    w_dec: jax.Array  # f32[F@(latent,data), D], unit rows
    b_dec: jax.Array  # f32[D]
    config: Config = struct.field(pytree_node=False)

    def n_slots(self, x_BX: jax.Array) -> int:
        """See AbstractSae."""
        return min(base.slots_for(_n_active(self, x_BX)), self.config.n_latents)

    def encode_rows(self, x_BX: jax.Array, n_slots: int) -> Code:
        """See AbstractSae."""
        dtype = jnp.dtype(self.config.dtype)
        return tiled.encode_largest(x_BX, self.w_enc, self.b_dec, self.b_enc, _activation, dtype, n_slots)

    def decode_rows(self, code: Code) -> jax.Array:
        """See AbstractSae."""
        return sparse.decode(code, self.w_dec)[0] + self.b_dec[None]

    def reconstruct_rows(self, x_BX: jax.Array) -> jax.Array:
        """See AbstractSae."""
        return self._reconstruct(x_BX, self.w_dec).x_hat + self.b_dec[None]

    def objective(
        self, batch: Batch, statistics: Statistics, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Outcome]:
        """See AbstractSae and the head of this file."""
        n_rows = batch.x.shape[0]
        tiles = self._reconstruct(batch.x, base.tangent_to_rows(self.w_dec))
        x_hat_BD = tiles.x_hat + self.b_dec[None]
        l1 = tiles.penalty.sum() / n_rows
        loss = losses.squared_error(batch.y - x_hat_BD) + self.config.l1_coefficient * l1
        l0 = tiles.n_active.sum() / n_rows
        return loss, Outcome(x_hat_BD, l0, statistics.after(tiles.fired, n_rows), {"l1": l1})

    def after_step(self, state: Any, key: jax.Array) -> Any:
        """Unit decoder rows again."""
        return replace(state, sae=replace(state.sae, w_dec=base.unit_rows(state.sae.w_dec)))

    def folded(self, scale: Scale) -> Relu:
        """See AbstractSae. Codes are in the units of the rows: for rows c times as large, biases and codes are too."""
        return replace(self, b_enc=self.b_enc / scale.x[0], b_dec=self.b_dec / scale.y)

    def _reconstruct(self, x_BD: jax.Array, w_dec: jax.Array) -> tiled.Tiled:
        dtype = jnp.dtype(self.config.dtype)
        return tiled.reconstruct(x_BD, self.w_enc, w_dec, self.b_dec, self.b_enc, _activation, dtype, base.FIRED_ABOVE)


def _activation(pre_bf: jax.Array, b_enc_f: jax.Array) -> tuple[jax.Array, jax.Array]:
    z_bf = jax.nn.relu(pre_bf + b_enc_f[None])
    return z_bf, z_bf


@jax.jit
def _n_active(sae: Relu, x_BX: jax.Array) -> jax.Array:
    return tiled.n_active(x_BX, sae.w_enc, sae.b_dec, sae.b_enc, _activation, jnp.dtype(sae.config.dtype))
