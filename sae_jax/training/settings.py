"""The settings of a run, and which of them a compiled program takes as data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import jax.numpy as jnp

from sae_jax.saes.base import Hyperparameters, SaeConfig
from sae_jax.types import UsageError

Precision = Literal["float32", "bfloat16", "int8"]

# What may differ when a run is resumed: everything else would make it another run.
MAY_CHANGE = (
    *("data.path", "data.text", "data.tokenizer"),  # where the set and what it was made of lie; its content is compared
    "allow_partial",
    "train.steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.tensorboard",
    *("engine.block_mib", "engine.block_rows", "engine.exchange_mib", "engine.kernels"),
    "mesh.data",
    "mesh.latent",
    "mesh.member",
)
# What belongs to the one pass over the data that the members of a set share; all other settings are a member's own.
SHARED = ("batch_size", "order_seed", "checkpoint_every", "log_every", "tensorboard")


@dataclass(frozen=True)
class TrainConfig:
    """Length, data order, optimiser and bookkeeping of a run."""

    steps: int = 10_000
    """optimiser steps"""
    batch_size: int = 8192
    """token activations a step, over all devices"""
    lr: float | None = None
    """learning rate; None = the variant's own at 2^14 latents (TopK: 2e-4) / sqrt(n_latents / 2^14)"""
    warmup_steps: int = 0
    """first steps, over which the rate rises linearly from 0"""
    decay_steps: int = 0
    """last steps, over which it falls to lr * decay_to"""
    decay: Literal["linear", "cosine"] = "linear"
    """shape of that fall"""
    decay_to: float = 0.0
    """share of the rate that is left at the end"""
    beta1: float | None = None
    """Adam's decay of the mean gradient; None = the variant's own (TopK: 0.9)"""
    beta2: float | None = None
    """Adam's decay of the mean squared gradient; None = the variant's own (TopK: 0.999)"""
    eps: float | None = None
    """what Adam adds to the root of the mean squared gradient; None = the variant's own (TopK: 6.25e-10)"""
    seed: int = 0
    """of the weights"""
    order_seed: int | None = None
    """of the order of the data; None = train.seed"""
    clip: float = 1.0
    """global gradient norm is cut to this; 0 = off"""
    ema: float = 0.999
    """decay of the averaged weights; 0 = none are kept"""
    moments: Precision = "float32"
    """how Adam's two moments of each matrix are kept: in 4, 2 or 1 bytes a weight each"""
    ema_dtype: Precision = "float32"
    """how the averaged weights are kept; int8 costs about 1 % of their FVU"""
    dead_after_tokens: int = 10_000_000
    """a latent that has not fired for this many tokens is dead"""
    checkpoint_every: int = 1000
    """a run that is killed repeats at most this many steps; saves begin twice as often"""
    log_every: int = 10
    """steps"""
    tensorboard: bool = False
    """also write metrics for TensorBoard, under RUN/tensorboard"""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "dead_after_tokens", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"train.{name}={getattr(self, name)} must be at least 1")
        if self.dead_after_tokens + self.batch_size >= 2**31:
            raise UsageError(f"train.dead_after_tokens={self.dead_after_tokens} must stay below 2^31 - batch_size")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise UsageError(f"train.lr={self.lr} must be above 0 and finite")
        if min(self.warmup_steps, self.decay_steps) < 0 or self.warmup_steps + self.decay_steps > self.steps:
            raise UsageError(
                f"train.warmup_steps={self.warmup_steps} and train.decay_steps={self.decay_steps} must be >= 0, and "
                f"together at most train.steps={self.steps}"
            )
        if not 0 <= self.decay_to <= 1:
            raise UsageError(f"train.decay_to={self.decay_to} must be in [0, 1]")
        for name in ("beta1", "beta2"):
            if not 0 <= (getattr(self, name) or 0.0) < 1:
                raise UsageError(f"train.{name}={getattr(self, name)} must be in [0, 1)")
        if self.eps is not None and not 0 < self.eps < math.inf:
            raise UsageError(f"train.eps={self.eps} must be above 0 and finite")
        if not 0 <= self.clip < math.inf:
            raise UsageError(f"train.clip={self.clip} must be >= 0 and finite; 0 turns it off")
        if not 0 <= self.ema < 1:
            raise UsageError(f"train.ema={self.ema} must be in [0, 1); 0 turns it off")
        for name in ("moments", "ema_dtype"):
            if getattr(self, name) not in get_args(Precision):
                allowed = ", ".join(get_args(Precision))
                raise UsageError(f"train.{name}={getattr(self, name)!r} does not exist; there are: {allowed}")
        for name in ("seed", "order_seed"):
            if not 0 <= (getattr(self, name) or 0) < 2**31:
                raise UsageError(f"train.{name}={getattr(self, name)} must be in [0, 2^31)")

    @property
    def order(self) -> int:
        """Seed of the order of the data."""
        return self.seed if self.order_seed is None else self.order_seed


def learning_rate(config: TrainConfig, sae: SaeConfig) -> float:
    """The configured peak rate, or the variant's / sqrt(n_latents / 2^14) (Gao et al. 2024, arXiv 2406.04093, A.3)."""
    return config.lr if config.lr is not None else sae.ADAM.lr / (sae.n_latents / 2**14) ** 0.5


def hyperparameters(config: TrainConfig, sae: SaeConfig) -> Hyperparameters:
    """What a compiled program takes as data of these settings."""
    return Hyperparameters(
        seed=jnp.int32(config.seed),
        lr=jnp.float32(learning_rate(config, sae)),
        clip=jnp.float32(config.clip),
        ema=jnp.float32(config.ema),
        dead_after=jnp.int32(config.dead_after_tokens),
        coefficients=sae.coefficients,
    )


def program(config: TrainConfig) -> TrainConfig:
    """What is compiled for this config: settings that are data, or that steps never see, stand at fixed values."""
    return replace(
        config,
        # How long a run is matters to its steps only where the rate falls at the end.
        **{"steps": config.steps if config.decay_steps else max(1, config.warmup_steps)},
        **{"lr": None, "seed": 0, "dead_after_tokens": 1},
        **{"order_seed": None, "checkpoint_every": 1, "log_every": 1, "tensorboard": False},
        **{"clip": float(config.clip > 0), "ema": 0.5 * (config.ema > 0)},
    )
