"""BatchTopK autoencoder: B*k latents are active in a batch of B rows, each row as many as it needs.

    pre = W_enc (x - b_dec) + b_enc      z = keep_{B k}(ReLU(pre))      x_hat = W_dec^T z + b_dec
    loss = s * mean((x - x_hat)^2) + aux_coefficient * L_aux            s, L_aux, unit rows: saes/topk.py

The B*k largest positive entries of the whole batch are kept, over all devices. A row on its own has no batch, so a
dictionary that is used takes a threshold for the selection, z = pre * 1[pre > threshold]: the running mean of the
smallest value kept, plain over the first 1 / (1 - threshold_decay) steps, exponential after. Before the first step it
is 0, and every positive latent is active.

A row of many active latents may need more than its list of candidates on a latent shard: 4k on one shard, towards k on
many. Such lists are counted (`widened` in the log) and their rows searched again with lists four times as long;
`saturated` counts those that were too short even so, whose rows lost latents to others.

Source: Bussmann et al. 2024, "BatchTopK sparse autoencoders", arXiv 2412.06410. There the threshold is the mean over
batches after training; implementations keep a running one of decay 0.999, which lags behind a threshold that falls as
weights learn: after the demo's 1,500 steps it left 14.0 of 16 latents active on held-out text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, cast

import jax
import jax.numpy as jnp
from flax import struct

from sae_jax import mesh
from sae_jax.ops import encode, sparse
from sae_jax.ops.topk import BatchSelection
from sae_jax.saes import jumprelu, losses
from sae_jax.saes.base import AbstractSae, Adam, Batch, Context, KConfig, Outcome
from sae_jax.saes.init import Sample
from sae_jax.saes.normalise import Scale
from sae_jax.types import Code, UsageError


@dataclass(frozen=True)
class ThresholdConfig(KConfig):
    """What dictionaries that select over a batch have to be told."""

    threshold_decay: float = 0.98
    """of the running mean of the smallest value kept; over more batches it is the threshold of earlier weights"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold_decay < 1:
            raise UsageError(f"sae.threshold_decay={self.threshold_decay} must be in [0, 1); 0 keeps the last batch's")


@dataclass(frozen=True)
class Config(ThresholdConfig):
    """BatchTopK with AuxK."""

    variant: Literal["batch_topk"] = "batch_topk"

    ADAM: ClassVar[Adam] = Adam(lr=3e-4, beta2=0.99, eps=1e-8)
    BY_PAIRS: ClassVar[bool] = True

    def init(self, key: jax.Array, sample: Sample, dtype: Any = jnp.float32) -> BatchTopK:
        """See KConfig.weights."""
        weights = self.weights(key, sample.median.shape[0], dtype)
        return BatchTopK(**weights, b_dec=sample.median, threshold=jnp.zeros(()), config=self)


class Thresholded(AbstractSae):
    """Dictionaries that select over a batch; a row by itself sees a JumpReLU with one threshold for all latents."""

    threshold: jax.Array  # f32[], not learnt but set

    def to_jumprelu(self) -> jumprelu.JumpRelu:
        """The dictionary that a row by itself sees."""
        return jumprelu.with_threshold(self, self.threshold)

    def n_slots(self, x_BX: jax.Array) -> int:
        """See AbstractSae."""
        return self.to_jumprelu().n_slots(x_BX)

    def encode_rows(self, x_BX: jax.Array, n_slots: int) -> Code:
        """See AbstractSae."""
        return self.to_jumprelu().encode_rows(x_BX, n_slots)

    def decode_rows(self, code: Code) -> jax.Array:
        """See AbstractSae."""
        return self.to_jumprelu().decode_rows(code)

    def reconstruct_rows(self, x_BX: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See AbstractSae."""
        return self.to_jumprelu().reconstruct_rows(x_BX)

    def folded(self, scale: Scale) -> Self:
        """See AbstractSae. For rows c times as large, biases, codes and the threshold are too."""
        c, sae = scale.x[0], cast(Any, self)  # a struct, as all that inherit from this
        return replace(sae, b_enc=self.b_enc / c, b_dec=self.b_dec / scale.y, threshold=self.threshold / c)


@struct.dataclass(repr=False)
class BatchTopK(Thresholded):
    """A BatchTopK autoencoder; frozen, so training makes a new one each step."""

    w_enc: jax.Array  # f32[F@(latent,data), D]
    b_enc: jax.Array  # f32[F@(latent,data)]
    w_dec: jax.Array  # f32[F@(latent,data), D], unit rows
    b_dec: jax.Array  # f32[D]
    threshold: jax.Array  # f32[], not learnt but set
    config: Config = struct.field(pytree_node=False)

    def objective(self, batch: Batch, context: Context) -> tuple[jax.Array, Outcome]:
        """See AbstractSae and the head of this file."""
        config = self.config
        code, w_enc, selection = select(self, batch.x, self.b_dec)
        y_hat_BY, w_dec = sparse.decode(code, self.w_dec, config.product_dtype, filling(batch.x, config.k))
        y_hat_BY = y_hat_BY + self.b_dec[None]
        loss = context.constants.loss_scale * ((batch.y - y_hat_BY) ** 2).mean()
        encoder = w_enc, self.b_enc, self.b_dec
        loss, outcome = losses.with_auxk(loss, batch, y_hat_BY, code, encoder, w_dec, config, context)
        return loss, with_threshold(outcome, self.threshold, selection, context.step, config)


def filling(x_BX: jax.Array, k: int) -> sparse.Filling:
    """Of a code that `select` makes."""
    return sparse.Filling(k, len(x_BX) * k)


def select(sae: Any, x_BX: jax.Array, b_pre: jax.Array) -> tuple[Code, jax.Array, BatchSelection]:
    """The code of a batch, see `encode.encode_batch_topk`; `sae` has the weights, and k and dtype in its config."""
    k, n_latents, dtype = sae.config.k, sae.config.n_latents, sae.config.product_dtype
    # The more shards, the fewer of a row's winners on each; k leaves room for latents that fire together.
    width = min(k + -(-3 * k // mesh.axis_size(mesh.LATENT)), n_latents)
    return encode.encode_batch_topk(x_BX, sae.w_enc, sae.b_enc, b_pre, k, dtype, width, min(4 * width, n_latents))


def with_threshold(
    outcome: Outcome, threshold: jax.Array, selection: BatchSelection, step: jax.Array, config: ThresholdConfig
) -> Outcome:
    """An outcome with the threshold after a batch's selection, and the selection's counts as metrics."""
    weight = jnp.maximum(1 / (step + 1).astype(jnp.float32), 1 - config.threshold_decay)
    threshold = threshold + weight * (selection.threshold - threshold)
    metrics = {"threshold": threshold, "widened": selection.n_widened, "saturated": selection.n_saturated}
    assigned = {**outcome.assigned, "threshold": jax.lax.stop_gradient(threshold)}
    return replace(outcome, metrics={**outcome.metrics, **metrics}, assigned=assigned)
