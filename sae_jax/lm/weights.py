"""Reading the parameters of a language model from its folder, and writing them as safetensors, without torch.

Which tensor holds which parameter is said in params.py, which kinds of files there are in checkpoint.py. Every
parameter must be there, once, as floats and in the shape that the config implies. What no parameter needs is named, or
refused where the model would be another one without it: a tensor inside a block, or a head that is not the embedding
although they are tied.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike

from sae_jax import storage
from sae_jax.lm import gguf_file
from sae_jax.lm.checkpoint import Checkpoint, gguf_of, weight_files
from sae_jax.lm.family import family, family_of
from sae_jax.lm.files import read_json
from sae_jax.lm.params import ArrayInfo, parameters
from sae_jax.lm.spec import Spec, UnsupportedError
from sae_jax.progress import say_once
from sae_jax.types import UserError

_ALIGNMENT = 64  # bytes
BLOCK_BYTES = 32 << 20  # of a file that are in memory at a time
MAX_SIZE = 1 << 24  # of any axis of a model
N_NAMED = 5  # tensors that a message names


def read_spec(folder: Path) -> Spec:
    """The Spec that a folder's config.json or .gguf file states; UserError for an unsupported family or setting."""
    path = folder / "config.json"
    if path.exists():
        config = read_json(path)
    elif (path := gguf_of(folder)) is not None:
        config = gguf_file.config(path)
    else:
        raise UserError(f"{folder} has no config.json; a model is a Hugging Face folder, or a .gguf file")
    try:
        spec = family_of(config, str(folder)).read_spec(config)
    except UnsupportedError as error:
        raise UnsupportedError(error.problem, in_gguf=path.suffix == ".gguf") from None
    except KeyError as error:
        raise UserError(f"{path} lacks {error}; get the file again") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{path} has a value of another kind ({error}); get the file again") from None
    storage.as_type(dataclasses.asdict(spec), Spec, path)
    _check_sizes(spec, path)
    return spec


def _check_sizes(spec: Spec, path: Path) -> None:
    """Raises UserError for numbers that no model has."""
    windows = {f"window of layers {i}": kind.window for i, kind in enumerate(spec.attention)}
    for name, value in (dataclasses.asdict(spec) | windows).items():
        if isinstance(value, int) and not isinstance(value, bool) and not 0 < value < MAX_SIZE:
            raise UserError(f"{path}: {name}={value} must be above 0 and below {MAX_SIZE:,}; get the file again")
    n_rotary = spec.d_head if spec.d_rotary is None else spec.d_rotary
    if spec.positions == "rotary" and (n_rotary % 2 or n_rotary > spec.d_head):
        raise UserError(f"{path}: {n_rotary} of {spec.d_head} numbers of a head rotate; they must be pairs of them")
    if len(spec.layer_kinds) != spec.n_layers:
        raise UserError(
            f"{path}: layer_types has {len(spec.layer_kinds)} layers of {spec.n_layers}; get the file again"
        )


