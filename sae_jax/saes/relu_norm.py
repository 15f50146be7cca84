"""ReLU autoencoder with an L1 penalty weighted by the norms of decoder rows, which are free.

    z = ReLU(W_enc x + b_enc)      x_hat = W_dec^T z + b_dec
    loss = error + l1_coefficient * mean sum_i z_i ||d_i||,      d_i: row i of W_dec

Long rows cost as much as large values, so no constraint on them is needed. What a latent contributes is z_i ||d_i||,
and `folded` moves the norms into the encoder: codes that users see are these, and decoder rows have norm 1.

Source: Conerly et al. 2024, "Circuits Updates - April 2024", its update on training: the coefficient 5 for rows of mean
squared norm d, which rises over the first 5 % of the steps, and a rate that falls to 0 over the last 20 %, as here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct

from sae_jax import mesh
from sae_jax.saes import init, losses, penalty
from sae_jax.saes.base import Adam, Batch, Context, Outcome
from sae_jax.saes.init import Sample
from sae_jax.saes.normalise import Scale
from sae_jax.saes.penalty import L1Config
from sae_jax.saes.relu import ReluCode

ROW_NORM = 0.1  # of decoder rows at the start


@dataclass(frozen=True)
class Config(L1Config):
    """ReLU with an L1 penalty weighted by decoder norms."""

    variant: Literal["relu_norm"] = "relu_norm"

    ADAM: ClassVar[Adam] = Adam(lr=5e-5, n_latents=2**17, eps=1e-8, short_run=1.5)

    def init(self, key: jax.Array, sample: Sample) -> ReluNorm:
        """Decoder rows in random directions and of norm 0.1, encoder = transposed decoder.

        b_dec = geometric median, b_enc: see `init.centring`; in the source both are 0.
        """
        shape = (self.n_latents, sample.median.shape[0])
        directions = jax.random.normal(key, shape, out_sharding=mesh.placed(mesh.DICT))
        w_dec = ROW_NORM * init.unit_rows(directions)
        return ReluNorm(
            w_enc=w_dec,
            b_enc=init.centring(w_dec, sample.median),
            w_dec=w_dec,
            b_dec=sample.median,
            config=self,
        )


@struct.dataclass(repr=False)
class ReluNorm(ReluCode):
    """A ReLU autoencoder with free decoder norms; frozen, so training makes a new one each step."""

    w_enc: jax.Array  # f32[F@(latent,data), D]
    b_enc: jax.Array  # f32[F@(latent,data)]
    w_dec: jax.Array  # f32[F@(latent,data), D]
    b_dec: jax.Array  # f32[D]
    config: Config = struct.field(pytree_node=False)

    @property
    def b_pre(self) -> jax.Array:
        """See ReluCode."""
        return jnp.zeros(self.w_enc.shape[1])

    def objective(self, batch: Batch, context: Context) -> tuple[jax.Array, Outcome]:
        """See AbstractSae and the head of this file."""
        n_rows = batch.x.shape[0]
        tiles = self.in_tiles(batch.x, self.w_dec, self.b_pre)
        x_hat_BD = tiles.x_hat + self.b_dec[None]
        l1 = (tiles.penalty * jnp.linalg.norm(self.w_dec, axis=-1)).sum() / n_rows
        coefficient = penalty.weight(self.config, context, batch.y.shape[1])
        loss = losses.error(self.config.error, batch.y - x_hat_BD) + coefficient * l1
        counters = penalty.led(self.config, context, context.count(tiles.fired, n_rows), tiles.l0)
        return loss, Outcome(x_hat_BD, tiles.l0, counters, {"l1": l1, "coefficient": coefficient})

    @property
    def unit_rows(self) -> tuple[str, ...]:
        """None: the penalty counts their norms."""
        return ()

    def folded(self, scale: Scale) -> ReluNorm:
        """See AbstractSae. For rows c times as large, biases and codes are too; decoder rows have norm 1."""
        norm_F = init.row_norms(self.w_dec)
        return replace(
            self,
            w_enc=self.w_enc * norm_F[:, None],
            b_enc=self.b_enc * norm_F / scale.x[0],
            w_dec=self.w_dec / norm_F[:, None],
            b_dec=self.b_dec / scale.y,
        )
