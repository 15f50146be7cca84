"""Goodfire's autoencoders of Llama 3.1 8B and 3.3 70B, and others saved as two linear layers of torch.

    encoder_linear.weight [n, d]   encoder_linear.bias [n]   decoder_linear.weight [d, n]   decoder_linear.bias [d]

ReLU; nothing is subtracted. Those of DeepSeek-R1 are of one matrix, W [d, n], b_enc [n], b_dec [d], and select the
k largest values a row of whatever batch is at hand; k is 128 for the one on mathematics, 64 for the general one. They
store no threshold for rows by themselves, which has to be calibrated.
"""

from __future__ import annotations

from pathlib import Path

from sae_jax.interchange.foreign import Files, Foreign, autoencoder, make_up, shape_of, sources, take
from sae_jax.interchange.tensors import Tensors
from sae_jax.saes import batch_topk
from sae_jax.types import UserError

NAME = "goodfire"

NAMES = tuple(f"{side}_linear.{what}" for side in ("encoder", "decoder") for what in ("weight", "bias"))
TIED = ("W", "b_enc", "b_dec")


def is_here(files: Files) -> bool:
    """See formats/__init__.py."""
    one = files.one
    return files.has_arrays(one, *NAMES) or (one is not None and files.tensors(one).arrays.keys() == {*TIED})


def read(files: Files, k: int | None = None) -> Foreign:
    """See formats/__init__.py."""
    name = files.one or "model.pt"
    tensors, path = files.tensors(name), files.folder / name
    if tensors.arrays.keys() == {*TIED}:
        return _tied(tensors, path, k)
    arrays = take(tensors, path, NAMES)
    w_enc, b_enc, w_dec, b_dec = (arrays[each] for each in NAMES)
    _, d = shape_of(w_enc)
    ours = {"w_enc": w_enc, "b_enc": b_enc, "w_dec": w_dec.transposed(), "b_dec": b_dec}
    config, ours, changes = autoencoder("relu", ours, False)
    return Foreign(config, ours, *sources(None, d), changes)


def _tied(tensors: Tensors, path: Path, k: int | None) -> Foreign:
    """One matrix for both ways, and a selection over a batch."""
    arrays = take(tensors, path, TIED)
    d, n_latents = shape_of(arrays["W"])
    if k is None:
        raise UserError(f"{path}: nothing says how many latents are active; give --k")
    rows = arrays["W"].transposed()
    ours = {"w_enc": rows, "b_enc": arrays["b_enc"], "w_dec": rows, "b_dec": arrays["b_dec"]}
    changes = make_up(ours, "b_enc")
    return Foreign(batch_topk.Config(n_latents=n_latents, k=k, input_norm="none"), ours, *sources(None, d), changes)
