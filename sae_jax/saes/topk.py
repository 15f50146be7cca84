"""TopK autoencoder with AuxK.

    pre = W_enc (x - b_dec) + b_enc      z = ReLU(keep_k(pre))      x_hat = W_dec^T z + b_dec
    loss = s * mean((x - x_hat)^2) + aux_coefficient * L_aux,       s = 1 / mean((x - mean x)^2) of a first sample

L_aux lets the k_aux strongest dead latents explain the error that the live ones leave, e = sg(x - x_hat), decoded
without bias. A latent is dead when it has not fired for `train.dead_after_tokens` tokens, this batch counted.
Multi-TopK adds multi_topk * s * mean((x - x_hat')^2), x_hat' from the 4k largest of the same pre-activations, so that
a code stays useful when it is cut at another k.
Decoder rows have unit norm: their gradient is projected before the moments see it, the rows renormalised after.

Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", arXiv 2406.04093, sections 2, 5.3 and A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from sae_jax import mesh
from sae_jax.ops import encode, explain, sparse
from sae_jax.saes import base, losses
from sae_jax.saes.base import AbstractSae, Batch, Outcome, SaeConfig, Sample, Scale, Statistics
from sae_jax.types import Code, UsageError

N_PROBES = 256  # random unit vectors that set the encoder's scale
MULTI = 4  # Multi-TopK's second reconstruction uses this many times k latents


@dataclass(frozen=True)
class Config(SaeConfig):
    """TopK with AuxK."""

    variant: Literal["topk"] = "topk"
    k: int = 32
    """active latents a token"""
    aux_coefficient: float = 1 / 32
    """weight of the AuxK loss; 0 turns it off"""
    k_aux: int = 0
    """dead latents that explain the error; 0 = the power of two nearest d_model / 2"""
    multi_topk: float = 0.0
    """weight of a second reconstruction from 4k latents (Multi-TopK; 1/8 in the paper); 0 = none"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.k <= self.n_latents:
            raise UsageError(f"sae.k={self.k} must be between 1 and sae.n_latents={self.n_latents}")
        for name, what in (("aux_coefficient", "AuxK"), ("multi_topk", "Multi-TopK")):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"sae.{name}={getattr(self, name)} must be >= 0 and finite; 0 turns {what} off")
        if self.k_aux < 0:
            raise UsageError(f"sae.k_aux={self.k_aux} must be >= 0")

    def init(self, key: jax.Array, sample: Sample) -> TopK:
        """Decoder = transposed encoder with unit rows, bias = geometric median, encoder scaled to reconstruct.

        The encoder is divided by r, the mean norm of the reconstruction of random unit vectors around the bias.
        """
        d_model = sample.median.shape[0]
        w_enc = base.linear_rows(key, self.n_latents, d_model)
        sae = TopK(
            w_enc=w_enc,
            b_enc=base.zeros((self.n_latents,), mesh.DICT),
            w_dec=base.unit_rows(w_enc),
            b_dec=sample.median,
            config=self,
        )
        r = _response(sae, jax.random.fold_in(key, 1))
        return replace(sae, w_enc=w_enc / jnp.where(r > 0, r, 1.0))


