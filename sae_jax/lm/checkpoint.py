"""The tensors of a model folder by name, whichever kind of file they lie in.

    *.safetensors          one, several, or those of an index
    pytorch_model*.bin     what torch.save writes, read without torch: tensors alone, no code (storage/tensor_files.py)
    *.gguf                 one, dequantised by the `gguf` package (gguf_file.py)

A tensor is a view of its file: bytes are read where they are used, so a device's part of a matrix is all that is read
of it.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sae_jax import storage
from sae_jax.lm import gguf_file
from sae_jax.lm.family import Family
from sae_jax.lm.files import read_json
from sae_jax.progress import say_once
from sae_jax.storage.tensor_files import FLOATS, safetensors_places, torch_places, view
from sae_jax.types import UserError

_FORMATS = (  # (one file, its index, all such files), the first that is there
    ("model.safetensors", "model.safetensors.index.json", "*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model*.bin"),
    ("model.gguf", "", "*.gguf"),
)


class StoredTensor(NamedTuple):
    """A tensor of a file that nobody has read yet."""

    kind: str  # a key of FLOATS, or another one
    shape: tuple[int, ...]
    view: Callable[[], np.ndarray]


class Checkpoint:
    """The tensors of a folder, by their names without the prefix of full checkpoints."""

    def __init__(self, folder: Path, of_family: Family) -> None:
        """Opens all files, and reads their headers. Raises UserError for one that is damaged, or none at all."""
        self.folder, self._family = folder, of_family
        self._tensors: dict[str, tuple[str, StoredTensor]] = {}
        self._maps: list[mmap.mmap] = []
        self.unread: dict[str, str] = {}  # {name without prefix: name}
        for path in weight_files(folder):
            for key, tensor in self._open(path).items():
                if (name := self._bare(key)) in self._tensors:
                    raise UserError(
                        f"{folder} has {name!r} twice, the second time in {path.name}; leave one of the two"
                    )
                self._tensors[name], self.unread[name] = (key, tensor), key

    def __contains__(self, name: str) -> bool:
        return self._bare(name) in self._tensors

    def check(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """A tensor of floats, unread. Raises UserError if it is not there, not one of floats, or not of this shape."""
        if name not in self:
            raise UserError(f"{self.folder} has no tensor {name!r}; its weights and config.json do not match")
        _, tensor = self._tensors[self._bare(name)]
        if tensor.kind not in FLOATS:
            raise UserError(
                f"{self.folder} has {name!r} as {tensor.kind}, which is no plain weight; get the model as "
                f"{', '.join(FLOATS)}"
            )
        if tensor.shape != shape:
            raise UserError(f"{self.folder} has {name!r} in shape {tensor.shape}; its config.json implies {shape}")
        if tensor.kind == "F64":
            say_once(f"{self.folder}: weights in float64 are rounded to float32")
        return tensor

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Its values: a view, but for tensors that have to be dequantised. Raises UserError as `check`."""
        tensor = self.check(name, shape)
        self.unread.pop(self._bare(name), None)
        return tensor.view()

    def forget(self) -> None:
        """Lets the system take back the memory of what was read."""
        for data in self._maps:
            if hasattr(data, "madvise"):
                data.madvise(mmap.MADV_DONTNEED)

    def _bare(self, name: str) -> str:
        return self._family.bare(name)

    def _open(self, path: Path) -> Mapping[str, StoredTensor]:
        if path.suffix == ".gguf":
            return {name: StoredTensor("F32", shape, view) for name, (shape, view) in gguf_file.tensors(path).items()}
        places = torch_places(path) if path.suffix == ".bin" else safetensors_places(path)
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._maps.append(data)
        return {
            name: StoredTensor(place.kind, place.shape, partial(view, data, place)) for name, place in places.items()
        }


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, or the one that is named itself: see the head. UserError if there are none.

    A folder may hold the same weights a second time, under another name.
    """
    if folder.is_file():
        if folder.suffix != ".gguf":
            raise UserError(f"{folder} is a file; give the folder of the model, or a .gguf file")
        return [folder]
    for single, index_name, pattern in _FORMATS:
        index = folder / index_name
        if index_name and index.exists():
            return _of_index(folder, index, single)
        if (folder / single).exists():
            return [folder / single]
        if paths := sorted(folder.glob(pattern)):
            if single == "model.gguf" and len(paths) > 1:
                raise UserError(f"{folder} has {len(paths)} .gguf files; give the path of one of them")
            return paths
    raise UserError(
        f"{folder} has no *.safetensors, pytorch_model.bin or *.gguf; get the model's weights as one of these"
    )


def gguf_of(folder: Path) -> Path | None:
    """The .gguf file that a folder's model lies in, or that is named itself; None if it lies in others."""
    if not folder.is_file() and not any(folder.glob("*.gguf")):
        return None
    first = weight_files(folder)[0]
    return first if first.suffix == ".gguf" else None


def _of_index(folder: Path, index: Path, single: str) -> list[Path]:
    names = {*storage.as_type(read_json(index).get("weight_map"), dict[str, str], f"{index}: weight_map").values()}
    if elsewhere := [name for name in names if Path(name).name != name]:
        raise UserError(f"{index} names {min(elsewhere)!r}, which is no file of this folder; get the file again")
    if (folder / single).exists() and single not in names:
        raise UserError(f"{index} names other files than {single}, which is there, too; remove one of the two")
    return [folder / name for name in sorted(names)]
