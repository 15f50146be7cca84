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
    """The dictionary in a line: "bundled · layer 2 · resid_post · 1,024 latents · k = 16 · topk"."""
    n_active = record.sae.get("k")
    size = [f"{record.sae['n_latents']:,} latents", *([f"k = {n_active}"] if n_active else []), record.variant]
    x, y = (_places(sources) for sources in (record.encodes, record.reconstructs))
    return " · ".join([*x, *([] if x == y else ["to", *y]), *size])


def without_folders(value: Any) -> Any:
    """A JSON value in which absolute paths are names alone: where its author keeps files is nobody's business."""
    if isinstance(value, dict):
        return {key: without_folders(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_folders(part) for part in value]
    if not isinstance(value, str):
        return value
    return Path(value).name if os.path.isabs(value) else _FOLDERS.sub("", value)


def _places(sources: Sequence[SourceRecord]) -> list[str]:
    """Models, layers and sites of sources: ["bundled", "layer 2", "resid_post"]."""
    models = dict.fromkeys(without_folders(source.model) for source in sources if source.model)
    hooks = [(source.hook or "").rpartition(".") for source in sources]
    if not all(layer.isdecimal() for _, _, layer in hooks):
        return [*models, " + ".join(source.name for source in sources)]
    layers = sorted({int(layer) for _, _, layer in hooks})
    points = dict.fromkeys(point for point, _, _ in hooks)
    return [*models, f"layer{'s' * (len(layers) > 1)} {_in_short(layers)}", " + ".join(points)]


def _in_short(numbers: Sequence[int]) -> str:
    """ "3 to 8", or each of them."""
    is_run = len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1
    return f"{numbers[0]} to {numbers[-1]}" if is_run else ", ".join(map(str, numbers))
