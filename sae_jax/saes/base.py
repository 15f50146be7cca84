"""What every sparse dictionary is to the rest of the library, and the parts that variants share.

A variant is one file: a frozen config named `Config` with `init`, and one final struct of float arrays with the
methods of `AbstractSae`. The training loop knows no variant. It asks for

    objective(batch, statistics, step, key) -> loss, Outcome      differentiated with respect to the sae
    after_step(state, key) -> state                               unit rows, resampling; may edit moments

and stores whatever tree the variant is. Weights are latent-major, `w_enc[F, X]` and `w_dec[F, Y]`: a latent is a row.

    sources of a set --side by side--> x [B, X] --scale, norm--> encode --> decode --undo--> y_hat [B, Y]

X and Y are widths of what is encoded and reconstructed: d_model both, for an autoencoder. Several sources stand side
by side, so that a crosscoder is an autoencoder of one wide row. How rows are normalised is decided here and nowhere
else: a variant sees normalised rows only.
"""

from __future__ import annotations

import abc
import importlib
import math
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from sae_jax import mesh
from sae_jax.ops import encode, sparse
from sae_jax.types import Code, UsageError, Widths

InputNorm = Literal["none", "layer_norm", "unit_norm", "dataset_rms", "dataset_sqrt_d"]
PER_VECTOR = ("layer_norm", "unit_norm")
# What a variant learns from: the rows of a set, or a language model, by its logits, or by its later layers too.
Learns = Literal["rows", "through_logits", "through_layers"]

N_PROBES = 256  # random unit vectors that set an encoder's scale
FIRED_ABOVE = 1e-3  # a latent counts as fired when its value exceeds this (Gao et al. 2024, released training code)
NOT_VARIANTS = ("base", "losses")


@struct.dataclass
class Batch:
    """Rows to learn from: `x` is encoded, `y` is reconstructed."""

    x: jax.Array  # [B, X], ROWS
    y: Any = None  # [B, Y], ROWS; None: x, as for every autoencoder. An objective finds it set.
    context: Any = None  # a pytree: what else is known of these rows, for objectives that ask for it (end_to_end.py)


@struct.dataclass
class Scale:
    """What rows are multiplied by before a dictionary sees them: one constant a source, fixed when a run starts."""

    x: jax.Array  # f32[X]
    y: jax.Array  # f32[Y]


@struct.dataclass
class Statistics:
    """What a run remembers between steps beside weights and moments."""

    silent: jax.Array  # i32[F], DICT: tokens since each latent fired, saturating just above dead_after
    dead_after: jax.Array  # i32[]: a latent silent for more tokens than this is dead
    loss_scale: jax.Array  # f32[]: 1 / mean((y - mean y)^2) of the sample the run started from
    scale: Scale  # constant
    own: dict[str, jax.Array] = struct.field(default_factory=dict)  # the variant's; begun by Config.own_statistics
    coefficients: dict[str, jax.Array] = struct.field(default_factory=dict)  # f32[], constant; those of Config.DATA

    def after(self, fired_F: jax.Array, n_tokens: int) -> Self:
        """Counters after a batch of `n_tokens` in which `fired_F` fired."""
        aged_F = jnp.minimum(self.silent + n_tokens, self.dead_after + 1)
        return replace(self, silent=jnp.where(fired_F, 0, aged_F))

    @property
    def dead(self) -> jax.Array:
        """bool[F], DICT."""
        return self.silent > self.dead_after


@struct.dataclass
class Outcome:
    """What a step learns from an objective beside the loss."""

    y_hat: jax.Array  # f32[B, Y], ROWS, in the units of the batch that the objective was given
    l0: jax.Array  # f32[], mean number of active latents a row
    statistics: Statistics
    metrics: dict[str, jax.Array]  # scalars to log under these names
    set: dict[str, jax.Array] = struct.field(default_factory=dict)  # fields of the sae that are not learnt but set
    y: jax.Array | None = None  # f32[B, Y], what y_hat stands for, where that is not the batch's y


@struct.dataclass
class Sample:
    """What initialisation needs to know of the data, in the units the dictionary sees."""

    median: jax.Array  # f32[X], geometric median of x
    mean: jax.Array  # f32[Y], of y
    variance: jax.Array  # f32[], mean over rows and dimensions of (y - mean y)^2
    square: jax.Array  # f32[], mean over rows of the squared norm of x
    scale: Scale
    widths: Widths = struct.field(pytree_node=False)
    same: bool = struct.field(pytree_node=False, default=True)  # y is x


