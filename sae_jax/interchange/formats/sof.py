"""Crosscoders of science-of-finetuning's crosscoder_learning: `config.json` with `dict_class`, and `model.safetensors`.

    encoder.weight [L, d, n]   encoder.bias [n]   decoder.weight [L, n, d]   decoder.bias [L, d]
    code_normalization_id      1 sum of a decoder's norms over layers, 2 norm over all, 3 a mixture, 4 none, 5 per layer
    activation_mean, activation_std [L, d], not a number where rows are as they are; activation_global_scale [L]
    BatchTopKCrossCoder: k, and threshold, which values times that norm have to exceed

Rows are (x - mean) times the scale of their layer, or over the deviation of each dimension where all scales are 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sae_jax.interchange.foreign import Files, Foreign, product, shape_of, shifted, take
from sae_jax.interchange.lazy import Lazy, side_by_side
from sae_jax.record import SourceRecord
from sae_jax.saes import crosscoder
from sae_jax.types import UserError

NAME = "sof"

CONFIG, WEIGHTS = "config.json", "model.safetensors"
NAMES = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
SCALING = ("activation_mean", "activation_std", "activation_global_scale")
CLASSES = ("CrossCoder", "BatchTopKCrossCoder")
SUM, ROOT, NONE = 1, 2, 4
EPSILON = 1e-8  # of theirs, where they divide


def is_here(files: Files) -> bool:
    """See formats/__init__.py."""
    return CONFIG in files.names and "dict_class" in (files.json(CONFIG) or {}) and WEIGHTS in files.names


def read(files: Files, k: int | None = None) -> Foreign:
    """See formats/__init__.py."""
    cfg, path, tensors = files.settings(CONFIG), files.folder / WEIGHTS, files.tensors(WEIGHTS)
    kind = cfg.require("dict_class", str)
    if kind not in CLASSES:
        raise UserError(f"{cfg.where}: dict_class {kind!r} is not read; those are {', '.join(CLASSES)}")
    arrays = take(tensors, path, NAMES, (*SCALING, "threshold"))
    n_layers, d, n_latents = shape_of(arrays["encoder.weight"], 3)
    if shape_of(arrays["decoder.weight"], 3) != (n_layers, n_latents, d):
        raise UserError(f"{path}: encoder.weight and decoder.weight disagree in their shapes; get the file again")
    if arrays["encoder.bias"].shape != (n_latents,) or shape_of(arrays["decoder.bias"]) != (n_layers, d):
        raise UserError(f"{path}: its biases are not of its {n_latents} latents and {n_layers} x {d}; get it again")
    layers = range(n_layers)
    ours = {
        "w_enc": side_by_side([arrays["encoder.weight"].picked(0, i).transposed() for i in layers], 1),
        "b_enc": arrays["encoder.bias"],
        "w_dec": side_by_side([arrays["decoder.weight"].picked(0, i) for i in layers], 1),
        "b_dec": Lazy.of(arrays["decoder.bias"].array().reshape(-1), arrays["decoder.bias"].name),
        "threshold": Lazy.zeros(()),
    }
    settings: dict[str, Any] = {"n_latents": n_latents, "k": min(32, n_latents), "activation": "relu"}
    changes: tuple[str, ...] = ()
    if kind == "BatchTopKCrossCoder":
        threshold = tensors.values.get("threshold")
        if not isinstance(threshold, float) or threshold < 0:
            raise UserError(f"{path}: has no threshold for rows by themselves; train it further, or set one")
        k = tensors.values.get("k")
        settings |= {"k": k if isinstance(k, int) else 0, "activation": "batch_topk"}
        ours["threshold"] = Lazy.of(np.asarray(threshold, np.float32))
        changes += _ranked(ours, tensors.values.get("code_normalization_id"), n_layers, path)
    changes += _unscaled(ours, arrays, n_layers, d, path)
    config = crosscoder.Config(input_norm="none", **settings)
    sources = tuple(SourceRecord(f"x{i}", d) for i in layers)
    return Foreign(config, ours, sources, sources, changes)


def _ranked(ours: dict[str, Lazy], kind: Any, n_layers: int, path: object) -> tuple[str, ...]:
    """Norms by which values are compared with the threshold, folded into the encoder."""
    if kind not in (SUM, ROOT, NONE):
        raise UserError(f"{path}: code_normalization_id {kind} is not read; 1, 2 and 4 are")
    if kind == NONE:
        return ()
    n_latents, width = ours["w_dec"].shape
    squares = np.zeros((n_latents, n_layers))
    for (rows, columns), values in ours["w_dec"].slabs():
        layer = np.arange(columns.start, columns.stop) // (width // n_layers)
        for i in range(n_layers):
            squares[rows, i] += np.square(values[:, layer == i].astype(np.float64)).sum(1)
    norms = np.sqrt(squares).sum(1) if kind == SUM else np.sqrt(squares.sum(1))
    ours["w_enc"] = ours["w_enc"].scaled(norms)
    ours["b_enc"] = Lazy.of((ours["b_enc"].array() * norms).astype(np.float32), ours["b_enc"].name)
    ours["w_dec"] = ours["w_dec"].scaled(1 / np.where(norms == 0, 1, norms))
    return ("norms of decoder rows, by which latents rank, were folded into the encoder: values are times the norm",)


def _unscaled(ours: dict[str, Lazy], arrays: dict[str, Lazy], n_layers: int, d: int, path: object) -> tuple[str, ...]:
    """How rows were scaled, folded into the weights."""
    if "activation_mean" not in arrays or "activation_std" not in arrays:
        return ()
    mean, deviation = (arrays[name].array().astype(np.float64).reshape(-1) for name in SCALING[:2])
    if mean.shape != (n_layers * d,) or deviation.shape != mean.shape:
        raise UserError(f"{path}: activation_mean and activation_std are not of its {n_layers} x {d}; get it again")
    if np.isnan(mean).any() or np.isnan(deviation).any():
        return ()
    scale = arrays["activation_global_scale"].array() if "activation_global_scale" in arrays else np.ones(n_layers)
    scale = scale.astype(np.float64).reshape(-1)
    if scale.shape != (n_layers,):
        raise UserError(f"{path}: activation_global_scale is not of its {n_layers} layers; get the file again")
    if (scale == 1).all():
        into = 1 / (deviation + EPSILON)
        out = deviation + EPSILON
    else:
        into, out = np.repeat(scale, d), 1 / (np.repeat(scale, d) + EPSILON)
    ours["b_enc"] = shifted(ours["b_enc"], -product(ours["w_enc"], into * mean))
    ours["w_enc"], ours["w_dec"] = ours["w_enc"].scaled(into, 1), ours["w_dec"].scaled(out, 1)
    b_dec = ours["b_dec"].array().astype(np.float64) * out + mean
    ours["b_dec"] = Lazy.of(b_dec.astype(np.float32), ours["b_dec"].name)
    return ("how rows were centred and scaled was folded into the weights",)
