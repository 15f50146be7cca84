"""Where the tensors lie in files of safetensors, numpy and torch: their bytes are read where they are used.

    safetensors_places    a header and the bytes
    npz_places            what `numpy.savez` writes: a zip, not packed
    torch_places          what `torch.save` writes, found without torch and without running anything: a zip, not packed,
                          of one pickle and the bytes of each storage. A pickle may call any function, so this reader
                          knows the few names that tensors and plain containers need, and refuses every other

`view` is the array at a place of a file that is mapped.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sae_jax.errors import UserError
from sae_jax.storage.guarded import npy_header, one_line, open_file, open_safetensors, parse_json

FLOATS = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64}  # as safetensors says
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
INTEGERS = {"I8": np.int8, "U8": np.uint8, "I16": np.int16, "I32": np.int32, "I64": np.int64}
_NUMPY = {np.dtype(dtype): kind for kind, dtype in {**FLOATS, **INTEGERS, "BOOL": np.bool_}.items()}
_MAX_PICKLE = 64 << 20  # bytes; names and shapes alone
SHORTEST_RUN = 64  # items that are read at once
_MAX_HEADER = 1 << 16  # of an array in an .npz file


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


def view(data: Any, place: Place) -> np.ndarray:
    """The array at a place of the bytes of a file, such as a memory map; not copied."""
    dtype = np.dtype({**FLOATS, **INTEGERS}[place.kind])
    n = 1 + sum((size - 1) * stride for size, stride in zip(place.shape, place.strides, strict=True))
    flat = np.frombuffer(data, dtype, n if 0 not in place.shape else 0, place.offset)
    strides = tuple(stride * dtype.itemsize for stride in place.strides)
    return np.lib.stride_tricks.as_strided(flat, place.shape, strides, writeable=False)


def safetensors_places(path: Path) -> dict[str, Place]:
    """Where each tensor of a safetensors file lies. UserError if the file is damaged."""
    with open_safetensors(path) as file:  # compares all that is stated with the size of the file
        keys = [*file.keys()]
    with open_file(path) as raw:
        size = int.from_bytes(raw.read(8), "little")
        header = parse_json(raw.read(size), path)
    places = {}
    for key in keys:
        shape, offset = tuple(header[key]["shape"]), 8 + size + header[key]["data_offsets"][0]
        places[key] = Place(header[key]["dtype"], shape, contiguous(shape), offset)
    return places


def read_part(descriptor: int, place: Place, part: tuple[slice, ...]) -> np.ndarray:
    """A part of the array at a place of a file; no more than that of the file is in memory.

    Read, not mapped: what is mapped counts as memory of this process, and the system may map far more than is touched.

    Args:
        descriptor: of the open file.
        place: of the array.
        part: a slice of each axis, with a start and a stop.
    """
    dtype = np.dtype({**FLOATS, **INTEGERS}[place.kind])
    order = sorted(range(len(part)), key=lambda axis: -place.strides[axis])  # outermost in the file first
    sizes = [part[axis].stop - part[axis].start for axis in order]
    steps = [place.strides[axis] for axis in order]
    first = place.offset + dtype.itemsize * sum(p.start * s for p, s in zip(part, place.strides, strict=True))
    run, n_outer = 1, len(order)
    while n_outer and (steps[n_outer - 1] == run or sizes[n_outer - 1] == 1):
        run *= sizes[n_outer - 1]
        n_outer -= 1
    outer, values = sizes[:n_outer], np.empty((*sizes[:n_outer], run), dtype)
    if run < SHORTEST_RUN < math.prod(outer):  # of strides that no writer makes; too many requests
        with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as data:
            return view(data, place)[part].copy()
    for index in np.ndindex(*outer):
        at = first + dtype.itemsize * sum(i * step for i, step in zip(index, steps, strict=False))
        left = memoryview(values[index].reshape(-1).view(np.uint8))
        while left:
            n = os.preadv(descriptor, [left], at)
            if not n:
                raise UserError("a file became shorter while it was read; get it again")
            left, at = left[n:], at + n
    return values.reshape(sizes).transpose(np.argsort(order))


def torch_places(path: Path) -> dict[str, Place]:
    """Where each tensor of a file that torch wrote lies.

    Raises UserError for what is no plain dict of tensors, or damaged.
    """
    loaded = torch_content(path)
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds {type(loaded).__name__} and no dict of tensors; save the state_dict alone")
    loaded = loaded.get("state_dict", loaded)
    if others := [name for name, value in loaded.items() if not isinstance(value, Place)]:
        raise UserError(f"{path} holds {str(others[0])!r}, which is no tensor; save the state_dict alone")
    return dict(loaded)


def torch_content(path: Path) -> Any:
    """What a file that torch wrote holds: dicts, lists, text and numbers, with a `Place` for each tensor.

    Raises UserError for anything else, and for a damaged file.
    """
    try:
        raw = open_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; get the file again") from None
    with raw:
        if not zipfile.is_zipfile(raw):
            raise UserError(f"{path} is damaged or older than torch 1.6; save the model again, as safetensors")
        try:
            with zipfile.ZipFile(raw) as archive:
                loaded = _Unpickler(archive, raw).load()
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except Exception as error:  # pickle and zipfile raise whatever the bytes lead them to
            raise UserError(
                f"{path}: cannot be read ({one_line(error)}); restore the file, or write it again"
            ) from None
    return loaded


def npz_places(path: Path) -> dict[str, Place]:
    """Where each array of a file that `numpy.savez` wrote lies. UserError for anything else, and for packed arrays."""
    with open_file(path) as raw:
        try:
            with zipfile.ZipFile(raw) as archive:
                return {entry.filename.removesuffix(".npy"): _npy(raw, entry) for entry in archive.infolist()}
        except Exception as error:  # zipfile and numpy raise whatever the bytes lead them to
            raise UserError(f"{path}: cannot be read ({one_line(error)}); write it with numpy.savez") from None


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
        name, item = _STORAGES[kind]
        if entry.file_size < n_items * item:
            raise ValueError(f"storage {key} is cut short")
        return _Storage(name, item, _start(self._raw, entry), n_items)


def _tensor(storage: _Storage, first: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> Place:
    if first < 0 or min((*shape, *strides), default=0) < 0 or len(shape) != len(strides):
        raise ValueError("a tensor of no size")
    last = first + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.n_items:
        raise ValueError("a tensor reaches beyond its storage")
    if math.prod(shape) > storage.n_items:  # one value that stands for any number of them
        raise ValueError("a tensor is larger than its storage")
    return Place(storage.kind, tuple(shape), tuple(strides), storage.offset + first * storage.item)


def _start(raw: Any, entry: zipfile.ZipInfo) -> int:
    """Where in a zip the bytes of an entry start. ValueError if they are packed, or reach beyond the file."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise ValueError("its tensors are packed")
    # The local header may have another extra field than the directory.
    raw.seek(entry.header_offset)
    header = raw.read(30)
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    start = entry.header_offset + 30 + lengths
    if start + entry.file_size > raw.seek(0, 2):
        raise ValueError(f"{entry.filename} is cut short")
    return start


def _npy(raw: Any, entry: zipfile.ZipInfo) -> Place:
    """Where the array of an entry lies."""
    start = _start(raw, entry)
    raw.seek(start)
    header = io.BytesIO(raw.read(min(entry.file_size, _MAX_HEADER)))
    shape, in_columns, dtype = npy_header(header)
    if dtype not in _NUMPY:
        raise ValueError(f"{dtype}{list(shape)}")
    if math.prod(shape) * dtype.itemsize > entry.file_size - header.tell():
        raise ValueError(f"{entry.filename} is cut short")
    strides = contiguous(shape[::-1])[::-1] if in_columns else contiguous(shape)
    return Place(_NUMPY[dtype], shape, strides, start + header.tell())
