"""Files and folders on a disk: whole, durable, and never half there."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

StrPath = str | os.PathLike[str]

LEFTOVER_SECONDS = 24 * 3600  # no write takes this long, so an older temporary belongs to a process that was killed
NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)


def is_url(path: StrPath) -> bool:
    """Whether it is a URL, else a path on a disk."""
    return "://" in os.fspath(path)


def absolute(path: StrPath) -> Path:
    """A path from the root, as the system finds it: after a link, `..` is the folder above the one it leads to."""
    path = Path(path).absolute()
    return path.resolve() if ".." in path.parts else path


def make_folder(path: StrPath) -> None:
    """A folder and those above it, durable. At a URL there are none, and nothing happens."""
    if is_url(path):
        return
    path = Path(path)
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def write(path: Path, data: bytes, put: Callable[[Path, Path], bool | None]) -> bool:
    """Write a temporary and put it in place; what `put` answers, if it does."""
    make_folder(path.parent)
    remove_leftovers(path.parent, path.name[:200].__eq__)
    temporary = temporary_name(path)
    with naming(path):
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            answer = put(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)
    return answer is not False


def link(temporary: Path, path: Path) -> bool:
    """Give a file the name `path` unless that is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        # A network disk may have carried out a request whose answer was lost, and been asked again.
        return temporary.stat().st_nlink == 2
    return True


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    except OSError as error:
        # Some network disks cannot do this for folders, whose names are then as durable as they get.
        if not (path.is_dir() and error.errno in _NO_FOLDER_SYNC):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: StrPath) -> Iterator[None]:
    """An OSError names the file: a write or fsync would not say where, a rename would name the temporary."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = os.fspath(path), None
        raise


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process takes, on whatever host."""
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.tmp")


def remove_leftovers(folder: Path, is_meant: Callable[[str], bool], seconds: float = LEFTOVER_SECONDS) -> None:
    """Remove temporaries that a kill left behind.

    Args:
        folder: where they are.
        is_meant: whether those of a file of this name (its first 200 characters) are.
        seconds: their age. Only the owner of the files may say 0: those of others may be in use.
    """
    for entry in os.scandir(folder):
        found = re.fullmatch(r"\.(.+)\.[0-9a-f]{16}\.(tmp|old)", entry.name)
        if found and is_meant(found[1]):
            with contextlib.suppress(OSError):  # another process removed it first
                if time.time() - entry.stat().st_mtime >= seconds:
                    shutil.rmtree(entry) if entry.is_dir() else os.unlink(entry)
