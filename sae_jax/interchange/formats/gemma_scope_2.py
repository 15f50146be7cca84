"""Gemma Scope 2: `params.safetensors`, and a `config.json` that may be missing; `resid_post/layer_L_width_W_l0_X`.

    w_enc [d, n]   b_enc [n]   w_dec [n, d]   b_dec [d]   threshold [n]   affine_skip_connection [d_in, d_out]

JumpReLU; b_dec is not subtracted before encoding. The names of hooks are those of transformers' modules: attn_out is
the input of o_proj, the heads side by side; a transcoder maps what comes out of pre_feedforward_layernorm to what comes
out of post_feedforward_layernorm. Cross-layer transcoders: gemma_scope_2_clt.py.
"""

from __future__ import annotations

import re

from sae_jax.interchange.foreign import (
    Files,
    Foreign,
    Settings,
    autoencoder,
    maps,
    number_in,
    pairs,
    shape_of,
    sources,
    take,
)

NAME = "gemma_scope_2"

WEIGHTS, CONFIG = "params.safetensors", "config.json"
NAMES = ("w_enc", "b_enc", "w_dec", "b_dec", "threshold")
SKIP = "affine_skip_connection"
POINTS = {"resid_post": "resid_post", "attn_out": "attn_z", "mlp_out": "mlp_out"}


def is_here(files: Files) -> bool:
    """See formats/__init__.py."""
    one = files.one
    return one is not None and one.endswith(".safetensors") and files.has_arrays(one, *NAMES)


def read(files: Files, k: int | None = None) -> Foreign:
    """See formats/__init__.py."""
    name = files.one or WEIGHTS
    arrays = take(files.tensors(name), files.folder / name, NAMES, (SKIP,))
    (d_in, _), (_, d_out) = shape_of(arrays["w_enc"]), shape_of(arrays["w_dec"])
    config_json = Settings(files.json(CONFIG) or {}, files.folder / CONFIG)
    ours = {
        "w_enc": arrays["w_enc"].transposed(),
        "b_enc": arrays["b_enc"],
        "w_dec": arrays["w_dec"],
        "b_dec": arrays["b_dec"],
    }
    threshold, layer = arrays["threshold"].array(), number_in(files.words, r"layer_(\d{1,4})_")
    model = config_json.get("model_name", str) or model_in(files.words)
    hooks = config_json.get("hf_hook_point_in", str), config_json.get("hf_hook_point_out", str)
    if SKIP in arrays or "transcoder" in files.words or hooks[0] != hooks[1]:
        skip = arrays[SKIP].transposed() if SKIP in arrays else None
        config, ours, said = maps(ours, skip, threshold=threshold)
        names = (None, None) if layer is None else (f"mlp_in.{layer}", f"mlp_out.{layer}")
        return Foreign(config, ours, *pairs(names, (d_in, d_out), model), said)
    config, ours, said = autoencoder("jumprelu", ours, False, threshold=threshold)
    found = re.search(r"(?:^|/)(resid_post|attn_out|mlp_out)(?:_all)?/layer_", files.words)
    hook = f"{POINTS[found[1]]}.{layer}" if found and layer is not None else None
    return Foreign(config, ours, *sources(hook, d_in, model), said)


def model_in(words: str) -> str | None:
    """The language model, from the name of the repository."""
    found = re.search(r"gemma-scope-2-(270m|1b|4b|12b|27b)-(pt|it)", words)
    return f"google/gemma-3-{found[1]}-{found[2]}".replace("270m-pt", "270m") if found else None
