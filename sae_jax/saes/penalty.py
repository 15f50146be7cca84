"""How heavy a sparsity penalty is: as it is told, or as a number of active latents needs it.

    led (no coefficient is given):    c = c_0 * exp(u)      u <- u + GAIN / steps * clip(ln(L0 / target_l0), -1, 1)

    L1    c_0 = START * sqrt(d / target_l0)      L0    c_0 = START * d / target_l0      START: of the variant

Latents of which target_l0 share the squared norm d of a row have values near sqrt(d / target_l0). An L1 penalty c takes
what contributes less than about c / 2, one of the number of latents what contributes less than sqrt(c): c_0 follows
from that. From there c is led by what batches show, over as many steps as the run has, and falls or rises by a factor
of exp(GAIN) at most. Ours, chosen on the bundled model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp

from sae_jax.saes import losses
from sae_jax.saes.base import Context, Counters, SaeConfig
from sae_jax.saes.init import Sample
from sae_jax.types import UsageError, Widths

GAIN = 10.0
LED = "log_coefficient"  # u, in Counters.extra


@dataclass(frozen=True)
class PenaltyConfig(SaeConfig):
    """What dictionaries with a penalty on their latents have to be told, beside its coefficient."""

    target_l0: float = 32.0
    """active latents a row that the penalty is led to, if no coefficient is given"""
    sparsity_warmup: float = 0.05
    """share of the run, the first, over which the penalty rises linearly from 0"""

    COEFFICIENT: ClassVar[str] = "l1_coefficient"
    COEFFICIENTS: ClassVar[tuple[str, ...]] = ("l1_coefficient", "target_l0")
    START: ClassVar[float] = 0.4  # see the head of this file

    def __post_init__(self) -> None:
        super().__post_init__()
        coefficient = getattr(self, self.COEFFICIENT) or 0.0
        losses.check_penalty(**{self.COEFFICIENT: coefficient, "sparsity_warmup": self.sparsity_warmup})
        if self.sparsity_warmup > 1:
            raise UsageError(f"sae.sparsity_warmup={self.sparsity_warmup} must be a share of the run, at most 1")
        if not 0 < self.target_l0 < math.inf:
            raise UsageError(f"sae.target_l0={self.target_l0} must be above 0 and finite")

    @property
    def is_led(self) -> bool:
        """Whether the penalty follows the number of active latents."""
        return getattr(self, self.COEFFICIENT) is None

    def initial_counters(self, sample: Sample) -> dict[str, jax.Array]:
        """u of the head of this file."""
        return {LED: jnp.float32(0)} if self.is_led else {}

    def check(self, widths: Widths, same: bool) -> None:
        """See SaeConfig."""
        super().check(widths, same)
        check_target(self)

    def start(self, width: int, target_l0: jax.Array) -> jax.Array:
        """c_0 of the head of this file, f32[], for rows of this width."""
        return self.START * jnp.sqrt(width / target_l0)


@dataclass(frozen=True)
class L1Config(PenaltyConfig):
    """The same for an L1 penalty beside a squared error."""

    l1_coefficient: float | None = None
    """weight of the penalty; None = as heavy as target_l0 needs it"""
    error: losses.Error = "summed"
    """which squared error the penalty stands beside, see saes/losses.py"""

    def start(self, width: int, target_l0: jax.Array) -> jax.Array:
        """See PenaltyConfig."""
        return super().start(width, target_l0) / (width if self.error == "mean" else 1)


def check_target(config: PenaltyConfig) -> None:
    """Refuse to lead a penalty to more active latents than there are."""
    if config.is_led and config.target_l0 > config.n_latents:
        raise UsageError(
            f"sae.target_l0={config.target_l0} must be at most sae.n_latents={config.n_latents}; lower it, or give "
            f"sae.{config.COEFFICIENT}"
        )


def how_to_have_fewer(config: SaeConfig) -> str:
    """Active latents, for messages."""
    if not isinstance(config, PenaltyConfig) or config.n_active is not None:
        return "lower sae.k"
    is_given = getattr(config, config.COEFFICIENT) is not None
    return f"raise sae.{config.COEFFICIENT}, or leave it out" if is_given else "lower sae.target_l0"


def weight(config: PenaltyConfig, context: Context, width: int) -> jax.Array:
    """The penalty's coefficient at this step, f32[]. `width`: of the rows of one source that are reconstructed."""
    if getattr(config, config.COEFFICIENT) is not None:
        return context.coefficient(config.COEFFICIENT, config.sparsity_warmup)
    start = config.start(width, context.hparams.coefficients["target_l0"]) * context.rising(config.sparsity_warmup)
    return start * jnp.exp(context.counters.extra[LED]) if config.is_led else start


def led(config: PenaltyConfig, context: Context, counters: Counters, l0: jax.Array) -> Counters:
    """The counters of a step with u as this batch leads it."""
    if not config.is_led:
        return counters
    excess = jnp.log(jnp.maximum(l0, 1e-3) / context.hparams.coefficients["target_l0"])
    moved = GAIN / context.hparams.steps.astype(jnp.float32) * jnp.clip(excess, -1.0, 1.0)
    u = context.counters.extra[LED] + jnp.where(context.done > config.sparsity_warmup, moved, 0.0)
    return replace(counters, extra={**counters.extra, LED: jax.lax.stop_gradient(u)})
