"""The files under one root, such as those of an activation set: many at a time, and ranges of them."""

from __future__ import annotations

import contextlib
import functools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from sae_jax.errors import UserError
from sae_jax.storage.disk import StrPath, absolute, is_url
from sae_jax.storage.objects import STORAGE_ERRORS, open_store, reason, write_error
from sae_jax.storage.whole import create, delete, read_bytes, write_bytes

if TYPE_CHECKING:
    import tensorstore as ts

T = TypeVar("T")

REQUESTS_IN_FLIGHT = 64  # of small files, when many are read at once


class Files:
    """The files under one root. Cheap to open.

    Ranges of files are read at known offsets; on a disk they go straight into the caller's buffer, which takes a
    quarter of the CPU time of a read that allocates.
    """

    def __init__(self, path: StrPath):
        self.path = os.fspath(path)
        self.local = None if is_url(path) else _of_user(self.path)
        if self.local is not None and self.local.is_file():
            raise UserError(f"{self.path} is a file; give a folder")
        try:
            self.store = open_store(self.local or self.path.rstrip("/"), "/")
        except STORAGE_ERRORS as error:
            raise UserError(f"cannot open {self.path}: {reason(error)}") from error

    def name(self, key: str) -> str:
        """The file's full name, for messages."""
        return f"{self.path.rstrip('/')}/{key}"

    def at(self, key: str) -> str:
        """The path or URL of a file."""
        return self.name(key) if self.local is None else str(self.local / key)

    def keys(self, prefix: str) -> list[str]:
        """The keys that begin with prefix, in no order; empty where there is no such folder."""
        import tensorstore as ts

        try:
            found = self.store.list(ts.KvStore.KeyRange(prefix, _prefix_end(prefix))).result()
        except STORAGE_ERRORS as error:
            if "Cannot list non-directory" in str(error):
                return []
            raise UserError(f"cannot list {self.name(prefix)}: {reason(error)}") from error
        return [key.decode() for key in found]

    def read(self, key: str) -> bytes | None:
        """The file's content, or None if it does not exist."""
        return read_bytes(self.at(key))

    def write(self, key: str, data: bytes) -> None:
        """`write_bytes`."""
        write_bytes(self.at(key), data)

    def create(self, key: str, data: bytes) -> bool:
        """`create`: whether there was no such file before."""
        return create(self.at(key), data)

    def delete(self, key: str) -> None:
        """`delete`."""
        delete(self.at(key))

    def read_many(self, keys: Iterable[str], n_at_once: int = REQUESTS_IN_FLIGHT) -> Iterator[bytes | None]:
        """The files in the order of keys, many requests at a time; None for one that does not exist."""
        for key, answer in _in_order(keys, self.store.read, n_at_once):
            try:
                found = answer.result()
            except STORAGE_ERRORS as error:
                raise UserError(f"cannot read {self.name(key)}: {reason(error)}") from error
            yield found.value if found.state == "value" else None

    def write_many(self, files: Iterable[tuple[str, bytes]], n_at_once: int = REQUESTS_IN_FLIGHT) -> None:
        """Write or replace objects at a URL, {key: content}, many requests at a time."""
        for (key, _), answer in _in_order(files, lambda file: self.store.write(*file), n_at_once):
            try:
                answer.result()
            except STORAGE_ERRORS as error:
                raise write_error(self.name(key), error) from error

    def delete_many(self, keys: Iterable[str]) -> None:
        """Delete objects at a URL, many requests at a time; nothing happens to those that are not there."""
        for key, answer in _in_order(keys, lambda key: self.store.write(key, None), REQUESTS_IN_FLIGHT):
            try:
                answer.result()
            except STORAGE_ERRORS as error:
                raise write_error(self.name(key), error) from error

    def tails_equal(self, keys: Iterable[str], offset: int, tail: bytes) -> Iterator[bool | None]:
        """For each file, whether its bytes from offset on are exactly tail; None where there is no file."""
        ask = functools.partial(self.store.read, byte_range=slice(offset, None))
        for _, answer in _in_order(keys, ask, REQUESTS_IN_FLIGHT):
            try:
                found = answer.result()
            except STORAGE_ERRORS:  # OUT_OF_RANGE: the file is shorter than offset
                yield False
            else:
                yield found.value == tail if found.state == "value" else None

    def announce(self, key: str, offset: int, n_bytes: int) -> None:
        """Asks the disk to fetch a range that will be read soon, without waiting; does nothing at a URL."""
        if self.local is None or not hasattr(os, "posix_fadvise"):
            return
        # A file that cannot be opened is reported by the read.
        with contextlib.suppress(OSError), open(self.local / key, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), offset, n_bytes, os.POSIX_FADV_WILLNEED)

    def read_into(self, key: str, offset: int, out: np.ndarray) -> None:
        """Fills a contiguous array with the file's bytes from offset on.

        Raises UserError naming the file when it is missing or too short.
        """
        target = out.reshape(-1).view(np.uint8).data
        if self.local is not None:
            try:
                with open(self.local / key, "rb", buffering=0) as file:
                    file.seek(offset)
                    done = 0
                    while done < len(target) and (n := file.readinto(target[done:])):
                        done += n
            except OSError as error:
                raise UserError(f"cannot read {self.name(key)}: {error.strerror}") from error
            if done < len(target):
                raise UserError(f"{self.name(key)} is cut short: it ends {len(target) - done} bytes too early")
            return
        try:
            found = self.store.read(key, byte_range=slice(offset, offset + len(target))).result()
        except STORAGE_ERRORS as error:
            raise UserError(f"cannot read {self.name(key)}: {reason(error)}") from error
        if len(found.value) != len(target):
            raise UserError(f"{self.name(key)} is missing or cut short")
        target[:] = found.value


def _in_order(
    items: Iterable[T], ask: Callable[[T], ts.Future], n_at_once: int = REQUESTS_IN_FLIGHT
) -> Iterator[tuple[T, ts.Future]]:
    """Requests for many things in order, so many under way at a time."""
    pending: deque[tuple[T, ts.Future]] = deque()
    for item in items:
        pending.append((item, ask(item)))
        if len(pending) == n_at_once:
            yield pending.popleft()
    while pending:
        yield pending.popleft()


def _of_user(path: str) -> Path:
    """The path from the root, without the ~ and `..` that tensorstore does not take."""
    try:
        return absolute(Path(path).expanduser())
    except RuntimeError:  # of a user that does not exist
        raise UserError(
            f"cannot open {path}: there is no such user; write ./{path} for a folder of that name"
        ) from None


def _prefix_end(prefix: str) -> str:
    """The smallest key above all those that begin with prefix; "" is above all keys."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""
