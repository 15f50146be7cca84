"""Very wide sparse autoencoders for language-model activations, split over many devices, in JAX.

    sae_jax.write_activations("set", rows)     an activation set from arrays you already have
    sae_jax.open_activations("set")            read one
    sae = sae_jax.load("run")                  what `sae-jax train` made
    code = sae.encode(x); sae.decode(code); sae(x)

Everything else is a command: `sae-jax --help`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_jax.activations.ingest import write_activations
    from sae_jax.activations.store import ActivationSet, open_activations
    from sae_jax.saes.base import AbstractSae
    from sae_jax.training.checkpoint import load
    from sae_jax.types import Code, UsageError, UserError

__all__ = [
    "AbstractSae",
    "ActivationSet",
    "Code",
    "UsageError",
    "UserError",
    "load",
    "open_activations",
    "write_activations",
]

__version__ = "0.1.0"

# Imported on first use: `sae-jax --help` must not wait for JAX.
_HOMES = {
    "AbstractSae": "sae_jax.saes.base",
    "ActivationSet": "sae_jax.activations.store",
    "Code": "sae_jax.types",
    "UsageError": "sae_jax.types",
    "UserError": "sae_jax.types",
    "load": "sae_jax.training.checkpoint",
    "open_activations": "sae_jax.activations.store",
    "write_activations": "sae_jax.activations.ingest",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sae_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
