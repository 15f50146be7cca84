"""ReLU autoencoder with an L1 penalty and a decoder of unit rows.

    z = ReLU(W_enc (x - b_dec) + b_enc)      x_hat = W_dec^T z + b_dec
    loss = error + l1_coefficient * mean ||z||_1,      ||W_dec row|| = 1

Any number of latents may be active, so the objective runs in tiles (ops/tiled.py). Decoder rows have unit norm, or the
penalty could be evaded by small values and long rows: their gradient is projected before the moments see it, the rows
renormalised after the step.

Resampling: after each of `resample_steps` dead latents start anew in directions that are reconstructed badly,

    W_dec row = v / ||v||      W_enc row = 0.2 * (mean norm of alive rows) * v / ||v||      b_enc = 0      moments = 0

where v = x - b_dec is one of the `resample_inputs` rows before, drawn with a probability that grows with the square of
its squared error.

Source: Bricken et al. 2023, "Towards Monosemanticity". There a latent is resampled if silent for 12,500 steps, here if
dead (`train.dead_after_tokens`); v is x, the loss that is squared counts the penalty too, and the learning rate, if it
had a warm-up, has it again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from sae_jax import mesh
from sae_jax.ops import resample, sparse, tiled, tuning
from sae_jax.saes import base, init, losses, penalty
from sae_jax.saes.base import AbstractSae, Adam, Batch, ClearRows, Context, Counters, Outcome, Updated
from sae_jax.saes.init import Sample
from sae_jax.saes.normalise import Scale
from sae_jax.saes.penalty import L1Config
from sae_jax.types import Code, UsageError

MAX_RESAMPLED = 8192  # latents at a time: as many rows are kept on every device
RESAMPLED_NORM = 0.2  # of an encoder row, among the mean of alive ones


@dataclass(frozen=True)
class Config(L1Config):
    """ReLU with an L1 penalty."""

    variant: Literal["relu"] = "relu"
    ADAM: ClassVar[Adam] = Adam(short_run=1.5)
    resample_steps: tuple[int, ...] = ()
    """numbers of steps after which dead latents are resampled (25k, 50k, 75k and 100k in the paper); none = never"""
    resample_inputs: int = 819_200
    """rows before each of them that new directions are drawn from"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(step < 1 for step in self.resample_steps) or self.resample_inputs < 1:
            raise UsageError(
                f"sae.resample_steps={self.resample_steps} and sae.resample_inputs={self.resample_inputs} must be at "
                f"least 1; leave resample_steps out for none"
            )

    def init(self, key: jax.Array, sample: Sample) -> Relu:
        """Encoder and decoder independent and Kaiming-uniform, decoder rows then of norm 1; bias = geometric median."""
        enc_key, dec_key = jax.random.split(key)
        d_model = sample.median.shape[0]
        return Relu(
            w_enc=math.sqrt(6) * init.linear_rows(enc_key, self.n_latents, d_model),  # U(-sqrt(6/D), sqrt(6/D))
            b_enc=init.zeros((self.n_latents,), mesh.DICT),
            w_dec=init.unit_rows(init.linear_rows(dec_key, self.n_latents, d_model)),
            b_dec=sample.median,
            config=self,
        )

    def initial_counters(self, sample: Sample) -> dict[str, jax.Array]:
        """Rows to resample from, and the logarithms of their keys (ops/resample.py)."""
        counters = super().initial_counters(sample)
        if not self.resample_steps:
            return counters
        n_kept = min(self.n_latents, MAX_RESAMPLED)
        rows_RD = init.zeros((n_kept, sample.median.shape[0]), mesh.REPLICATED)
        return {**counters, "row_keys": init.zeros((n_kept,), mesh.REPLICATED) - jnp.inf, "rows": rows_RD}


