"""A language model and how to get one: `bundled`, a local folder or .gguf file, or a hub model as `id[@revision]`.

`+random:SEED` after any of these stands for the same model with random weights (redrawn.py).

What a user writes is made a reference that means the same in any folder (`resolve`), once: that one is recorded.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jax.typing import DTypeLike

from sae_jax import storage
from sae_jax.lm import params, redrawn, weights
from sae_jax.lm.spec import Spec
from sae_jax.lm.tokenizer import Tokenizer, read_tokenizer
from sae_jax.types import UsageError, UserError, check_indices

BUNDLED = Path(__file__).parent.parent / "assets" / "bundled_lm"

_HUB = re.compile(r"(?P<id>\w[\w.-]*(/\w[\w.-]*)?)(@(?P<revision>[\w./-]+))?")
_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_TORCH_FILES = ["pytorch_model*.bin"]  # fetched where there are no safetensors: many repositories have both


@struct.dataclass
class LanguageModel:
    """A decoder: its parameters, which are the leaves of this pytree, and where they come from."""

    params: dict[str, Any]  # as params.py describes them
    spec: Spec = struct.field(pytree_node=False)
    reference: str = struct.field(pytree_node=False, default="")  # what the user called it
    digest: str = struct.field(pytree_node=False, default="")  # sha256 of its config and weight files
    path: str = struct.field(pytree_node=False, default="")  # the folder it came from

    def __repr__(self) -> str:
        spec, n_parameters = self.spec, sum(getattr(array, "size", 0) for array in jax.tree.leaves(self.params))
        return (
            f"LanguageModel {self.reference}: {spec.family}, {spec.n_layers} layers, d_model={spec.d_model}, "
            f"{n_parameters:,} parameters"
        )


def load(
    reference: str, dtype: DTypeLike = jnp.float32, *, recorded: bool = False, mesh: Mesh | None = None
) -> LanguageModel:
    """The language model that `reference` names, with parameters in `dtype`.

    Args:
        reference: `bundled`, a folder, a .gguf file, or hub-id[@revision]; then +random:SEED for random weights.
        dtype: of the parameters.
        recorded: it is what `resolve` made of a reference.
        mesh: where to put the parameters, each device reading its part; None: whole on the default device.

    Raises UsageError for a reference that names nothing, or two things, and UserError for a model that cannot be
    fetched, is damaged, or belongs to a family that is not supported.
    """
    folder = locate(reference, recorded=recorded)
    spec = weights.read_spec(folder)
    values = weights.read_params(folder, spec, dtype, None if mesh is None else params.shardings(spec, mesh))
    _, seed = redrawn.parted(reference)
    return LanguageModel(
        params=values if seed is None else redrawn.draw(values, seed),
        spec=spec,
        reference=reference,
        digest=redrawn.digest(weights.digest(folder), seed),
        path=str(folder),
    )


def digest(reference: str, *, recorded: bool = False) -> str:
    """That which `load` gives the model, without its parameters."""
    return redrawn.digest(weights.digest(locate(reference, recorded=recorded)), redrawn.parted(reference)[1])


def place(model: LanguageModel, mesh: Mesh) -> LanguageModel:
    """The model on the devices of a mesh, each parameter where params.shardings says."""
    return dataclasses.replace(model, params=jax.device_put(model.params, params.shardings(model.spec, mesh)))


def read_spec(reference: str, *, recorded: bool = False) -> Spec:
    """The sizes and kinds of the model that `reference` names; of a hub model only config.json is fetched."""
    folder = locate(reference, ["config.json"], recorded=recorded)
    if not (folder / "config.json").exists():  # a .gguf file says it itself
        folder = locate(reference, recorded=recorded)
    return weights.read_spec(folder)


def tokenizer(reference: str, *n_vocab: int, recorded: bool = False) -> Tokenizer:
    """The tokenizer of the model that `reference` names; errors as `load`.

    `n_vocab`: rows of the embeddings that its tokens are for. Raises UserError if one has too few.
    """
    loaded = read_tokenizer(locate(reference, recorded=recorded))
    for n_rows in n_vocab:
        check_indices(
            loaded.n_used - 1,
            n_rows,
            f"the tokenizer of {reference} does not fit the model: token id",
            f"the embedding has {n_rows} rows; use the tokenizer that the model was trained with",
        )
    return loaded


def resolve(reference: str) -> str:
    """A user's reference as one that means the same in any folder: `bundled`, an absolute path, or a hub id.

    Raises UsageError for a reference that names nothing, and for one that could be a word or a hub id and is a folder
    too.
    """
    trained, seed = redrawn.parted(reference)
    if seed is not None:
        return redrawn.joined(resolve(trained), seed)
    is_here = bool(reference) and Path(reference).is_dir()  # an empty name would be the current folder
    if Path(reference).suffix == ".gguf" and Path(reference).is_file():
        return str(storage.absolute(reference))
    is_hub = _HUB.fullmatch(reference) is not None
    if is_here and is_hub:
        other = (
            "run elsewhere for the bundled model" if reference == "bundled" else f"{reference}@main for that of the hub"
        )
        raise UsageError(
            f"model {reference!r} is a folder here and could be another; write ./{reference} for the folder, or {other}"
        )
    if not (is_here or is_hub):
        raise UsageError(
            f"model {reference!r} is no folder and no .gguf file; use bundled, a folder, or hub-id[@revision]"
        )
    return str(storage.absolute(reference)) if is_here else reference


def locate(reference: str, files: Sequence[str] = _FILES, *, recorded: bool = False) -> Path:
    """The local folder of a model; a hub model is fetched, or found in the local cache when offline."""
    reference, _ = redrawn.parted(reference if recorded else resolve(reference))
    if reference == "bundled":
        return BUNDLED
    if os.path.isabs(reference):
        if not Path(reference).exists():
            raise UserError(
                f"the model {reference} is not there; say where it is now with --model, or repeat the harvest with its "
                f"new place"
            )
        return Path(reference)
    match = _HUB.fullmatch(reference)
    if match is None:
        raise UserError(f"model {reference!r} is no reference; say where the model is with --model")
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    def fetched(patterns: Sequence[str]) -> Path:
        return Path(
            huggingface_hub.snapshot_download(match["id"], revision=match["revision"], allow_patterns=[*patterns])
        )

    try:
        folder = fetched(files)
        if files is not _FILES or any(folder.glob("*.safetensors")):
            return folder
        folder = fetched([*files, *_TORCH_FILES])
        if any(folder.glob("*.bin")) or any(folder.glob("*.gguf")):
            return folder
        names = huggingface_hub.list_repo_files(match["id"], revision=match["revision"])
    except (HTTPError, OSError, ValueError) as error:
        # Every error of the hub client and its transport is one of these; the first line says which it was.
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"model {reference!r} is no folder, is not in the hub's cache and cannot be fetched ({reason}); "
            "check the name and the network"
        ) from error
    quantised = [name for name in names if name.endswith(".gguf")]
    if len(quantised) > 1:
        raise UserError(
            f"model {reference!r} has {len(quantised)} .gguf files and no other weights; fetch one of them "
            f"(hf download {match['id']} {quantised[0]}) and give its path"
        )
    return fetched([*files, *quantised])
