"""The dictionary interface, and helpers that variants share.

A variant is one file: a frozen config named `Config` with `init`, and one final struct of float arrays with the
methods of `AbstractSae`. The training loop knows no variant. It asks for

    objective(batch, context) -> loss, Outcome                    differentiated with respect to the sae
    unit_rows                                                     names of arrays whose rows keep norm 1
    constrained() -> sae                                          with these restored, after every update
    after_step(updated, context, clear_rows) -> Updated           such as resampling

and stores whatever tree the variant is. Weights are latent-major, `w_enc[F, X]` and `w_dec[F, Y]`: a latent is a row.

    sources of a set --side by side--> x [B, X] --normalise--> encode --> decode --undo--> y_hat [B, Y]

X and Y are the widths of what is encoded and reconstructed: d_model both, for an autoencoder. Several sources stand
side by side, so that a crosscoder is an autoencoder of one wide row.
"""

from __future__ import annotations

import abc
import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sae_jax import config, mesh
from sae_jax.ops import encode, sparse, tuning
from sae_jax.saes.init import Sample, linear_rows, row_norms, unit_rows, zeros
from sae_jax.saes.normalise import InputNorm, Scale, normalise
from sae_jax.types import Code, UsageError, Widths, refuse_masked

# What a variant learns from: the rows of a set, or a language model, by its logits, or by its later layers too.
Learns = Literal["rows", "through_logits", "through_layers"]

N_PROBES = 256  # random unit vectors that set an encoder's scale
FIRED_ABOVE = 1e-3  # a latent counts as fired when its value exceeds this (Gao et al. 2024, released training code)


@struct.dataclass
class Batch:
    """Rows to learn from: `x` is encoded, `y` is reconstructed."""

    x: jax.Array  # [B, X], ROWS
    y: Any = None  # [B, Y], ROWS; None: x, as for every autoencoder. An objective always finds it set.
    model: Any = None  # a pytree: the language model around these rows, for objectives that need it (end_to_end.py)


@struct.dataclass
class Hyperparameters:
    """Settings that a compiled program takes as data, so that runs which differ in nothing else share it."""

    seed: jax.Array  # i32[]
    steps: jax.Array  # i32[], of the whole run
    lr: jax.Array  # f32[], the peak
    clip: jax.Array  # f32[], not used if train.clip is 0
    ema: jax.Array  # f32[], not used if train.ema is 0
    dead_after: jax.Array  # i32[]: a latent that has been silent for more tokens than this is dead
    coefficients: dict[str, jax.Array]  # f32[] of each in SaeConfig.COEFFICIENTS


@struct.dataclass
class Constants:
    """What a run fixes before its first step, from a sample of the rows."""

    loss_scale: jax.Array  # f32[]: 1 / mean((y - mean y)^2)
    scale: Scale


@struct.dataclass
class Counters:
    """What a run counts from step to step, beside weights and moments."""

    silent: jax.Array  # i32[F], DICT: tokens since each latent fired, saturating just above dead_after
    extra: dict[str, jax.Array] = struct.field(default_factory=dict)  # the variant's; see SaeConfig.initial_counters


@struct.dataclass
class Context:
    """What an objective may read beside the weights and the rows."""

    step: jax.Array  # i32[], steps done before this one
    key: jax.Array  # randomness of this step
    counters: Counters
    constants: Constants
    hparams: Hyperparameters

    @property
    def dead(self) -> jax.Array:
        """bool[F], DICT: latents that are dead before this step."""
        return self.counters.silent > self.hparams.dead_after

    @property
    def done(self) -> jax.Array:
        """Share of the run that is over with this step, f32[]."""
        return (self.step + 1).astype(jnp.float32) / self.hparams.steps.astype(jnp.float32)

    def coefficient(self, name: str, warmup: float = 0.0) -> jax.Array:
        """A coefficient of this step, f32[]: over the first `warmup` of the run, a share, it rises linearly from 0."""
        return self.hparams.coefficients[name] * self.rising(warmup)

    def rising(self, warmup: float) -> jax.Array | float:
        """From 0 to 1 over the first `warmup` of the run, a share."""
        return jnp.minimum(self.done / warmup, 1.0) if warmup else 1.0

    def count(self, fired_F: jax.Array, n_tokens: int) -> Counters:
        """The counters after a batch of `n_tokens` in which `fired_F` fired."""
        silent_F = jnp.minimum(self.counters.silent + n_tokens, self.hparams.dead_after + 1)
        return replace(self.counters, silent=jnp.where(fired_F, 0, silent_F))


