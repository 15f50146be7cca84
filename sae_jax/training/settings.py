"""The settings of a run, and which of them a compiled program takes as data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import jax.numpy as jnp

from sae_jax.saes.base import Hyperparameters, SaeConfig
from sae_jax.types import UsageError

Precision = Literal["float32", "bfloat16", "int8"]
Tracker = Literal["wandb", "tensorboard"]

DECAY = 0.2  # share of a run over which its rate falls
MAX_DEAD_AFTER = 10_000_000  # tokens (Gao et al. 2024, arXiv 2406.04093, A.3)
FITTED = 8192  # latents up to which rates of short runs were measured
SHORTEST = 100  # steps; a shorter run takes this one's rate, as ever higher ones leave more than they find

# What may differ when a run is resumed: everything else would make it another run.
MAY_CHANGE = (
    *("data.path", "data.text", "data.tokenizer"),  # where the set and what it was made of lie; its content is compared
    "allow_partial",
    "train.steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.log",
    *("engine.block_mib", "engine.block_rows", "engine.exchange_mib", "engine.kernels"),
    "mesh.data",
    "mesh.latent",
    "mesh.member",
)
# Shares of the run: where one is not 0, train.steps may not change either.
SHARES = ("train.warmup", "train.decay", "sae.sparsity_warmup")
# What belongs to the one pass over the data that the members of a set share; all other settings are a member's own.
SHARED = ("batch_size", "order_seed", "checkpoint_every", "log_every", "log")


def as_now(train: dict[str, Any]) -> dict[str, Any]:
    """The settings in the record of a run, under the names that they have today."""
    if "tensorboard" not in train:
        return train
    rest = {name: value for name, value in train.items() if name != "tensorboard"}
    return {**rest, "log": ["tensorboard"] * bool(train["tensorboard"])}


@dataclass(frozen=True)
class TrainConfig:
    """Length, data order, optimiser and bookkeeping of a run."""

    steps: int = 10_000
    """optimiser steps"""
    batch_size: int = 8192
    """token activations a step, over all devices"""
    lr: float | None = None
    """learning rate; None = by width and steps, from the variant's own, see docs/variants.md"""
    warmup: float = 0.0
    """share of the steps, the first, over which the rate rises linearly from 0"""
    decay: float | None = None
    """share of the steps, the last, over which it falls to lr * decay_to; None = 0.2, and 0 in a sweep"""
    decay_shape: Literal["linear", "cosine"] = "linear"
    """of that fall"""
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
    weights: Literal["float32", "bfloat16"] = "float32"
    """how each matrix is kept. bfloat16: rounded stochastically, with gradients that are made a range of latents at a
    time, so that none is as large as the weights"""
    moments: Precision = "float32"
    """how Adam's two moments of each matrix are kept: in 4, 2 or 1 bytes a weight each"""
    ema_dtype: Precision = "float32"
    """how the averaged weights are kept; int8 costs about 1 % of their FVU"""
    dead_after_tokens: int | None = None
    """a latent that has not fired for this many tokens is dead; None = a tenth of the run, at most 10 million"""
    checkpoint_every: int = 1000
    """a run that is killed repeats at most this many steps; saves begin twice as often"""
    log_every: int = 10
    """steps"""
    log: tuple[Tracker, ...] = ()
    """what follows metrics.jsonl: wandb, tensorboard (under RUN/tensorboard) or both; see docs/trackers.md"""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "dead_after_tokens", "checkpoint_every", "log_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"train.{name}={getattr(self, name)} must be at least 1")
        if (self.dead_after_tokens or 0) + self.batch_size >= 2**31:
            raise UsageError(f"train.dead_after_tokens={self.dead_after_tokens} must stay below 2^31 - batch_size")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise UsageError(f"train.lr={self.lr} must be above 0 and finite")
        if not (self.warmup >= 0 and self.decay_share >= 0 and self.warmup + self.decay_share <= 1):
            raise UsageError(
                f"train.warmup={self.warmup} and train.decay={self.decay_share} must be shares of the run, >= 0 and "
                f"together at most 1"
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
        for name in self.log:
            if name not in get_args(Tracker):
                raise UsageError(f"train.log={name!r} does not exist; there are: {', '.join(get_args(Tracker))}")
        if len(set(self.log)) < len(self.log):
            raise UsageError(f"train.log={' '.join(self.log)} names one twice; name each once")
        if self.weights not in ("float32", "bfloat16"):
            raise UsageError(f"train.weights={self.weights!r} does not exist; there are: float32, bfloat16")
        for name in ("seed", "order_seed"):
            if not 0 <= (getattr(self, name) or 0) < 2**31:
                raise UsageError(f"train.{name}={getattr(self, name)} must be in [0, 2^31)")

    @property
    def decay_share(self) -> float:
        """Share of the steps over which the rate falls."""
        return DECAY if self.decay is None else self.decay

    @property
    def order(self) -> int:
        """Seed of the order of the data."""
        return self.seed if self.order_seed is None else self.order_seed


def settled(config: TrainConfig, sae: SaeConfig) -> TrainConfig:
    """The same with all that may be left out as it is for this dictionary: rate, decay, and when a latent is dead.

    Raises UsageError for weights that this variant cannot be trained in.
    """
    if config.weights != "float32" and not sae.BY_PAIRS:
        raise UsageError(
            f"train.weights={config.weights} is for dictionaries of k latents a row with unit rows (topk, batch_topk, "
            f"matryoshka), not for sae.variant={sae.variant}; use float32"
        )
    return replace(
        config,
        lr=learning_rate(config, sae),
        decay=config.decay_share,
        dead_after_tokens=config.dead_after_tokens or min(MAX_DEAD_AFTER, -(-config.steps * config.batch_size // 10)),
    )


def learning_rate(config: TrainConfig, sae: SaeConfig) -> float:
    """The configured peak rate, or the larger of the variant's own at this width and of what a short run needs.

    A variant's own rate is that of its authors at their width, and falls as the root of the number of latents (Gao et
    al. 2024, arXiv 2406.04093, A.3). It is for runs of many steps. What short runs need is fitted to TopK of 256 to
    8,192 latents and 500 to 1,500 steps of 2,048 rows (experiments/learning_rate.py), and up to twice as much for L1
    penalties at 1,024 latents; elsewhere it is a guess, which falls as theirs beyond FITTED. A run of fewer than
    SHORTEST steps takes the rate of SHORTEST.
    """
    if config.lr is not None:
        return config.lr
    own = sae.ADAM.lr * math.sqrt(sae.ADAM.n_latents / sae.n_latents)
    beyond = max(1.0, sae.n_latents / FITTED)
    by_width = (sae.n_latents / beyond) ** (1 / 3) * beyond ** (1 / 2)
    short = sae.ADAM.short_run / by_width / math.sqrt(max(config.steps, SHORTEST))
    return max(own, short)


def hyperparameters(config: TrainConfig, sae: SaeConfig) -> Hyperparameters:
    """What a compiled program takes as data of these settings."""
    config = settled(config, sae)
    return Hyperparameters(
        seed=jnp.int32(config.seed),
        steps=jnp.int32(config.steps),
        lr=jnp.float32(config.lr),
        clip=jnp.float32(config.clip),
        ema=jnp.float32(config.ema),
        dead_after=jnp.int32(config.dead_after_tokens),
        coefficients=sae.coefficients,
    )


def program(config: TrainConfig) -> TrainConfig:
    """What is compiled for this config: settings that are data, or that steps never see, stand at fixed values."""
    return replace(
        config,
        **{"steps": 1, "lr": None, "seed": 0, "dead_after_tokens": 1, "decay": config.decay_share},
        **{"order_seed": None, "checkpoint_every": 1, "log_every": 1, "log": ()},
        **{"clip": float(config.clip > 0), "ema": 0.5 * (config.ema > 0)},
    )