@struct.dataclass
class TopK(AbstractSae):
    """A TopK autoencoder; frozen, so training makes a new one each step."""

    w_enc: jax.Array  # f32[F@(latent,data), D]
    b_enc: jax.Array  # f32[F@(latent,data)]
    w_dec: jax.Array  # f32[F@(latent,data), D], unit rows
    b_dec: jax.Array  # f32[D]
    config: Config = struct.field(pytree_node=False)

    def n_slots(self, x_BX: jax.Array) -> int:
        """See AbstractSae."""
        return self.config.k

    def encode_rows(self, x_BX: jax.Array, n_slots: int) -> Code:
        """See AbstractSae."""
        return self._encode(x_BX, n_slots)[0]

    def decode_rows(self, code: Code) -> jax.Array:
        """See AbstractSae."""
        return self._decode(code, self.w_dec)[0]

    def reconstruct_rows(self, x_BX: jax.Array) -> jax.Array:
        """See AbstractSae."""
        return self.decode_rows(self.encode_rows(x_BX, self.config.k))

    def objective(
        self, batch: Batch, statistics: Statistics, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Outcome]:
        """See AbstractSae and the head of this file."""
        x_BD, y_BD = batch.x, batch.y
        wide, w_enc = self._encode(x_BD, self.config.k * (MULTI if self.config.multi_topk else 1))
        code = encode.narrow(wide, self.config.k) if self.config.multi_topk else wide
        x_hat_BD, w_dec = self._decode(code, self.w_dec, tangent=True)
        loss = statistics.loss_scale * ((y_BD - x_hat_BD) ** 2).mean()
        # Counters before AuxK: a latent that fires in this very batch is not dead.
        fired_F = sparse.fired(code, self.config.n_latents, base.FIRED_ABOVE)
        statistics = statistics.after(fired_F, batch.x.shape[0])
        metrics = {}
        if self.config.multi_topk:
            wide_hat_BD, w_dec = self._decode(wide, w_dec, tangent=True)
            metrics["multi_loss"] = statistics.loss_scale * ((y_BD - wide_hat_BD) ** 2).mean()
            loss = loss + self.config.multi_topk * metrics["multi_loss"]
        if self.config.aux_coefficient:
            error_BD = lax.stop_gradient(y_BD - x_hat_BD)
            k_aux = self.config.k_aux or 2 ** round(math.log2(max(batch.x.shape[1] / 2, 1)))
            left = explain.unexplained(
                x_BD, error_BD, w_enc, self.b_enc, self.b_dec, w_dec, statistics.dead, k_aux, self._dtype, tangent=True
            )
            metrics["aux_loss"] = losses.auxiliary_ratio(error_BD, left)
            loss = loss + self.config.aux_coefficient * metrics["aux_loss"]
        l0 = (code.values > 0).sum(-1).mean(dtype=jnp.float32)
        return loss, Outcome(x_hat_BD, l0, statistics, metrics)

    def after_step(self, state: Any, key: jax.Array) -> Any:
        """Unit decoder rows again."""
        return replace(state, sae=replace(state.sae, w_dec=base.unit_rows(state.sae.w_dec)))

    def folded(self, scale: Scale) -> TopK:
        """See AbstractSae. Codes are in the units of the rows: for rows c times as large, biases and codes are too."""
        return replace(self, b_enc=self.b_enc / scale.x[0], b_dec=self.b_dec / scale.y)

    @property
    def _dtype(self) -> jnp.dtype:
        return jnp.dtype(self.config.dtype)

    def _encode(self, x_BD: jax.Array, k: int) -> tuple[Code, jax.Array]:
        k = min(k, self.config.n_latents)
        return encode.encode_topk(x_BD, self.w_enc, self.b_enc, self.b_dec, k, self._dtype)

    def _decode(self, code: Code, w_dec: jax.Array, tangent: bool = False) -> tuple[jax.Array, jax.Array]:
        x_hat_BD, w_dec = sparse.decode(code, w_dec, self._dtype, tangent)
        return x_hat_BD + self.b_dec[None], w_dec


def _response(sae: TopK, key: jax.Array) -> jax.Array:
    """Mean norm of the reconstruction, less the bias, of random unit vectors around the bias."""
    d_model = sae.b_dec.shape[0]
    n_devices = mesh.axis_size(mesh.AXES)
    shape = (math.ceil(N_PROBES / n_devices) * n_devices, d_model)
    probes_PD = jax.random.normal(key, shape, out_sharding=mesh.placed(mesh.ROWS))
    code, w_dec = sae._encode(base.unit_rows(probes_PD) + sae.b_dec[None], sae.config.k)[0], sae.w_dec
    return jnp.linalg.norm(sparse.decode(code, w_dec)[0], axis=-1).mean()