@struct.dataclass
class Outcome:
    """What a step learns from an objective beside the loss."""

    y_hat: jax.Array  # f32[B, Y], ROWS, in the units of the batch that the objective was given
    l0: jax.Array  # f32[], mean number of active latents a row
    counters: Counters
    metrics: dict[str, jax.Array]  # scalars to log under these names
    assigned: dict[str, jax.Array] = struct.field(default_factory=dict)  # fields that are set, not learnt by gradient
    y: jax.Array | None = None  # f32[B, Y], what y_hat stands for, where that is not the batch's y


@struct.dataclass
class Updated:
    """What a variant may change after the optimiser has moved the weights."""

    sae: Any
    optimiser_state: Any  # opaque; rows are cleared by the function that comes with it
    counters: Counters


# (optimiser state, bool[F], names of arrays) -> the state that has forgotten these rows of these arrays
ClearRows = Callable[[Any, jax.Array, tuple[str, ...]], Any]


class Adam(NamedTuple):
    """What a variant's authors train it with, in runs of many steps, and ours of few; `train.*` overrides each."""

    lr: float = 2e-4
    n_latents: int = 2**14  # at this width; it falls as the square root of their number
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 6.25e-10
    short_run: float = 1.1  # rate of a run of few steps, times the cube root of its latents and the root of its steps


