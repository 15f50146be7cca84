"""circuit-tracer: what its pages show of the latents in an attribution graph, as version 0.5 reads it.

    latents/Z.json                a latent by itself, for graphs served from this machine with scan ./data/NAME/latents
    features/index.json.gz        {layer: {filename, offsets}} and
    features/layer_I.bin          the same latents, compressed, for graphs with scan OWNER/REPO or OWNER/REPO//FOLDER,
                                  which a browser reads from the Hugging Face hub

Z is the number that pairs a layer and a latent of it: (i + n)(i + n + 1) / 2 + n. A record in a .bin is the length of
what follows (4 bytes, little-endian) and JSON under zlib. Layers of an earlier export in the folder stay, so that
transcoders exported one after the other make a set.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sae_jax import storage
from sae_jax.pages.export import Exported, examples, json_bytes, layer_of, numbers
from sae_jax.pages.latents import Latent
from sae_jax.progress import say_once
from sae_jax.record import Record

NAME = "circuit-tracer"
MOST_FILES = 2**17  # of latents by themselves: more are a burden to a disk
_SIGNS = str.maketrans({"\n": "\u23ce", "\t": "\u2192", "\r": "\u21b5"})  # as its graphs have them


def check(record: Record) -> None:
    """See the package."""
    if not _is_cross_layer(record):
        layer_of(record)


def write(folder: Path, exported: Exported, latents: Iterator[Latent], earlier: Path | None) -> None:
    """See the package."""
    singles, packed = folder / "latents", folder / "features"
    singles.mkdir()
    packed.mkdir()
    layers = _layers(exported)
    n_latents = exported.site.subject.table.n_latents
    with_singles = n_latents <= MOST_FILES
    if not with_singles:
        say_once(f"{n_latents:,} latents are too many for a file each: {NAME} can show them from a hub alone")
    index: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        files: dict[int, Any] = {}
        for latent in latents:
            layer, number = layers(latent.number)
            name = f"layer_{layer}.bin"
            if layer not in files:
                files[layer] = stack.enter_context((packed / name).open("wb"))
                index[str(layer)] = {"filename": name, "offsets": [0]}
            text = json_bytes(_latent(exported, latent, number))
            compressed = zlib.compress(text, 6)
            offsets = index[str(layer)]["offsets"]
            offsets += [offsets[-1]] * (number + 1 - len(offsets))  # of those that are not shown
            files[layer].write(len(compressed).to_bytes(4, "little") + compressed)
            offsets.append(files[layer].tell())
            if with_singles:
                (singles / f"{paired(layer, number)}.json").write_bytes(text)
    if earlier is not None:
        index = _kept(earlier, folder, index) | index
    content = json.dumps(dict(sorted(index.items(), key=lambda item: int(item[0]))))
    (packed / "index.json.gz").write_bytes(gzip.compress(content.encode(), mtime=0))


def paired(layer: int, latent: int) -> int:
    """The number of a latent of a layer."""
    return (layer + latent) * (layer + latent + 1) // 2 + latent


def unpaired(number: int) -> tuple[int, int]:
    """The layer and the latent of a number; the inverse of `paired`."""
    total = (math.isqrt(8 * number + 1) - 1) // 2
    latent = number - total * (total + 1) // 2
    return total - latent, latent


def _is_cross_layer(record: Record) -> bool:
    """Whether it is a cross-layer transcoder: latents of a group read the layer of the group."""
    return len(record.encodes) > 1 and record.sae.get("mask") == "weakly_causal"


def _layers(exported: Exported) -> Any:
    """From a number of a latent to its layer and its number there."""
    record = exported.record
    if _is_cross_layer(record):
        n_layers = len(record.encodes)
        size = exported.site.subject.table.n_latents // n_layers
        return lambda n: (min(n // size, n_layers - 1), n - size * min(n // size, n_layers - 1))
    layer = exported.layer
    return lambda n: (layer, n)


def _latent(exported: Exported, latent: Latent, number: int) -> dict[str, Any]:
    table, ends = exported.site.subject.table, latent.logits
    values = table.of_latent(latent.number)[1] if latent.count else np.zeros(0, np.float32)
    quantiles = np.quantile(values, np.arange(1, 101) / 100) if len(values) else ()
    groups: dict[str, list[dict[str, Any]]] = {}
    for example in examples(latent):
        interval = example.interval
        name = (
            f"{interval[0]:.4g} to {interval[1]:.4g}, {interval[2]:,} of {latent.count:,}" if interval else "Strongest"
        )
        groups.setdefault(name, []).append(
            {
                "tokens_acts_list": example.values,
                "train_token_ind": example.peak,
                "is_repeated_datapoint": False,
                "tokens": _texts(exported, example.ids),
            }
        )
    return {
        "transcoder_id": exported.title,
        "index": number,
        "examples_quantiles": [{"quantile_name": name, "examples": group} for name, group in groups.items()],
        "top_logits": _texts(exported, ends.up[0]) if ends else [],
        "bottom_logits": _texts(exported, ends.down[0]) if ends else [],
        "act_min": 0.0,
        "act_max": numbers(latent.max)[0],
        "quantile_values": numbers(quantiles),
        "histogram": [] if latent.histogram is None else latent.histogram.tolist(),
        "activation_frequency": latent.count / max(table.n_rows, 1),
    }


def _texts(exported: Exported, ids: np.ndarray) -> list[str]:
    return [exported.tokens[int(token)].translate(_SIGNS) for token in ids]


def _kept(earlier: Path, folder: Path, index: dict[str, Any]) -> dict[str, Any]:
    """Bring other layers of an earlier export along; their part of its index."""
    packed = earlier / "features" / "index.json.gz"
    data = storage.read_bytes(packed)
    before = {} if data is None else storage.parse_json(gzip.decompress(data), packed, dict[str, dict[str, Any]])
    others = {layer: part for layer, part in before.items() if layer not in index}
    for part in others.values():
        if re.fullmatch(r"layer_\d+\.bin", part["filename"]):
            _link(earlier / "features" / part["filename"], folder / "features" / part["filename"])
    for path in (earlier / "latents").glob("*.json"):
        if path.stem.isdigit() and str(unpaired(int(path.stem))[0]) in others:
            _link(path, folder / "latents" / path.name)
    return others


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path, to)
    except OSError:  # of another disk, or one without links
        shutil.copyfile(path, to)
