"""Qwen-Scope: `layer{n}.sae.pt`, a file of torch a layer; no settings.

    W_enc [n, d]   b_enc [n]   W_dec [d, n]   b_dec [d]

TopK; b_dec is not subtracted before encoding; rows are the residual stream after the block. k is in the name of the
repository, `SAE-Res-Qwen3-8B-Base-W64K-L0_50`: keep it as the folder's, or say `--k`.
"""

from __future__ import annotations

import re

from sae_jax.interchange.foreign import Files, Foreign, autoencoder, number_in, shape_of, sources, take

NAME = "qwen_scope"

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def is_here(files: Files) -> bool:
    """See formats/__init__.py."""
    one = files.one
    return one is not None and re.search(r"layer\d+\.sae\.pt$", one) is not None and files.has_arrays(one, *NAMES)


def read(files: Files, k: int | None = None) -> Foreign:
    """See formats/__init__.py."""
    name = files.one or "layer0.sae.pt"
    arrays = take(files.tensors(name), files.folder / name, NAMES)
    _, d = shape_of(arrays["W_enc"])
    ours = {
        "w_enc": arrays["W_enc"],
        "b_enc": arrays["b_enc"],
        "w_dec": arrays["W_dec"].transposed(),
        "b_dec": arrays["b_dec"],
    }
    words = f"{files.words}/{name}"
    k = k or number_in(words, r"L0_(\d{1,6})(?:/|@|$)")
    config, ours, changes = autoencoder("topk", ours, False, k)
    layer, found = number_in(words, r"layer(\d{1,4})\.sae"), re.search(r"SAE-Res-(Qwen[^/]+?)-W\d+K", words)
    hook = None if layer is None else f"resid_post.{layer}"
    return Foreign(config, ours, *sources(hook, d, f"Qwen/{found[1]}" if found else None), changes)
