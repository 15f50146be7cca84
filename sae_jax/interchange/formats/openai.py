"""OpenAI's sparse_autoencoder: a file of torch a layer, as `resid_post_mlp_v5_32k/autoencoders/6.pt`, for GPT-2 small.

    pre_bias [d]   encoder.weight [n, d]   latent_bias [n]   decoder.weight [d, n], missing where it is the encoder's

pre_bias is subtracted before encoding and added to outputs. Those with TopK see each vector less its mean, over its
(unbiased) deviation, undone on outputs; those with ReLU see it as it is.
"""

from __future__ import annotations

import re

from sae_jax.interchange.foreign import Files, Foreign, autoencoder, shape_of, sources, take
from sae_jax.types import UserError

NAME = "openai"

NAMES = ("pre_bias", "encoder.weight", "latent_bias")
COUNTS = ("latents_activation_frequency", "latents_mean_square", "stats_last_nonzero")
POINTS = {
    "resid_post_mlp": "resid_post",
    "resid_post_attn": "resid_mid",
    "resid_delta_mlp": "mlp_out",
    "resid_delta_attn": "attn_out",
    "mlp_post_act": "mlp_act",
}


def is_here(files: Files) -> bool:
    """See formats/__init__.py."""
    return files.has_arrays(files.one, *NAMES)


def read(files: Files, k: int | None = None) -> Foreign:
    """See formats/__init__.py."""
    name = files.one or "autoencoder.pt"
    path, tensors = files.folder / name, files.tensors(name)
    arrays = take(tensors, path, NAMES, ("decoder.weight", *COUNTS))
    encoder = arrays["encoder.weight"]
    _, d = shape_of(encoder)
    ours = {
        "w_enc": encoder,
        "b_enc": arrays["latent_bias"],
        "w_dec": arrays["decoder.weight"].transposed() if "decoder.weight" in arrays else encoder,
        "b_dec": arrays["pre_bias"],
    }
    activation, k = tensors.values.get("activation", "ReLU"), tensors.values.get("activation_state_dict.k", k)
    if activation == "TopK":
        if tensors.values.get("activation_state_dict.postact_fn", "ReLU") != "ReLU":
            raise UserError(f"{path}: values that are not made positive after the selection; no variant here has them")
        if not isinstance(k, int):
            raise UserError(f"{path}: has no activation_state_dict.k; get the file again")
        config, ours, changes = autoencoder("topk", ours, True, k, norm="layer_norm")
    elif activation == "ReLU":
        config, ours, changes = autoencoder("relu", ours, True)
    else:
        raise UserError(f"{path}: activation {activation!r} is none that a variant here computes; TopK and ReLU are")
    found = re.search(rf"({'|'.join(POINTS)})[^/]*/(?:autoencoders/)?(\d{{1,4}})\.pt", files.words)
    hook = f"{POINTS[found[1]]}.{int(found[2])}" if found else None
    return Foreign(config, ours, *sources(hook, d, "gpt2" if found else None), changes)
