"""Llama Scope, and the later one on R1-distilled models: settings of OpenMOSS and linear layers of torch.

    hyperparams.json and checkpoints/final.safetensors    jump_relu_threshold, one number, in the settings
    config.json and sae_weights.safetensors               log_jumprelu_threshold, an array

    encoder.weight [n, d]   encoder.bias [n]   decoder.weight [d, n]   decoder.bias [d]

Rows were scaled so that their average norm, `dataset_average_activation_norm`, became sqrt(d): that is folded into the
weights, and values stay those of the scaled rows.
"""

from __future__ import annotations

import math

import numpy as np

from sae_jax.interchange.foreign import Files, Foreign, Settings, autoencoder, row_norms, shape_of, sources, take
from sae_jax.lm import hooks
from sae_jax.types import UserError

NAME = "llama_scope"

NAMES = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
FIRST, R1 = ("hyperparams.json", "checkpoints/final.safetensors"), ("config.json", "sae_weights.safetensors")
LOG = "log_jumprelu_threshold"
NEAR_ONE = 0.01  # norms of decoder rows that were stored in bfloat16


def is_here(files: Files) -> bool:
    """See formats/__init__.py."""
    return {*FIRST} <= {*files.names} or (R1[0] in files.names and files.has_arrays(R1[1], *NAMES))


def read(files: Files, k: int | None = None) -> Foreign:
    """See formats/__init__.py."""
    config_name, weights = FIRST if FIRST[0] in files.names else R1
    cfg, path = files.settings(config_name), files.folder / weights
    log = {name for name in files.tensors(weights).arrays if name.endswith(LOG)}
    arrays = take(files.tensors(weights), path, (*NAMES, *log))
    n_latents, d = shape_of(arrays["encoder.weight"])
    if cfg.require("d_model", int) != d:
        raise UserError(f"{path}: encoder.weight has rows of {d}, and {config_name} says {cfg.values['d_model']}")
    if cfg.get("use_glu_encoder", bool, False):
        raise UserError(f"{cfg.where}: use_glu_encoder is nothing that a variant here computes")
    if cfg.get("act_fn", str, "jumprelu") not in ("jumprelu", "relu"):
        raise UserError(f"{cfg.where}: act_fn {cfg.values['act_fn']!r} is not read; jumprelu and relu are")
    ours = {
        "w_enc": arrays["encoder.weight"],
        "b_enc": arrays["encoder.bias"],
        "w_dec": arrays["decoder.weight"].transposed(),
        "b_dec": arrays["decoder.bias"],
    }
    scales, changes = _scales(cfg, d)
    is_subtracted = cfg.get("apply_decoder_bias_to_pre_encoder", bool, False)
    if is_subtracted and scales[0] != scales[1]:
        raise UserError(f"{cfg.where}: the bias is subtracted from rows of another scale than it is added to")
    ours["w_enc"] = ours["w_enc"].scaled(scales[0])
    ours["w_dec"], ours["b_dec"] = ours["w_dec"].scaled(1 / scales[1]), ours["b_dec"].scaled(1 / scales[1])
    if cfg.get("sparsity_include_decoder_norm", bool, False):
        norms = row_norms(arrays["decoder.weight"].transposed())
        if (np.abs(norms - 1) > NEAR_ONE).any():
            raise UserError(f"{path}: thresholds are of values times norms of decoder rows, which are not 1")
    threshold = _threshold(cfg, arrays, log, n_latents, path)
    config, ours, said = autoencoder("jumprelu", ours, is_subtracted, threshold=threshold)
    point = cfg.get("hook_point_in", str)
    if (out := cfg.get("hook_point_out", str, point)) != point:
        raise UserError(f"{cfg.where}: a transcoder, from {point} to {out}, which this format is not read for")
    hook = hooks.from_transformer_lens(point) if point else None
    return Foreign(config, ours, *sources(hook, d, name=point), changes + said)


def _scales(cfg: Settings, d: int) -> tuple[tuple[float, float], tuple[str, ...]]:
    """What rows were multiplied by, before encoding and before they were reconstructed."""
    kind = cfg.get("norm_activation", str, "dataset-wise")
    if kind in ("none", "inference"):
        return (1.0, 1.0), ()
    if kind != "dataset-wise":
        raise UserError(f"{cfg.where}: norm_activation {kind!r} is not read; dataset-wise is")
    norms = cfg.below("dataset_average_activation_norm")
    norm_in = norms.require("in", float)
    norm_out = norms.get("out", float, norm_in)
    if not (norm_in > 0 and norm_out > 0):
        raise UserError(f"{cfg.where}: dataset_average_activation_norm must be above 0, not {norm_in} and {norm_out}")
    said = f"rows were scaled to an average norm of sqrt(d), from {norm_in:g}: that was folded into the weights"
    return (math.sqrt(d) / norm_in, math.sqrt(d) / norm_out), (said,)


def _threshold(cfg: Settings, arrays: dict, log: set[str], n_latents: int, path: object) -> np.ndarray:
    if log:
        threshold = np.exp(arrays[min(log)].array().astype(np.float64))
    elif cfg.get("act_fn", str) == "relu":
        threshold = np.zeros(())
    else:
        threshold = np.asarray(cfg.require("jump_relu_threshold", float))
    if threshold.size not in (1, n_latents):
        raise UserError(f"{path}: {threshold.size} thresholds for {n_latents} latents; get the file again")
    return np.broadcast_to(threshold.reshape(-1), (n_latents,))
