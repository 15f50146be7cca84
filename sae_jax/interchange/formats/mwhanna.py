"""Transcoders of one layer in a file `layer_{n}.safetensors`, as mwhanna's of Qwen 3: latent-major on both sides.

    W_enc [n, d]   b_enc [n]   W_dec [n, d]   b_dec [d]   activation_function.threshold [n] and W_skip [d, d], if any

b_dec is not subtracted. From the normalised input of an MLP to what it adds to the stream; a whole set, of all layers,
is circuit-tracer's.
"""

from __future__ import annotations

import re

from sae_jax.interchange.foreign import Files, Foreign, maps, number_in, pairs, shape_of, take
from sae_jax.types import UserError

NAME = "mwhanna"

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
THRESHOLD = "activation_function.threshold"


def is_here(files: Files) -> bool:
    """See formats/__init__.py."""
    one = files.one
    return (
        one is not None and re.fullmatch(r"layer_\d+\.safetensors", one) is not None and files.has_arrays(one, *NAMES)
    )


def read(files: Files, k: int | None = None) -> Foreign:
    """See formats/__init__.py."""
    name = files.one or "layer_0.safetensors"
    path = files.folder / name
    arrays = take(files.tensors(name), path, NAMES, (THRESHOLD, "W_skip"))
    n_latents, d = shape_of(arrays["W_enc"])
    if arrays["b_enc"].shape != (n_latents,):
        raise UserError(f"{path}: W_enc has shape {[n_latents, d]}, b_enc {list(arrays['b_enc'].shape)}; get it again")
    ours = {name.lower(): arrays[name] for name in NAMES}
    threshold = arrays[THRESHOLD].array() if THRESHOLD in arrays else None
    config, ours, changes = maps(ours, arrays.get("W_skip"), k, threshold)
    layer = number_in(name, r"layer_(\d{1,4})\.")
    d_out = arrays["b_dec"].shape[0] if arrays["b_dec"].shape else d
    return Foreign(config, ours, *pairs((f"mlp_in.{layer}", f"mlp_out.{layer}"), (d, d_out)), changes)
