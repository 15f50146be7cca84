"""The JSON files of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sae_jax.types import UserError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError, naming the file, for anything else."""
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); get the file again") from None
    if not isinstance(parsed, dict):
        raise UserError(f"{path} is not a JSON object; get the file again")
    return parsed
