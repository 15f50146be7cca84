"""What objectives read beside weights and rows, for tests that call them by themselves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sae_jax.saes.base import Constants, Context, Counters, Hyperparameters
from sae_jax.saes.normalise import Scale


def context_of(
    silent: Any,
    dead_after: Any,
    loss_scale: Any,
    scale: Scale,
    extra: dict[str, Any] | None = None,
    coefficients: dict[str, Any] | None = None,
) -> Context:
    """The context of the first step of a run with these counters, constants and coefficients."""
    zero = jnp.float32(0)
    hparams = Hyperparameters(jnp.int32(0), jnp.int32(100), zero, zero, zero, jnp.int32(dead_after), coefficients or {})
    constants = Constants(jnp.float32(loss_scale), scale)
    return Context(jnp.int32(0), jax.random.key(0), Counters(silent, extra or {}), constants, hparams)


def with_silent(context: Context, silent: Any, extra: dict[str, Any] | None = None) -> Context:
    """The same with other counters."""
    counters = context.counters.replace(silent=silent, extra=context.counters.extra if extra is None else extra)
    return context.replace(counters=counters)
