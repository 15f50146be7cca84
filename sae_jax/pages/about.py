"""What pages say of a dictionary, without what its author would not publish."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_jax.record import Record, SourceRecord

# The folders of an absolute path inside other text: "hf:/home/...", "base=/home/...".
_FOLDERS = re.compile(r"(?<![^\s:=,])/(?!/)(?:[^/\s]+/)+")


def about(record: Record) -> str:
    """The dictionary in a line: "topk, 1,024 latents, k = 16, of resid_post.2 of bundled"."""
    n_active = record.sae.get("k")
    size = f"{record.variant}, {record.sae['n_latents']:,} latents{f', k = {n_active}' if n_active else ''}"
    x, y = (_named(sources) for sources in (record.encodes, record.reconstructs))
    return f"{size}, of {x}" if x == y else f"{size}, from {x} to {y}"


def without_folders(value: Any) -> Any:
    """A JSON value in which absolute paths are names alone: where its author keeps files is nobody's business."""
    if isinstance(value, dict):
        return {key: without_folders(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_folders(part) for part in value]
    if not isinstance(value, str):
        return value
    return Path(value).name if os.path.isabs(value) else _FOLDERS.sub("", value)


def _named(sources: Sequence[SourceRecord]) -> str:
    """Sources, and the language models that they come from."""
    models = {source.model: None for source in sources}
    names = " + ".join(source.name for source in sources)
    known = [without_folders(model) for model in models if model]
    return f"{names} of {' and '.join(known)}" if known else names