class ReluCode(AbstractSae):
    """Encoding and decoding that all ReLU dictionaries of one site share: z = ReLU(W_enc (x - b_pre) + b_enc)."""

    @property
    def b_pre(self) -> jax.Array:
        """What is subtracted from rows before they are encoded, f32[D]."""
        return self.b_dec

    def n_slots(self, x_BX: jax.Array) -> int:
        """See AbstractSae."""
        return min(base.slots_for(n_active(self, x_BX)), self.config.n_latents)

    def encode_rows(self, x_BX: jax.Array, n_slots: int) -> Code:
        """See AbstractSae."""
        dtype = self.config.product_dtype
        return tiled.encode_largest(x_BX, self.w_enc, self.b_pre, self.b_enc, tiled.relu, dtype, n_slots)

    def decode_rows(self, code: Code) -> jax.Array:
        """See AbstractSae."""
        return sparse.decode(code, self.w_dec)[0] + self.b_dec[None]

    def reconstruct_rows(self, x_BX: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See AbstractSae."""
        tiles = self.in_tiles(x_BX, self.w_dec, self.b_pre)
        return tiles.x_hat + self.b_dec[None], tiles.l0

    def in_tiles(self, x_BX: jax.Array, w_dec: jax.Array, b_pre: jax.Array) -> tiled.Tiled:
        """Encode and decode with this decoder, without bias."""
        dtype = self.config.product_dtype
        return tiled.reconstruct(x_BX, self.w_enc, w_dec, b_pre, self.b_enc, tiled.relu, dtype, base.FIRED_ABOVE)


@struct.dataclass(repr=False)
class Relu(ReluCode):
    """A ReLU autoencoder; frozen, so training makes a new one each step."""

    w_enc: jax.Array  # f32[F@(latent,data), D]
    b_enc: jax.Array  # f32[F@(latent,data)]
    w_dec: jax.Array  # f32[F@(latent,data), D], unit rows
    b_dec: jax.Array  # f32[D]
    config: Config = struct.field(pytree_node=False)

    def objective(self, batch: Batch, context: Context) -> tuple[jax.Array, Outcome]:
        """See AbstractSae and the head of this file."""
        n_rows = batch.x.shape[0]
        tiles = self.in_tiles(batch.x, self.w_dec, self.b_dec)
        x_hat_BD = tiles.x_hat + self.b_dec[None]
        l1 = tiles.penalty.sum() / n_rows
        coefficient = penalty.weight(self.config, context, batch.y.shape[1])
        loss = losses.error(self.config.error, batch.y - x_hat_BD) + coefficient * l1
        counters = penalty.led(self.config, context, context.count(tiles.fired, n_rows), tiles.l0)
        if self.config.resample_steps:
            error_B = lax.stop_gradient(((batch.y - x_hat_BD) ** 2).sum(-1))
            counters = replace(counters, extra={**counters.extra, **self._kept_rows(batch.x, error_B, context)})
        return loss, Outcome(x_hat_BD, tiles.l0, counters, {"l1": l1, "coefficient": coefficient})

    def after_step(self, updated: Updated, context: Context, clear_rows: ClearRows) -> Updated:
        """New rows for dead latents when it is time."""
        if not self.config.resample_steps:
            return updated
        is_time = (context.step + 1 == jnp.asarray(self.config.resample_steps, jnp.int32)).any()

        def resampled(updated: Updated) -> Updated:
            return _resampled(updated, context.hparams.dead_after, clear_rows)

        return lax.cond(is_time, resampled, lambda updated: updated, updated)

    def folded(self, scale: Scale) -> Relu:
        """See AbstractSae. Codes are in the units of the rows: for rows c times as large, biases and codes are too."""
        return replace(self, b_enc=self.b_enc / scale.x[0], b_dec=self.b_dec / scale.y)

    def _kept_rows(self, x_BD: jax.Array, error_B: jax.Array, context: Context) -> dict[str, jax.Array]:
        """Rows and keys of `Counters.extra` after a batch, whose rows count if the next resampling is near."""
        n_steps = math.ceil(self.config.resample_inputs / len(x_BD))
        left_E = jnp.asarray(self.config.resample_steps, jnp.int32) - context.step

        def keep(extra):
            keys_R, rows_RD = resample.keep_rows(extra["row_keys"], extra["rows"], x_BD, error_B**2, context.key)
            return {"row_keys": keys_R, "rows": rows_RD}

        is_near = ((left_E > 0) & (left_E <= n_steps)).any()
        kept = {name: context.counters.extra[name] for name in ("row_keys", "rows")}
        return lax.cond(is_near, keep, lambda extra: extra, kept)


def _resampled(updated: Updated, dead_after: jax.Array, clear_rows: ClearRows) -> Updated:
    """Dead latents begun anew, as many as there are rows kept."""
    sae, counters, extra = updated.sae, updated.counters, updated.counters.extra
    dead_F = counters.silent > dead_after
    rank_F = resample.ranks(dead_F)
    chosen_F = dead_F & (rank_F < (extra["row_keys"] > -jnp.inf).sum(dtype=jnp.int32))
    v_RD = init.unit_rows(extra["rows"] - sae.b_dec[None])
    v_FD = v_RD.at[jnp.minimum(rank_F, len(v_RD) - 1)].get(out_sharding=mesh.placed(mesh.DICT))
    norms_F = jnp.where(dead_F, 0.0, jnp.linalg.norm(sae.w_enc, axis=-1))
    norm = norms_F.sum() / jnp.maximum((~dead_F).sum(dtype=jnp.float32), 1.0)

    def begin(w_FD: jax.Array, value: Any) -> jax.Array:
        return jnp.where(chosen_F.reshape(-1, *(1,) * (w_FD.ndim - 1)), value, w_FD)

    return Updated(
        sae=replace(
            sae,
            w_enc=begin(sae.w_enc, RESAMPLED_NORM * norm * v_FD),
            b_enc=begin(sae.b_enc, 0.0),
            w_dec=begin(sae.w_dec, v_FD),
        ),
        optimiser_state=clear_rows(updated.optimiser_state, chosen_F, ("w_enc", "b_enc", "w_dec")),
        counters=Counters(
            silent=begin(counters.silent, 0),
            extra={**extra, "row_keys": jnp.full_like(extra["row_keys"], -jnp.inf)},
        ),
    )


@tuning.jit
def n_active(sae: ReluCode, x_BX: jax.Array) -> jax.Array:
    """Active latents of each row, i32[B]."""
    return tiled.n_active(x_BX, sae.w_enc, sae.b_pre, sae.b_enc, tiled.relu, sae.config.product_dtype)
