"""A folder that appears whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sae_jax.errors import UsageError
from sae_jax.storage import disk
from sae_jax.storage.disk import StrPath, is_url
from sae_jax.storage.lease import Lease


def lease_of_folder(path: StrPath) -> Lease:
    """The lease of a folder that `new_folder` writes; it lies beside it."""
    if is_url(path):
        raise UsageError(f"{path}: a URL cannot take a folder that appears whole; give a path on a disk")
    final = Path(path).resolve()
    return Lease(final.with_name(f".{final.name[:200]}.owner"), path)


@contextlib.contextmanager
def new_folder(path: StrPath, replace: bool = False, lease: Lease | None = None) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path`, durable, when the block ends; on an error nothing is left.

    Args:
      path: on a disk.
      replace: an existing folder stays until the new one is complete, and then makes way for it. Without this, raises
        UsageError if `path` exists and is not empty.
      lease: `lease_of_folder`, if the caller holds it already.
    """
    mine = lease_of_folder(path) if lease is None else contextlib.nullcontext(lease)
    final = Path(path).resolve()
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
