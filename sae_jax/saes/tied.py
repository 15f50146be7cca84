"""Tied ReLU autoencoder: the rows of one matrix are both what is looked for and what is written.

    z = ReLU(M (x - centre) + b_enc)      x_hat = M^T z + centre      ||M row|| = 1
    loss = error + l1_coefficient * mean ||z||_1

No output bias is learnt. The centre is 0, or with `centre` the mean of a first sample, which stays. Rows have unit
norm: their gradient is projected before the moments see it, the rows renormalised after the step.

Source: Cunningham et al. 2023, "Sparse autoencoders find highly interpretable features in language models",
arXiv 2309.08600, section 2. There rows are normalised where they are used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from sae_jax import mesh
from sae_jax.ops import sparse, tiled
from sae_jax.saes import base, losses
from sae_jax.saes.base import AbstractSae, Adam, Batch, Outcome, SaeConfig, Sample, Scale, Statistics
from sae_jax.types import Code


@dataclass(frozen=True)
class Config(SaeConfig):
    """Tied ReLU with an L1 penalty."""

    variant: Literal["tied"] = "tied"
    l1_coefficient: float = 8.6e-4
    """weight of ||z||_1; of the order of 8.6e-4 for residual streams, 3.2e-4 for outputs of MLPs in the paper"""
    sparsity_warmup_steps: int = 0
    """first steps, over which that weight rises linearly from 0"""
    centre: bool = False
    """subtract the mean of a first sample, and add it to outputs"""
    error: losses.Error = "mean"
    """which squared error the coefficient stands beside, see saes/losses.py"""

    ADAM: ClassVar[Adam] = Adam(lr=1e-3, eps=1e-8)
    DATA: ClassVar[tuple[str, ...]] = ("l1_coefficient",)

    def __post_init__(self) -> None:
        super().__post_init__()
        losses.check_penalty(l1_coefficient=self.l1_coefficient, sparsity_warmup_steps=self.sparsity_warmup_steps)

    def init(self, key: jax.Array, sample: Sample) -> Tied:
        """Xavier-uniform rows, then of norm 1; biases 0."""
        return Tied(
            w_enc=base.unit_rows(base.linear_rows(key, self.n_latents, sample.median.shape[0])),
            b_enc=base.zeros((self.n_latents,), mesh.DICT),
            b_dec=sample.mean if self.centre else jnp.zeros_like(sample.mean),
            config=self,
        )


@struct.dataclass
class Tied(AbstractSae):
    """A tied autoencoder; frozen, so training makes a new one each step."""

    w_enc: jax.Array  # f32[F@(latent,data), D], unit rows
    b_enc: jax.Array  # f32[F@(latent,data)]
    b_dec: jax.Array  # f32[D], constant
    config: Config = struct.field(pytree_node=False)

    @property
    def w_dec(self) -> jax.Array:  # pyrefly: ignore[bad-override] (a field of the others)
        """f32[F, D], w_enc."""
        return self.w_enc

    def n_slots(self, x_BX: jax.Array) -> int:
        """See AbstractSae."""
        return min(base.slots_for(_n_active(self, x_BX)), self.config.n_latents)

    def encode_rows(self, x_BX: jax.Array, n_slots: int) -> Code:
        """See AbstractSae."""
        return tiled.encode_largest(x_BX, self.w_enc, self.b_dec, self.b_enc, _activation, self._dtype, n_slots)

    def decode_rows(self, code: Code) -> jax.Array:
        """See AbstractSae."""
        return sparse.decode(code, self.w_enc)[0] + self.b_dec[None]

    def reconstruct_rows(self, x_BX: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See AbstractSae."""
        tiles = self._reconstruct(x_BX, self.w_enc, self.b_dec)
        return tiles.x_hat + self.b_dec[None], tiles.l0

    def objective(
        self, batch: Batch, statistics: Statistics, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Outcome]:
        """See AbstractSae and the head of this file."""
        n_rows, centre_D = batch.x.shape[0], lax.stop_gradient(self.b_dec)
        tiles = self._reconstruct(batch.x, base.tangent_to_rows(self.w_enc), centre_D)
        x_hat_BD = tiles.x_hat + centre_D[None]
        l1 = tiles.penalty.sum() / n_rows
        coefficient = losses.warmed(statistics.coefficients["l1_coefficient"], step, self.config.sparsity_warmup_steps)
        loss = losses.error(self.config.error, batch.y - x_hat_BD) + coefficient * l1
        return loss, Outcome(x_hat_BD, tiles.l0, statistics.after(tiles.fired, n_rows), {"l1": l1})

    def after_step(self, state: Any, key: jax.Array) -> Any:
        """Unit rows again."""
        return replace(state, sae=replace(state.sae, w_enc=base.unit_rows(state.sae.w_enc)))

    def folded(self, scale: Scale) -> Tied:
        """See AbstractSae. Codes are in the units of the rows: for rows c times as large, biases and codes are too."""
        return replace(self, b_enc=self.b_enc / scale.x[0], b_dec=self.b_dec / scale.y)

    @property
    def _dtype(self) -> jnp.dtype:
        return jnp.dtype(self.config.dtype)

    def _reconstruct(self, x_BD: jax.Array, m_FD: jax.Array, centre_D: jax.Array) -> tiled.Tiled:
        weights = (m_FD, m_FD, centre_D, self.b_enc)
        return tiled.reconstruct(x_BD, *weights, _activation, self._dtype, base.FIRED_ABOVE)


def _activation(pre_bf: jax.Array, b_enc_f: jax.Array) -> tuple[jax.Array, jax.Array]:
    z_bf = jax.nn.relu(pre_bf + b_enc_f[None])
    return z_bf, z_bf


@jax.jit
def _n_active(sae: Tied, x_BX: jax.Array) -> jax.Array:
    return tiled.n_active(x_BX, sae.w_enc, sae.b_dec, sae.b_enc, _activation, sae._dtype)
