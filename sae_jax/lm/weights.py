"""Reading and writing the parameters of a language model as a Hugging Face safetensors folder, without torch.

Which tensor holds which parameter is said in params.py. Tensors that no parameter needs (attention mask buffers, a tied
head) are ignored; every parameter must be there, in the shape that the config implies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sae_jax.lm.family import family, family_of
from sae_jax.lm.params import ArrayInfo, parameters
from sae_jax.lm.spec import Spec
from sae_jax.types import UserError

_INDEX = "model.safetensors.index.json"


def read_spec(folder: Path) -> Spec:
    """The Spec that a folder's config.json states; UserError for an unsupported family or setting."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} has no config.json; a model is a Hugging Face folder")
    config = _read_json(path)
    try:
        return family_of(config, str(folder)).read_spec(config)
    except KeyError as error:
        raise UserError(f"{path} lacks {error}; get the file again") from None


def read_params(folder: Path, spec: Spec, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """The parameters (params.py) in a folder's safetensors, cast to `dtype`, on the default device.

    The host holds one parameter of all layers at a time (those that share a tensor together).

    Raises UserError, naming the file, for a missing, damaged or incomplete set of weight files.
    """
    prefix = family(spec.family).prefix
    params: dict[str, Any] = {"layers": {}}
    with contextlib.ExitStack() as opened:
        file_of: dict[str, Any] = {}  # tensor, without prefix -> the file that holds it
        for path in weight_files(folder):
            try:
                file = opened.enter_context(safe_open(path, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} cannot be read ({error}); get the file again") from None
            file_of |= {key.removeprefix(prefix): (file, key) for key in file.keys()}  # noqa: SIM118, no dict

        def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
            if name.removeprefix(prefix) not in file_of:
                raise UserError(f"{folder} has no tensor {name!r}; its safetensors and config.json do not match")
            file, key = file_of[name.removeprefix(prefix)]
            tensor = file.get_tensor(key)
            if tensor.shape != shape:
                raise UserError(f"{folder} has {name!r} in shape {tensor.shape}; its config.json implies {shape}")
            return tensor

        for tensor in _tensors(spec):
            if tensor.in_layers:
                names = [tensor.name.format(layer=layer) for layer in range(spec.n_layers)]
                values = np.stack([read(name, tensor.shape) for name in names])
            else:
                values = read(tensor.name, tensor.shape)
            for name, part in zip(tensor.parts, np.split(values, len(tensor.parts), axis=-1), strict=True):
                (params["layers"] if tensor.in_layers else params)[name] = jnp.asarray(part, dtype)
    return params


def save(
    folder: Path,
    spec: Spec,
    params: Mapping[str, Any],
    *,
    dtype: DTypeLike = np.float32,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json and model.safetensors, in `dtype`, as transformers and `read_params` read them.

    Args:
        folder: made if it does not exist.
        spec: the model's sizes and kinds.
        params: the parameters, as params.py describes them.
        dtype: of the stored tensors; float16 halves the file.
        settings: further keys of config.json that do not concern the forward pass, such as `eos_token_id`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = {}
    for tensor in _tensors(spec):
        tree = params["layers"] if tensor.in_layers else params
        values = np.concatenate([np.asarray(tree[name]) for name in tensor.parts], axis=-1)
        for layer, one in enumerate(values if tensor.in_layers else [values]):
            # save_file writes the buffer and ignores strides: a transposed view would be stored scrambled.
            stored[tensor.name.format(layer=layer)] = np.ascontiguousarray(one, dtype=dtype)
    path = folder / "model.safetensors"
    save_file(stored, path, metadata={"format": "pt"})
    path.chmod(0o644)  # save_file leaves it readable by its owner alone
    config = {
        "architectures": [family(spec.family).architecture],
        "model_type": spec.family,
        "dtype": np.dtype(dtype).name,
        **family(spec.family).write_config(spec),
        **(settings or {}),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def digest(folder: Path) -> str:
    """sha256 (hex) over the bytes of a folder's weight files, in order of name."""
    sha = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                sha.update(block)
    return sha.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those its index lists, else all there are; UserError if none."""
    index = folder / _INDEX
    if index.exists():
        return [folder / name for name in sorted(set(_read_json(index).get("weight_map", {}).values()))]
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UserError(f"{folder} has no *.safetensors; convert the model's weights to safetensors first")
    return paths


class _Tensor(NamedTuple):
    """A tensor of a checkpoint, or if `in_layers` that of each layer."""

    name: str  # see family.Stored
    parts: tuple[str, ...]  # the parameters in it, side by side on its last axis
    shape: tuple[int, ...]
    in_layers: bool


def _tensors(spec: Spec) -> list[_Tensor]:
    """Every tensor that a checkpoint of this spec has to hold."""
    tree = parameters(spec)
    layers = tree.pop("layers")
    infos: dict[str, ArrayInfo] = {**tree, **layers}
    parts_of: dict[str, list[str]] = {}
    for name, info in sorted(infos.items(), key=lambda item: item[1].stored.part):
        parts_of.setdefault(info.stored.name, []).append(name)
    tensors = []
    for stored_name, parts in parts_of.items():
        in_layers = parts[0] in layers
        shape = infos[parts[0]].shape[in_layers:]
        tensors.append(_Tensor(stored_name, tuple(parts), (*shape[:-1], shape[-1] * len(parts)), in_layers))
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); get the file again") from None
    if not isinstance(parsed, dict):
        raise UserError(f"{path} is not a JSON object; get the file again")
    return parsed
