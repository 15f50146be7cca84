"""A folder that appears whole.

At a URL it is made on the disk of this machine and then put there, an object a file. UNFINISHED, an object that is put
first and deleted last, says that not all of it is there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sae_jax.errors import UsageError
from sae_jax.storage import disk
from sae_jax.storage.disk import StrPath
from sae_jax.storage.lease import Lease
from sae_jax.storage.many import Files
from sae_jax.storage.url import Url
from sae_jax.storage.url import path as as_path
from sae_jax.storage.whole import delete, write_bytes
from sae_jax.units import size

UNFINISHED = ".unfinished"
AT_ONCE = 8  # files of a folder that are in memory on their way to a URL
COPIED_AT_ONCE = 64 << 20  # bytes of a file on their way from one
S3_BYTES = 5 << 30  # that S3 takes in one request


def is_whole(path: StrPath) -> bool:
    """Whether a folder is there, and not on its way to a URL."""
    folder = as_path(path)
    if not isinstance(folder, Url):
        return folder.is_dir()
    keys = Files(folder).keys("")
    return bool(keys) and UNFINISHED not in keys


def lease_of_folder(path: StrPath) -> Lease:
    """The lease of a folder that `new_folder` writes; it lies beside it."""
    final = as_path(path)
    final = final if isinstance(final, Url) else final.resolve()
    return Lease(final.with_name(f".{final.name[:200]}.owner"), path)


def remove_folder(path: StrPath) -> None:
    """Remove a folder and all that is in it; nothing happens if there is none."""
    folder = as_path(path)
    if not isinstance(folder, Url):
        shutil.rmtree(folder, ignore_errors=True)
        return
    if folder.is_dir():
        write_bytes(folder / UNFINISHED, b"")
        files = Files(folder)
        files.delete_many(key for key in files.keys("") if key != UNFINISHED)
        delete(folder / UNFINISHED)


def refuse_large(path: StrPath, n_bytes: int) -> None:
    """Raise UsageError if a file of so many bytes cannot be put where `path` is."""
    if os.fspath(path).startswith("s3://") and n_bytes > S3_BYTES:
        raise UsageError(
            f"{path}: {size(n_bytes)} are more than the {size(S3_BYTES)} that S3 takes as one object; write to a disk, "
            f"and copy with `aws s3 cp`, which sends parts"
        )


@contextlib.contextmanager
def on_disk(path: StrPath, n_bytes: int) -> Iterator[Path]:
    """A file on a disk: itself, or while the block lasts a copy of one of so many bytes at a URL.

    Raises UserError if the object is missing or shorter.
    """
    given = as_path(path)
    if not isinstance(given, Url):
        yield given
        return
    files = Files(given.parent)
    with tempfile.TemporaryDirectory(prefix="sae-jax-") as folder:
        copy = Path(folder) / given.name
        with open(copy, "wb") as file:
            for first in range(0, n_bytes, COPIED_AT_ONCE):
                piece = np.empty(min(COPIED_AT_ONCE, n_bytes - first), np.uint8)
                files.read_into(given.name, first, piece)
                file.write(piece.data)
        yield copy


@contextlib.contextmanager
def new_folder(path: StrPath, replace: bool = False, lease: Lease | None = None) -> Iterator[Path]:
    """A temporary folder that becomes `path`, durable, when the block ends; on an error nothing is left.

    Args:
      path: on a disk, where the temporary lies beside it; or at a URL.
      replace: an existing folder stays until the new one is complete, and then makes way for it. Without this, raises
        UsageError if `path` exists and is not empty.
      lease: `lease_of_folder`, if the caller holds it already.
    """
    mine = lease_of_folder(path) if lease is None else contextlib.nullcontext(lease)
    given = as_path(path)
    if isinstance(given, Url):
        with _new_at_url(given, replace, mine) as building:
            yield building
        return
    final = given.resolve()
    _refuse_occupied(final, path, replace)  # before anything is written
    with mine as held:
        disk.make_folder(final.parent)
        disk.remove_leftovers(
            final.parent, final.name[:200].__eq__, seconds=0
        )  # of processes that are dead: this one is the owner
        building = disk.temporary_name(final)
        try:
            building.mkdir()
            yield building
            for folder, _, names in os.walk(building, topdown=False):
                for name in names:
                    disk.sync(Path(folder) / name)
                disk.sync(Path(folder))
            _refuse_occupied(final, path, replace)
            held.check()
            _put_in_place(building, final, replace)
        except OSError as error:
            # A write to a full disk names no file, and the name of the temporary would tell nobody anything.
            if error.filename is None or os.fspath(error.filename).startswith(str(building)):
                error.filename = os.fspath(path)
            raise
        finally:
            shutil.rmtree(building, ignore_errors=True)


@contextlib.contextmanager
def _new_at_url(final: Url, replace: bool, lease: contextlib.AbstractContextManager[Lease]) -> Iterator[Path]:
    def refuse_occupied() -> None:
        if is_whole(final) and not replace:
            raise UsageError(f"{final} exists and is not empty; delete it or choose another URL")

    refuse_occupied()  # before anything is written
    with lease as held, tempfile.TemporaryDirectory(prefix="sae-jax-") as folder:
        building = Path(folder)
        yield building
        names = [str(file.relative_to(building)) for file in building.rglob("*") if file.is_file()]
        for name in names:
            refuse_large(final / name, (building / name).stat().st_size)
        refuse_occupied()
        held.check()
        write_bytes(final / UNFINISHED, b"")
        files = Files(final)
        files.write_many(((name, (building / name).read_bytes()) for name in names), AT_ONCE)
        # Of a folder that it replaces, or of a process that was killed.
        files.delete_many(key for key in files.keys("") if key not in {*names, UNFINISHED})
        held.check()
        delete(final / UNFINISHED)


def _put_in_place(building: Path, final: Path, replace: bool) -> None:
    old = building.with_suffix(".old")
    if replace and final.exists():
        final.rename(old)
    building.rename(final)  # takes the place of an empty folder
    disk.sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _refuse_occupied(final: Path, given: StrPath, replace: bool) -> None:
    if final.is_dir():
        if not replace and any(final.iterdir()):
            raise UsageError(f"{given} exists and is not empty; delete it or choose another path")
    elif final.exists():
        raise UsageError(f"{given} is a file; choose another path for a folder")