@dataclass(frozen=True)
class SaeConfig:
    """What every variant has to be told."""

    variant: str = ""
    """the file in sae_jax/saes/ that is trained"""
    n_latents: int = 32768
    """width of the dictionary"""
    input_norm: InputNorm = "dataset_sqrt_d"
    """dataset_*: one constant a source, so that the mean square of its rows' norms is its width (sqrt_d) or 1 (rms);
    layer_norm, unit_norm, vector_sqrt_d: of each vector, undone on outputs; none: rows as they are"""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """inputs of products over all latents; auto: bfloat16, but float32 on CPUs that would have to emulate it. Weights,
    sums, selection and losses are float32"""

    ADAM: ClassVar[Adam] = Adam()
    # Settings that objectives read from `hparams.coefficients`, so that a sweep over them is one program.
    COEFFICIENTS: ClassVar[tuple[str, ...]] = ()
    UNIT_DECODER: ClassVar[bool] = True  # decoder rows have norm 1 in what users load
    # Whether the objective has its matrices from `encode_topk` or `encode_batch_topk`, `decode` and `with_auxk` alone,
    # so that their gradients may be made from pairs (ops/pairs.py), and weights kept in bf16.
    BY_PAIRS: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 1 <= self.n_latents < 2**31:
            raise UsageError(f"sae.n_latents={self.n_latents} must be at least 1 and below 2^31: indices are int32")

    def init(self, key: jax.Array, sample: Sample) -> Any:
        """Initial weights; on a mesh every array is created where it will live.

        Where BY_PAIRS says so it takes a third argument, the type of the matrices.
        """
        raise NotImplementedError

    def initial_counters(self, sample: Sample) -> dict[str, jax.Array]:
        """What the objective keeps in `Counters.extra`, before the first step."""
        return {}

    @property
    def product_dtype(self) -> jnp.dtype:
        """Of the inputs of products."""
        return jnp.dtype(self.on(jax.default_backend()).dtype)

    def on(self, platform: str) -> Self:
        """The same with a `dtype` of auto settled for a platform, "cpu", "gpu" or "tpu": for this machine if a CPU."""
        return replace(self, dtype=tuning.product_dtype(platform)) if self.dtype == "auto" else self

    @property
    def n_active(self) -> int | None:
        """Active latents a row, where their number is set."""
        return None

    @property
    def coefficients(self) -> dict[str, jax.Array]:
        """f32[] of each in COEFFICIENTS that is set."""
        values = {name: getattr(self, name) for name in self.COEFFICIENTS}
        return {name: jnp.float32(value) for name, value in values.items() if value is not None}

    @property
    def program(self) -> Self:
        """What is compiled for this config: coefficients count only as 0 or not 0, as their values are data."""
        return replace(
            self,
            **{name: float(getattr(self, name) > 0) for name in self.COEFFICIENTS if getattr(self, name) is not None},
        )

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
    aux_rows: Literal["sampled", "all"] = "sampled"
    """rows whose error they explain. sampled, which bounds the price: 1/4 of them when more than 1/16 of the latents
    are dead, 1/16 when more than 1/4, but at least 128, drawn anew each step; all: every row"""

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

    def weights(
        self, key: jax.Array, width: int, dtype: Any = jnp.float32, transposed: bool = True
    ) -> dict[str, jax.Array]:
        """w_enc, b_enc, w_dec for rows of this width: the decoder is the transposed encoder with unit rows, b_enc is 0.

        The encoder is divided by r, the mean norm of what the k strongest latents make of random unit vectors. Not
        `transposed`: a decoder that knows nothing of the encoder, else the same. Matrices are of type `dtype`.

        Source: Gao et al. 2024, arXiv 2406.04093, section A.1 and its released code.
        """
        w_enc, b_enc = linear_rows(key, self.n_latents, width, dtype), zeros((self.n_latents,), mesh.DICT)
        probe_key, decoder_key = jax.random.fold_in(key, 1), jax.random.fold_in(key, 2)
        drawn = w_enc if transposed else linear_rows(decoder_key, self.n_latents, width, dtype)
        w_dec = unit_rows(drawn).astype(dtype)
        n_devices = mesh.axis_size(mesh.AXES)
        shape = (math.ceil(N_PROBES / n_devices) * n_devices, width)
        probes_PX = unit_rows(jax.random.normal(probe_key, shape, out_sharding=mesh.placed(mesh.ROWS)))
        code, _ = encode.encode_topk(probes_PX, w_enc, b_enc, jnp.zeros(width), self.k, self.product_dtype)
        r = jnp.linalg.norm(sparse.decode(code, w_dec)[0], axis=-1).mean()
        scaled = w_enc.astype(jnp.float32) / jnp.where(r > 0, r, 1.0)
        return {"w_enc": scaled.astype(dtype), "b_enc": b_enc, "w_dec": w_dec}


class AbstractSae(abc.ABC):
    """A sparse dictionary. Subclasses are final flax structs; what is concrete here is seldom overridden.

    Methods that end in `_rows` take normalised rows, may be traced, and may run on a mesh.
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
        code = _encode(self, x_BX, n_slots=self.n_slots(x_BX))
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

    def __repr__(self) -> str:
        values = {field.name: getattr(self, field.name) for field in fields(cast(Any, self))}
        arrays = [f"{name} {list(value.shape)}" for name, value in values.items() if hasattr(value, "shape")]
        return f"{type(self).__name__}({', '.join(arrays)}, {self.config})"

    @abc.abstractmethod
    def n_slots(self, x_BX: jax.Array) -> int:
        """Slots that a code of these rows needs. Not traced."""

    @property
    def most_slots(self) -> int:
        """Slots that the code of any rows fits into: for `encode_rows` where a trace cannot look at them."""
        return self.b_enc.shape[0]

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
    def objective(self, batch: Batch, context: Context) -> tuple[jax.Array, Outcome]:
        """Loss of a batch (f32[]) and what else the step needs to know."""

    @property
    def unit_rows(self) -> tuple[str, ...]:
        """Names of the arrays whose rows keep norm 1 in training: the optimiser moves them along the sphere."""
        return ("w_dec",)

    def constrained(self) -> Self:
        """The same weights with the variant's constraints restored: `unit_rows`."""
        return replace(cast(Any, self), **{name: unit_rows(getattr(self, name)) for name in self.unit_rows})

    def after_step(self, updated: Updated, context: Context, clear_rows: ClearRows) -> Updated:
        """What else changes once the optimiser has moved the weights and they are `constrained`.

        `updated.sae` is this dictionary. Only variants that do more, such as resampling, override it.
        """
        return updated

    @abc.abstractmethod
    def folded(self, scale: Scale) -> Self:
        """The same dictionary for rows that were not multiplied by `scale`, as users load it.

        Its decoder rows have unit norm if the config's UNIT_DECODER says so, in whatever form training keeps them.
        """

    def unfolded(self, scale: Scale) -> Self:
        """The same dictionary for rows that are multiplied by `scale`: what `folded` makes this one of."""
        return self.folded(Scale(1 / scale.x, 1 / scale.y))

    @property
    def row_lengths(self) -> jax.Array | None:
        """f32[F], what `constrained` divides decoder rows by; None where training takes rows of any length."""
        return row_norms(self.w_dec) if "w_dec" in self.unit_rows else None


