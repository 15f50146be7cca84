"""TopK autoencoder with AuxK.

    pre = W_enc (x - b_dec) + b_enc      z = ReLU(keep_k(pre))      x_hat = W_dec^T z + b_dec
    loss = s * mean((x - x_hat)^2) + aux_coefficient * L_aux,       s = 1 / mean((x - mean x)^2) of a first sample

L_aux lets the k_aux strongest dead latents explain the error that the live ones leave, e = sg(x - x_hat), decoded
without bias; with `aux_rows` = sampled on fewer rows the more are dead, unbiased (ours, to bound the price: see
ops/auxk.py). A latent is dead when it has not fired for `train.dead_after_tokens` tokens, this batch counted.
Multi-TopK adds multi_topk * s * mean((x - x_hat')^2), x_hat' from the 4k largest of the same pre-activations, so that
a code stays useful when it is cut at another k.
With k_start, k begins there and falls linearly to its value over k_steps steps; the same program runs throughout.
Decoder rows have unit norm: their gradient is projected before the moments see it, the rows renormalised after.

Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", arXiv 2406.04093, sections 2, 5.3 and A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct

from sae_jax.ops import encode, sparse
from sae_jax.saes import base, jumprelu, losses
from sae_jax.saes.base import AbstractSae, Batch, Context, KConfig, Outcome
from sae_jax.saes.init import Sample
from sae_jax.saes.normalise import Scale
from sae_jax.types import Code, UsageError

MULTI = 4  # Multi-TopK's second reconstruction uses this many times k latents


@dataclass(frozen=True)
class Config(KConfig):
    """TopK with AuxK."""

    variant: Literal["topk"] = "topk"
    multi_topk: float = 0.0
    """weight of a second reconstruction from 4k latents (Multi-TopK; 1/8 in the paper); 0 = none"""
    k_start: int = 0
    """active latents at the first step, if not k"""
    k_steps: int = 0
    """steps over which k_start falls to k"""
    decoder: Literal["transposed", "independent"] = "transposed"
    """how it begins: as the transposed encoder, or at random"""

    BY_PAIRS: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.multi_topk < math.inf:
            raise UsageError(f"sae.multi_topk={self.multi_topk} must be >= 0 and finite; 0 turns Multi-TopK off")
        if self.k_start and not self.k < self.k_start <= self.n_latents:
            raise UsageError(
                f"sae.k_start={self.k_start} must be above sae.k={self.k} and at most sae.n_latents={self.n_latents}; "
                f"0 turns it off"
            )
        if (self.k_start > 0) != (self.k_steps > 0) or self.k_steps < 0:
            raise UsageError(f"sae.k_start={self.k_start} and sae.k_steps={self.k_steps}: give both, or neither")
        if self.k_start and self.multi_topk:
            raise UsageError(
                f"sae.k_start={self.k_start} does not go with sae.multi_topk={self.multi_topk}; choose one"
            )

    def init(self, key: jax.Array, sample: Sample, dtype: Any = jnp.float32) -> TopK:
        """See KConfig.weights. The bias is the geometric median."""
        weights = self.weights(key, sample.median.shape[0], dtype, self.decoder == "transposed")
        return TopK(**weights, b_dec=sample.median, config=self)

    def k_at(self, step: jax.Array) -> jax.Array:
        """Active latents at a step, i32[]."""
        left = jnp.maximum(1 - step.astype(jnp.float32) / self.k_steps, 0)
        return self.k + jnp.round((self.k_start - self.k) * left).astype(jnp.int32)


@struct.dataclass(repr=False)
class TopK(AbstractSae):
    """A TopK autoencoder; frozen, so training makes a new one each step."""

    w_enc: jax.Array  # f32[F@(latent,data), D]; in training perhaps bf16, as w_dec
    b_enc: jax.Array  # f32[F@(latent,data)]
    w_dec: jax.Array  # f32[F@(latent,data), D], unit rows
    b_dec: jax.Array  # f32[D]
    config: Config = struct.field(pytree_node=False)

    def to_jumprelu(self, x: Any, per_latent: bool = False) -> jumprelu.JumpRelu:
        """With thresholds in place of the selection, see `jumprelu.calibrated`: k active latents a row on average."""
        return jumprelu.calibrated(self, x, per_latent)

    def n_slots(self, x_BX: jax.Array) -> int:
        """See AbstractSae."""
        return self.config.k

    @property
    def most_slots(self) -> int:
        """See AbstractSae."""
        return self.config.k

    def encode_rows(self, x_BX: jax.Array, n_slots: int) -> Code:
        """See AbstractSae."""
        return self._encode(x_BX, n_slots)[0]

    def decode_rows(self, code: Code) -> jax.Array:
        """See AbstractSae."""
        return sparse.decode(code, self.w_dec)[0] + self.b_dec[None]

    def reconstruct_rows(self, x_BX: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See AbstractSae."""
        code = self.encode_rows(x_BX, self.config.k)
        return self.decode_rows(code), base.l0(code)

    def objective(self, batch: Batch, context: Context) -> tuple[jax.Array, Outcome]:
        """See AbstractSae and the head of this file."""
        config, k = self.config, self.config.k
        k_now = config.k_at(context.step) if config.k_start else None
        code, w_enc = self._encode(batch.x, k * (MULTI if config.multi_topk else 1), k_now)
        code, multi_code = (encode.narrow(code, k), code) if config.multi_topk else (code, None)
        y_hat_BY, w_dec = self._decode(code, self.w_dec, k)
        loss, metrics = context.constants.loss_scale * ((batch.y - y_hat_BY) ** 2).mean(), {}
        if k_now is not None:
            metrics["k"] = k_now
        if multi_code is not None:
            multi_hat_BY, w_dec = self._decode(multi_code, w_dec)
            metrics["multi_loss"] = context.constants.loss_scale * ((batch.y - multi_hat_BY) ** 2).mean()
            loss = loss + config.multi_topk * metrics["multi_loss"]
        encoder = w_enc, self.b_enc, self.b_dec
        loss, outcome = losses.with_auxk(loss, batch, y_hat_BY, code, encoder, w_dec, config, context)
        return loss, replace(outcome, metrics={**outcome.metrics, **metrics})

    def folded(self, scale: Scale) -> TopK:
        """See AbstractSae. Codes are in the units of the rows: for rows c times as large, biases and codes are too."""
        return replace(self, b_enc=self.b_enc / scale.x[0], b_dec=self.b_dec / scale.y)

    @property
    def _dtype(self) -> jnp.dtype:
        return self.config.product_dtype

    def _encode(self, x_BD: jax.Array, k: int, k_now: jax.Array | None = None) -> tuple[Code, jax.Array]:
        max_k = None if k_now is None else self.config.k_start
        k = min(k, self.config.n_latents)
        return encode.encode_topk(x_BD, self.w_enc, self.b_enc, self.b_dec, k, self._dtype, max_k, k_now)

    def _decode(self, code: Code, w_dec: jax.Array, k: int | None = None) -> tuple[jax.Array, jax.Array]:
        filling = None if k is None else sparse.Filling(k)
        y_hat_BY, w_dec = sparse.decode(code, w_dec, self._dtype, filling)
        return y_hat_BY + self.b_dec[None], w_dec
