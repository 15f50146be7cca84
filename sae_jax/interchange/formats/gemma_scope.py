"""Gemma Scope: `params.npz` in `layer_L/width_W/average_l0_X`, of JumpReLU autoencoders and transcoders.

    W_enc [d, n]   b_enc [n]   W_dec [n, d]   b_dec [d]   threshold [n]

b_dec is not subtracted before encoding. What the rows are, the name of the repository says: -res the residual stream
after a block, -att the heads side by side, -mlp what the MLP adds to the stream, -transcoders a map from the MLP's
normalised input to that. Files of the embedding are for rows that are sqrt(d) smaller than those of the stream.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from sae_jax.interchange.foreign import (
    Files,
    Foreign,
    Ours,
    autoencoder,
    maps,
    number_in,
    pairs,
    refuse,
    shape_of,
    sources,
    take,
    thresholded,
)
from sae_jax.interchange.tensors import write_npz

NAME = "gemma_scope"
NEEDS_THRESHOLD = True

WEIGHTS = "params.npz"
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
POINTS = {"res": "resid_post", "att": "attn_z", "mlp": "mlp_out"}


def is_here(files: Files) -> bool:
    """See formats/__init__.py."""
    one = files.one
    return one is not None and one.endswith(".npz") and files.has_arrays(one, *NAMES)


def read(files: Files, k: int | None = None) -> Foreign:
    """See formats/__init__.py."""
    name = files.one or WEIGHTS
    arrays = take(files.tensors(name), files.folder / name, NAMES)
    d, _ = shape_of(arrays["W_enc"])
    ours = {
        "w_enc": arrays["W_enc"].transposed(),
        "b_enc": arrays["b_enc"],
        "w_dec": arrays["W_dec"],
        "b_dec": arrays["b_dec"],
    }
    changes: tuple[str, ...] = ()
    if is_embedding := "embedding" in files.words:
        ours["w_enc"] = ours["w_enc"].scaled(1 / math.sqrt(d))
        ours["w_dec"] = ours["w_dec"].scaled(math.sqrt(d))
        changes = ("of the embedding: rescaled by sqrt(d), for rows of the stream before the first block",)
    threshold, layer = arrays["threshold"].array(), number_in(files.words, r"layer_(\d{1,4})(?:/|$)")
    if "transcoder" in files.words:
        config, ours, said = maps(ours, threshold=threshold)
        hooks = (None, None) if layer is None else (f"mlp_in.{layer}", f"mlp_out.{layer}")
        return Foreign(config, ours, *pairs(hooks, (d, d), _model(files.words)), changes + said)
    config, ours, said = autoencoder("jumprelu", ours, False, threshold=threshold)
    found = re.search(r"gemma-scope-[^/]*-(res|att|mlp)(?:-|/|$)", files.words)
    hook = f"{POINTS[found[1]]}.{layer}" if found and layer is not None else None
    hook = "resid_pre.0" if is_embedding else hook
    return Foreign(config, ours, *sources(hook, d, _model(files.words)), changes + said)


def write(ours: Ours, folder: Path) -> None:
    """See formats/__init__.py."""
    if "w_skip" in ours.arrays:
        raise refuse(NAME, ours.config, "it has no skip", "export it as saelens")
    made = thresholded(ours, NAME)
    theirs = {name: made[name.lower()] for name in NAMES}
    theirs["W_enc"] = theirs["W_enc"].transposed()
    write_npz(folder / WEIGHTS, theirs)


def _model(words: str) -> str | None:
    found = re.search(r"gemma-scope-(2b|9b|27b)-(pt|it)-", words)
    return f"google/gemma-2-{found[1]}{'-it' if found[2] == 'it' else ''}" if found else None
