"""A file at a path or a URL, read and written whole."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sae_jax.errors import UserError
from sae_jax.storage import disk, guarded
from sae_jax.storage.disk import StrPath, is_url
from sae_jax.storage.guarded import MAX_BYTES
from sae_jax.storage.objects import STORAGE_ERRORS, create_object, open_store, reason, write_error


def read_bytes(path: StrPath) -> bytes | None:
    """The content of a file; None if there is none."""
    if not is_url(path):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), guarded.open_file(path) as file:
            return file.read()
        return None
    try:
        found = open_store(path).read("").result()
    except STORAGE_ERRORS as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    return found.value if found.state == "value" else None


def read_limited(path: StrPath, limit: int = MAX_BYTES) -> bytes:
    """The content of a file that must be there. Raises OSError if it is not, UserError if it is over `limit` bytes."""
    if not is_url(path):
        return guarded.read_limited(path, limit)
    if (data := read_bytes(path)) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
    guarded.refuse_long(path, len(data), limit)
    return data


def read_json(path: StrPath) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no file. Raises UserError if it holds something else."""
    try:
        return guarded.parse_json(read_limited(path), path, dict[str, Any])
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_bytes(path: StrPath, data: bytes) -> None:
    """Write or replace a file, whole and durable. Folders on the way are made."""
    if not is_url(path):
        disk.write(Path(path), data, os.replace)
        return
    try:
        open_store(path).write("", data).result()
    except STORAGE_ERRORS as error:
        raise write_error(os.fspath(path), error) from error


def write_text(path: StrPath, text: str) -> None:
    """`write_bytes` of text as UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: StrPath, content: Any) -> None:
    """`write_text` of JSON. Raises UserError for a number that is not finite: JSON has no word for it."""
    write_text(path, json_text(content, path))


def write_safetensors(path: StrPath, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Write arrays as a safetensors file on a disk, which all may read. It is not put in place whole.

    Args:
        path: of the file.
        arrays: C-contiguous: the library writes their buffers and ignores strides.
        metadata: of the file.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with disk.naming(path):
        try:
            save_file(arrays, path, metadata)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            raise (OSError(int(number[1]), os.strerror(int(number[1]))) if number else error) from error
        os.chmod(path, 0o644)  # save_file leaves it readable by its owner alone


def json_text(content: Any, where: object, indent: int | None = 2) -> str:
    """JSON as files of ours have it. Raises UserError, naming `where`, for what JSON cannot hold."""
    try:
        text = json.dumps(content, indent=indent, allow_nan=False)
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        name = str(error.object[max(error.start - 40, 0) : error.end].encode("utf-8", "backslashreplace"))
        raise UserError(f"{where}: {name} is not UTF-8; rename that file or folder") from None
    except ValueError:
        raise UserError(f"{where}: {_not_finite(content)}, which JSON cannot hold; nothing was written") from None
    return text + "\n"


def create(path: StrPath, data: bytes) -> bool:
    """Write a file unless there is one. Of any number of callers at once, on any hosts, one gets True."""
    if is_url(path):
        return create_object(path, data)
    if Path(path).exists():
        return False
    try:
        return disk.write(Path(path), data, disk.link)
    except OSError as error:
        if error.errno not in disk.NO_HARD_LINKS:
            raise
    return create_object(path, data)


def delete(path: StrPath) -> None:
    """Delete a file; nothing happens if there is none."""
    if not is_url(path):
        Path(path).unlink(missing_ok=True)
        if Path(path).parent.is_dir():
            disk.sync(Path(path).parent)
        return
    try:
        open_store(path).write("", None).result()
    except STORAGE_ERRORS as error:
        raise write_error(os.fspath(path), error) from error


def _not_finite(value: Any, name: str = "") -> str:
    """Which number in a JSON value is not finite, as "a.b is nan"."""
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    elif isinstance(value, float) and not math.isfinite(value):
        return f"{name or 'it'} is {value}"
    return next(filter(None, (_not_finite(part, f"{name}.{key}".lstrip(".")) for key, part in parts)), "")
