"""Parameters of a language model: from a Hugging Face safetensors folder, to one, or random.

The folder is read tensor by tensor without torch. Names that no parameter needs (attention mask buffers, a
tied head) are ignored; every parameter must be found, in the shape the config implies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sae_jax.lm.families import FAMILIES, family_of
from sae_jax.lm.spec import Spec, shapes
from sae_jax.types import UserError

_INDEX = "model.safetensors.index.json"
_HEAD = "lm_head.weight"  # stands beside the prefixed base model in every family


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
    """The parameter tree (`spec.shapes`) of a folder's safetensors, cast to `dtype`, on the default device.

    Raises UserError, naming the file, for a missing, damaged or incomplete set of weight files.
    """
    prefix = FAMILIES[spec.family].prefix
    wanted = {name: _stored_shape(spec, ours, layer) for name, ours, layer in _layout(spec)}
    found: dict[str, np.ndarray] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118, the handle is no dict and does not iterate
                    name = key.removeprefix(prefix)
                    if name in wanted:
                        found[name] = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}); get the file again") from None
    for name, shape in wanted.items():
        if name not in found:
            raise UserError(f"{folder} has no tensor {name!r}; its safetensors and config.json do not match")
        if found[name].shape != shape:
            raise UserError(f"{folder} has {name!r} in shape {found[name].shape}; its config.json implies {shape}")

    params: dict[str, Any] = {"layers": {}}
    stacks: dict[str, list[np.ndarray]] = {}
    for name, ours, layer in _layout(spec):
        tensor = found.pop(name)
        if layer is None:
            params[ours[0]] = jnp.asarray(tensor, dtype)
        else:
            for part, values in zip(ours, np.split(tensor, len(ours), axis=-1), strict=True):
                stacks.setdefault(part, []).append(values)
    for part in list(stacks):
        params["layers"][part] = jnp.asarray(np.stack(stacks.pop(part)), dtype)
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
        params: the parameter tree, as `spec.shapes`.
        dtype: of the stored tensors; float16 halves the file.
        settings: further keys of config.json that do not concern the forward pass, such as `eos_token_id`.
    """
    family = FAMILIES[spec.family]
    folder.mkdir(parents=True, exist_ok=True)
    stored = {}
    for name, ours, layer in _layout(spec):
        tree = params if layer is None else {part: params["layers"][part][layer] for part in ours}
        tensor = np.concatenate([np.asarray(tree[part]) for part in ours], axis=-1)
        # save_file writes the buffer and ignores strides: a transposed view would be stored scrambled.
        full_name = name if name == _HEAD else family.prefix + name
        stored[full_name] = np.ascontiguousarray(tensor, dtype=dtype)
    path = folder / "model.safetensors"
    save_file(stored, path, metadata={"format": "pt"})
    path.chmod(0o644)  # save_file leaves it readable by its owner alone
    config = {
        "architectures": [family.architecture],
        "model_type": spec.family,
        "dtype": np.dtype(dtype).name,
        **family.write_config(spec),
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


def init(spec: Spec, key: jax.Array) -> dict[str, Any]:
    """Random f32 parameters: normal with deviation 0.02, smaller (by sqrt(2L)) for what writes to the stream.

    Source: Radford et al. 2019, section 2.3. Norm weights are 1 and biases 0.
    """
    tree = shapes(spec)
    paths, structure = jax.tree.flatten_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))
    leaves = []
    for number, (path, shape) in enumerate(paths):
        name = path[-1].key
        if name.endswith(".b"):
            leaves.append(jnp.zeros(shape))
        elif name.startswith("norm"):
            leaves.append(jnp.ones(shape))
        else:
            scale = 0.02 / (2 * spec.n_layers) ** 0.5 if name in ("o.w", "down.w") else 0.02
            leaves.append(scale * jax.random.normal(jax.random.fold_in(key, number), shape))
    return jax.tree.unflatten(structure, leaves)


def _layout(spec: Spec) -> Iterator[tuple[str, tuple[str, ...], int | None]]:
    """Every tensor of a checkpoint: its name without prefix, our names for its parts, its layer."""
    family, tree = FAMILIES[spec.family], shapes(spec)
    for name, ours in family.top.items():
        if ours in tree:
            yield name, (ours,), None
    for layer in range(spec.n_layers):
        for module, parts in family.layer.items():
            for suffix, short in (("weight", "w"), ("bias", "b")):
                ours = tuple(f"{part}.{short}" for part in parts)
                yield f"{family.layer_list}.{layer}.{module}.{suffix}", ours, layer


def _stored_shape(spec: Spec, ours: tuple[str, ...], layer: int | None) -> tuple[int, ...]:
    tree = shapes(spec)
    shape = tree[ours[0]] if layer is None else tree["layers"][ours[0]][1:]
    return (*shape[:-1], shape[-1] * len(ours))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); get the file again") from None
    if not isinstance(parsed, dict):
        raise UserError(f"{path} is not a JSON object; get the file again")
    return parsed
