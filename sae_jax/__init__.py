"""Very wide sparse autoencoders for language-model activations, split over many devices, in JAX.

    sae_jax.harvest("set", model="bundled")    activations of a language model on disk
    sae_jax.write_activations("set", rows)     a set from arrays you already have; sae_jax.open_activations("set")
    d = sae_jax.train(rows, n_latents=4096, k=32, steps=1000, batch_size=2048)
    code = d.encode(x); d.decode(code); d(x)   d.w_dec and the other arrays; d.record
    d.save("dictionary"); sae_jax.load("dictionary"); sae_jax.push(d, "you/yours"); sae_jax.load("hf:you/yours")

Each is a command, too: `sae-jax --help`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_jax.activations.ingest import write_activations
    from sae_jax.activations.source import RowSource
    from sae_jax.activations.store import ActivationSet, open_activations
    from sae_jax.artifact import Dictionary, save
    from sae_jax.interchange.convert import export, import_dictionary
    from sae_jax.interchange.publish import load, push
    from sae_jax.record import Record
    from sae_jax.runs import (
        advise,
        fit,
        harvest,
        live,
        plan,
        sweep,
        train,
        train_members,
    )
    from sae_jax.saes.base import AbstractSae
    from sae_jax.types import Code, UsageError, UserError
    from sae_jax.uses import (
        active,
        attribute,
        causal_tree,
        collect,
        dashboard,
        evaluate,
        explain,
        explore,
        find,
        quality,
        steer,
    )

__all__ = [
    "AbstractSae",
    "ActivationSet",
    "Code",
    "Dictionary",
    "Record",
    "RowSource",
    "UsageError",
    "UserError",
    "active",
    "advise",
    "attribute",
    "causal_tree",
    "collect",
    "dashboard",
    "evaluate",
    "explain",
    "explore",
    "export",
    "find",
    "fit",
    "harvest",
    "import_dictionary",
    "live",
    "load",
    "open_activations",
    "plan",
    "push",
    "quality",
    "save",
    "steer",
    "sweep",
    "train",
    "train_members",
    "write_activations",
]

__version__ = "0.1.0"

# Imported on first use: `sae-jax --help` must not wait for JAX.
_HOMES = {
    "AbstractSae": "sae_jax.saes.base",
    "ActivationSet": "sae_jax.activations.store",
    "Code": "sae_jax.types",
    "Dictionary": "sae_jax.artifact",
    "Record": "sae_jax.record",
    "RowSource": "sae_jax.activations.source",
    "UsageError": "sae_jax.errors",
    "UserError": "sae_jax.errors",
    "export": "sae_jax.interchange.convert",
    "import_dictionary": "sae_jax.interchange.convert",
    "load": "sae_jax.interchange.publish",
    "open_activations": "sae_jax.activations.store",
    "push": "sae_jax.interchange.publish",
    "save": "sae_jax.artifact",
    "write_activations": "sae_jax.activations.ingest",
    **dict.fromkeys(
        (
            *("active", "attribute", "causal_tree", "collect", "dashboard"),
            *("evaluate", "explain", "explore", "find", "quality", "steer"),
        ),
        "sae_jax.uses",
    ),
    **dict.fromkeys(
        ("advise", "fit", "harvest", "live", "plan", "sweep", "train", "train_members"),
        "sae_jax.runs",
    ),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sae_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
