"""What every sparse dictionary is to the rest of the library, and the parts that variants share.

A variant is one file: a frozen config named `Config` with `init`, and one final struct of float arrays with the
methods of `AbstractSae`. The training loop knows no variant. It asks for

    objective(batch, statistics, step, key) -> loss, Outcome      differentiated with respect to the sae
    after_step(state, key) -> state                               unit rows, resampling; may edit moments

and stores whatever tree the variant is. Weights are latent-major, `w_enc[F, D]` and `w_dec[F, D]`: a latent is a row.
"""

from __future__ import annotations

import abc
import importlib
import math
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from sae_jax import mesh
from sae_jax.types import Code, UsageError

InputNorm = Literal["none", "layer_norm", "unit_norm"]

FIRED_ABOVE = 1e-3  # a latent counts as fired when its value exceeds this (Gao et al. 2024, released training code)
NOT_VARIANTS = ("base", "losses")


@struct.dataclass
class Batch:
    """Rows to learn from: `x` is encoded, `y` is reconstructed. They are one array for autoencoders."""

    x: jax.Array  # f32[B, D], ROWS
    y: jax.Array  # f32[B, D], ROWS


@struct.dataclass
class Statistics:
    """What a run remembers between steps beside weights and moments."""

    silent: jax.Array  # i32[F], DICT: tokens since each latent fired, saturating just above dead_after
    dead_after: jax.Array  # i32[]: a latent silent for more tokens than this is dead
    loss_scale: jax.Array  # f32[]: 1 / mean((x - mean x)^2) of the sample the run started from

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

    x_hat: jax.Array  # f32[B, D], ROWS, in the units of the batch
    l0: jax.Array  # f32[], mean number of active latents a row
    statistics: Statistics
    metrics: dict[str, jax.Array]  # scalars to log under these names


@struct.dataclass
class Sample:
    """What initialisation needs to know of the data, in the units the dictionary sees."""

    median: jax.Array  # f32[D], geometric median
    variance: jax.Array  # f32[], mean over rows and dimensions of (x - mean x)^2


class AbstractSae(abc.ABC):
    """A sparse dictionary. Subclasses are final flax structs; nothing concrete here is overridden."""

    w_enc: jax.Array  # f32[F, D]
    b_enc: jax.Array  # f32[F]
    w_dec: jax.Array  # f32[F, D]
    b_dec: jax.Array  # f32[D]
    config: Any

    @abc.abstractmethod
    def encode(self, x: Any) -> Code:
        """Sparse code of x [..., D] (numpy, JAX or a torch tensor); fields [..., K], values descending.

        K is the variant's k, or where any number of latents may be active the largest number in x, rounded up: then
        it has to be looked up, so `encode` cannot run inside `jax.jit`.
        """

    @abc.abstractmethod
    def decode(self, code: Code) -> jax.Array:
        """Reconstruction f32[..., D] of a code [..., K], in the units that `encode` works in."""

    @abc.abstractmethod
    def __call__(self, x: Any) -> jax.Array:
        """Reconstruction f32[..., D] of x [..., D], in the units of x."""

    @abc.abstractmethod
    def objective(
        self, batch: Batch, statistics: Statistics, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Outcome]:
        """Loss of a batch (f32[]) and what else the step needs to know."""

    @abc.abstractmethod
    def after_step(self, state: Any, key: jax.Array) -> Any:
        """The train state after the optimiser moved the weights: constraints are restored here."""


class SaeConfig(Protocol):
    """What the loop asks of a variant's config."""

    variant: str
    n_latents: int
    input_norm: InputNorm

    def init(self, key: jax.Array, sample: Sample) -> AbstractSae:
        """Initial weights; on a mesh every array is created where it will live."""
        ...


def variants() -> list[str]:
    """Names a recipe may give as `sae.variant`: the files of this folder."""
    package = importlib.import_module("sae_jax.saes")
    return [m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in NOT_VARIANTS]


def config_class(variant: str) -> type[SaeConfig]:
    """The config that types the `sae.*` keys of this variant. Raises UsageError for an unknown name."""
    if variant not in variants():
        raise UsageError(f"sae.variant={variant!r} does not exist; there are: {', '.join(variants())}")
    return importlib.import_module(f"sae_jax.saes.{variant}").Config


def as_rows(x: Any, d_model: int) -> jax.Array:
    """x [..., D] from numpy, JAX or (through dlpack) torch as f32[..., D]. Raises UsageError on another width."""
    if not isinstance(x, jax.Array | np.ndarray) and hasattr(x, "__dlpack__"):
        x = jnp.from_dlpack(x.detach() if hasattr(x, "detach") else x)
    x = jnp.asarray(x, jnp.float32)
    if x.shape[-1:] != (d_model,):
        raise UsageError(f"x has shape {x.shape}; its last dimension must be d_model={d_model}")
    return x


def on_rows(fn: Callable[[jax.Array], Any], x: Any, d_model: int) -> Any:
    """`fn` of x [..., D] as rows f32[B, D]; what it returns, [B, ...], gets the leading dimensions of x."""
    x = as_rows(x, d_model)
    return jax.tree.map(lambda y: y.reshape(*x.shape[:-1], *y.shape[1:]), fn(x.reshape(-1, d_model)))


def on_codes(fn: Callable[[Code], jax.Array], code: Code) -> jax.Array:
    """`fn` of a code [..., K] as one of rows [B, K]; what it returns, [B, ...], gets the code's leading dimensions."""
    *lead, n_slots = code.indices.shape
    shape = (math.prod(lead), n_slots)
    y = fn(Code(*(jnp.asarray(field).reshape(shape) for field in (code.indices, code.values))))
    return y.reshape(*lead, *y.shape[1:])


def normalise(x_BD: jax.Array, kind: InputNorm) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Per-vector input normalisation: (normalised x, mean [B, 1], scale [B, 1]); undo with x * scale + mean.

    In f32, except that "none" leaves x as it is, in its type: the ops take it from there a block at a time.
    """
    if kind == "none":
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


def sample_statistics(rows_ND: np.ndarray, kind: InputNorm) -> Sample:
    """Geometric median and variance of a sample of rows f32[N, D], in float64 on the host."""
    rows_ND = np.asarray(normalise(jnp.asarray(rows_ND, jnp.float32), kind)[0], np.float64)
    variance = ((rows_ND - rows_ND.mean(0)) ** 2).mean()
    if not np.isfinite(variance) or variance == 0:
        raise UsageError(
            f"the sample of {len(rows_ND)} activations has variance {variance}; a set must hold finite, varied rows"
        )
    return Sample(jnp.asarray(geometric_median(rows_ND), jnp.float32), jnp.asarray(variance, jnp.float32))


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
    return w_FD / jnp.maximum(jnp.linalg.norm(w_FD, axis=-1, keepdims=True), 1e-12)


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
