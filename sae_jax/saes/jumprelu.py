"""JumpReLU autoencoder: a latent is silent below a threshold of its own, which is learnt.

    pi = W_enc x + b_enc      z = pi * H(pi - theta)      x_hat = W_dec^T z + b_dec      theta = exp(log_threshold) > 0
    loss = error + l0_coefficient * sparsity

    sparsity   sum_i p_i                      p_i: share of the rows of a batch in which latent i is active
               sum_i p_i (1 + p_i / s)        with frequency_scale s: latents that are always active cost more
               (sum_i p_i / L0* - 1)^2        penalty "squared", with target_l0 L0*
               mean sum_i tanh(c z_i ||d_i||) penalty "tanh": p_i is the mean of this smooth count, d_i a decoder row

If no l0_coefficient is given, the square weighs d_model / 4, and that of another penalty is led (penalty.py).

H has no gradient, so the backward pass estimates that of its mean over a batch from the rows near the threshold, with
K(u) = 1[|u| < 1/2] and bandwidth eps:

    dz/dpi = H      dz/dtheta = -(theta / eps) K((pi - theta) / eps)      dH/dtheta = -(1 / eps) K((pi - theta) / eps)

and dH/dpi = 0: the count moves thresholds alone. With the tanh the count is a function of z and reaches every weight,
and latents that a row does not reach are raised by preactivation_coefficient * sum_i ReLU(theta_i - pi_i) ||d_i||.
Decoder rows have unit norm, or with the tanh any norm, which `folded` moves into the code.

Once few latents are active a batch is a sparse code, whose gradients touch active latents alone. The estimate for
thresholds is what needs dense products: of every pre-activation near its threshold, which with a wide window is nearly
all. It is made of every eighth row, counted from one drawn at each step, times eight. A batch in which a row has more
than 16 target_l0 active latents, or the average over 2 (target_l0 rounded up to a power of two), goes through dense
tiles instead (`tiled` in the log); so does every batch with the tanh, of a dictionary with few latents, or if
`threshold_rows` says all.

Sources: Rajamanoharan et al. 2024, arXiv 2407.14435, sections 3 and 4, appendix B; the tanh: Conerly et al. 2025,
"Circuits Updates - January 2025". There biases start from quantiles of a sample, here from those of a normal
distribution with its mean and variance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from sae_jax import mesh
from sae_jax.ops import encode, sparse, spmd, tiled, tuning
from sae_jax.saes import base, init, losses, normalise, penalty
from sae_jax.saes.base import AbstractSae, Adam, Batch, Context, Outcome
from sae_jax.saes.init import Sample
from sae_jax.saes.normalise import Scale
from sae_jax.saes.penalty import PenaltyConfig
from sae_jax.types import Code, UsageError

STEEPNESS = 4.0  # c of the tanh
SQUARED = 0.25  # weight of the square, for each dimension
N_ACTIVE_AT_START = 10_000  # over all latents a row, as far as the tanh's biases can tell
CANDIDATES, WIDEST, MOST = 4, 4, 2  # times `usual`: of a row; times these, of a long row; active in a row on average
SPARSE_FROM = 64  # latents for each that is usual: with fewer, dense products take no longer
STRIDE = 8  # of the rows that move thresholds
ROWS = 1  # folded into a step's key: other uses of it are others' draws


@dataclass(frozen=True)
class Config(PenaltyConfig):
    """JumpReLU.

    Thresholds move by at most a factor of exp(train.lr) a step, so they begin near the values that are looked for.
    The authors, for runs of a million steps: `--sae.input_norm=dataset_rms --sae.initial_threshold=1e-3
    --sae.bandwidth=1e-3`. The tanh's: `--sae.penalty=tanh --sae.bandwidth=2 --sae.initial_threshold=0.1
    --sae.sparsity_warmup=1 --train.decay=0.2`.
    """

    variant: Literal["jumprelu"] = "jumprelu"
    l0_coefficient: float | None = None
    """weight of the sparsity; None = d_model / 4 if squared, else as heavy as target_l0 needs it"""
    penalty: Literal["l0", "squared", "tanh"] = "squared"
    """what counts: active latents, by how much they miss target_l0, or a smooth number of them"""
    frequency_scale: float | None = None
    """share of rows above which an active latent costs more; None = all cost the same"""
    preactivation_coefficient: float = 3e-6
    """with the tanh: weight of how far rows stay below the thresholds"""
    initial_threshold: float = 0.5
    bandwidth: float = 2.0
    """width of the window around a threshold whose rows say where it should go"""
    pre_bias: bool = False
    """subtract b_dec before encoding"""
    error: losses.Error = "summed"
    """which squared error the coefficients stand beside, see saes/losses.py"""
    threshold_rows: Literal["sampled", "all"] = "sampled"
    """rows whose errors move thresholds: every eighth, counted from one drawn each step; all: up to five times the
    work. With fewer than 64 latents for each of target_l0 it is always all"""

    ADAM: ClassVar[Adam] = Adam(lr=7e-5, n_latents=2**17, beta1=0.0, eps=1e-8)
    COEFFICIENT: ClassVar[str] = "l0_coefficient"
    START: ClassVar[float] = 0.1
    COEFFICIENTS: ClassVar[tuple[str, ...]] = ("l0_coefficient", "target_l0", "preactivation_coefficient")

    def __post_init__(self) -> None:
        super().__post_init__()
        losses.check_penalty(preactivation_coefficient=self.preactivation_coefficient)
        for name in ("initial_threshold", "bandwidth", "frequency_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"sae.{name}={value} must be above 0 and finite")
        if self.penalty == "squared" and self.frequency_scale is not None:
            raise UsageError(
                f"sae.frequency_scale={self.frequency_scale} is for numbers of latents; use sae.penalty=l0 or tanh"
            )

    @property
    def is_led(self) -> bool:
        """See penalty.py. The square leads itself: it pushes thresholds down, too."""
        return self.penalty != "squared" and super().is_led

    @property
    def usual(self) -> int:
        """Active latents a row that codes are made for: target_l0, rounded up to a power of two, so that targets in
        between share a program."""
        return 2 ** max(0, math.ceil(math.log2(self.target_l0)))

    @property
    def program(self) -> Self:
        """See SaeConfig."""
        return replace(super().program, target_l0=float(self.usual))

    @property
    def may_be_sparse(self) -> bool:
        """Whether a batch with few active latents is learnt from as a sparse code."""
        is_estimated = self.penalty != "tanh" and self.threshold_rows == "sampled"
        return is_estimated and SPARSE_FROM * self.usual <= self.n_latents

    def sparsity(self, share_F: jax.Array, target_l0: jax.Array) -> jax.Array:
        """Of p_i, f32[F], DICT; see the head of this file."""
        if self.penalty == "squared":
            return (share_F.sum() / target_l0 - 1) ** 2
        if self.frequency_scale is not None:
            return (share_F * (1 + share_F / self.frequency_scale)).sum()
        return share_F.sum()

    def start(self, width: int, target_l0: jax.Array) -> jax.Array:
        """See penalty.py."""
        share = SQUARED if self.penalty == "squared" else self.START / target_l0
        return share * jnp.float32(1 if self.error == "mean" else width)

    def init(self, key: jax.Array, sample: Sample) -> JumpRelu:
        """Encoder = transposed decoder of uniform rows, of norm 1; b_dec = geometric median; b_enc: `init.centring`.

        With the tanh b_dec is 0 if there is no pre_bias, rows keep their norm, the encoder is d_model / n_latents as
        long and biases let every latent be active on about 10,000 / n_latents of the rows.
        """
        d_model = sample.median.shape[0]
        w_dec = init.linear_rows(key, self.n_latents, d_model)
        b_enc = init.zeros((self.n_latents,), mesh.DICT)
        b_dec = jnp.zeros_like(sample.median) if self.penalty == "tanh" and not self.pre_bias else sample.median
        if self.penalty == "tanh":
            w_enc = d_model / self.n_latents * w_dec
            b_enc = self.initial_threshold + init.biases_for(w_enc, sample, b_dec, N_ACTIVE_AT_START)
        else:
            w_enc = w_dec = init.unit_rows(w_dec)
            b_enc = b_enc if self.pre_bias else init.centring(w_enc, sample.median)
        return JumpRelu(
            w_enc=w_enc,
            b_enc=b_enc,
            w_dec=w_dec,
            b_dec=b_dec,
            log_threshold=init.zeros((self.n_latents,), mesh.DICT) + math.log(self.initial_threshold),
            config=self,
        )


@struct.dataclass(repr=False)
class JumpRelu(AbstractSae):
    """A JumpReLU autoencoder; frozen, so training makes a new one each step."""

    w_enc: jax.Array  # f32[F@(latent,data), D]
    b_enc: jax.Array  # f32[F@(latent,data)]
    w_dec: jax.Array  # f32[F@(latent,data), D], unit rows, but for the tanh
    b_dec: jax.Array  # f32[D]
    log_threshold: jax.Array  # f32[F@(latent,data)]
    config: Config = struct.field(pytree_node=False)

    @property
    def threshold(self) -> jax.Array:
        """f32[F], > 0: a latent is active where its pre-activation exceeds this."""
        return jnp.exp(self.log_threshold)

    def n_slots(self, x_BX: jax.Array) -> int:
        """See AbstractSae."""
        return min(base.slots_for(_n_active(self, x_BX)), self.config.n_latents)

    def encode_rows(self, x_BX: jax.Array, n_slots: int) -> Code:
        """See AbstractSae."""
        dtype = self.config.product_dtype
        return tiled.encode_largest(x_BX, self.w_enc, self._b_pre, self._latents, _counting(), dtype, n_slots)

    def decode_rows(self, code: Code) -> jax.Array:
        """See AbstractSae."""
        return sparse.decode(code, self.w_dec)[0] + self.b_dec[None]

    def reconstruct_rows(self, x_BX: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See AbstractSae."""
        tiles = self._reconstruct(x_BX, self.w_dec, self._latents, _counting())
        return tiles.x_hat + self.b_dec[None], tiles.l0

    def objective(self, batch: Batch, context: Context) -> tuple[jax.Array, Outcome]:
        """See AbstractSae and the head of this file."""
        return _objective(self, batch, context) if self.config.may_be_sparse else self._of_tiles(batch, context)

    def _of_tiles(self, batch: Batch, context: Context) -> tuple[jax.Array, Outcome]:
        """Every product whole, in tiles."""
        config, n_rows, below_F = self.config, batch.x.shape[0], None
        if config.penalty == "tanh":
            latents = {**self._latents, "norm": jnp.linalg.norm(self.w_dec, axis=-1)}
            tiles = self._reconstruct(batch.x, self.w_dec, latents, partial(_smooth, bandwidth=config.bandwidth))
            count_F, below_F = tiles.penalty
        else:
            tiles = self._reconstruct(batch.x, self.w_dec, self._latents, _counting(config.bandwidth))
            count_F = tiles.penalty
        made = tiles.x_hat + self.b_dec[None], count_F / n_rows, tiles.fired, tiles.l0
        loss, outcome = self._loss(batch, context, *made)
        outcome.metrics["tiled"] = jnp.float32(1)
        if below_F is not None:
            outcome.metrics["below"] = below_F.sum() / n_rows
            loss = loss + context.coefficient("preactivation_coefficient") * outcome.metrics["below"]
        return loss, outcome

    def _loss(
        self, batch: Batch, context: Context, x_hat_BD: jax.Array, share_F: jax.Array, fired_F: jax.Array, l0: jax.Array
    ) -> tuple[jax.Array, Outcome]:
        """Of a reconstruction, the p_i and what a batch counts."""
        config = self.config
        sparsity = config.sparsity(share_F, context.hparams.coefficients["target_l0"])
        coefficient = penalty.weight(config, context, batch.y.shape[1])
        loss = losses.error(config.error, batch.y - x_hat_BD) + coefficient * sparsity
        metrics = {"sparsity": sparsity, "threshold": self.threshold.mean(), "coefficient": coefficient}
        counters = penalty.led(config, context, context.count(fired_F, batch.x.shape[0]), l0)
        return loss, Outcome(x_hat_BD, l0, counters, metrics)

    def _with_gradients(self, batch: Batch, context: Context) -> tuple[tuple[jax.Array, Outcome], JumpRelu]:
        """The objective and its gradients, of a sparse code if it holds all that is active, else of tiles."""
        config, n_rows = self.config, batch.x.shape[0]
        k = config.usual
        filling = sparse.Filling(k, n_most := MOST * k * n_rows)
        width = min(k + -(-(CANDIDATES - 1) * k // mesh.axis_size(mesh.LATENT)), config.n_latents)
        threshold_F = self.threshold

        def above(w_enc: jax.Array, b_enc: jax.Array, b_pre: jax.Array) -> tuple[jax.Array, Any]:
            encoder, lists = (w_enc, b_enc - threshold_F, b_pre), (width, min(WIDEST * width, config.n_latents))
            code, _, is_whole = encode.encode_above(batch.x, *encoder, k, n_most, config.product_dtype, *lists)
            return code.values, (code.indices, is_whole)

        values_BK, pull, (indices_BK, is_whole) = jax.vjp(above, self.w_enc, self.b_enc, self._b_pre, has_aux=True)
        above_BK = Code(indices_BK, values_BK)
        z_BK = jnp.where(values_BK > 0, values_BK + sparse.looked_up(above_BK, threshold_F), 0.0)
        code = Code(indices_BK, z_BK)

        def of_code() -> tuple[tuple[jax.Array, Outcome], JumpRelu]:
            ones = Code(indices_BK, (values_BK > 0).astype(jnp.float32))
            share_F = sparse.summed(ones, config.n_latents, filling) / n_rows
            fired_F = sparse.fired(code, config.n_latents, base.FIRED_ABOVE, filling)

            def objective(z_BK: jax.Array, w_dec: jax.Array, b_dec: jax.Array) -> tuple[jax.Array, Outcome]:
                x_hat_BD, _ = sparse.decode(Code(indices_BK, z_BK), w_dec, config.product_dtype, filling)
                return self._loss(batch, context, x_hat_BD + b_dec[None], share_F, fired_F, base.l0(code))

            (loss, outcome), gradients = jax.value_and_grad(objective, (0, 1, 2), has_aux=True)(
                z_BK, self.w_dec, self.b_dec
            )
            outcome.metrics["tiled"] = jnp.float32(0)
            g_z_BK, g_w_dec, g_b_dec = gradients
            g_w_enc, g_b_enc, g_b_pre = pull(g_z_BK)
            return (loss, outcome), replace(
                self,
                w_enc=g_w_enc,
                b_enc=g_b_enc,
                w_dec=g_w_dec,
                b_dec=g_b_dec + g_b_pre if config.pre_bias else g_b_dec,
                log_threshold=self._threshold_gradient(batch, context, outcome.y_hat, share_F) * threshold_F,
            )

        def of_tiles() -> tuple[tuple[jax.Array, Outcome], JumpRelu]:
            return jax.value_and_grad(lambda sae: sae._of_tiles(batch, context), has_aux=True)(self)

        return lax.cond(is_whole, of_code, of_tiles)

    def _threshold_gradient(self, batch: Batch, context: Context, x_hat_BD: jax.Array, share_F: jax.Array) -> jax.Array:
        """Estimated from every eighth row, f32[F], DICT: see the head of this file."""
        config = self.config
        g_x_hat_BD = jax.grad(lambda x_hat_BD: losses.error(config.error, batch.y - x_hat_BD))(x_hat_BD)
        g_share_F = jax.grad(config.sparsity)(share_F, context.hparams.coefficients["target_l0"])
        g_count_F = penalty.weight(config, context, batch.y.shape[1]) * g_share_F / len(batch.x)
        stride = math.gcd(len(batch.x) // mesh.axis_size(mesh.AXES), STRIDE)
        first = jax.random.randint(jax.random.fold_in(context.key, ROWS), (), 0, stride)
        x_SD, g_x_hat_SD = _every(stride, first, (batch.x, g_x_hat_BD))
        w_dec, counting = lax.stop_gradient(self.w_dec), _counting(config.bandwidth)

        def reconstructed(threshold_F: jax.Array) -> tuple[jax.Array, jax.Array]:
            tiles = self._reconstruct(x_SD, w_dec, {**self._latents, "threshold": threshold_F}, counting)
            return tiles.x_hat, tiles.penalty

        (g_threshold_F,) = jax.vjp(reconstructed, self.threshold)[1]((g_x_hat_SD, g_count_F))
        return stride * g_threshold_F

    @property
    def unit_rows(self) -> tuple[str, ...]:
        """Those of the decoder, but for the tanh."""
        return () if self.config.penalty == "tanh" else ("w_dec",)

    def folded(self, scale: Scale) -> JumpRelu:
        """See AbstractSae. For rows c times as large, biases, thresholds and codes are too."""
        factor = scale.x[0]
        norm_F = init.row_norms(self.w_dec) if self.config.penalty == "tanh" else jnp.ones_like(self.b_enc)
        return replace(
            self,
            w_enc=self.w_enc * norm_F[:, None],
            b_enc=self.b_enc * norm_F / factor,
            w_dec=self.w_dec / norm_F[:, None],
            b_dec=self.b_dec / scale.y,
            log_threshold=self.log_threshold + jnp.log(norm_F / factor),
        )

    @property
    def _b_pre(self) -> jax.Array:
        return self.b_dec if self.config.pre_bias else jnp.zeros(self.w_enc.shape[1])

    @property
    def _latents(self) -> dict[str, jax.Array]:
        return {"b_enc": self.b_enc, "threshold": self.threshold}

    def _reconstruct(
        self, x_BD: jax.Array, w_dec: jax.Array, latents: Any, activation: tiled.Activation
    ) -> tiled.Tiled:
        dtype = self.config.product_dtype
        return tiled.reconstruct(x_BD, self.w_enc, w_dec, self._b_pre, latents, activation, dtype, base.FIRED_ABOVE)


def with_threshold(sae: Any, threshold: jax.Array, pre_bias: bool = True) -> JumpRelu:
    """The dictionary `sae` of unit rows, whose latents are active above `threshold`.

    Args:
        sae: weights, and a config that says n_latents, input_norm and dtype.
        threshold: f32[] for all latents or f32[F], DICT; >= 0.
        pre_bias: b_dec is subtracted before encoding.
    """
    config, zeros_F = sae.config, jnp.zeros_like(sae.b_enc)
    kept = {name: getattr(config, name) for name in ("n_latents", "input_norm", "dtype")}
    config = Config(**kept, pre_bias=pre_bias, l0_coefficient=0.0)
    return JumpRelu(sae.w_enc, sae.b_enc, sae.w_dec, sae.b_dec, zeros_F + jnp.log(threshold), config)


def calibrated(sae: Any, x: Any, per_latent: bool = False, pre_bias: bool = True) -> JumpRelu:
    """`with_threshold` such that the rows x have k = sae.config.k active latents on average. On one device.

    Args:
        sae: a dictionary that selects k latents a row, in the units of x.
        x: a sample of rows, [..., X].
        per_latent: each latent has a threshold of its own, that of as many of the rows as select it now, or above all
            of them if none does; else one for all.
        pre_bias: b_dec is subtracted before encoding.
    """
    config, (n_latents, width) = sae.config, sae.w_enc.shape
    x_NX = normalise.normalise(base.as_rows(x, width).reshape(-1, width), config.input_norm)[0]
    b_pre, dtype, threshold_F = sae.b_dec if pre_bias else jnp.zeros(width), config.product_dtype, []
    if not per_latent:
        n_slots, encoder = min(4 * config.k, n_latents), (sae.w_enc, sae.b_enc, b_pre)
        while True:
            _, _, selection = encode.encode_batch_topk(x_NX, *encoder, config.k, dtype, n_slots, n_slots)
            if not selection.n_saturated:
                return with_threshold(sae, _just_below(selection.threshold), pre_bias)
            n_slots = min(2 * n_slots, n_latents)
    code = sae.encode_rows(x_NX, config.k)
    count_F = jnp.zeros(n_latents, jnp.int32).at[code.indices].add((code.values > 0).astype(jnp.int32))
    x_NX = encode.centred(x_NX, b_pre).astype(dtype)
    size = max(1, tuning.current().block_bytes // (4 * len(x_NX)))
    for first in range(0, n_latents, size):
        w_fX, b_f, count_f = (a[first : first + size] for a in (sae.w_enc, sae.b_enc, count_F))
        pre_fN = encode.product(w_fX.astype(dtype), x_NX, "fx,nx->fn") + b_f[:, None]
        nth_f = jnp.take_along_axis(-jnp.sort(-pre_fN, axis=1), jnp.maximum(count_f - 1, 0)[:, None], axis=1)[:, 0]
        threshold_F.append(jnp.where(count_f > 0, _just_below(nth_f), nth_f))
    return with_threshold(sae, jnp.maximum(jnp.concatenate(threshold_F), 0.0), pre_bias)


def _just_below(value: jax.Array) -> jax.Array:
    """By more than the logarithm that thresholds are kept in may round."""
    return value * (1 - 1e-6)


@jax.custom_vjp
def _objective(sae: JumpRelu, batch: Batch, context: Context) -> tuple[jax.Array, Outcome]:
    """The objective of `sae`, without gradient for the rows.

    Gradients are made where the batch is looked at, in one of two ways: a derivative of `lax.cond` would keep what each
    way needs, copies of the weights among it.
    """
    return sae._with_gradients(batch, context)[0]


_objective.defvjp(
    lambda sae, batch, context: sae._with_gradients(batch, context),
    lambda gradients, cotangent: (jax.tree.map(lambda g: g * cotangent[0], gradients), None, None),
)


def _every(stride: int, first: jax.Array, arrays_BD: Any) -> Any:
    """Rows first, first + stride, ... of what each device has of the arrays, ROWS: the same rows on any mesh."""

    def local(first, arrays_RD):
        return jax.tree.map(
            lambda a_RD: lax.dynamic_index_in_dim(a_RD.reshape(-1, stride, a_RD.shape[1]), first, 1, keepdims=False),
            arrays_RD,
        )

    return spmd.per_device(local, (mesh.REPLICATED, mesh.ROWS), mesh.ROWS)(first, arrays_BD)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def active(pi: jax.Array, theta: jax.Array, bandwidth: float) -> jax.Array:
    """H(pi - theta), f32; its gradient is estimated, see the head of this file."""
    return (pi > theta).astype(jnp.float32)


@active.defjvp
def _(bandwidth, primals, tangents):
    pi, theta = primals
    near = (jnp.abs(pi - theta) < bandwidth / 2).astype(jnp.float32)
    return active(pi, theta, bandwidth), -near / bandwidth * tangents[1]


def _jump(pre_bf: jax.Array, latents: Any, bandwidth: float) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(pi, theta, H, z)."""
    pi_bf, theta_1f = pre_bf + latents["b_enc"][None], latents["threshold"][None]
    h_bf = active(pi_bf, jnp.broadcast_to(theta_1f, pi_bf.shape), bandwidth)
    fixed_bf = lax.stop_gradient(h_bf)
    # The second term is zero, with the gradient of a step of height theta.
    z_bf = pi_bf * fixed_bf + lax.stop_gradient(theta_1f) * (h_bf - fixed_bf)
    return pi_bf, theta_1f, h_bf, z_bf


def _counting(bandwidth: float = 1.0) -> tiled.Activation:
    """z and the count H. The bandwidth is that of gradients alone."""

    def activation(pre_bf, latents):
        _, _, h_bf, z_bf = _jump(pre_bf, latents, bandwidth)
        return z_bf, h_bf

    return activation


def _smooth(pre_bf: jax.Array, latents: Any, bandwidth: float) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """z, and both penalties of the tanh."""
    pi_bf, theta_1f, _, z_bf = _jump(pre_bf, latents, bandwidth)
    norm_1f = latents["norm"][None]
    return z_bf, (jnp.tanh(STEEPNESS * z_bf * norm_1f), jax.nn.relu(theta_1f - pi_bf) * norm_1f)


@tuning.jit
def _n_active(sae: JumpRelu, x_BX: jax.Array) -> jax.Array:
    return tiled.n_active(x_BX, sae.w_enc, sae._b_pre, sae._latents, _counting(), sae.config.product_dtype)
