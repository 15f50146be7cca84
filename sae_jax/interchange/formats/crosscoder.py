"""Crosscoders of two models in the layout of ckkissane's replication: `cfg.json` and `cc_weights.pt`.

    W_enc [sources, d, n]   b_enc [n]   W_dec [n, sources, d]   b_dec [sources, d]

ReLU; nothing is subtracted. Rows were scaled by a constant a model while it learnt, which the files do not hold.
"""

from __future__ import annotations

from sae_jax.interchange.foreign import Files, Foreign, shape_of, take
from sae_jax.interchange.lazy import Lazy, side_by_side
from sae_jax.record import SourceRecord
from sae_jax.saes import crosscoder
from sae_jax.types import UserError

NAME = "crosscoder"

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def is_here(files: Files) -> bool:
    """See formats/__init__.py."""
    one = files.one
    return one is not None and files.has_arrays(one, *NAMES) and len(files.tensors(one).arrays["W_enc"].shape) == 3


def read(files: Files, k: int | None = None) -> Foreign:
    """See formats/__init__.py."""
    name = files.one or "cc_weights.pt"
    path = files.folder / name
    arrays = take(files.tensors(name), path, NAMES)
    n_sources, d, n_latents = shape_of(arrays["W_enc"], 3)
    if shape_of(arrays["W_dec"], 3) != (n_latents, n_sources, d) or shape_of(arrays["b_dec"]) != (n_sources, d):
        raise UserError(f"{path}: W_enc, W_dec and b_dec disagree in their shapes; get the file again")
    ours = {
        "w_enc": side_by_side([arrays["W_enc"].picked(0, i).transposed() for i in range(n_sources)], 1),
        "b_enc": arrays["b_enc"],
        "w_dec": side_by_side([arrays["W_dec"].picked(1, i) for i in range(n_sources)], 1),
        "b_dec": Lazy.of(arrays["b_dec"].array().reshape(-1), arrays["b_dec"].name),
        "threshold": Lazy.zeros(()),
    }
    settings = {"n_latents": n_latents, "k": min(32, n_latents), "input_norm": "none", "activation": "relu"}
    config = crosscoder.Config(**settings)  # type: ignore[arg-type]
    encodes = tuple(SourceRecord(f"x{i}", d) for i in range(n_sources))
    said = "rows are to be scaled as they were while it learnt: nothing in the files says by how much"
    return Foreign(config, ours, encodes, encodes, (said,))
