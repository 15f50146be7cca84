"""SAELens: `cfg.json` and `sae_weights.safetensors`, as `SAE.load_from_disk` of version 6 reads them.

    W_enc [d_in, d_sae]   b_enc [d_sae]   W_dec [d_sae, d_out]   b_dec [d_out]
    jumprelu: threshold [d_sae]     gated: b_gate, b_mag, r_mag [d_sae] and no b_enc     skip: W_skip [d_out, d_in]

`apply_b_dec_to_input` says whether b_dec is subtracted before encoding. `normalize_activations` is layer_norm or
constant_norm_rescale, of each vector and undone on outputs; expected_average_only_in is in the file and not applied.
`rescale_acts_by_decoder_norm` ranks latents of a topk by value times norm of the decoder row. The library needs `k`,
`dtype` and `metadata.sae_lens_version`, and refuses arrays that it does not expect.

abstopk selects by absolute values and keeps the sign: a latent f of it is two here, f for positive values and n + f for
the others.

Folders from before version 6 have a flat config under older names, such as `hook_point` and `activation_fn_str`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sae_jax import storage
from sae_jax.interchange import foreign
from sae_jax.interchange.foreign import (
    Files,
    Foreign,
    Ours,
    Settings,
    autoencoder,
    fold_norms,
    make_up,
    maps,
    product,
    refuse,
    shape_of,
    shifted,
    take,
)
from sae_jax.interchange.lazy import Lazy, side_by_side
from sae_jax.interchange.tensors import write_safetensors
from sae_jax.lm import hooks
from sae_jax.record import SourceRecord, program
from sae_jax.saes import gated, transcoder
from sae_jax.saes.base import SaeConfig
from sae_jax.types import UserError

NAME = "saelens"
NEEDS_THRESHOLD = False

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
VERSION = "6.54.12"  # of the layout that is written
NORMS = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "vector_sqrt_d",
    "expected_average_only_in": "none",
}
TRAINED_AS = {"batch_topk": "batchtopk", "matryoshka": "matryoshka_batchtopk"}
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
ARCHITECTURES = ("topk", "abstopk", "standard", "jumprelu", "gated", *TRANSCODERS)


def is_here(files: Files) -> bool:
    """See formats/__init__.py."""
    return CONFIG in files.names and WEIGHTS in files.names and "sae.safetensors" not in files.names


def read(files: Files, k: int | None = None) -> Foreign:
    """See formats/__init__.py."""
    where = files.folder / CONFIG
    cfg = Settings(_current(files.settings(CONFIG).values), where)
    architecture = cfg.get("architecture", str, "standard")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{where}: architecture {architecture!r} is none that a variant here computes; those are "
            f"{', '.join(ARCHITECTURES)}"
        )
    tensors, path = files.tensors(WEIGHTS), files.folder / WEIGHTS
    is_transcoder, has_threshold = architecture in TRANSCODERS, "jumprelu" in architecture
    biases = ("b_gate", "b_mag", "r_mag") if architecture == "gated" else ("b_enc",)
    extra = [*(["threshold"] if has_threshold else []), *(["W_skip"] if "skip" in architecture else [])]
    arrays = take(tensors, path, ("W_enc", *biases, "W_dec", "b_dec", *extra), ("scaling_factor",))
    n_latents, d_in = cfg.require("d_sae", int), cfg.require("d_in", int)
    d_out = cfg.get("d_out", int, d_in) if is_transcoder else d_in
    norm, changes = _norm(cfg)
    ours = {"w_enc": arrays["W_enc"].transposed(), "w_dec": arrays["W_dec"], "b_dec": arrays["b_dec"]}
    for name in (*biases, *(["threshold"] if has_threshold else [])):
        if arrays[name].shape != shape_of(arrays["W_enc"])[1:]:
            raise UserError(f"{path}: {name} is {list(arrays[name].shape)}, W_enc {list(arrays['W_enc'].shape)}")
    if "scaling_factor" in arrays:
        ours["w_dec"], said = _finetuned(cfg, ours["w_dec"], arrays["scaling_factor"].array(), path)
        changes += said
    is_subtracted = cfg.get("apply_b_dec_to_input", bool, not is_transcoder)
    threshold = arrays["threshold"].array() if has_threshold else None
    if architecture == "gated":
        config: SaeConfig = gated.Config(n_latents=n_latents, input_norm=norm)
        ours |= {"b_enc": arrays["b_mag"], "b_gate": arrays["b_gate"], "log_gain": arrays["r_mag"]}
        if not is_subtracted:
            gain = np.exp(ours["log_gain"].array().astype(np.float64))
            changes += make_up(ours, "b_gate", "b_enc", gains=(1.0, gain))
    elif is_transcoder:
        ours["b_enc"] = arrays["b_enc"]
        if is_subtracted:
            ours["b_enc"] = shifted(arrays["b_enc"], -product(ours["w_enc"], arrays["b_dec"].array()))
            changes += ("b_dec, which is subtracted before encoding, was folded into b_enc",)
        if norm != "none" and "W_skip" in arrays:
            raise UserError(f"{where}: normalize_activations with a skip; which of the two comes first is not said")
        config, ours, said = maps(ours, arrays.get("W_skip"), None, threshold, norm)
        changes += said
    else:
        ours["b_enc"] = arrays["b_enc"]
        selects = architecture in ("topk", "abstopk")
        if selects and cfg.get("rescale_acts_by_decoder_norm", bool, False):
            changes += fold_norms(ours, "latents rank by that")
        activation: Any = {"standard": "relu", "abstopk": "topk"}.get(architecture, architecture)
        k = cfg.require("k", int) if selects else None
        if architecture == "abstopk":
            changes += _split_signs(ours, n_latents)
        config, ours, said = autoencoder(activation, ours, is_subtracted, k, threshold, norm)
        changes += said
    if shape_of(arrays["W_enc"])[1] != n_latents:
        raise UserError(f"{path}: W_enc has shape {list(arrays['W_enc'].shape)}, and {CONFIG} says d_sae {n_latents}")
    encodes, reconstructs, said = _sources(cfg, d_in, d_out, is_transcoder)
    return Foreign(config, ours, encodes, reconstructs, changes + said)


def _split_signs(arrays: dict[str, Lazy], n_latents: int) -> tuple[str, ...]:
    """Latents of both signs as twice as many of positive values; what was changed.

    At most one of the two is positive, so the k largest are those of the k largest absolute values.
    """
    for name in ("w_enc", "b_enc", "w_dec"):
        arrays[name] = side_by_side([arrays[name], arrays[name].scaled(-1.0)], 0)
    return (f"latents of both signs became two: f where it is positive, {n_latents} + f where it is negative",)


def write(ours: Ours, folder: Path) -> None:
    """See formats/__init__.py."""
    cfg, arrays = in_their_words(ours)
    write_safetensors(folder / WEIGHTS, arrays)
    storage.write_json(folder / CONFIG, cfg)


def in_their_words(ours: Ours) -> tuple[dict[str, Any], dict[str, Lazy]]:
    """The config and the arrays of a dictionary of ours."""
    config, record = ours.config, ours.record
    norms = {ours_: theirs for theirs, ours_ in NORMS.items() if ours_ != "none"}
    if config.input_norm == "unit_norm":
        raise refuse(NAME, config, "it has no input_norm=unit_norm", "train with layer_norm, or a dataset_* norm")
    architecture, arrays, is_subtracted, extra = _architecture(ours)
    (width_x,), (width_y,) = record.widths
    source, target = record.encodes[0], record.reconstructs[0]
    metadata: dict[str, Any] = {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "model_name": source.model,
        "hook_name": _hook_name(source),
        "hook_head_index": None,
        "model_class_name": "HookedTransformer",
        "model_from_pretrained_kwargs": {},
        "prepend_bos": True,
        "context_size": None,
        "dataset_path": record.data.text if record.data else None,
    }
    if config.variant in TRAINED_AS:
        metadata["training_architecture"] = TRAINED_AS[config.variant]
    if architecture in TRANSCODERS:
        metadata["hook_name_out"] = _hook_name(target)
        extra = {**extra, "d_out": width_y}
    cfg = {
        "architecture": architecture,
        "d_in": width_x,
        "d_sae": config.n_latents,
        **extra,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": is_subtracted,
        "normalize_activations": norms.get(config.input_norm, "none"),
        "reshape_activations": "none",
        "metadata": metadata,
        "sae_jax": {"variant": config.variant, "program": program(), "sources": [source.name, target.name]},
    }
    return cfg, arrays


def _hook_name(source: SourceRecord) -> str:
    return hooks.to_transformer_lens(source.hook) or source.hook or source.name


def _architecture(ours: Ours) -> tuple[str, dict[str, Lazy], bool, dict[str, Any]]:
    """(architecture, arrays by their names, whether b_dec is subtracted, other settings)."""
    config, variant = ours.config, ours.config.variant
    w_dec = ours.arrays["w_enc" if variant == "tied" else "w_dec"]
    arrays = {"W_enc": ours.arrays["w_enc"].transposed(), "W_dec": w_dec, "b_dec": ours.arrays["b_dec"]}
    b_enc = {"b_enc": ours.arrays["b_enc"]}
    if variant == "topk" or (variant == "end_to_end" and config.n_active):
        extra = {"k": config.n_active, "rescale_acts_by_decoder_norm": False}
        return "topk", {**arrays, **b_enc}, True, extra
    if variant in ("relu", "tied", "relu_norm", "end_to_end"):
        return "standard", {**arrays, **b_enc}, variant != "relu_norm", {}
    if variant == "gated":
        gates = {"b_mag": b_enc["b_enc"], "b_gate": ours.arrays["b_gate"], "r_mag": ours.arrays["log_gain"]}
        return "gated", {**arrays, **gates}, True, {}
    threshold = {"threshold": Lazy.of(ours.threshold)} if foreign.has_threshold(config) else {}
    if variant in ("jumprelu", "batch_topk", "matryoshka"):
        name = "jumprelu" if ours.record.encodes == ours.record.reconstructs else "jumprelu_transcoder"
        return name, {**arrays, **b_enc, **threshold}, getattr(config, "pre_bias", True), {}
    if isinstance(config, transcoder.Config):
        if config.activation == "topk":
            raise refuse(NAME, config, "it has no transcoder that selects k latents", "give --calibrate SET")
        skip = {"W_skip": ours.arrays["w_skip"]} if config.skip else {}
        name = ("jumprelu_" if threshold else "") + ("skip_" if skip else "") + "transcoder"
        return name, {**arrays, **b_enc, **threshold, **skip}, False, {}
    raise refuse(NAME, config, "it has one source and no other kind of code", "export it as another format")


def _current(cfg: dict[str, Any]) -> dict[str, Any]:
    """A config in the words of version 6."""
    metadata = cfg.get("metadata")
    if metadata is not None and (not isinstance(metadata, dict) or "sae_lens_version" in metadata):
        return cfg
    cfg = {{"hook_point": "hook_name", "activation_fn_str": "activation_fn"}.get(n, n): v for n, v in cfg.items()}
    if cfg.get("architecture", "standard") == "standard" and cfg.get("activation_fn") == "topk":
        kwargs = cfg.get("activation_fn_kwargs")
        cfg |= {"architecture": "topk", "k": kwargs.get("k") if isinstance(kwargs, dict) else None}
    elif cfg.get("activation_fn", "relu") != "relu":
        raise UserError(f"activation_fn {cfg['activation_fn']!r} of {CONFIG} is none that a variant here computes")
    if isinstance(norm := cfg.get("normalize_activations"), bool):
        cfg["normalize_activations"] = "expected_average_only_in" if norm else "none"
    names = ("model_name", "hook_name", "model_from_pretrained_kwargs")
    return {**cfg, "metadata": {name: cfg[name] for name in names if name in cfg}}


def _norm(cfg: Settings) -> tuple[Any, tuple[str, ...]]:
    norm = cfg.get("normalize_activations", str, "none")
    if norm not in NORMS:
        raise UserError(
            f"{cfg.where}: normalize_activations {norm!r} is none that a variant here computes; those are "
            f"{', '.join(NORMS)}"
        )
    if norm == "expected_average_only_in":
        said = "normalize_activations expected_average_only_in was left out, as by SAELens: rows are taken as they are"
        return "none", (said,)
    return NORMS[norm], ()


def _finetuned(cfg: Settings, w_dec: Lazy, factor: np.ndarray, path: Path) -> tuple[Lazy, tuple[str, ...]]:
    """A factor of each latent on its way out, which old folders may have."""
    if cfg.get("finetuning_scaling_factor", bool, False):
        if factor.shape != w_dec.shape[:1]:
            raise UserError(f"{path}: scaling_factor has shape {list(factor.shape)}, W_dec {list(w_dec.shape)}")
        return w_dec.scaled(factor), ("scaling_factor was folded into the decoder rows",)
    if not (factor == 1).all():
        raise UserError(f"{path}: has a scaling_factor, and {CONFIG} does not say that it is applied; get it again")
    return w_dec, ()


def _sources(
    cfg: Settings, d_in: int, d_out: int, is_transcoder: bool
) -> tuple[tuple[SourceRecord], tuple[SourceRecord], tuple[str, ...]]:
    metadata = cfg.below("metadata")
    model, said = metadata.get("model_name", str), ()

    def source(key: str, width: int, default: str) -> SourceRecord:
        name = metadata.get(key, str)
        hook = hooks.from_transformer_lens(name) if name else None
        return SourceRecord(hook or name or default, width, hook, model)

    if kwargs := metadata.get("model_from_pretrained_kwargs", dict[str, Any], {}):
        said = (f"rows are of a model that TransformerLens changed when it was loaded: {', '.join(sorted(kwargs))}",)
    encodes = (source("hook_name", d_in, "x"),)
    if not is_transcoder:
        return encodes, encodes, said
    key = "hook_name_out" if "hook_name_out" in metadata.values else "out_hook_name"
    return encodes, (source(key, d_out, "y"),), said
