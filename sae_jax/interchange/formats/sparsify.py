"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors`, a folder for each hook point such as `layers.6`.

    encoder.weight [n, d]   encoder.bias [n]   W_dec [n, d]   b_dec [d]   W_skip [d, d], output += x W_skip^T

`transcode` says whether it maps the input of a module to its output; else b_dec is subtracted before encoding.
`num_latents` of 0 means d_in times `expansion_factor`. ReLU, then the k largest.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sae_jax import storage
from sae_jax.interchange.foreign import (
    Files,
    Foreign,
    Ours,
    autoencoder,
    maps,
    product,
    refuse,
    selects_k,
    shifted,
    sources,
    take,
)
from sae_jax.interchange.lazy import Lazy
from sae_jax.interchange.tensors import write_safetensors
from sae_jax.saes.normalise import PER_VECTOR
from sae_jax.types import UserError

NAME = "sparsify"
NEEDS_THRESHOLD = False

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def is_here(files: Files) -> bool:
    """See formats/__init__.py."""
    return CONFIG in files.names and WEIGHTS in files.names and "sae_weights.safetensors" not in files.names


def read(files: Files, k: int | None = None) -> Foreign:
    """See formats/__init__.py."""
    cfg, path = files.settings(CONFIG), files.folder / WEIGHTS
    activation = cfg.get("activation", str, "topk")
    if activation != "topk" or cfg.get("signed", bool, False):
        what = "signed" if activation == "topk" else f"activation {activation!r}"
        raise UserError(f"{cfg.where}: {what} is none that a variant here computes; topk of positive values is")
    d_in, k = cfg.require("d_in", int), cfg.require("k", int)
    n_latents = cfg.get("num_latents", int, 0) or d_in * cfg.get("expansion_factor", int, 32)
    is_transcoder = cfg.get("transcode", bool, False)
    skip = ("W_skip",) if cfg.get("skip_connection", bool, False) else ()
    arrays = take(files.tensors(WEIGHTS), path, ("encoder.weight", "encoder.bias", "W_dec", "b_dec", *skip))
    ours = {
        "w_enc": arrays["encoder.weight"],
        "b_enc": arrays["encoder.bias"],
        "w_dec": arrays["W_dec"],
        "b_dec": arrays["b_dec"],
    }
    encodes, reconstructs = sources(_hook(files.words), d_in)
    changes: tuple[str, ...] = ()
    if is_transcoder:
        encodes, reconstructs = (tuple(_side(s, side) for s in encodes) for side in ("input", "output"))
    elif skip:
        ours["b_enc"] = shifted(ours["b_enc"], -product(ours["w_enc"], ours["b_dec"].array()))
        changes = ("b_dec, which is subtracted before encoding, was folded into b_enc",)
    if is_transcoder or skip:
        config, ours, said = maps(ours, arrays.get("W_skip"), k)
    else:
        config, ours, said = autoencoder("topk", ours, True, k)
    if config.n_latents != n_latents:
        raise UserError(f"{path}: {config.n_latents} latents, and {CONFIG} says {n_latents}; get both again")
    return Foreign(config, ours, encodes, reconstructs, changes + said)


def write(ours: Ours, folder: Path) -> None:
    """See formats/__init__.py."""
    cfg, arrays = in_their_words(ours)
    write_safetensors(folder / WEIGHTS, arrays)
    storage.write_json(folder / CONFIG, cfg)


def in_their_words(ours: Ours) -> tuple[dict[str, Any], dict[str, Lazy]]:
    """The config and the arrays of a dictionary of ours."""
    config, arrays = ours.config, ours.arrays
    if not selects_k(config):
        raise refuse(NAME, config, "it knows a selection of k latents a row alone", "export it as saelens")
    if config.input_norm in PER_VECTOR:
        raise refuse(NAME, config, f"it has no input_norm={config.input_norm}", "train with a dataset_* norm")
    (width_x,), (width_y,) = ours.record.widths
    is_transcoder = config.variant == "transcoder"
    if width_x != width_y:
        raise refuse(NAME, config, f"it maps {width_x} numbers to {width_y}", "it knows one width; use saelens")
    theirs = {
        "encoder.weight": arrays["w_enc"],
        "encoder.bias": arrays["b_enc"],
        "W_dec": arrays["w_dec"],
        "b_dec": arrays["b_dec"],
    }
    if "w_skip" in arrays:
        theirs["W_skip"] = arrays["w_skip"]
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, config.n_latents // width_x),
        "normalize_decoder": config.UNIT_DECODER,
        "num_latents": config.n_latents,
        "k": config.n_active,
        "multi_topk": False,
        "skip_connection": "w_skip" in arrays,
        "transcode": is_transcoder,
        "d_in": width_x,
    }
    return cfg, theirs


def _hook(words: str) -> str | None:
    """Of a folder named after a block of the model; what a module inside it is called here depends on the model."""
    found = re.search(r"(?:^|[/.])(?:layers|h)\.(\d{1,4})$", words)
    return f"resid_post.{int(found[1])}" if found else None


def _side(source: Any, side: str) -> Any:
    """The input or output of a module is at no hook that the folder names."""
    return type(source)(f"{source.name}.{side}", source.width)
