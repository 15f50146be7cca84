"""Reading and writing the parameters of a language model as a Hugging Face safetensors folder, without torch.

Which tensor holds which parameter is said in params.py. Every parameter must be there, once, as floats and in the shape
that the config implies. What no parameter needs is named, or refused where the model would be another one without it: a
tensor inside a block, or a head that is not the embedding although they are tied.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sae_jax import storage
from sae_jax.lm.family import family, family_of
from sae_jax.lm.files import read_json
from sae_jax.lm.params import ArrayInfo, parameters
from sae_jax.lm.spec import Spec
from sae_jax.progress import say_once
from sae_jax.types import UserError

_INDEX = "model.safetensors.index.json"
_FLOATS = ("F16", "BF16", "F32", "F64")  # as safetensors calls them
MAX_SIZE = 1 << 24  # of any axis of a model
N_NAMED = 5  # tensors that a message names


def read_spec(folder: Path) -> Spec:
    """The Spec that a folder's config.json states; UserError for an unsupported family or setting."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} has no config.json; a model is a Hugging Face folder")
    config = read_json(path)
    try:
        spec = family_of(config, str(folder)).read_spec(config)
    except KeyError as error:
        raise UserError(f"{path} lacks {error}; get the file again") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{path} has a value of another kind ({error}); get the file again") from None
    storage.as_type(dataclasses.asdict(spec), Spec, path)
    for name, value in dataclasses.asdict(spec).items():
        if isinstance(value, int) and not isinstance(value, bool) and not 0 < value < MAX_SIZE:
            raise UserError(f"{path}: {name}={value} must be above 0 and below {MAX_SIZE:,}; get the file again")
    return spec


def read_params(folder: Path, spec: Spec, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """The parameters (params.py) in a folder's safetensors, cast to `dtype`, on the default device.

    The host holds one parameter of all layers at a time (those that share a tensor together).

    Raises UserError, naming the file, for a missing, damaged or incomplete set of weight files, and for tensors that
    make another model than the config says.
    """
    params: dict[str, Any] = {"layers": {}}
    with contextlib.ExitStack() as opened:
        stored = _StoredTensors(folder, family(spec.family).prefix, opened)
        for tensor in _tensors(spec):
            if tensor.in_layers:
                # The first that is missing ends it, however many layers the config claims.
                names = (tensor.name.format(layer=layer) for layer in range(spec.n_layers))
                values = np.stack([stored.read(name, tensor.shape) for name in names])
            else:
                values = stored.read(tensor.name, tensor.shape)
            for name, part in zip(tensor.parts, np.split(values, len(tensor.parts), axis=-1), strict=True):
                (params["layers"] if tensor.in_layers else params)[name] = jnp.asarray(part, dtype)
        if spec.tied:
            _check_head(stored, spec)
        _check_ignored(stored, spec)
    return params


class _StoredTensors:
    """The tensors of a folder, by their names without the prefix of full checkpoints."""

    def __init__(self, folder: Path, prefix: str, opened: contextlib.ExitStack) -> None:
        self.folder, self._prefix = folder, prefix
        self._file_of: dict[str, tuple[Any, str]] = {}
        self.unread: dict[str, str] = {}  # {name without prefix: name}
        for path in weight_files(folder):
            file = opened.enter_context(storage.open_safetensors(path))
            for key in file.keys():  # noqa: SIM118, no dict
                if (name := self._bare(key)) in self._file_of:
                    raise UserError(
                        f"{folder} has {name!r} twice, the second time in {path.name}; leave one of the two"
                    )
                self._file_of[name], self.unread[name] = (file, key), key

    def __contains__(self, name: str) -> bool:
        return self._bare(name) in self._file_of

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor of floats. Raises UserError if it is not there, or not of this shape."""
        if name not in self:
            raise UserError(f"{self.folder} has no tensor {name!r}; its safetensors and config.json do not match")
        file, key = self._file_of[self._bare(name)]
        header = file.get_slice(key)
        if (kind := header.get_dtype()) not in _FLOATS:
            raise UserError(
                f"{self.folder} has {name!r} as {kind}, which is no plain weight; get the model as {', '.join(_FLOATS)}"
            )
        if (stored_shape := tuple(header.get_shape())) != shape:
            raise UserError(f"{self.folder} has {name!r} in shape {stored_shape}; its config.json implies {shape}")
        if kind == "F64":
            say_once(f"{self.folder}: weights in float64 are rounded to float32")
        self.unread.pop(self._bare(name), None)
        return file.get_tensor(key)

    def _bare(self, name: str) -> str:
        return name.removeprefix(self._prefix)


def _check_head(stored: _StoredTensors, spec: Spec) -> None:
    """Raises UserError if a head is stored that is not the embedding, although they are tied."""
    infos = family(spec.family).stored
    head, embedding = (infos[name].name for name in ("unembed", "embed"))
    shape = (spec.n_vocab, spec.d_model)
    if head in stored and not np.array_equal(stored.read(head, shape), stored.read(embedding, shape)):
        raise UserError(
            f"{stored.folder} has {head!r} unlike {embedding!r}, though its config.json ties them, in words or by "
            f"default; set tie_word_embeddings to false there if the model has a head of its own, or remove the tensor"
        )


def _check_ignored(stored: _StoredTensors, spec: Spec) -> None:
    """Names the tensors that were not read.

    Raises UserError for one in a block, or beside a parameter: the model would be another one without it.
    """
    of_family = family(spec.family)
    buffers = {name.format(layer=layer) for name in of_family.buffers for layer in range(spec.n_layers)}
    ignored = {bare: key for bare, key in stored.unread.items() if bare not in buffers}
    # "h." of blocks, "ln_f." of others.
    modules = {
        name.partition("{")[0] if "{" in name else f"{name.rpartition('.')[0]}."
        for name in (place.name.removeprefix(of_family.prefix) for place in of_family.stored.values())
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
    stored = {}
    for tensor in _tensors(spec):
        tree = params["layers"] if tensor.in_layers else params
        values = np.concatenate([np.asarray(tree[name]) for name in tensor.parts], axis=-1)
        for layer, one in enumerate(values if tensor.in_layers else [values]):
            stored[tensor.name.format(layer=layer)] = np.ascontiguousarray(one, dtype=dtype)
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


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those its index lists, model.safetensors, or all there are; UserError if none.

    A folder may hold the same weights a second time, under another name.
    """
    index = folder / _INDEX
    if index.exists():
        names = {*storage.as_type(read_json(index).get("weight_map"), dict[str, str], f"{index}: weight_map").values()}
        if elsewhere := [name for name in names if Path(name).name != name]:
            raise UserError(f"{index} names {min(elsewhere)!r}, which is no file of this folder; get the file again")
        if (folder / "model.safetensors").exists() and "model.safetensors" not in names:
            raise UserError(
                f"{index} names other files than model.safetensors, which is there, too; remove one of the two"
            )
        return [folder / name for name in sorted(names)]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
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
