"""Tied ReLU autoencoder: the rows of one matrix are both what is looked for and what is written.

    z = ReLU(M (x - centre) + b_enc)      x_hat = M^T z + centre      ||M row|| = 1
    loss = error + l1_coefficient * mean ||z||_1

No output bias is learnt. The centre is the mean of a first sample, which stays, or without `centre` 0. Rows have unit
norm: their gradient is projected before the moments see it, the rows renormalised after the step.

Source: Cunningham et al. 2023, "Sparse autoencoders find highly interpretable features in language models",
arXiv 2309.08600, section 2. There rows are normalised where they are used, there is no centre, and the coefficient is
of the order of 8.6e-4 for residual streams and 3.2e-4 for outputs of MLPs as they are: `--sae.no-centre
--sae.input_norm=none --sae.l1_coefficient=8.6e-4`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from sae_jax import mesh
from sae_jax.saes import init, losses, penalty
from sae_jax.saes.base import Adam, Batch, Context, Outcome
from sae_jax.saes.init import Sample
from sae_jax.saes.normalise import Scale
from sae_jax.saes.penalty import L1Config
from sae_jax.saes.relu import ReluCode

N_ACTIVE_AT_START = 128  # latents of a row, where biases have far to go for fewer: rows cannot shrink


@dataclass(frozen=True)
class Config(L1Config):
    """Tied ReLU with an L1 penalty."""

    variant: Literal["tied"] = "tied"
    sparsity_warmup: float = 0.35
    """share of the run, the first, over which the penalty rises from 0: rows turn before it takes latents away"""
    centre: bool = True
    """subtract the mean of a first sample, and add it to outputs"""
    error: losses.Error = "mean"
    """which squared error the coefficient stands beside, see saes/losses.py"""

    ADAM: ClassVar[Adam] = Adam(lr=1e-3, n_latents=2048, eps=1e-8, short_run=2.2)

    def init(self, key: jax.Array, sample: Sample) -> Tied:
        """Xavier-uniform rows, then of norm 1; biases 0, or such that 128 latents are active if the penalty is led."""
        w_enc = init.unit_rows(init.linear_rows(key, self.n_latents, sample.median.shape[0]))
        b_dec = sample.mean if self.centre else jnp.zeros_like(sample.mean)
        b_enc = init.zeros((self.n_latents,), mesh.DICT)
        if self.is_led:
            b_enc = b_enc + init.biases_for(w_enc, sample, b_dec, N_ACTIVE_AT_START)
        return Tied(w_enc=w_enc, b_enc=b_enc, b_dec=b_dec, config=self)


@struct.dataclass(repr=False)
class Tied(ReluCode):
    """A tied autoencoder; frozen, so training makes a new one each step."""

    w_enc: jax.Array  # f32[F@(latent,data), D], unit rows
    b_enc: jax.Array  # f32[F@(latent,data)]
    b_dec: jax.Array  # f32[D], constant
    config: Config = struct.field(pytree_node=False)

    @property
    def w_dec(self) -> jax.Array:  # pyrefly: ignore[bad-override] (a field of the others)
        """f32[F, D], w_enc."""
        return self.w_enc

    def objective(self, batch: Batch, context: Context) -> tuple[jax.Array, Outcome]:
        """See AbstractSae and the head of this file."""
        n_rows, centre_D = batch.x.shape[0], lax.stop_gradient(self.b_dec)
        tiles = self.in_tiles(batch.x, self.w_enc, centre_D)
        x_hat_BD = tiles.x_hat + centre_D[None]
        l1 = tiles.penalty.sum() / n_rows
        coefficient = penalty.weight(self.config, context, batch.y.shape[1])
        loss = losses.error(self.config.error, batch.y - x_hat_BD) + coefficient * l1
        counters = penalty.led(self.config, context, context.count(tiles.fired, n_rows), tiles.l0)
        return loss, Outcome(x_hat_BD, tiles.l0, counters, {"l1": l1, "coefficient": coefficient})

    @property
    def unit_rows(self) -> tuple[str, ...]:
        """Those of the one matrix."""
        return ("w_enc",)

    def folded(self, scale: Scale) -> Tied:
        """See AbstractSae. Codes are in the units of the rows: for rows c times as large, biases and codes are too."""
        return replace(self, b_enc=self.b_enc / scale.x[0], b_dec=self.b_dec / scale.y)
