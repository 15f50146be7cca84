"""The JSON files of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_jax import storage
from sae_jax.types import UserError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError, naming the file, for anything else."""
    content = storage.read_json(path)
    if content is None:
        raise UserError(f"{path} is missing; get the file again")
    return content
