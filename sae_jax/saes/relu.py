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
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from sae_jax import mesh
from sae_jax.ops import sparse, tiled
from sae_jax.saes import base, losses
from sae_jax.saes.base import AbstractSae, Batch, Outcome, Sample, Statistics
from sae_jax.types import Code, UsageError


@dataclass(frozen=True)
class Config:
    """ReLU with an L1 penalty."""

    variant: Literal["relu"] = "relu"
    """the file in sae_jax/saes/ that is trained"""
    n_latents: int = 32768
    """width of the dictionary"""
    l1_coefficient: float = 5.0
    """weight of ||z||_1; for the same sparsity it grows with the norm of the activations"""
    l1_convention: Literal["summed"] = "summed"
    """l1_coefficient stands beside the squared error summed over d_model; beside its mean, divide by d_model"""
    input_norm: base.InputNorm = "none"
    """per-vector normalisation applied to inputs and undone on outputs"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """inputs of all products; weights, sums and losses are float32"""

    def __post_init__(self) -> None:
        if not 1 <= self.n_latents < 2**31:
            raise UsageError(f"sae.n_latents={self.n_latents} must be at least 1 and below 2^31: indices are int32")
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

    def encode(self, x: Any) -> Code:
        """See AbstractSae. With an input_norm the values are in normalised units; K is rounded up to a power of two."""

        def encode_rows(x_BD):
            most = int(_n_active(self, x_BD).max(initial=1))
            return _encode_rows(self, x_BD, min(1 << (most - 1).bit_length(), self.config.n_latents))

        return base.on_rows(encode_rows, x, self.b_dec.shape[0])

    def decode(self, code: Code) -> jax.Array:
        """See AbstractSae. With an input_norm the result is in normalised units."""
        return base.on_codes(partial(_decode_rows, self), code)

    def __call__(self, x: Any) -> jax.Array:
        """See AbstractSae."""
        return base.on_rows(partial(_reconstruct_rows, self), x, self.b_dec.shape[0])

    def objective(
        self, batch: Batch, statistics: Statistics, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Outcome]:
        """See AbstractSae and the head of this file."""
        x_BD, mean, scale = base.normalise(batch.x, self.config.input_norm)
        y_BD = (batch.y.astype(jnp.float32) - mean) / scale
        n_rows = x_BD.shape[0]
        tiles = self._reconstruct(x_BD, base.tangent_to_rows(self.w_dec))
        x_hat_BD = tiles.x_hat + self.b_dec[None]
        l1 = tiles.penalty.sum() / n_rows
        loss = losses.squared_error(x_hat_BD - y_BD) + self.config.l1_coefficient * l1
        l0 = tiles.n_active.sum() / n_rows
        return loss, Outcome(x_hat_BD * scale + mean, l0, statistics.after(tiles.fired, n_rows), {"l1": l1})

    def after_step(self, state: Any, key: jax.Array) -> Any:
        """Unit decoder rows again."""
        return replace(state, sae=replace(state.sae, w_dec=base.unit_rows(state.sae.w_dec)))

    def _reconstruct(self, x_BD: jax.Array, w_dec: jax.Array) -> tiled.Tiled:
        dtype = jnp.dtype(self.config.dtype)
        return tiled.reconstruct(x_BD, self.w_enc, w_dec, self.b_dec, self.b_enc, _activation, dtype, base.FIRED_ABOVE)


def _activation(pre_bf: jax.Array, b_enc_f: jax.Array) -> tuple[jax.Array, jax.Array]:
    z_bf = jax.nn.relu(pre_bf + b_enc_f[None])
    return z_bf, z_bf


@jax.jit
def _n_active(sae: Relu, x_BD: jax.Array) -> jax.Array:
    x_BD = base.normalise(x_BD, sae.config.input_norm)[0]
    return tiled.n_active(x_BD, sae.w_enc, sae.b_dec, sae.b_enc, _activation, jnp.dtype(sae.config.dtype))


@partial(jax.jit, static_argnames="k")
def _encode_rows(sae: Relu, x_BD: jax.Array, k: int) -> Code:
    x_BD = base.normalise(x_BD, sae.config.input_norm)[0]
    dtype = jnp.dtype(sae.config.dtype)
    return tiled.encode_largest(x_BD, sae.w_enc, sae.b_dec, sae.b_enc, _activation, dtype, k)


@jax.jit
def _decode_rows(sae: Relu, code: Code) -> jax.Array:
    return sparse.decode(code, sae.w_dec)[0] + sae.b_dec[None]


@jax.jit
def _reconstruct_rows(sae: Relu, x_BD: jax.Array) -> jax.Array:
    normed_BD, mean, scale = base.normalise(x_BD, sae.config.input_norm)
    return (sae._reconstruct(normed_BD, sae.w_dec).x_hat + sae.b_dec[None]) * scale + mean
