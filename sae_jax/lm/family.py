"""What a file in families/ says about its family: how its config.json is read, and where checkpoints hold tensors.

A new family is one new file there, with a `FAMILY`. Where it needs a kind of norm, position or MLP that no family had
before, it also adds that kind to spec.py, params.py and block.py.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from sae_jax.lm.spec import Spec, UnsupportedError


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a checkpoint holds a parameter, and how."""

    name: str  # of the tensor in a full checkpoint; "{layer}" stands for the number of the layer
    transposed: bool = False  # a matrix is (out, in) there
    part: int = 0  # of n_parts equal ones, side by side on the axis of outputs
    n_parts: int = 1
    by_head: bool = False  # the parts alternate: all of the first head, all of the second


@dataclasses.dataclass(frozen=True)
class Family:
    """How one `model_type` is read and written."""

    architecture: str  # class name that Hugging Face configs state
    read_spec: Callable[[Mapping[str, Any]], Spec]  # config.json -> Spec
    write_config: Callable[[Spec], dict[str, Any]]  # the inverse
    prefixes: tuple[str, ...]  # one of which tensors of full checkpoints have and those of base checkpoints lack
    stored: Mapping[str, Stored]  # parameter (params.py) -> tensor
    modules: Mapping[str, str]  # point -> the module of transformers that has this input or output; see hooks.py
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)  # name of a tensor in some files -> in others
    buffers: tuple[str, ...] = ()  # tensors of a block, without prefix, that hold no weight, such as the causal mask

    def bare(self, name: str) -> str:
        """The name of a tensor as base checkpoints have it."""
        prefix = next((prefix for prefix in self.prefixes if name.startswith(prefix)), "")
        return self.renamed.get(name, name).removeprefix(prefix)


def families() -> list[str]:
    """The supported values of `model_type`: the files of families/."""
    package = importlib.import_module("sae_jax.lm.families")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def family(model_type: str) -> Family:
    """The family of one of `families()`."""
    return importlib.import_module(f"sae_jax.lm.families.{model_type}").FAMILY


def family_of(config: Mapping[str, Any], reference: str) -> Family:
    """The family of a parsed config.json. Raises UnsupportedError, naming `reference`, if there is none."""
    model_type = config.get("model_type")
    if model_type not in families():
        raise UnsupportedError(
            f"model {reference!r} has model_type {model_type!r}, which is not supported; supported: "
            f"{', '.join(families())}"
        )
    return family(model_type)
