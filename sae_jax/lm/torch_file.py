"""Where the tensors lie in a file that `torch.save` wrote, found without torch and without running anything.

Such a file is a zip, not packed, of one pickle and the bytes of each storage. A pickle may call any function, so this
reader knows the few names that a plain dict of tensors needs, and refuses every other.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

from sae_jax.storage import one_line
from sae_jax.types import UserError

_STORAGES = {
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "FloatStorage": ("F32", 4),
    "DoubleStorage": ("F64", 8),
    "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
    "ShortStorage": ("I16", 2),
    "IntStorage": ("I32", 4),
    "LongStorage": ("I64", 8),
}
_MAX_PICKLE = 64 << 20  # bytes; names and shapes alone


class Place(NamedTuple):
    """Where a tensor lies in a file."""

    kind: str  # as safetensors calls it
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in items
    offset: int  # of its first item, in bytes


class _Storage(NamedTuple):
    kind: str
    item: int  # bytes
    offset: int
    n_items: int


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of an array in C order."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))[: len(shape)]


def places(path: Path) -> dict[str, Place]:
    """Where each tensor of the file lies.

    Raises UserError for what is no plain dict of tensors, or damaged.
    """
    if not path.exists():
        raise UserError(f"{path} is missing; get the file again")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is damaged or older than torch 1.6; save the model again, as safetensors")
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
            loaded = _Unpickler(archive, raw).load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # pickle and zipfile raise whatever the bytes lead them to
        raise UserError(f"{path}: cannot be read ({one_line(error)}); restore the file, or write it again") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds {type(loaded).__name__} and no dict of tensors; save the state_dict alone")
    loaded = loaded.get("state_dict", loaded)
    if others := [name for name, value in loaded.items() if not isinstance(value, Place)]:
        raise UserError(f"{path} holds {str(others[0])!r}, which is no tensor; save the state_dict alone")
    return dict(loaded)


class _Unpickler(pickle.Unpickler):
    """Of names, numbers and places of tensors alone."""

    def __init__(self, archive: zipfile.ZipFile, raw: Any) -> None:
        entries = {entry.filename: entry for entry in archive.infolist()}
        (name,) = [name for name in entries if name.endswith("/data.pkl")]
        self._root = name.removesuffix("data.pkl")
        order = entries.get(f"{self._root}byteorder")
        if order is not None and archive.read(order) != b"little":
            raise ValueError("its bytes are in big-endian order")
        if entries[name].file_size > _MAX_PICKLE:
            raise ValueError(f"its index has {entries[name].file_size:,} bytes")
        super().__init__(archive.open(name))
        self._entries, self._raw = entries, raw

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in _STORAGES:
            return name
        raise UserError(f"it wants {module}.{name}, which is no tensor of plain numbers; get the model as safetensors")

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _, n_items = pid
        entry = self._entries[f"{self._root}data/{key}"]
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError("its tensors are packed")
        # The local header may have another extra field than the directory.
        self._raw.seek(entry.header_offset)
        header = self._raw.read(30)
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        name, item = _STORAGES[kind]
        if entry.file_size < n_items * item:
            raise ValueError(f"storage {key} is cut short")
        return _Storage(name, item, entry.header_offset + 30 + lengths, n_items)


def _tensor(storage: _Storage, first: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> Place:
    if first < 0 or min((*shape, *strides), default=0) < 0 or len(shape) != len(strides):
        raise ValueError("a tensor of no size")
    last = first + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.n_items:
        raise ValueError("a tensor reaches beyond its storage")
    return Place(storage.kind, tuple(shape), tuple(strides), storage.offset + first * storage.item)
