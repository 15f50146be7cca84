"""Files of tensors that others wrote, opened without torch and without reading them; and files that others read.

open_tensors(path)                 {name: Lazy} and the plain values beside them, by the name's ending
write_safetensors, write_npz, write_torch    from {name: Lazy}, a slab at a time: no array is ever whole in memory
"""

from __future__ import annotations

import io
import json
import mmap
import os
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sae_jax.interchange.lazy import SLAB_BYTES, Lazy
from sae_jax.storage import disk, tensor_files
from sae_jax.storage.guarded import open_file
from sae_jax.storage.tensor_files import FLOATS, INTEGERS, Place, contiguous, view
from sae_jax.types import UserError

SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")
MAX_SMALL = 1 << 16  # items of a tensor of whole numbers, such as k or the sizes of groups
_STORAGES = {np.dtype(np.float32): "FloatStorage", np.dtype(np.int32): "IntStorage", np.dtype(np.int64): "LongStorage"}


class Tensors(NamedTuple):
    """What a file holds. Names of nested dicts are joined by dots."""

    arrays: dict[str, Lazy]  # of floats, of any number of axes
    values: dict[str, Any]  # text and numbers; scalars and small tensors of whole numbers as numbers and lists


def open_tensors(path: Path) -> Tensors:
    """What a file holds, of a kind that its name's ending says. Raises UserError for a damaged one and another kind."""
    if path.suffix == ".safetensors":
        content: Any = tensor_files.safetensors_places(path)
    elif path.suffix == ".npz":
        content = tensor_files.npz_places(path)
    elif path.suffix in (".pt", ".pth"):
        content = tensor_files.torch_content(path)
    else:
        raise UserError(f"{path}: no file of tensors; such files end in {', '.join(SUFFIXES)}")
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__} and no dict of tensors; give the dictionary's own file")
    tensors = Tensors({}, {})
    _collect(path, content, "", tensors, 0)
    return tensors


def _collect(path: Path, content: Mapping[Any, Any], prefix: str, tensors: Tensors, depth: int) -> None:
    if depth > 8:
        raise UserError(f"{path}: nested more than 8 deep; give the dictionary's own file")
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            _collect(path, value, f"{name}.", tensors, depth + 1)
        elif not isinstance(value, Place):
            tensors.values[name] = value
        elif value.kind in INTEGERS or not value.shape:
            if np.prod(value.shape, dtype=np.int64) <= MAX_SMALL:
                tensors.values[name] = _small(path, name, value)
        else:
            tensors.arrays[name] = Lazy.of_file(path, name, value)


