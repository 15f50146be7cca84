"""circuit-tracer: what stands in for all MLPs of a model, as its version 0.5 loads it, with `config.yaml`.

    a transcoder for each layer       layer_{i}.safetensors: W_enc [n, d]   b_enc [n]   W_dec [n, d]   b_dec [d]
                                      and W_skip [d_out, d_in], activation_function.threshold [n], if any
    one cross-layer transcoder        W_enc_{i}.safetensors: W_enc_{i} [n, d]   b_enc_{i} [n]   b_dec_{i} [d]
                                      and threshold_{i} [n], if any
                                      W_dec_{i}.safetensors: W_dec_{i} [n, L - i, d], whose slot j writes layer i + j

Every layer from 0 on is there, with as many latents. b_dec is not subtracted from the input. A latent is active above
0, or strictly above its threshold: version 0.5 knows no selection of k latents. W_skip is applied as x W_skip^T.

A cross-layer transcoder is a crosscoder of ours with mask=weakly_causal: latents of group i read layer i and write i
and later ones. Its matrices hold zeros for all other layers, so they are larger here than there. Of a set, each file is
a transcoder by itself, imported into a folder of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sae_jax import storage
from sae_jax.interchange.foreign import Files, Foreign, Ours, log_threshold, refuse, shape_of, take
from sae_jax.interchange.formats import mwhanna
from sae_jax.interchange.lazy import Lazy, side_by_side
from sae_jax.interchange.tensors import write_safetensors
from sae_jax.record import SourceRecord
from sae_jax.saes import crosscoder, transcoder
from sae_jax.saes.normalise import PER_VECTOR
from sae_jax.types import UsageError, UserError

NAME = "circuit_tracer"
NEEDS_THRESHOLD = True

CONFIG = "config.yaml"
# Our points of a block in its words. It wraps MLPs: what goes in is normalised, times the norm's weight.
READS = {"mlp_in": "mlp.hook_in", "resid_mid": "hook_resid_mid"}
WRITES = {"mlp_out": "hook_mlp_out", "mlp_raw": "mlp.hook_out"}


def is_here(files: Files) -> bool:
    """See formats/__init__.py."""
    # With one layer it could be mwhanna's, which is the same.
    is_set = {CONFIG, "layer_0.safetensors", "layer_1.safetensors"} <= {*files.names} and files.given is None
    return is_set or ("W_enc_0.safetensors" in files.names and "W_dec_0.safetensors" in files.names)


def read_set(files: Files, k: int | None = None) -> dict[str, Foreign]:
    """See formats/__init__.py: transcoders of all layers; {} of a cross-layer transcoder."""
    if "W_enc_0.safetensors" in files.names:
        return {}
    found = (re.fullmatch(r"layer_(\d{1,4})\.safetensors", name) for name in files.names)
    layers = sorted(int(match[1]) for match in found if match)
    if layers != [*range(len(layers))]:
        there = ", ".join(map(str, layers))
        raise UserError(f"{files.folder} has layers {there}, which are not all from 0 on; get the others")
    settings = _settings(files)
    if settings.get("activation") == "topk":
        k = storage.as_type(settings.get("k"), int, f"{files.folder / CONFIG}: k")
    members = {}
    for i in layers:
        name = f"layer_{i}.safetensors"
        foreign = mwhanna.read(replace(files, names=(name, CONFIG), given=name), k)
        sides = zip(_sources(settings, [i], 0), (foreign.encodes, foreign.reconstructs), strict=True)
        x, y = (tuple(replace(named[0], width=one.width) for one in measured) for named, measured in sides)
        members[f"layer_{i}"] = replace(foreign, encodes=x, reconstructs=y)
    return members


def read(files: Files, k: int | None = None) -> Foreign:
    """See formats/__init__.py: a cross-layer transcoder."""
    n_layers = sum(re.fullmatch(r"W_enc_\d+\.safetensors", name) is not None for name in files.names)
    encoders, decoders, biases, thresholds = [], [], {"b_enc": [], "b_dec": []}, []
    names = ("W_enc_0", "b_enc_0", "b_dec_0")
    first = take(files.tensors("W_enc_0.safetensors"), files.folder, names, ("threshold_0",))
    n_latents, d = shape_of(first["W_enc_0"])
    for i in range(n_layers):
        encoder, decoder = _layer(files, i, n_latents, n_layers, d)
        encoders.append(_beside_zeros(encoder[f"W_enc_{i}"], i * d, n_layers * d))
        parts = [decoder.picked(1, j) for j in range(n_layers - i)]
        decoders.append(_beside_zeros(side_by_side(parts, 1), i * d, n_layers * d))
        for name, of_layers in biases.items():
            of_layers.append(encoder[f"{name}_{i}"])
        thresholds += [encoder[f"threshold_{i}"].array()] if f"threshold_{i}" in encoder else []
    if thresholds and len(thresholds) < n_layers:
        raise UserError(f"{files.folder}: {len(thresholds)} of {n_layers} layers have thresholds; get the others again")
    total = n_layers * n_latents
    arrays = {"w_enc": side_by_side(encoders, 0), "w_dec": side_by_side(decoders, 0)}
    arrays |= {name: side_by_side(of_layers, 0) for name, of_layers in biases.items()}
    arrays["threshold"] = Lazy.of(np.zeros((), np.float32))
    said: tuple[str, ...] = ()
    if thresholds:
        arrays["log_threshold"], said = log_threshold(np.concatenate(thresholds), files.folder)
    config = crosscoder.Config(
        n_latents=total,
        k=min(32, total),
        activation="jumprelu" if thresholds else "relu",
        mask="weakly_causal",
        input_norm="none",
    )
    encodes, reconstructs = _sources(_settings(files), range(n_layers), d)
    return Foreign(config, arrays, encodes, reconstructs, said)


def write(ours: Ours, folder: Path) -> None:
    """See formats/__init__.py: of a cross-layer transcoder, or of a model of one layer."""
    if isinstance(ours.config, crosscoder.Config):
        _write_cross_layer(ours, ours.config, folder)
    else:
        write_set([ours], folder)


def write_set(members: Sequence[Ours], folder: Path) -> None:
    """Transcoders of all layers of a model. UsageError where one is missing or of another width."""
    for ours in members:
        config = ours.config
        if not isinstance(config, transcoder.Config):
            raise refuse(NAME, config, "it takes transcoders, and crosscoders with mask=weakly_causal", "train one")
        _refuse_norm(ours)
    ordered = sorted(members, key=lambda ours: _point(ours, ours.record.encodes[0])[1])
    sources = [(ours.record.encodes[0], ours.record.reconstructs) for ours in ordered]
    if any(len(targets) > 1 for _, targets in sources):
        raise UsageError(f"{NAME}: a transcoder of one layer writes one; for several train a crosscoder")
    hooks = _hooks(ordered, [encodes for encodes, _ in sources], [targets[0] for _, targets in sources])
    widths = {(ours.config.n_latents, *map(sum, ours.record.widths)) for ours in ordered}
    if len(widths) > 1:
        told = ", ".join(f"{n:,} latents for d={x} to {y}" for n, x, y in sorted(widths))
        raise UsageError(f"{NAME} has one width for all layers, and these are {told}; train them alike")
    for i, ours in enumerate(ordered):
        arrays = {name: ours.arrays[name.lower()] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        if "w_skip" in ours.arrays:
            arrays["W_skip"] = ours.arrays["w_skip"]
        if "log_threshold" in ours.arrays:
            arrays["activation_function.threshold"] = Lazy.of(ours.threshold)
        write_safetensors(folder / f"layer_{i}.safetensors", arrays)
    _write_config(folder, "transcoder_set", hooks, ordered[0].record.encodes[0])


def _write_cross_layer(ours: Ours, config: crosscoder.Config, folder: Path) -> None:
    if config.mask != "weakly_causal":
        cure = "train with sae.mask=weakly_causal, on mlp_in of all layers to mlp_out of all"
        raise refuse(
            NAME, config, f"its latents read one layer and write that and later ones, not mask={config.mask}", cure
        )
    _refuse_norm(ours)
    encodes, reconstructs = ours.record.encodes, ours.record.reconstructs
    n_layers, (d, *others) = len(encodes), (source.width for source in encodes + reconstructs)
    hooks = _hooks([ours] * n_layers, encodes, reconstructs)
    if {d} != {d, *others}:
        raise refuse(NAME, config, "it has layers of one width", "train on layers that are as wide")
    n_latents, rest = divmod(config.n_latents, n_layers)
    if rest:
        cure = f"train with sae.n_latents={n_latents * n_layers or n_layers}"
        raise refuse(NAME, config, f"it has as many latents for each of the {n_layers} layers", cure)
    has_threshold = config.activation != "relu"
    for i in range(n_layers):
        of_layer, here = (i * n_latents, (i + 1) * n_latents), (i * d, (i + 1) * d)
        arrays = {
            f"W_enc_{i}": ours.arrays["w_enc"].part(0, *of_layer).part(1, *here),
            f"b_enc_{i}": ours.arrays["b_enc"].part(0, *of_layer),
            f"b_dec_{i}": ours.arrays["b_dec"].part(0, *here),
        }
        if has_threshold:
            arrays[f"threshold_{i}"] = Lazy.of(ours.threshold[slice(*of_layer)])
        write_safetensors(folder / f"W_enc_{i}.safetensors", arrays)
        later = ours.arrays["w_dec"].part(0, *of_layer).part(1, i * d, n_layers * d)
        write_safetensors(folder / f"W_dec_{i}.safetensors", {f"W_dec_{i}": later.cut(n_layers - i)})
    _write_config(folder, "cross_layer_transcoder", hooks, encodes[0])


def _write_config(folder: Path, kind: str, hooks: tuple[str, str], source: SourceRecord) -> None:
    content = {
        "model_name": (source.model or "unknown").partition("@")[0],
        "model_kind": kind,
        "feature_input_hook": hooks[0],
        "feature_output_hook": hooks[1],
        "scan": None,
    }
    storage.write_text(folder / CONFIG, yaml.safe_dump(content, sort_keys=False))


def _refuse_norm(ours: Ours) -> None:
    if ours.config.input_norm in PER_VECTOR:
        why = f"it has no norm of each vector, such as input_norm={ours.config.input_norm}"
        raise refuse(NAME, ours.config, why, "train with a dataset_* norm")


def _hooks(members: Sequence[Ours], reads: Sequence[SourceRecord], writes: Sequence[SourceRecord]) -> tuple[str, str]:
    """What is read and written in its words. UsageError if that is not the same place of every layer from 0 on."""
    found = []
    for sources, words in ((reads, READS), (writes, WRITES)):
        points = [_point(ours, source) for ours, source in zip(members, sources, strict=True)]
        if [layer for _, layer in points] != [*range(len(points))]:
            layers = ", ".join(str(layer) for _, layer in points)
            raise UsageError(f"{NAME} needs every layer of the model, from 0 on and once each; these are {layers}")
        if len(names := {point for point, _ in points}) > 1 or not names <= words.keys():
            what = f"from {' or '.join(READS)} to {' or '.join(WRITES)}"
            raise UsageError(f"{NAME} replaces MLPs, {what}, not {', '.join(sorted(names))}")
        found.append(words[names.pop()])
    return found[0], found[1]


def _point(ours: Ours, source: SourceRecord) -> tuple[str, int]:
    name = source.hook or source.name
    point, _, layer = name.rpartition(".")
    if not (layer.isdecimal() and len(layer) < 5):
        raise refuse(
            NAME, ours.config, f"it needs to know the layer, and {name!r} names none", "name sources as mlp_in.3"
        )
    return point, int(layer)


def _layer(files: Files, i: int, n_latents: int, n_layers: int, d: int) -> tuple[dict[str, Lazy], Lazy]:
    """The arrays of one layer. UserError where a shape is another one."""
    name = f"W_enc_{i}.safetensors"
    names = (f"W_enc_{i}", f"b_enc_{i}", f"b_dec_{i}")
    encoder = take(files.tensors(name), files.folder / name, names, (f"threshold_{i}",))
    name = f"W_dec_{i}.safetensors"
    decoder = take(files.tensors(name), files.folder / name, (f"W_dec_{i}",))[f"W_dec_{i}"]
    shapes: dict[str, Any] = {f"W_enc_{i}": (n_latents, d), f"b_enc_{i}": (n_latents,), f"b_dec_{i}": (d,)}
    shapes[f"threshold_{i}"] = (n_latents,)
    for each, array in {**encoder, f"W_dec_{i}": decoder}.items():
        expected = shapes.get(each, (n_latents, n_layers - i, d))
        if array.shape != expected:
            raise UserError(
                f"{array.name} has shape {list(array.shape)}, where {list(expected)} is needed; get it again"
            )
    return encoder, decoder


def _beside_zeros(array: Lazy, before: int, width: int) -> Lazy:
    """[n, w] as [n, width], with zeros around it."""
    n, after = array.shape[0], width - before - array.shape[1]
    parts = [Lazy.zeros((n, before)), array, Lazy.zeros((n, after))]
    padded = side_by_side([part for part in parts if part.shape[1]], 1)
    return replace(padded, name=array.name, kind=array.kind)


def _settings(files: Files) -> dict[str, Any]:
    """What config.yaml says; {} without it."""
    path = files.folder / CONFIG
    if CONFIG not in files.names:
        return {}
    content = storage.parse_yaml(storage.read_limited(path).decode(errors="replace"), path)
    return storage.as_type(content, dict[str, Any], path)


def _sources(settings: dict[str, Any], layers: Sequence[int], d: int) -> list[tuple[SourceRecord, ...]]:
    """What is read and what is written in each layer."""
    model, sides = settings.get("model_name"), []
    for key, words in (("feature_input_hook", READS), ("feature_output_hook", WRITES)):
        theirs = str(settings.get(key, "unknown"))
        point = next((ours for ours, each in words.items() if each == theirs), None)
        names = [f"{point or theirs}.{i}" for i in layers]
        hooks = names if point else [None] * len(names)
        of_model = model if isinstance(model, str) else None
        sides.append(tuple(SourceRecord(name, d or 1, hook, of_model) for name, hook in zip(names, hooks, strict=True)))
    return sides
