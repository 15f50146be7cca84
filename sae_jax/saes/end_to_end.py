"""Autoencoder that is trained through the language model: what counts is what the model makes of its reconstruction.

    pre = W_enc (x - b_dec) + b_enc      x_hat = D^T z + b_dec, D: rows of W_dec scaled to norm 1

    z = ReLU(pre)             loss = KL(p_model || p_substituted) + (l1_coefficient / d_model) ||z||_1
    z = ReLU(keep_k(pre))     loss = KL(p_model || p_substituted)                                        with k > 0

    + downstream / n_later * sum over the n_later later residual layers of ||a_hat - a||^2
    with objective `local`, MSE(x, x_hat) at the site stands in the place of the KL

All are means over tokens, squares summed over d_model but in the MSE. The model is frozen: its activations at one site
are replaced by x_hat, but where the set leaves a position out (special tokens, sinks), which keeps its own and counts
nowhere. W_dec is learnt freely; it is scaled in the forward pass.

It learns from `Batch.model`, a model that continues from the site (lm.ReplacedSite), which it knows by four names:

    keep bool[S, T]   logits f32[S, T, V]   later (f32[S, T, D], ...)   with_rows(rows f32[S * T, X]) -> logits, later

Source: Braun et al. 2024, "Identifying Functionally Important Features with End-to-End Sparse Dictionary Learning",
arXiv 2405.12241, sections 2 and 3. Other than there: b_dec is subtracted first and starts as the geometric median, the
encoder starts as the decoder's transpose, and TopK may take the place of the penalty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct

from sae_jax import mesh
from sae_jax.ops import encode, predictions, sparse, tiled, tuning
from sae_jax.saes import base, init, losses, normalise, penalty
from sae_jax.saes.base import AbstractSae, Adam, Batch, Context, Learns, Outcome
from sae_jax.saes.init import Sample
from sae_jax.saes.normalise import Scale
from sae_jax.saes.penalty import PenaltyConfig
from sae_jax.types import Code, UsageError

BAR, N_BARS = -1e30, 8  # columns of the encoder; several, as widths that are no multiple of 8 are slow on a GPU


@dataclass(frozen=True)
class Config(PenaltyConfig):
    """Trained through the language model, on the token sequences of a set that `sae-jax harvest` made.

    `train.batch_size` counts tokens and is a whole number of sequences.
    """

    variant: Literal["end_to_end"] = "end_to_end"
    objective: Literal["kl", "local"] = "kl"
    """what is kept: the model's predictions, or, for comparison, the activations at the site"""
    k: int = 0
    """active latents a token, without a penalty; 0 = ReLU, as many as the penalty leaves"""
    l1_coefficient: float | None = None
    """lambda: weight of ||z||_1 / d_model where k = 0; None = as heavy as target_l0 needs it"""
    downstream: float = 0.0
    """beta: weight of the squared error in later residual layers"""

    START: ClassVar[float] = 0.1
    ADAM: ClassVar[Adam] = Adam(lr=5e-4, n_latents=46_080, eps=1e-8)
    COEFFICIENTS: ClassVar[tuple[str, ...]] = (*PenaltyConfig.COEFFICIENTS, "downstream")

    def __post_init__(self) -> None:
        super().__post_init__()
        losses.check_penalty(downstream=self.downstream)
        if not 0 <= self.k <= self.n_latents:
            raise UsageError(f"sae.k={self.k} must be between 0, for ReLU, and sae.n_latents={self.n_latents}")
        if self.input_norm in normalise.PER_VECTOR:
            raise UsageError(
                f"sae.input_norm={self.input_norm}: reconstructions are put into the model, so use none or a constant "
                f"of the set (dataset_rms, dataset_sqrt_d)"
            )
        if self.objective == "local" and self.downstream:
            raise UsageError(f"sae.downstream={self.downstream} needs sae.objective=kl; local sees the site alone")

    @property
    def is_led(self) -> bool:
        """See PenaltyConfig."""
        return not self.k and super().is_led

    @property
    def n_active(self) -> int | None:
        """See SaeConfig."""
        return self.k or None

    @property
    def learns(self) -> Learns:
        """See SaeConfig."""
        return "through_layers" if self.downstream else "through_logits"

    def init(self, key: jax.Array, sample: Sample) -> EndToEnd:
        """Decoder semi-orthogonal, encoder its transpose scaled to reconstruct, bias = geometric median.

        The encoder is divided by r, the mean norm of the reconstruction of random unit vectors around the bias.
        """
        dec_key, probe_key = jax.random.split(key)
        w_dec = orthogonal_rows(dec_key, self.n_latents, sample.median.shape[0])
        sae = EndToEnd(
            w_enc=init.unit_rows(w_dec),
            b_enc=init.zeros((self.n_latents,), mesh.DICT),
            w_dec=w_dec,
            b_dec=sample.median,
            config=self,
        )
        n_devices = mesh.axis_size(mesh.AXES)
        shape = (math.ceil(base.N_PROBES / n_devices) * n_devices, sample.median.shape[0])
        probes_PD = init.unit_rows(jax.random.normal(probe_key, shape, out_sharding=mesh.placed(mesh.ROWS)))
        hat_PD = sae.reconstruct_rows(probes_PD + sae.b_dec[None])[0] - sae.b_dec[None]
        r = jnp.linalg.norm(hat_PD, axis=-1).mean()
        return replace(sae, w_enc=sae.w_enc / jnp.where(r > 0, r, 1.0))


