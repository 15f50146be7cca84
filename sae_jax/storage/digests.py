"""Digests (xxh3): that what is read is what was written.

A file of ours that other files depend on is *sealed*: it holds the digest of all else in it. Files that another library
writes, such as those of a checkpoint, are listed with their digests in a sealed file beside them.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from sae_jax.errors import UserError
from sae_jax.storage.disk import StrPath, sync
from sae_jax.storage.guarded import DAMAGED, as_type, open_file
from sae_jax.storage.whole import read_json, write_json

SEAL = "xxh3_64_of_all_else"
THREADS = 8  # most of the time is a disk's
LIST = re.compile(r"digests-(?P<process>\d+)-of-(?P<n>\d+)\.json")  # of the files that one of n processes wrote
BLOCK_BYTES = 1 << 20  # stays in the cache of a core between the read and the digest


class FileDigest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file must be."""

    size: int
    xxh3_64: str


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the digest of all else in it."""
    return {**content, SEAL: _seal(content)}


def unsealed(content: Mapping[str, Any], path: StrPath) -> dict[str, Any]:
    """A JSON object without its seal. Raises UserError if there is none or something else has changed."""
    rest = {key: value for key, value in content.items() if key != SEAL}
    if content.get(SEAL) != _seal(rest):
        raise UserError(f"{path}: not what was written, its digest differs; {DAMAGED}")
    return rest


def list_name(process: int, n: int) -> str:
    """The name of the list of what one of n processes has written."""
    return f"digests-{process}-of-{n}.json"


def are_all_there(names: Iterable[str]) -> bool:
    """Whether among these names are the lists of all processes that took part."""
    n_lists = Counter(int(match["n"]) for name in names if (match := LIST.fullmatch(name)))
    return any(found == n for n, found in n_lists.items())


def write_digests(path: Path, folder: Path, names: Iterable[str]) -> None:
    """Make files of `folder` and the folders they are in durable, then list them with their digests in `path`."""
    names = sorted(names)
    parents = {parent for name in names for parent in (folder / name).parents if parent.is_relative_to(folder)}
    with ThreadPoolExecutor(THREADS) as threads:  # a disk and the processors work at the same time
        files = [threads.submit(sync, folder / name) for name in names]
        listed = dict(zip(names, threads.map(lambda name: of_file(folder / name), names), strict=True))
        folders = [threads.submit(sync, parent) for parent in sorted(parents | {folder.parent})]
        for synced in files + folders:
            synced.result()
    write_json(path, sealed({"files": msgspec.to_builtins(listed)}))


def read_digests(path: Path) -> dict[str, FileDigest]:
    """{name: digest} of what `write_digests` listed. Raises UserError if the list is missing or damaged."""
    content = read_json(path)
    if content is None:
        raise UserError(f"{path} is missing")
    return as_type(unsealed(content, path).get("files"), dict[str, FileDigest], path)


def check_file(path: Path, expected: FileDigest) -> None:
    """Raises UserError, naming the file, unless it is what was written."""
    if of_file(path) != expected:
        raise UserError(f"{path} is not what was written, its digest differs")


def of_file(path: StrPath) -> FileDigest:
    """Raises UserError if there is no such file, or it is none that can be read to an end."""
    digest, block = xxhash.xxh3_64(), bytearray(BLOCK_BYTES)
    size, view = 0, memoryview(block)
    with open_file(path) as file:
        while n := file.readinto(view):
            digest.update(view[:n])
            size += n
    return FileDigest(size, digest.hexdigest())


def of_bytes(data: Any) -> str:
    """xxh3_64 of a buffer, hex."""
    return xxhash.xxh3_64_hexdigest(data)


def _seal(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return of_bytes(os.fsencode(canonical))