class Adam(NamedTuple):
    """What a variant's authors train it with; `train.*` overrides each."""

    lr: float = 2e-4  # at 2^14 latents; it falls as the square root of their number
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 6.25e-10


@dataclass(frozen=True)
class SaeConfig:
    """What every variant has to be told."""

    variant: str = ""
    """the file in sae_jax/saes/ that is trained"""
    n_latents: int = 32768
    """width of the dictionary"""
    input_norm: InputNorm = "none"
    """layer_norm, unit_norm: of each vector, undone on outputs; dataset_*: one constant a source, so that its mean
    squared norm is 1 (rms) or its width (sqrt_d)"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """inputs of products over all latents; weights, sums, selection and losses are float32"""

    ADAM: ClassVar[Adam] = Adam()
    # Coefficients that objectives take from `Statistics.coefficients`, so that a sweep over them is one program. Of
    # these the config of a state in training says only whether they are 0.
    DATA: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.n_latents < 2**31:
            raise UsageError(f"sae.n_latents={self.n_latents} must be at least 1 and below 2^31: indices are int32")

    def init(self, key: jax.Array, sample: Sample) -> Any:
        """Initial weights; on a mesh every array is created where it will live."""
        raise NotImplementedError

    def own_statistics(self, sample: Sample) -> dict[str, jax.Array]:
        """What the objective keeps in `Statistics.own`, before the first step."""
        return {}

    @property
    def n_active(self) -> int | None:
        """Active latents a row, where their number is set."""
        return None

    @property
    def coefficients(self) -> dict[str, jax.Array]:
        """f32[] of each in DATA."""
        return {name: jnp.float32(getattr(self, name)) for name in self.DATA}

    @property
    def program(self) -> Self:
        """This config with all that is data to the program at fixed values: equal where it is shared."""
        return replace(self, **{name: float(getattr(self, name) > 0) for name in self.DATA})

    @property
    def learns(self) -> Learns:
        """What `objective` has to be given."""
        return "rows"

    def check(self, widths: Widths, same: bool) -> None:
        """Refuse sources that this variant cannot work on. `same`: what is encoded is what is reconstructed."""
        check_autoencoder(self, widths, same)


@dataclass(frozen=True)
class KConfig(SaeConfig):
    """What dictionaries that select k latents a row have to be told, and how their weights begin."""

    k: int = 32
    """active latents a token"""
    aux_coefficient: float = 1 / 32
    """weight of the AuxK loss; 0 turns it off"""
    k_aux: int = 0
    """dead latents that explain the error; 0 = the power of two nearest d_model / 2"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.k <= self.n_latents:
            raise UsageError(f"sae.k={self.k} must be between 1 and sae.n_latents={self.n_latents}")
        if not 0 <= self.aux_coefficient < math.inf:
            raise UsageError(f"sae.aux_coefficient={self.aux_coefficient} must be >= 0 and finite; 0 turns AuxK off")
        if self.k_aux < 0:
            raise UsageError(f"sae.k_aux={self.k_aux} must be >= 0")

    @property
    def n_active(self) -> int | None:
        """See SaeConfig."""
        return self.k

    def weights(self, key: jax.Array, sample: Sample, transposed: bool = True) -> dict[str, jax.Array]:
        """w_enc, b_enc, w_dec: the decoder is the transposed encoder with unit rows, the encoder's bias is 0.

        The encoder is divided by r, the mean norm of what the k strongest latents make of random unit vectors. Not
        `transposed`: a decoder that knows nothing of the encoder, else the same.

        Source: Gao et al. 2024, arXiv 2406.04093, section A.1 and its released code.
        """
        encoder_width, width = sample.median.shape[0], sample.mean.shape[0]
        w_enc, b_enc = linear_rows(key, self.n_latents, encoder_width), zeros((self.n_latents,), mesh.DICT)
        probe_key, decoder_key = jax.random.fold_in(key, 1), jax.random.fold_in(key, 2)
        w_dec = unit_rows(w_enc if transposed else linear_rows(decoder_key, self.n_latents, width))
        n_devices = mesh.axis_size(mesh.AXES)
        shape = (math.ceil(N_PROBES / n_devices) * n_devices, encoder_width)
        probes_PX = unit_rows(jax.random.normal(probe_key, shape, out_sharding=mesh.placed(mesh.ROWS)))
        code, _ = encode.encode_topk(probes_PX, w_enc, b_enc, jnp.zeros(encoder_width), self.k, jnp.dtype(self.dtype))
        r = jnp.linalg.norm(sparse.decode(code, w_dec)[0], axis=-1).mean()
        return {"w_enc": w_enc / jnp.where(r > 0, r, 1.0), "b_enc": b_enc, "w_dec": w_dec}