@struct.dataclass(repr=False)
class EndToEnd(AbstractSae):
    """An autoencoder trained through the model; frozen, so training makes a new one each step."""

    w_enc: jax.Array  # f32[F@(latent,data), D]
    b_enc: jax.Array  # f32[F@(latent,data)]
    w_dec: jax.Array  # f32[F@(latent,data), D], of any norm; what decodes has unit rows
    b_dec: jax.Array  # f32[D]
    config: Config = struct.field(pytree_node=False)

    def n_slots(self, x_BX: jax.Array) -> int:
        """See AbstractSae."""
        return self.config.k or min(base.slots_for(_n_active(self, x_BX)), self.config.n_latents)

    @property
    def most_slots(self) -> int:
        """See AbstractSae."""
        return self.config.k or self.config.n_latents

    def encode_rows(self, x_BX: jax.Array, n_slots: int) -> Code:
        """See AbstractSae."""
        if self.config.k:
            return encode.encode_topk(x_BX, self.w_enc, self.b_enc, self.b_dec, n_slots, self._dtype)[0]
        return tiled.encode_largest(x_BX, self.w_enc, self.b_dec, self.b_enc, tiled.relu, self._dtype, n_slots)

    def decode_rows(self, code: Code) -> jax.Array:
        """See AbstractSae."""
        return sparse.decode(code, init.unit_rows(self.w_dec))[0] + self.b_dec[None]

    def reconstruct_rows(self, x_BX: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See AbstractSae."""
        tiles = self._pass(x_BX, self.w_enc, self.b_dec)
        return tiles.x_hat + self.b_dec[None], tiles.l0

    def objective(self, batch: Batch, context: Context) -> tuple[jax.Array, Outcome]:
        """See AbstractSae and the head of this file."""
        model, y_BD = batch.model, batch.y.astype(jnp.float32)
        weight_ST = model.keep.astype(jnp.float32)
        weight_B1 = mesh.reshape(weight_ST, -1)[:, None]
        n_kept = jnp.maximum(weight_ST.sum(), 1.0)

        # Rows that are left out get a column that bars every latent, so that they are in no count and no gradient.
        barred_BC = jnp.broadcast_to(1 - weight_B1, (len(y_BD), N_BARS))
        x_BC = jnp.concatenate([batch.x.astype(jnp.float32), barred_BC], axis=1)
        w_enc_FC = jnp.pad(self.w_enc, ((0, 0), (0, N_BARS)), constant_values=BAR)
        tiles = self._pass(x_BC, w_enc_FC, jnp.pad(self.b_dec, (0, N_BARS)))
        y_hat_BD = tiles.x_hat + self.b_dec[None]

        metrics = {}
        if self.config.objective == "local":
            loss = metrics["mse"] = (weight_B1 * (y_BD - y_hat_BD) ** 2).sum() / (n_kept * y_BD.shape[1])
        else:
            logits_STV, later = model.with_rows(y_hat_BD / context.constants.scale.y[None])
            loss = metrics["kl"] = (weight_ST * predictions.kl_divergence(model.logits, logits_STV)).sum() / n_kept
            if self.config.downstream:
                errors = [((a - b) ** 2).sum(-1) for a, b in zip(later, model.later, strict=True)]
                metrics["downstream"] = (weight_ST * sum(errors)).sum() / (n_kept * len(errors))
                loss = loss + context.coefficient("downstream") * metrics["downstream"]
        if not self.config.k:
            metrics["l1"] = tiles.penalty.sum() / n_kept
            metrics["coefficient"] = penalty.weight(self.config, context, y_BD.shape[1])
            loss = loss + metrics["coefficient"] / y_BD.shape[1] * metrics["l1"]

        # The mean in the place of rows that are left out: they then add nothing to variance or error.
        mean_1D = (weight_B1 * y_BD).sum(0, keepdims=True) / n_kept
        kept = [jnp.where(weight_B1 > 0, rows_BD, mean_1D) for rows_BD in (y_hat_BD, y_BD)]
        l0 = tiles.n_active.sum() / n_kept
        counters = penalty.led(self.config, context, context.count(tiles.fired, len(y_BD)), l0)
        return loss, Outcome(kept[0], l0, counters, metrics, y=kept[1])

    @property
    def unit_rows(self) -> tuple[str, ...]:
        """None: rows are scaled in the forward pass."""
        return ()

    def folded(self, scale: Scale) -> EndToEnd:
        """See AbstractSae. Codes are in the units of the rows: for rows c times as large, biases and codes are too."""
        w_dec = init.unit_rows(self.w_dec)
        return replace(self, w_dec=w_dec, b_enc=self.b_enc / scale.x[0], b_dec=self.b_dec / scale.y)

    @property
    def _dtype(self) -> jnp.dtype:
        return self.config.product_dtype

    def _pass(self, x_BC: jax.Array, w_enc_FC: jax.Array, b_pre_C: jax.Array) -> tiled.Tiled:
        """Encode and decode, without bias; with a k the penalty is 0."""
        w_dec = init.unit_rows(self.w_dec)
        if not self.config.k:
            return tiled.reconstruct(
                x_BC, w_enc_FC, w_dec, b_pre_C, self.b_enc, tiled.relu, self._dtype, base.FIRED_ABOVE
            )
        code, _ = encode.encode_topk(x_BC, w_enc_FC, self.b_enc, b_pre_C, self.config.k, self._dtype)
        return tiled.Tiled(
            x_hat=sparse.decode(code, w_dec, self._dtype)[0],
            penalty=jnp.float32(0),
            n_active=(code.values > 0).sum(dtype=jnp.float32),
            fired=sparse.fired(code, self.config.n_latents, base.FIRED_ABOVE),
        )


def orthogonal_rows(key: jax.Array, n_latents: int, d_model: int) -> jax.Array:
    """f32[F, D], DICT: uniform over matrices with W^T W = 1, or W W^T = 1 where there are fewer latents than D."""
    w_FD = jax.random.normal(key, (n_latents, d_model), out_sharding=mesh.placed(mesh.DICT))
    product = {"precision": encode.EXACT}
    gram_DD = jnp.einsum("fd,fe->de", w_FD, w_FD, out_sharding=mesh.placed(mesh.REPLICATED), **product)
    values_D, vectors_DD = jnp.linalg.eigh(gram_DD)
    factors_D = jnp.where(values_D > 1e-5 * values_D[-1], jax.lax.rsqrt(values_D), 0.0)
    return jnp.einsum("fd,de->fe", w_FD, (vectors_DD * factors_D[None]) @ vectors_DD.T, **product)


@tuning.jit
def _n_active(sae: EndToEnd, x_BX: jax.Array) -> jax.Array:
    return tiled.n_active(x_BX, sae.w_enc, sae.b_dec, sae.b_enc, tiled.relu, sae.config.product_dtype)
