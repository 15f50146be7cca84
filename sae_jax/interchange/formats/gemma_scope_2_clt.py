"""Cross-layer transcoders of Gemma Scope 2: a folder `clt...` with a `.safetensors` file for each layer from 0 on.

    w_enc [d, n]   b_enc [n]   w_dec [n, layers, d]   b_dec [d]   threshold [n]

Latents of a layer read what comes out of its pre_feedforward_layernorm, and write what comes out of the
post_feedforward_layernorm of that layer and of later ones; b_dec is that of the layer's own output. JumpReLU; nothing
is subtracted before encoding.

It is a crosscoder of ours with mask=weakly_causal, which holds zeros for the layers that a latent neither reads nor
writes, so it is larger here than there.
"""

from __future__ import annotations

import re

import numpy as np

from sae_jax.interchange.foreign import Files, Foreign, Settings, log_threshold, number_in, shape_of, take
from sae_jax.interchange.formats import gemma_scope_2
from sae_jax.interchange.lazy import Lazy, side_by_side
from sae_jax.record import SourceRecord
from sae_jax.saes import crosscoder
from sae_jax.types import UserError

NAME = "gemma_scope_2_clt"


def is_here(files: Files) -> bool:
    """See formats/__init__.py."""
    first = _by_layer(files).get(0)
    return files.has_arrays(first, *gemma_scope_2.NAMES) and len(files.tensors(str(first)).arrays["w_dec"].shape) == 3


def read(files: Files, k: int | None = None) -> Foreign:
    """See formats/__init__.py."""
    names = _by_layer(files)
    if sorted(names) != [*range(len(names))] or not names:
        there = ", ".join(map(str, sorted(names))) or "none"
        raise UserError(f"{files.folder} has layers {there}, which are not all from 0 on; get the others")
    n_layers, encoders, decoders, b_enc, b_dec, threshold = len(names), [], [], [], [], []
    shape = None
    for i in range(n_layers):
        path = files.folder / names[i]
        arrays = take(files.tensors(names[i]), path, gemma_scope_2.NAMES)
        d, n = shape_of(arrays["w_enc"])
        shape = shape or (d, n)
        if (d, n) != shape or shape_of(arrays["w_dec"], 3) != (n, n_layers, d):
            raise UserError(f"{path}: its w_enc and w_dec are not those of one of {n_layers} layers; get all again")
        if arrays["b_enc"].shape != (n,) or arrays["threshold"].shape != (n,) or arrays["b_dec"].shape != (d,):
            raise UserError(f"{path}: its biases and thresholds are not of its {n} latents and d={d}; get it again")
        encoders.append(_between_zeros(arrays["w_enc"].transposed(), i, n_layers))
        own = side_by_side([arrays["w_dec"].picked(1, j) for j in range(i, n_layers)], 1)
        decoders.append(side_by_side([Lazy.zeros((n, i * d)), own], 1) if i else own)
        b_enc.append(arrays["b_enc"])
        b_dec.append(arrays["b_dec"])
        threshold.append(arrays["threshold"].array())
    logs, said = log_threshold(np.concatenate(threshold), files.folder)
    ours = {
        "w_enc": side_by_side(encoders, 0),
        "b_enc": side_by_side(b_enc, 0),
        "w_dec": side_by_side(decoders, 0),
        "b_dec": side_by_side(b_dec, 0),
        "threshold": Lazy.of(np.zeros((), np.float32)),
        "log_threshold": logs,
    }
    n_latents = ours["b_enc"].shape[0]
    config = crosscoder.Config(
        n_latents=n_latents, k=min(32, n_latents), input_norm="none", activation="jumprelu", mask="weakly_causal"
    )
    model = Settings(files.json("config.json") or {}, files.folder).get("model_name", str)
    model = model or gemma_scope_2.model_in(files.words)
    encodes, reconstructs = (
        tuple(SourceRecord(f"{point}.{i}", b_dec[0].shape[0], f"{point}.{i}", model) for i in range(n_layers))
        for point in ("mlp_in", "mlp_out")
    )
    dropped = "what a layer writes to earlier ones, which nothing reads, was left out"
    return Foreign(config, ours, encodes, reconstructs, (dropped, *said))


def _by_layer(files: Files) -> dict[int, str]:
    """The file of each layer, by the last number in its name."""
    names = [name for name in files.weights if re.search(r"\d{1,4}\.safetensors$", name) and "/" not in name]
    return {number_in(name, r"(\d{1,4})\.safetensors$") or 0: name for name in names}


def _between_zeros(own: Lazy, layer: int, n_layers: int) -> Lazy:
    """[n, d] as [n, layers * d], of which other layers are 0."""
    n, d = own.shape
    parts = [Lazy.zeros((n, layer * d)), own, Lazy.zeros((n, (n_layers - layer - 1) * d))]
    return side_by_side([part for part in parts if part.shape[1]], 1)
