"""Crosscoder: one code for several sources, layers or models; a latent has an encoder and a decoder row for each.

    pre = sum_l W_enc^l x^l + b_enc      y_hat^m = W_dec^m^T f + b_dec^m
    relu          f = ReLU(pre)          loss = error + l1_coefficient * mean sum_i f_i ||d_i||
    batch_topk    f = keep_{B k}(ReLU(pre)), ranked by f_i ||d_i||
                                         loss = s * mean((y - y_hat)^2) + aux_coefficient * L_aux    (batch_topk.py)
    jumprelu      f = pre * 1[pre > theta]     not trained here: of crosscoders that others made and `import` read

    ||d_i||    sum_m ||d_i^m||, d_i^m row i of W_dec^m: what it costs to write to several sources is what it costs to
               have a latent for each; or sqrt(sum_m ||d_i^m||^2), which favours latents that many sources share

Nothing but a penalty cares how long d_i is, if f_i is as much shorter: with batch_topk ||d_i|| is kept at 1, so that
latents rank by f_i alone.

The squared error is summed over all sources. Where y are other sources than x, it is a cross-layer transcoder.

Masks: sources stand in the order of layers, and latents are cut into as many groups, one after the other. Latents of
group g, with `weakly_causal`, read source g and write g and later ones; `strictly_causal`, read g and write later ones
(there is no last group); with `window`, read and write sources at most `window` places from g. What a mask bars is 0
from the start, and its gradient is: no mask is stored, none is multiplied with weights.

Sources: Lindsey et al. 2024, "Sparse crosscoders for cross-layer features and model diffing"; batch_topk: Minder et al.
2025, arXiv 2504.02922, there with rows of any length. Ours: b_dec starts at the mean of y.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from sae_jax import mesh
from sae_jax.ops import sparse, tiled
from sae_jax.saes import base, batch_topk, init, jumprelu, losses, normalise, penalty
from sae_jax.saes.base import AbstractSae, Adam, Batch, Context, Outcome
from sae_jax.saes.init import Sample
from sae_jax.saes.normalise import Scale
from sae_jax.saes.penalty import L1Config
from sae_jax.types import Code, UsageError, Widths

NO_NORM = 1e-12  # of a decoder that a mask bars; the derivative of a norm of 0 would not be finite


@dataclass(frozen=True)
class Config(batch_topk.ThresholdConfig, L1Config):
    """Crosscoder; k, AuxK and the threshold are for batch_topk, the penalty and initial_norm for relu."""

    variant: Literal["crosscoder"] = "crosscoder"
    activation: Literal["relu", "batch_topk", "jumprelu"] = "relu"
    """which latents are active: all positive ones, which then are penalised, or the strongest of a batch; jumprelu,
    those above thresholds of their own, is not trained"""
    decoder_norm: Literal["sum", "root"] = "sum"
    """||d_i|| over sources: the sum of their norms, or the root of the sum of squares"""
    mask: Literal["acausal", "weakly_causal", "strictly_causal", "window"] = "acausal"
    """which sources a latent may read and write"""
    window: int = 1
    """places to either side that mask=window leaves open"""
    initial_norm: float = 0.08
    """of a decoder row of one source at the start; lower it for very wide dictionaries"""

    ADAM: ClassVar[Adam] = Adam(lr=5e-5, n_latents=2**17, eps=1e-8)
    UNIT_DECODER: ClassVar[bool] = False  # rows of several sources

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.input_norm in normalise.PER_VECTOR:
            raise UsageError(
                f"sae.input_norm={self.input_norm} would mix the sources of a row; use dataset_sqrt_d, dataset_rms or "
                f"none"
            )
        if self.window < 0:
            raise UsageError(f"sae.window={self.window} must be >= 0; 0 lets latents read and write one source alone")
        if not 0 < self.initial_norm < math.inf:
            raise UsageError(f"sae.initial_norm={self.initial_norm} must be above 0 and finite, such as 0.08")

    @property
    def is_led(self) -> bool:
        """See L1Config."""
        return self.activation == "relu" and super().is_led

    @property
    def n_active(self) -> int | None:
        """See SaeConfig."""
        return self.k if self.activation == "batch_topk" else None

    def init(self, key: jax.Array, sample: Sample) -> Crosscoder:
        """Decoder rows in random directions, of one length; the encoder transposed, or independent if y is not x.

        With batch_topk the encoder is as long as makes a row along one latent's directions come out as it went in.
        """
        dec_key, enc_key = jax.random.split(key)
        widths = sample.widths
        rows_FY = _unit_parts(init.linear_rows(dec_key, self.n_latents, sum(widths.y)), widths.y)
        rows_FX = rows_FY
        if not sample.same:
            rows_FX = _unit_parts(init.linear_rows(enc_key, self.n_latents, sum(widths.x)), widths.x)
        w_enc, w_dec = _masked(self, widths.x, _reads, rows_FX), _masked(self, widths.y, _writes, rows_FY)
        enc_scale = dec_scale = self.initial_norm
        if self.activation == "batch_topk":
            norm_F1 = row_norms(w_dec, widths.y, self.decoder_norm)[:, None]
            enc_scale, dec_scale = norm_F1 / row_norms(w_enc, widths.x, "sum")[:, None], 1 / norm_F1
        return Crosscoder(
            w_enc=enc_scale * w_enc,
            b_enc=init.zeros((self.n_latents,), mesh.DICT),
            w_dec=dec_scale * w_dec,
            b_dec=sample.mean,
            threshold=jnp.zeros(()),
            config=self,
            widths=widths,
            log_threshold=init.zeros((self.n_latents,), mesh.DICT) if self.activation == "jumprelu" else None,
        )

    def check(self, widths: Widths, same: bool) -> None:
        """Masks need sources that stand in pairs, and latents for each group; thresholds are not learnt."""
        if self.activation == "jumprelu":
            raise UsageError(
                "sae.activation=jumprelu is of imported crosscoders alone; train one with relu or batch_topk"
            )
        penalty.check_target(self)
        if self.mask == "acausal":
            return
        n_x, n_y = len(widths.x), len(widths.y)
        if n_x != n_y or n_x < 2:
            raise UsageError(
                f"sae.mask={self.mask} needs at least two sources, and as many that are reconstructed as are encoded, "
                f"not {n_x} and {n_y}; use sae.mask=acausal"
            )
        if self.n_latents < n_x:
            raise UsageError(f"sae.n_latents={self.n_latents} must be at least the number of sources, {n_x}")


@struct.dataclass(repr=False)
class Crosscoder(AbstractSae):
    """A crosscoder; frozen, so training makes a new one each step."""

    w_enc: jax.Array  # f32[F@(latent,data), X]
    b_enc: jax.Array  # f32[F@(latent,data)]
    w_dec: jax.Array  # f32[F@(latent,data), Y]
    b_dec: jax.Array  # f32[Y]
    threshold: jax.Array  # f32[], not learnt but set; 0 but for batch_topk
    config: Config = struct.field(pytree_node=False)
    widths: Widths = struct.field(pytree_node=False)
    log_threshold: jax.Array | None = None  # f32[F@(latent,data)], with jumprelu

    def n_slots(self, x_BX: jax.Array) -> int:
        """See AbstractSae."""
        return self._jumprelu.n_slots(x_BX)

    def encode_rows(self, x_BX: jax.Array, n_slots: int) -> Code:
        """See AbstractSae."""
        return self._jumprelu.encode_rows(x_BX, n_slots)

    def decode_rows(self, code: Code) -> jax.Array:
        """See AbstractSae."""
        return self._jumprelu.decode_rows(code)

    def reconstruct_rows(self, x_BX: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See AbstractSae."""
        return self._jumprelu.reconstruct_rows(x_BX)

    def objective(self, batch: Batch, context: Context) -> tuple[jax.Array, Outcome]:
        """See AbstractSae and the head of this file."""
        config, n_rows = self.config, batch.x.shape[0]
        w_enc = _learnable(self.w_enc, lambda g_FX, _: _masked(config, self.widths.x, _reads, g_FX))
        w_dec = _learnable(self.w_dec, self._project)
        if config.activation == "batch_topk":
            code, w_enc, selection = batch_topk.select(replace(self, w_enc=w_enc), batch.x, self._no_pre_bias)
            filling = batch_topk.filling(batch.x, config.k)
            y_hat_BY, w_dec = sparse.decode(code, w_dec, self._dtype, filling)
            y_hat_BY = y_hat_BY + self.b_dec[None]
            loss = context.constants.loss_scale * ((batch.y - y_hat_BY) ** 2).mean()
            encoder = w_enc, self.b_enc, self._no_pre_bias
            loss, outcome = losses.with_auxk(loss, batch, y_hat_BY, code, encoder, w_dec, config, context)
            return loss, batch_topk.with_threshold(outcome, self.threshold, selection, context.step, config)
        latents = {"b_enc": self.b_enc, "norm": row_norms(w_dec, self.widths.y, config.decoder_norm)}
        tiles = tiled.reconstruct(
            batch.x, w_enc, w_dec, self._no_pre_bias, latents, _relu, self._dtype, base.FIRED_ABOVE
        )
        y_hat_BY, l1 = tiles.x_hat + self.b_dec[None], tiles.penalty.sum() / n_rows
        coefficient = penalty.weight(config, context, batch.y.shape[1] // len(self.widths.y))
        loss = losses.error(config.error, batch.y - y_hat_BY) + coefficient * l1
        counters = penalty.led(config, context, context.count(tiles.fired, n_rows), tiles.l0)
        return loss, Outcome(y_hat_BY, tiles.l0, counters, {"l1": l1, "coefficient": coefficient})

    @property
    def unit_rows(self) -> tuple[str, ...]:
        """None of the whole array: see `constrained`."""
        return ()

    def constrained(self) -> Crosscoder:
        """With batch_topk ||d_i|| = 1."""
        if self.config.activation != "batch_topk":
            return self
        norm_F = row_norms(self.w_dec, self.widths.y, self.config.decoder_norm)
        return replace(self, w_dec=self.w_dec / norm_F[:, None])

    def folded(self, scale: Scale) -> Crosscoder:
        """See AbstractSae. A code says how much f_i ||d_i|| was in scaled rows, so latents can be compared."""
        norm_F = row_norms(self.w_dec, self.widths.y, self.config.decoder_norm)
        return replace(
            self,
            w_enc=self.w_enc * norm_F[:, None] * scale.x[None],
            b_enc=self.b_enc * norm_F,
            w_dec=self.w_dec / norm_F[:, None] / scale.y[None],
            b_dec=self.b_dec / scale.y,
            log_threshold=None if self.log_threshold is None else self.log_threshold + jnp.log(norm_F),
        )

    def unfolded(self, scale: Scale) -> Crosscoder:
        """See AbstractSae. Sources have scales of their own, so rows of one length leave with several."""
        return replace(
            self,
            w_enc=self.w_enc / scale.x[None],
            w_dec=self.w_dec * scale.y[None],
            b_dec=self.b_dec * scale.y,
        )

    @property
    def row_lengths(self) -> jax.Array | None:
        """See AbstractSae."""
        is_kept = self.config.activation == "batch_topk"
        return row_norms(self.w_dec, self.widths.y, self.config.decoder_norm) if is_kept else None

    @property
    def _jumprelu(self) -> jumprelu.JumpRelu:
        # Only rows whose length is kept go with one threshold for all.
        threshold = self.threshold if self.config.activation == "batch_topk" else jnp.zeros(())
        if self.log_threshold is not None:
            threshold = jnp.exp(self.log_threshold)
        return jumprelu.with_threshold(self, threshold, pre_bias=False)

    @property
    def _no_pre_bias(self) -> jax.Array:
        return jnp.zeros(self.w_enc.shape[1])

    @property
    def _dtype(self) -> jnp.dtype:
        return self.config.product_dtype

    def _project(self, g_FY: jax.Array, w_FY: jax.Array) -> jax.Array:
        """The decoder's gradient: nothing where a mask bars, nor along rows whose length is kept."""
        g_FY = _masked(self.config, self.widths.y, _writes, g_FY)
        if self.config.activation == "relu":
            return g_FY
        along_F1 = (g_FY * w_FY).sum(-1, keepdims=True) / (w_FY**2).sum(-1, keepdims=True)
        return g_FY - along_F1 * w_FY


def source_norms(w_dec: jax.Array, widths: Sequence[int]) -> jax.Array:
    """Norm of each decoder row in each source: [F, Y] -> f32[F, S], above 0."""
    squares_FS = jnp.stack([(part_FD**2).sum(-1) for part_FD in _parts(w_dec, widths)], axis=-1)
    return jnp.sqrt(jnp.maximum(squares_FS, NO_NORM**2))


def row_norms(w_dec: jax.Array, widths: Sequence[int], kind: Literal["sum", "root"]) -> jax.Array:
    """||d_i|| over sources, f32[F]: see the head of this file."""
    norms_FS = source_norms(w_dec, widths)
    return norms_FS.sum(-1) if kind == "sum" else jnp.sqrt((norms_FS**2).sum(-1))


def _parts(w_FY: jax.Array, widths: Sequence[int]) -> list[jax.Array]:
    return [w_FY[:, end - width : end] for end, width in zip(np.cumsum(widths), widths, strict=True)]


def _unit_parts(w_FY: jax.Array, widths: Sequence[int]) -> jax.Array:
    """Rows of norm 1 in each source."""
    return jnp.concatenate([init.unit_rows(part_FD) for part_FD in _parts(w_FY, widths)], axis=1)


def _reads(config: Config, distance: jax.Array) -> jax.Array:
    """Whether a latent reads a source that stands `distance` places after that of its group."""
    return abs(distance) <= config.window if config.mask == "window" else distance == 0


def _writes(config: Config, distance: jax.Array) -> jax.Array:
    if config.mask == "window":
        return abs(distance) <= config.window
    return distance > 0 if config.mask == "strictly_causal" else distance >= 0


def _masked(config: Config, widths: Sequence[int], allows: Callable[..., jax.Array], w_FY: jax.Array) -> jax.Array:
    """`w_FY` with zeros where the mask bars a latent from a source."""
    if config.mask == "acausal":
        return w_FY
    n_groups = len(widths) - (config.mask == "strictly_causal")
    latent_FY = lax.broadcasted_iota(jnp.int32, w_FY.shape, 0, out_sharding=mesh.placed(mesh.DICT))
    group_FY = jnp.minimum(latent_FY // (config.n_latents // n_groups), n_groups - 1)
    source_Y = np.repeat(np.arange(len(widths), dtype=np.int32), widths)
    return jnp.where(allows(config, source_Y[None] - group_FY), w_FY, 0.0)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _learnable(w_FY: jax.Array, project: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """The identity, with the gradient `project(gradient, w)`."""
    return w_FY


_learnable.defvjp(lambda w_FY, project: (w_FY, w_FY), lambda project, w_FY, g_FY: (project(g_FY, w_FY),))


def _relu(pre_bf: jax.Array, latents: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    f_bf = jax.nn.relu(pre_bf + latents["b_enc"][None])
    return f_bf, f_bf * latents["norm"][None]
