"""One folder that SAELens and sparsify both open: the files of each, with one `cfg.json` for both.

Each ignores what it does not know of it. Only a topk autoencoder is in both.
"""

from __future__ import annotations

from pathlib import Path

from sae_jax import storage
from sae_jax.interchange.foreign import Files, Foreign, Ours, refuse
from sae_jax.interchange.formats import saelens, sparsify
from sae_jax.interchange.tensors import write_safetensors

NAME = "saelens_and_sparsify"
NEEDS_THRESHOLD = False


def is_here(files: Files) -> bool:
    """See formats/__init__.py."""
    return {"cfg.json", saelens.WEIGHTS, sparsify.WEIGHTS} <= {*files.names}


def read(files: Files, k: int | None = None) -> Foreign:
    """See formats/__init__.py. They are the same dictionary twice; SAELens' half says more."""
    return saelens.read(files, k)


def write(ours: Ours, folder: Path) -> None:
    """See formats/__init__.py."""
    if ours.config.variant == "transcoder":
        raise refuse(NAME, ours.config, "SAELens has no transcoder that selects k latents", "export it as sparsify")
    for_sparsify, for_saelens = sparsify.in_their_words(ours), saelens.in_their_words(ours)
    write_safetensors(folder / sparsify.WEIGHTS, for_sparsify[1])
    write_safetensors(folder / saelens.WEIGHTS, for_saelens[1])
    storage.write_json(folder / saelens.CONFIG, {**for_sparsify[0], **for_saelens[0]})