def variants() -> list[str]:
    """Names a recipe may give as `sae.variant`: the files of this folder that define a `Config`."""
    package = importlib.import_module("sae_jax.saes")
    names = [m.name for m in pkgutil.iter_modules(package.__path__)]
    return [name for name in names if hasattr(importlib.import_module(f"sae_jax.saes.{name}"), "Config")]


def config_class(variant: str) -> type[SaeConfig]:
    """The config that types the `sae.*` keys of this variant. Raises UsageError for an unknown name."""
    package = importlib.import_module("sae_jax.saes")
    if variant in {m.name for m in pkgutil.iter_modules(package.__path__)}:
        module = importlib.import_module(f"sae_jax.saes.{variant}")
        if hasattr(module, "Config"):
            return module.Config
    raise UsageError(f"sae.variant={variant!r} does not exist; there are: {', '.join(variants())}")


def config_from(variant: str, settings: Mapping[str, Any], where: str) -> SaeConfig:
    """The config that a file states. Raises UsageError, naming `where`, for what a variant does not have."""
    try:
        cls = config_class(variant)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    return config.from_dict(cls, settings, where)


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
    """x [..., X] from numpy, JAX or (through dlpack) torch as f32[..., X]. Raises UsageError on another width.

    And for complex numbers and masked arrays, of which a part would be lost.
    """
    refuse_masked(x, "x")
    if not isinstance(x, jax.Array | np.ndarray) and hasattr(x, "__dlpack__"):
        x = jnp.from_dlpack(x.detach() if hasattr(x, "detach") else x)
    if jnp.iscomplexobj(x):
        raise UsageError(f"x is {x.dtype}; give real numbers")
    x = jnp.asarray(x, jnp.float32)
    if x.shape[-1:] != (width,):
        raise UsageError(f"x has shape {x.shape}; its last dimension must be d_model={width}")
    return x


def l0(code: Code) -> jax.Array:
    """Active latents a row on average, f32[]."""
    return (code.values > 0).sum(-1).mean(dtype=jnp.float32)


def slots_for(n_active: jax.Array) -> int:
    """Slots for codes with up to this many active latents: a power of two, so that few programs are compiled."""
    return 1 << (int(np.max(n_active, initial=1)) - 1).bit_length()


@tuning.jit
def _normed(sae: AbstractSae, x_BX: jax.Array) -> jax.Array:
    return normalise(x_BX, sae.config.input_norm)[0]


@tuning.jit(static_argnames=("n_slots",))
def _encode(sae: AbstractSae, x_BX: jax.Array, n_slots: int) -> Code:
    return sae.encode_rows(x_BX, n_slots)


@tuning.jit
def _decode(sae: AbstractSae, code: Code) -> jax.Array:
    return sae.decode_rows(code)


@tuning.jit
def _reconstruct(sae: AbstractSae, x_BX: jax.Array) -> jax.Array:
    x_BX, mean, scale = normalise(x_BX, sae.config.input_norm)
    return sae.reconstruct_rows(x_BX)[0] * scale + mean