def read_params(
    folder: Path, spec: Spec, dtype: DTypeLike = jnp.float32, placement: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The parameters (params.py) in a folder's weight files, cast to `dtype`.

    Each device's part of a parameter is read by itself, once for all devices that hold it, and nothing else is kept on
    the host.

    Args:
        folder: of the model, or its .gguf file.
        spec: what its config.json states.
        dtype: of the parameters.
        placement: the sharding of each, a tree like the parameters; None: whole, on the default device.

    Raises UserError, naming the file, for a missing, damaged or incomplete set of weight files, and for tensors that
    make another model than the config says.
    """
    stored = Checkpoint(folder, family(spec.family))
    infos = parameters(spec)
    for info in jax.tree.leaves(infos):  # all must be there before the first is read
        for layer in _layers(info, spec):
            stored.check(*_tensor(info, layer))
    if placement is None:
        (device,) = jax.device_put(np.zeros(())).devices()  # the default one, also where a mesh is in use
        here = SingleDeviceSharding(device)
        placement = jax.tree.map(lambda _: here, infos)
    params = jax.tree.map(lambda info, where: _read(stored, info, spec, dtype, where), infos, placement)
    if spec.tied:
        _check_head(stored, spec)
    _check_ignored(stored, spec)
    return params


def _layers(info: ArrayInfo, spec: Spec) -> range:
    """Layers that have a tensor of a parameter; a single one where it is of no layer."""
    return range(spec.n_layers if info.axes[0] == "layer" else 1)


def _tensor(info: ArrayInfo, layer: int) -> tuple[str, tuple[int, ...]]:
    """(name, shape) of the tensor that has a parameter, or a part of one."""
    place, shape = info.stored, info.shape[1:] if info.axes[0] == "layer" else info.shape
    whole = (*shape[:-1], shape[-1] * place.n_parts)
    return place.name.format(layer=layer), whole[::-1] if place.transposed else whole


def _read(stored: Checkpoint, info: ArrayInfo, spec: Spec, dtype: DTypeLike, where: jax.sharding.Sharding) -> jax.Array:
    """One parameter, on its devices."""
    in_layers = info.axes[0] == "layer"  # an axis that is never split
    indices = {str(index): index or () for index in where.addressable_devices_indices_map(info.shape).values()}
    parts = {key: _aligned(_size(info.shape, index), dtype) for key, index in indices.items()}
    for layer in _layers(info, spec):
        values = _view(stored, info, spec, layer)
        for key, index in indices.items():
            part, source = (parts[key][layer], values[index[1:]]) if in_layers else (parts[key], values[index])
            n_rows = max(BLOCK_BYTES // max(source[:1].nbytes, 1), 1)
            for first in range(0, len(source), n_rows):
                part[first : first + n_rows] = source[first : first + n_rows]
                stored.forget()
    return jax.make_array_from_callback(info.shape, where, lambda index: parts[str(index)])


def _size(shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(len(range(size)[part]) for size, part in zip(shape, index, strict=True))


def _view(stored: Checkpoint, info: ArrayInfo, spec: Spec, layer: int) -> np.ndarray:
    """A parameter, of a layer if it is of one, as a view of its tensor where that can be."""
    place, tensor = info.stored, stored.read(*_tensor(info, layer))
    tensor = tensor.T if place.transposed else tensor
    if place.n_parts == 1:
        return tensor
    width = tensor.shape[-1] // place.n_parts
    if place.by_head:
        by_head = tensor.reshape(*tensor.shape[:-1], spec.n_heads, place.n_parts, -1)
        return by_head[..., place.part, :].reshape(*tensor.shape[:-1], width)
    return tensor[..., place.part * width : (place.part + 1) * width]


def _aligned(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Memory that a CPU device takes as it is, without a copy."""
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(n_bytes + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    return memory[first : first + n_bytes].view(dtype).reshape(shape)


def _check_head(stored: Checkpoint, spec: Spec) -> None:
    """Raises UserError if a head is stored that is not the embedding, although they are tied."""
    infos = family(spec.family).stored
    head, embedding = (infos[name].name for name in ("unembed", "embed"))
    shape = (spec.n_vocab, spec.d_model)
    if head in stored and not np.array_equal(stored.read(head, shape), stored.read(embedding, shape)):
        raise UserError(
            f"{stored.folder} has {head!r} unlike {embedding!r}, though its config.json ties them, in words or by "
            f"default; set tie_word_embeddings to false there if the model has a head of its own, or remove the tensor"
        )


def _check_ignored(stored: Checkpoint, spec: Spec) -> None:
    """Names the tensors that were not read.

    Raises UserError for one in a block, or beside a parameter: the model would be another one without it.
    """
    of_family = family(spec.family)
    buffers = {name.format(layer=layer) for name in of_family.buffers for layer in range(spec.n_layers)}
    ignored = {bare: key for bare, key in stored.unread.items() if bare not in buffers}
    # "h." of blocks, "ln_f." of others.
    modules = {
        name.partition("{")[0] if "{" in name else f"{name.rpartition('.')[0]}."
        for name in (of_family.bare(place.name) for place in of_family.stored.values())
    }
    for bare, key in ignored.items():
        if bare.startswith(tuple(modules)):
            raise UserError(
                f"{stored.folder} has a tensor {key!r}, which a {spec.family} of {spec.n_layers} layers by its "
                f"config.json does not use; the model would be another one without it"
            )
    if ignored:
        names = list(ignored.values())
        more = f" and {len(names) - N_NAMED} more" if len(names) > N_NAMED else ""
        say_once(f"{stored.folder}: tensors that are not used: {', '.join(names[:N_NAMED])}{more}")


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
    infos, by_tensor = parameters(spec), {}
    layers = infos.pop("layers")
    for tree, of_tree in ((infos, params), (layers, params["layers"])):
        for name, info in tree.items():
            by_tensor.setdefault(info.stored.name, []).append((info, np.asarray(of_tree[name])))
    stored = {}
    for name, parts in by_tensor.items():
        parts.sort(key=lambda item: item[0].stored.part)
        place, in_layers = parts[0][0].stored, parts[0][0].axes[0] == "layer"
        values = [part for _, part in parts]
        if place.by_head:
            by_head = [part.reshape(*part.shape[:-1], spec.n_heads, -1) for part in values]
            value = np.stack(by_head, axis=-2).reshape(*values[0].shape[:-1], -1)
        else:
            value = np.concatenate(values, axis=-1)
        for layer, one in enumerate(value if in_layers else [value]):
            stored[name.format(layer=layer)] = np.ascontiguousarray(one.T if place.transposed else one, dtype=dtype)
    storage.write_safetensors(folder / "model.safetensors", stored, {"format": "pt"})
    config = {
        "architectures": [family(spec.family).architecture],
        "model_type": spec.family,
        "dtype": np.dtype(dtype).name,
        **family(spec.family).write_config(spec),
        **(settings or {}),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def digest(folder: Path) -> str:
    """sha256 (hex) of what makes a model: its config, as far as it is no default, and the bytes of its weight files."""
    spec = read_spec(folder)
    defaults = {field.name: field.default for field in dataclasses.fields(spec)}
    settings = {name: value for name, value in dataclasses.asdict(spec).items() if value != defaults[name]}
    sha = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in weight_files(folder):
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                sha.update(block)
    return sha.hexdigest()