class AbstractSae(abc.ABC):
    """A sparse dictionary. Subclasses are final flax structs; nothing concrete here is overridden.

    Methods that end in `_rows` see rows as `normalised` leaves them, may be traced, and may run on a mesh.
    """

    w_enc: jax.Array  # f32[F, X]
    b_enc: jax.Array  # f32[F]
    w_dec: jax.Array  # f32[F, Y]
    b_dec: jax.Array  # f32[Y]
    config: Any

    def encode(self, x: Any) -> Code:
        """Sparse code of x [..., X] (numpy, JAX or a torch tensor); fields [..., K], values descending.

        K is the variant's k, or where any number of latents may be active the largest number in x, rounded up to a
        power of two: then it has to be looked up, so `encode` cannot run inside `jax.jit`. With a norm of each vector
        the values are in normalised units.
        """
        x = as_rows(x, self.w_enc.shape[1])
        x_BX = _normed(self, x.reshape(-1, x.shape[-1]))
        code = _encode(self, x_BX, self.n_slots(x_BX))
        return jax.tree.map(lambda field: field.reshape(*x.shape[:-1], field.shape[-1]), code)

    def decode(self, code: Code) -> jax.Array:
        """Reconstruction f32[..., Y] of a code [..., K], in the units that `encode` works in."""
        *lead, n_slots = code.indices.shape
        rows = Code(*(jnp.asarray(field).reshape(math.prod(lead), n_slots) for field in (code.indices, code.values)))
        return _decode(self, rows).reshape(*lead, self.w_dec.shape[1])

    def __call__(self, x: Any) -> jax.Array:
        """Reconstruction f32[..., Y] for x [..., X], in the units of x."""
        x = as_rows(x, self.w_enc.shape[1])
        return _reconstruct(self, x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.w_dec.shape[1])

    @abc.abstractmethod
    def n_slots(self, x_BX: jax.Array) -> int:
        """Slots that a code of these rows needs. Not traced."""

    @abc.abstractmethod
    def encode_rows(self, x_BX: jax.Array, n_slots: int) -> Code:
        """The code [B, n_slots] of rows."""

    @abc.abstractmethod
    def decode_rows(self, code: Code) -> jax.Array:
        """The reconstruction f32[B, Y] that a code [B, K] stands for."""

    @abc.abstractmethod
    def reconstruct_rows(self, x_BX: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The reconstruction f32[B, Y] of rows, and how many latents are active in a row on average, f32[]."""

    @abc.abstractmethod
    def objective(
        self, batch: Batch, statistics: Statistics, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Outcome]:
        """Loss of a batch (f32[]) and what else the step needs to know."""

    @abc.abstractmethod
    def after_step(self, state: Any, key: jax.Array) -> Any:
        """The train state after the optimiser moved the weights: constraints are restored here."""

    @abc.abstractmethod
    def folded(self, scale: Scale) -> Self:
        """The same dictionary for rows that were not multiplied by `scale`, as `load` gives it to users."""


def variants() -> list[str]:
    """Names a recipe may give as `sae.variant`: the files of this folder."""
    package = importlib.import_module("sae_jax.saes")
    return [m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in NOT_VARIANTS]


def config_class(variant: str) -> type[SaeConfig]:
    """The config that types the `sae.*` keys of this variant. Raises UsageError for an unknown name."""
    if variant not in variants():
        raise UsageError(f"sae.variant={variant!r} does not exist; there are: {', '.join(variants())}")
    return importlib.import_module(f"sae_jax.saes.{variant}").Config


def check_autoencoder(config: SaeConfig, widths: Widths, same: bool) -> None:
    """Refuse what only transcoders and crosscoders can work on."""
    if not same:
        raise UsageError(
            f"sae.variant={config.variant} reconstructs what it encodes; leave `reconstruct` out, or use a transcoder"
        )
    if len(widths.x) > 1:
        raise UsageError(
            f"sae.variant={config.variant} encodes one source, not {len(widths.x)}; name one in `site`, or use a "
            f"crosscoder"
        )


def as_rows(x: Any, width: int) -> jax.Array:
    """x [..., X] from numpy, JAX or (through dlpack) torch as f32[..., X]. Raises UsageError on another width."""
    if not isinstance(x, jax.Array | np.ndarray) and hasattr(x, "__dlpack__"):
        x = jnp.from_dlpack(x.detach() if hasattr(x, "detach") else x)
    x = jnp.asarray(x, jnp.float32)
    if x.shape[-1:] != (width,):
        raise UsageError(f"x has shape {x.shape}; its last dimension must be d_model={width}")
    return x


@jax.jit
def _normed(sae: AbstractSae, x_BX: jax.Array) -> jax.Array:
    return normalise(x_BX, sae.config.input_norm)[0]


@partial(jax.jit, static_argnames="n_slots")
def _encode(sae: AbstractSae, x_BX: jax.Array, n_slots: int) -> Code:
    return sae.encode_rows(x_BX, n_slots)


@jax.jit
def _decode(sae: AbstractSae, code: Code) -> jax.Array:
    return sae.decode_rows(code)


@jax.jit
def _reconstruct(sae: AbstractSae, x_BX: jax.Array) -> jax.Array:
    x_BX, mean, scale = normalise(x_BX, sae.config.input_norm)
    return sae.reconstruct_rows(x_BX)[0] * scale + mean


def l0(code: Code) -> jax.Array:
    """Active latents a row on average, f32[]."""
    return (code.values > 0).sum(-1).mean(dtype=jnp.float32)


def slots_for(n_active: jax.Array) -> int:
    """Slots for codes with up to this many active latents: a power of two, so that few programs are compiled."""
    return 1 << (int(np.max(n_active, initial=1)) - 1).bit_length()


def normalised(batch: Batch, kind: InputNorm, scale: Scale) -> tuple[Batch, Callable[[jax.Array], jax.Array]]:
    """A batch as dictionaries see it, y set; and what takes their rows [B, Y] to where errors are measured.

    That is the units of the set for one source; sources that were scaled stay so, and then weigh alike.
    """
    x_BX, y_BY = batch.x, batch.x if batch.y is None else batch.y
    if kind in PER_VECTOR:
        x_BX, mean_B1, scale_B1 = normalise(x_BX, kind)
        y_BY = x_BX if batch.y is None else (y_BY.astype(jnp.float32) - mean_B1) / scale_B1
        return replace(batch, x=x_BX, y=y_BY), lambda rows_BY: rows_BY * scale_B1 + mean_B1
    if kind != "none":
        x_BX = x_BX.astype(jnp.float32) * scale.x[None]
        y_BY = x_BX if batch.y is None else y_BY.astype(jnp.float32) * scale.y[None]
    return replace(batch, x=x_BX, y=y_BY), lambda rows_BY: rows_BY


def normalise(x_BD: jax.Array, kind: InputNorm) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalisation of each vector: (normalised x, mean [B, 1], scale [B, 1]); undo with x * scale + mean.

    In f32, except that the other kinds leave x as it is, in its type: the ops take it from there a block at a time.
    """
    if kind not in PER_VECTOR:
        return x_BD, jnp.float32(0), jnp.float32(1)
    x_BD = x_BD.astype(jnp.float32)
    mean_B1 = x_BD.mean(-1, keepdims=True)
    centred_BD = x_BD - mean_B1
    square_B1 = (centred_BD**2).sum(-1, keepdims=True)
    if kind == "unit_norm":
        scale_B1 = jnp.maximum(jnp.sqrt(square_B1), 1e-12)
    else:  # layer_norm, with the unbiased estimator that the released TopK autoencoders were trained on
        scale_B1 = jnp.sqrt(square_B1 / (x_BD.shape[-1] - 1)) + 1e-5
    return centred_BD / scale_B1, mean_B1, scale_B1


def factor(kind: InputNorm, mean_square: float, width: int) -> float:
    """What the rows of a source are multiplied by, given the mean of their squared norms."""
    wanted = {"dataset_rms": 1.0, "dataset_sqrt_d": float(width)}.get(kind)
    return 1.0 if wanted is None else math.sqrt(wanted / mean_square)


def sample_statistics(
    x_ND: np.ndarray,
    kind: InputNorm,
    y_ND: np.ndarray | None = None,
    widths: Widths | None = None,
    mean_squares: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Sample:
    """What initialisation needs, from a sample of rows, in float64 on the host.

    Args:
        x_ND: f32[N, X], in the units of the set.
        kind: how they will be normalised.
        y_ND: f32[N, Y]; None: x.
        widths: of the sources side by side in x and y; None: one each.
        mean_squares: mean squared norm of each source in x and in y, over the whole set; None: over the sample.

    Raises:
        UsageError: rows that are not finite, or do not vary.
    """
    same, y_ND = y_ND is None, x_ND if y_ND is None else y_ND
    widths = widths or Widths((x_ND.shape[1],), (y_ND.shape[1],))
    scales = []
    for side, (rows_ND, own) in enumerate(((x_ND, widths.x), (y_ND, widths.y))):
        parts = np.split(rows_ND, np.cumsum(own)[:-1], axis=1)
        squares = mean_squares[side] if mean_squares else [float((np.float64(p) ** 2).sum(1).mean()) for p in parts]
        factors = [factor(kind, square, width) for square, width in zip(squares, own, strict=True)]
        scales.append(np.repeat(np.asarray(factors, np.float32), own))
    scale = Scale(*map(jnp.asarray, scales))
    batch = normalised(Batch(jnp.asarray(x_ND, jnp.float32), jnp.asarray(y_ND, jnp.float32)), kind, scale)[0]
    x_ND, y_ND = np.asarray(batch.x, np.float64), np.asarray(batch.y, np.float64)
    variance = ((y_ND - y_ND.mean(0)) ** 2).mean()
    if not np.isfinite(variance) or not np.isfinite(x_ND).all() or variance == 0:
        raise UsageError(
            f"the sample of {len(x_ND)} activations has variance {variance}; a set must hold finite, varied rows"
        )
    found = (geometric_median(x_ND), y_ND.mean(0), variance, (x_ND**2).sum(1).mean())
    median, mean, variance, square = (jnp.asarray(value, jnp.float32) for value in found)
    return Sample(median, mean, variance, square, scale, widths, same)


def abstract_sample(widths: Widths) -> Sample:
    """Shapes in the place of a sample."""
    x, y, one = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((sum(widths.x),), (sum(widths.y),), ()))
    return Sample(x, y, one, one, Scale(x, y), widths)  # pyrefly: ignore[bad-argument-type] (shapes for arrays)


def geometric_median(rows_ND: np.ndarray, max_iterations: int = 100, tolerance: float = 1e-5) -> np.ndarray:
    """Point with the least summed distance to the rows [N, D], by Weiszfeld's iteration from the mean (float64)."""
    rows_ND = np.asarray(rows_ND, np.float64)
    guess_D = rows_ND.mean(0)
    for _ in range(max_iterations):
        # A row that coincides with the guess would get infinite weight.
        weight_N = 1.0 / np.maximum(np.linalg.norm(rows_ND - guess_D, axis=1), 1e-12)
        previous_D, guess_D = guess_D, weight_N @ rows_ND / weight_N.sum()
        if np.linalg.norm(guess_D - previous_D) < tolerance:
            break
    return guess_D


def unit_rows(w_FD: jax.Array) -> jax.Array:
    """Rows scaled to norm 1. A row of zeros stays."""
    # Apart from what made them: XLA on GPU would write moments of fewer bytes out in f32, as operands of this fusion.
    w_FD = lax.optimization_barrier(w_FD)
    return w_FD / row_norms(w_FD)[:, None]


def row_norms(w_FD: jax.Array) -> jax.Array:
    """Norm of each row, f32[F], to divide by: above 0."""
    return jnp.maximum(jnp.linalg.norm(w_FD, axis=-1), 1e-12)


@jax.custom_vjp
def tangent_to_rows(w_FD: jax.Array) -> jax.Array:
    """The identity, whose gradient loses its component along each unit row: g_i - (g_i . w_i) w_i.

    Written into the objective of a variant with unit rows, so that the optimiser's moments never see a direction
    that renormalisation will undo.
    """
    return w_FD


def _tangent(w_FD: jax.Array, g_FD: jax.Array) -> tuple[jax.Array]:
    return (g_FD - (g_FD * w_FD).sum(-1, keepdims=True) * w_FD,)


tangent_to_rows.defvjp(lambda w_FD: (w_FD, w_FD), _tangent)


def linear_rows(key: jax.Array, n_latents: int, d_model: int) -> jax.Array:
    """f32[F, D], DICT: U(-1/sqrt(D), 1/sqrt(D)), a linear layer's usual default. Born sharded on a mesh."""
    bound = d_model**-0.5
    shape = (n_latents, d_model)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound, out_sharding=mesh.placed(mesh.DICT))


def zeros(shape: tuple[int, ...], role: Any, dtype: Any = jnp.float32) -> jax.Array:
    """Zeros placed by role where there is a mesh."""
    return jnp.zeros(shape, dtype, out_sharding=mesh.placed(role))
