"""Gated autoencoder: whether a latent is active and how strongly are decided apart, so that L1 shrinks nothing.

    pi_gate = W_enc (x - b_dec) + b_gate      pi_size = exp(log_gain) * W_enc (x - b_dec) + b_enc
    z = 1[pi_gate > 0] * ReLU(pi_size)        x_hat = W_dec^T z + b_dec
    loss = error(x_hat) + l1_coefficient * mean ||ReLU(pi_gate)||_1 + error(sg(W_dec)^T ReLU(pi_gate) + sg(b_dec))

A gate has no gradient: it learns from the last two terms alone, and these teach no decoder (sg stops gradients). Both
reconstructions come from one product with the encoder. Decoder rows have unit norm. As the two pre-activations of a
latent are lines in the same product, it is a JumpReLU in pi_size with theta = b_enc - exp(log_gain) * b_gate: see
`to_jumprelu`.

Source: Rajamanoharan et al. 2024, "Improving dictionary learning with gated sparse autoencoders", arXiv 2404.16014,
section 3 and appendix H. A step costs up to half as much again as one of `relu`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from sae_jax import mesh
from sae_jax.ops import sparse, tiled, tuning
from sae_jax.saes import base, init, jumprelu, losses, penalty
from sae_jax.saes.base import AbstractSae, Adam, Batch, Context, Outcome
from sae_jax.saes.init import Sample
from sae_jax.saes.normalise import Scale
from sae_jax.saes.penalty import L1Config
from sae_jax.types import Code


@dataclass(frozen=True)
class Config(L1Config):
    """Gated."""

    variant: Literal["gated"] = "gated"

    START: ClassVar[float] = 0.85
    ADAM: ClassVar[Adam] = Adam(lr=3e-4, n_latents=2**17, beta1=0.0, eps=1e-8, short_run=1.5)

    def init(self, key: jax.Array, sample: Sample) -> Gated:
        """Encoder = transposed decoder of uniform rows, of norm 1; b_dec = geometric median; all else 0."""
        w_dec = init.unit_rows(init.linear_rows(key, self.n_latents, sample.median.shape[0]))
        return Gated(
            w_enc=w_dec,
            b_enc=init.zeros((self.n_latents,), mesh.DICT),
            b_gate=init.zeros((self.n_latents,), mesh.DICT),
            log_gain=init.zeros((self.n_latents,), mesh.DICT),
            w_dec=w_dec,
            b_dec=sample.median,
            config=self,
        )


@struct.dataclass(repr=False)
class Gated(AbstractSae):
    """A gated autoencoder; frozen, so training makes a new one each step."""

    w_enc: jax.Array  # f32[F@(latent,data), D], of the gate; exp(log_gain) times it gives the size
    b_enc: jax.Array  # f32[F@(latent,data)], of the size
    b_gate: jax.Array  # f32[F@(latent,data)]
    log_gain: jax.Array  # f32[F@(latent,data)]
    w_dec: jax.Array  # f32[F@(latent,data), D], unit rows
    b_dec: jax.Array  # f32[D]
    config: Config = struct.field(pytree_node=False)

    def n_slots(self, x_BX: jax.Array) -> int:
        """See AbstractSae."""
        return min(base.slots_for(_n_active(self, x_BX)), self.config.n_latents)

    def encode_rows(self, x_BX: jax.Array, n_slots: int) -> Code:
        """See AbstractSae."""
        return tiled.encode_largest(x_BX, self.w_enc, self.b_dec, self._latents, _activation, self._dtype, n_slots)

    def decode_rows(self, code: Code) -> jax.Array:
        """See AbstractSae."""
        return sparse.decode(code, self.w_dec)[0] + self.b_dec[None]

    def reconstruct_rows(self, x_BX: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See AbstractSae."""
        tiles = self._reconstruct(x_BX, self.w_dec, _activation)
        return tiles.x_hat + self.b_dec[None], tiles.l0

    def objective(self, batch: Batch, context: Context) -> tuple[jax.Array, Outcome]:
        """See AbstractSae and the head of this file."""
        config, n_rows = self.config, batch.x.shape[0]
        decoders = self.w_dec, lax.stop_gradient(self.w_dec)
        tiles = self._reconstruct(batch.x, decoders, _both)
        x_hat_BD, gate_hat_BD = tiles.x_hat
        x_hat_BD = x_hat_BD + self.b_dec[None]
        gate_error = losses.error(config.error, batch.y - gate_hat_BD - lax.stop_gradient(self.b_dec)[None])
        l1 = tiles.penalty.sum() / n_rows
        coefficient = penalty.weight(config, context, batch.y.shape[1])
        loss = losses.error(config.error, batch.y - x_hat_BD) + coefficient * l1 + gate_error
        counters = penalty.led(config, context, context.count(tiles.fired, n_rows), tiles.l0)
        metrics = {"l1": l1, "gate_error": gate_error, "coefficient": coefficient}
        return loss, Outcome(x_hat_BD, tiles.l0, counters, metrics)

    def folded(self, scale: Scale) -> Gated:
        """See AbstractSae. Codes are in the units of the rows: for rows c times as large, biases and codes are too."""
        factor = scale.x[0]
        return replace(self, b_enc=self.b_enc / factor, b_gate=self.b_gate / factor, b_dec=self.b_dec / scale.y)

    def to_jumprelu(self) -> jumprelu.JumpRelu:
        """The same function as a JumpReLU. A threshold that is not above 0 leaves a ReLU."""
        config = self.config
        gain_F = jnp.exp(self.log_gain)
        threshold_F = jnp.maximum(self.b_enc - gain_F * self.b_gate, jnp.finfo(jnp.float32).tiny)
        return jumprelu.JumpRelu(
            w_enc=gain_F[:, None] * self.w_enc,
            b_enc=self.b_enc,
            w_dec=self.w_dec,
            b_dec=self.b_dec,
            log_threshold=jnp.log(threshold_F),
            config=jumprelu.Config(
                n_latents=config.n_latents,
                input_norm=config.input_norm,
                dtype=config.dtype,
                pre_bias=True,
                l0_coefficient=0.0,
            ),
        )

    @property
    def _dtype(self) -> jnp.dtype:
        return self.config.product_dtype

    @property
    def _latents(self) -> dict[str, jax.Array]:
        return {"b_enc": self.b_enc, "b_gate": self.b_gate, "gain": jnp.exp(self.log_gain)}

    def _reconstruct(self, x_BD: jax.Array, w_dec: Any, activation: tiled.Activation) -> tiled.Tiled:
        weights = (self.w_enc, w_dec, self.b_dec, self._latents)
        return tiled.reconstruct(x_BD, *weights, activation, self._dtype, base.FIRED_ABOVE)


def _both(pre_bf: jax.Array, latents: Any) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """z and ReLU(pi_gate), which is the penalty too."""
    gate_bf = pre_bf + latents["b_gate"][None]
    size_bf = latents["gain"][None] * pre_bf + latents["b_enc"][None]
    z_bf = jnp.where(gate_bf > 0, jax.nn.relu(size_bf), 0.0)
    return (z_bf, jax.nn.relu(gate_bf)), jax.nn.relu(gate_bf)


def _activation(pre_bf: jax.Array, latents: Any) -> tuple[jax.Array, jax.Array]:
    """z alone."""
    (z_bf, _), penalty_bf = _both(pre_bf, latents)
    return z_bf, penalty_bf


@tuning.jit
def _n_active(sae: Gated, x_BX: jax.Array) -> jax.Array:
    return tiled.n_active(x_BX, sae.w_enc, sae.b_dec, sae._latents, _activation, sae._dtype)
