"""saprmarks' dictionary_learning: `ae.pt`, a file of torch, and `config.json`, where trainer.dict_class says which.

    AutoEncoder                  bias [d], encoder.weight [n, d], encoder.bias [n], decoder.weight [d, n]
    AutoEncoderNew               the same with decoder.bias [d]; nothing is subtracted before encoding
    GatedAutoEncoder             decoder_bias [d], encoder.weight, r_mag, gate_bias, mag_bias [n], decoder.weight
    JumpReluAutoEncoder          W_enc [d, n], b_enc, W_dec [n, d], b_dec, threshold [n]; nothing is subtracted
    AutoEncoderTopK              encoder.weight, encoder.bias, decoder.weight, b_dec, k, threshold (-1: not set)
    BatchTopKSAE                 the same; rows by themselves are active above the threshold
    MatryoshkaBatchTopKSAE       W_enc [d, n], b_enc, W_dec [n, d], b_dec, k, threshold, group_sizes

The library scales decoder rows of an AutoEncoder to norm 1 when it loads them: so do we.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from sae_jax import storage
from sae_jax.interchange.foreign import (
    Files,
    Foreign,
    Ours,
    autoencoder,
    fold_norms,
    product,
    refuse,
    shape_of,
    shifted,
    sources,
    take,
)
from sae_jax.interchange.lazy import Lazy
from sae_jax.interchange.tensors import Tensors, write_torch
from sae_jax.saes import batch_topk, gated, matryoshka
from sae_jax.saes.base import SaeConfig
from sae_jax.saes.normalise import PER_VECTOR
from sae_jax.types import UserError

NAME = "dictionary_learning"
NEEDS_THRESHOLD = False

WEIGHTS, CONFIG = "ae.pt", "config.json"
LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
ARRAYS = {
    "AutoEncoder": (*LINEAR, "bias"),
    "AutoEncoderNew": (*LINEAR, "decoder.bias"),
    "GatedAutoEncoder": ("encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias"),
    "JumpReluAutoEncoder": (*PLAIN, "threshold"),
    "AutoEncoderTopK": (*LINEAR, "b_dec"),
    "BatchTopKSAE": (*LINEAR, "b_dec"),
    "MatryoshkaBatchTopKSAE": PLAIN,
}
POINTS = {"resid_post": "resid_post", "resid": "resid_post", "mlp_out": "mlp_out", "attn_out": "attn_out"}


def is_here(files: Files) -> bool:
    """See formats/__init__.py."""
    one = files.one
    if one is None or not one.endswith(".pt"):
        return False
    trainer = (files.json(CONFIG) or {}).get("trainer")
    return (isinstance(trainer, dict) and "dict_class" in trainer) or _class_of(files.tensors(one)) is not None


def read(files: Files, k: int | None = None) -> Foreign:
    """See formats/__init__.py."""
    name = files.one or WEIGHTS
    path, tensors = files.folder / name, files.tensors(name)
    trainer = files.settings(CONFIG).below("trainer") if CONFIG in files.names else None
    kind = trainer.get("dict_class", str) if trainer else None
    kind = kind or _class_of(tensors)
    if kind not in ARRAYS:
        raise UserError(f"{path}: dict_class {kind!r} is not read; those are {', '.join(ARRAYS)}")
    if trainer is None and kind == "AutoEncoderTopK":
        raise UserError(
            f"{path}: without {CONFIG} nothing says whether k are active in a row or in a batch; get it, too"
        )
    arrays = take(tensors, path, ARRAYS[kind])
    bias = arrays[next(name for name in ("b_dec", "bias", "decoder.bias", "decoder_bias") if name in arrays)]
    if "W_enc" in arrays:
        ours = {"w_enc": arrays["W_enc"].transposed(), "w_dec": arrays["W_dec"], "b_enc": arrays["b_enc"]}
    else:
        ours = {"w_enc": arrays["encoder.weight"], "w_dec": arrays["decoder.weight"].transposed()}
        ours["b_enc"] = arrays["mag_bias" if kind == "GatedAutoEncoder" else "encoder.bias"]
    ours["b_dec"] = bias
    n_latents, d = shape_of(ours["w_enc"])
    if ours["b_enc"].shape != (n_latents,) or shape_of(ours["w_dec"]) != (n_latents, d):
        raise UserError(f"{path}: its arrays are not all of {n_latents} latents and d={d}; get the file again")
    config, ours, changes = _read(kind, ours, arrays, tensors, path)
    words = trainer.get("submodule_name", str) if trainer else None
    layer = trainer.get("layer", int) if trainer else None
    found = re.match(r"(resid_post|mlp_out|attn_out|resid)", words or "")
    hook = f"{POINTS[found[1]]}.{layer}" if found and layer is not None else None
    model = trainer.get("lm_name", str) if trainer else None
    return Foreign(config, ours, *sources(hook, d, model, words), changes)


def write(ours: Ours, folder: Path) -> None:
    """See formats/__init__.py."""
    config, arrays = ours.config, ours.arrays
    if config.input_norm in PER_VECTOR:
        raise refuse(NAME, config, f"it has no input_norm={config.input_norm}", "train with a dataset_* norm")
    if config.variant in ("transcoder", "crosscoder") or ours.record.encodes != ours.record.reconstructs:
        raise refuse(NAME, config, "it has autoencoders of one source alone", "export it as another format")
    kind = _kind_for(config)
    w_dec = arrays.get("w_dec", arrays["w_enc"])
    theirs: dict[str, Lazy | np.ndarray]
    if kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        theirs = {"W_enc": arrays["w_enc"].transposed(), "b_enc": arrays["b_enc"], "W_dec": w_dec}
    else:
        theirs = {"encoder.weight": arrays["w_enc"], "decoder.weight": w_dec.transposed()}
        theirs["mag_bias" if kind == "GatedAutoEncoder" else "encoder.bias"] = arrays["b_enc"]
    names = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}
    theirs[names.get(kind, "b_dec")] = arrays["b_dec"]
    if kind == "GatedAutoEncoder":
        theirs |= {"r_mag": arrays["log_gain"], "gate_bias": arrays["b_gate"]}
    if kind == "JumpReluAutoEncoder":
        theirs["threshold"] = Lazy.of(ours.threshold)
        if getattr(config, "pre_bias", False):
            theirs["b_enc"] = shifted(arrays["b_enc"], -product(arrays["w_enc"], arrays["b_dec"].array()))
    if "TopK" in kind:
        threshold = ours.array("threshold") if kind != "AutoEncoderTopK" else -1.0
        theirs |= {"k": np.asarray(config.n_active, np.int32), "threshold": np.asarray(threshold, np.float32)}
    if kind == "MatryoshkaBatchTopKSAE" and isinstance(config, matryoshka.Config):
        theirs["group_sizes"] = np.diff(np.asarray((0, *config.sizes), np.int64))
    source = ours.record.encodes[0]
    point, _, layer = (source.hook or "").rpartition(".")
    trainer = {
        "dict_class": kind,
        "activation_dim": source.width,
        "dict_size": config.n_latents,
        "k": config.n_active,
        "layer": int(layer) if layer else None,
        "lm_name": source.model,
        "submodule_name": f"{point}_layer_{layer}" if point else source.name,
    }
    write_torch(folder / WEIGHTS, theirs)
    storage.write_json(folder / CONFIG, {"trainer": trainer, "buffer": {"d_submodule": source.width, "ctx_len": None}})


def _read(
    kind: str, ours: dict[str, Lazy], arrays: dict[str, Lazy], tensors: Tensors, path: Path
) -> tuple[SaeConfig, dict[str, Lazy], tuple[str, ...]]:
    n_latents, values = ours["w_enc"].shape[0], tensors.values
    if kind == "AutoEncoder":
        said = fold_norms(ours, "the library does so when it loads them")
        return *autoencoder("relu", ours, True)[:2], said
    if kind == "AutoEncoderNew":
        return autoencoder("relu", ours, False)
    if kind == "GatedAutoEncoder":
        ours |= {"b_gate": arrays["gate_bias"], "log_gain": arrays["r_mag"]}
        return gated.Config(n_latents=n_latents, input_norm="none"), ours, ()
    if kind == "JumpReluAutoEncoder":
        return autoencoder("jumprelu", ours, False, threshold=arrays["threshold"].array())
    k = values.get("k")
    if not isinstance(k, int):
        raise UserError(f"{path}: has no whole number k; get the file again")
    if kind == "AutoEncoderTopK":
        return autoencoder("topk", ours, True, k)
    threshold = values.get("threshold")
    if isinstance(threshold, float) and threshold >= 0:  # else it was never set
        ours["threshold"] = Lazy.of(np.asarray(threshold, np.float32))
    settings: dict[str, Any] = {"n_latents": n_latents, "k": k, "input_norm": "none"}
    sizes = np.cumsum(_group_sizes(values.get("group_sizes"), n_latents, path)) if "Matryoshka" in kind else [n_latents]
    if len(sizes) == 1:
        return batch_topk.Config(**settings), ours, ()
    prefixes = tuple(float(size / n_latents) for size in sizes)
    return matryoshka.Config(prefixes=prefixes, **settings), ours, ()


def _group_sizes(sizes: Any, n_latents: int, path: Path) -> list[int]:
    if not isinstance(sizes, list) or not all(isinstance(n, int) and n > 0 for n in sizes) or sum(sizes) != n_latents:
        raise UserError(f"{path}: group_sizes {sizes} are not groups of its {n_latents} latents; get the file again")
    return sizes


def _class_of(tensors: Tensors) -> str | None:
    """The class whose arrays these are; AutoEncoderTopK stands for BatchTopKSAE, too."""
    names, has_k = tensors.arrays.keys(), "k" in tensors.values
    for kind, arrays in ARRAYS.items():
        if names == {*arrays} and has_k == ("TopK" in kind):
            return kind
    return None


def _kind_for(config: SaeConfig) -> str:
    kinds = {
        "relu": "AutoEncoder",
        "tied": "AutoEncoder",
        "relu_norm": "AutoEncoderNew",
        "gated": "GatedAutoEncoder",
        "jumprelu": "JumpReluAutoEncoder",
        "topk": "AutoEncoderTopK",
        "batch_topk": "BatchTopKSAE",
        "matryoshka": "MatryoshkaBatchTopKSAE",
        "end_to_end": "AutoEncoderTopK" if config.n_active else "AutoEncoder",
    }
    if getattr(config, "random_prefixes", 0):  # of training alone; a row sees a threshold
        return "BatchTopKSAE"
    if config.variant not in kinds:
        raise refuse(NAME, config, "it has no class for it", "export it as another format")
    return kinds[config.variant]