def _small(path: Path, name: str, place: Place) -> Any:
    if place.kind not in {**FLOATS, **INTEGERS}:
        raise UserError(f"{path}: {name} is {place.kind}, which is no plain number")
    with open_file(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return view(data, place).tolist()


def write_safetensors(path: Path, arrays: Mapping[str, Lazy], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file of float32, in slabs: strided arrays come out right, which the library's own writer breaks."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, end = {}, 0
    for name, array in sorted(arrays.items()):
        offsets[name], end = end, end + _n_bytes(array)
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with disk.naming(path), open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        os.truncate(file.fileno(), 8 + len(text) + end)
        for name, offset in offsets.items():
            _fill(file.fileno(), 8 + len(text) + offset, arrays[name])


def write_npz(path: Path, arrays: Mapping[str, Lazy]) -> None:
    """What `numpy.load` reads, of float32."""
    with disk.naming(path), open(path, "xb+") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            header = io.BytesIO()
            described = {"descr": "<f4", "fortran_order": False, "shape": array.shape}
            np.lib.format.write_array_header_1_0(header, described)
            _write_entry(archive, file, f"{name}.npy", header.getvalue(), array)


def write_torch(path: Path, content: Mapping[str, Lazy | np.ndarray]) -> None:
    """What `torch.load` reads, a dict of tensors: Lazy ones of float32, those in memory of their own type."""
    tensors, parts = list(content.values()), [b"\x80\x02}("]
    for number, (name, tensor) in enumerate(content.items()):
        parts += [_plain(name), _rebuilt(number, tensor)]
    with disk.naming(path), open(path, "xb+") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", b"".join(parts) + b"u.")
        archive.writestr("archive/byteorder", b"little")
        for number, tensor in enumerate(tensors):
            entry = f"archive/data/{number}"
            if isinstance(tensor, Lazy):
                _write_entry(archive, file, entry, b"", tensor)
            else:
                archive.writestr(entry, np.ascontiguousarray(tensor).tobytes())
        archive.writestr("archive/version", b"3\n")


def _rebuilt(number: int, tensor: Lazy | np.ndarray) -> bytes:
    """The pickle of a tensor, as torch writes it: how to call its function, of the storage with this number."""
    storage = "FloatStorage" if isinstance(tensor, Lazy) else _STORAGES[tensor.dtype]
    n_items = int(np.prod(tensor.shape, dtype=np.int64))
    place = b"(" + _plain("storage") + f"ctorch\n{storage}\n".encode()
    place += _plain(str(number)) + _plain("cpu") + _plain(n_items) + b"tQ"
    layout = _plain(0) + _plain(tuple(tensor.shape)) + _plain(contiguous(tuple(tensor.shape)))
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + place + layout + hooks + b"tR"


def _plain(value: Any) -> bytes:
    """The pickle of a plain value, without its frame."""
    return pickle.dumps(value, 2)[2:-1]


def _write_entry(archive: zipfile.ZipFile, file: BinaryIO, name: str, header: bytes, array: Lazy) -> None:
    """An array as an entry of a zip in this file, in C order."""
    if not array.shape or np.argmax(array.shape) == 0:
        with archive.open(name, "w", force_zip64=_n_bytes(array) >= 1 << 31) as entry:
            entry.write(header)
            for _, values in array.slabs():
                entry.write(np.ascontiguousarray(values).data)
        return
    # A zip takes bytes in order, and slabs of a transposed array go to many places: they are written where they belong,
    # and the checksum, which stands before them, is that of what was written.
    entry = zipfile.ZipInfo(name)
    entry.file_size = entry.compress_size = len(header) + _n_bytes(array)
    entry.header_offset, entry.CRC = archive.start_dir, zlib.crc32(header)
    is_large = entry.file_size >= 1 << 31
    file.seek(entry.header_offset)
    file.write(entry.FileHeader(is_large) + header)
    file.flush()
    start = file.tell()
    os.truncate(file.fileno(), start + _n_bytes(array))
    _fill(file.fileno(), start, array)
    while part := file.read(SLAB_BYTES):
        entry.CRC = zlib.crc32(part, entry.CRC)
    archive.start_dir = file.tell()
    file.seek(entry.header_offset)
    file.write(entry.FileHeader(is_large))
    file.seek(archive.start_dir)
    archive.filelist.append(entry)
    archive.NameToInfo[name] = entry


def _fill(descriptor: int, offset: int, array: Lazy) -> None:
    """Write an array in C order at an offset of a file, slab by slab."""
    for part, values in array.slabs():
        axis = int(np.argmax(array.shape or (0,)))
        inner = 4 * int(np.prod(array.shape[axis + 1 :], dtype=np.int64))
        values = np.ascontiguousarray(values, "<f4")
        for number, index in enumerate(np.ndindex(values.shape[:axis])):
            at = offset + (number * array.shape[axis] + part[axis].start) * inner if part else offset
            left = memoryview(values[index].reshape(-1).view(np.uint8))
            while left:  # a system writes at most 2 GiB at once, or less
                n = os.pwrite(descriptor, left, at)
                left, at = left[n:], at + n


def _n_bytes(array: Lazy) -> int:
    return 4 * int(np.prod(array.shape, dtype=np.int64))
