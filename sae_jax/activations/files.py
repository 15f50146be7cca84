"""Objects of an activation set by key, on a local disk or at a URL (gs://, s3://), through tensorstore.

Objects are written whole and appear at once (a rename on a disk, one PUT in a bucket), so a process killed
at any moment leaves an object that is either complete or absent. Ranges of objects are read at known
offsets; on a disk they go straight into the caller's buffer, which takes a quarter of the CPU time of a
read that allocates.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
import tensorstore as ts

from sae_jax.activations.spec import ArraySpec
from sae_jax.types import UserError

REQUESTS_IN_FLIGHT = 64  # of small objects, when many are read at once

# tensorstore reports a failed request as ValueError, KeyError or OSError with the status in the text.
STORAGE_ERRORS = (ValueError, KeyError, OSError, RuntimeError)


class Files:
    """The objects under one root. Picklable only by its path; cheap to open."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        self.context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_concurrency": {"limit": 16}})
        if "://" in self.path:
            self.local = None
            spec: str | dict = self.path.rstrip("/") + "/"
        else:
            self.local = Path(self.path).expanduser().absolute()
            spec = {"driver": "file", "path": f"{self.local}/"}
        try:
            self.store = ts.KvStore.open(spec, context=self.context).result()
        except STORAGE_ERRORS as error:
            raise UserError(f"cannot open {self.path}: {reason(error)}") from error

    def name(self, key: str) -> str:
        """The object's full name, for messages."""
        return f"{self.path.rstrip('/')}/{key}"

    def keys(self, prefix: str) -> list[str]:
        """The keys that begin with prefix, in no order; empty where there is no such folder."""
        try:
            found = self.store.list(ts.KvStore.KeyRange(prefix, _prefix_end(prefix))).result()
        except STORAGE_ERRORS as error:
            raise UserError(f"cannot list {self.name(prefix)}: {reason(error)}") from error
        return [key.decode() for key in found]

    def read(self, key: str) -> bytes | None:
        """The object's bytes, or None if it does not exist."""
        return next(iter(self.read_many([key])))

    def read_many(self, keys: Iterable[str]) -> Iterator[bytes | None]:
        """The objects in the order of keys, many requests at a time; None for one that does not exist."""
        for key, answer in self._ask(keys, None):
            try:
                found = answer.result()
            except STORAGE_ERRORS as error:
                raise UserError(f"cannot read {self.name(key)}: {reason(error)}") from error
            yield found.value if found.state == "value" else None

    def tails_equal(self, keys: Iterable[str], offset: int, tail: bytes) -> Iterator[bool | None]:
        """For each object, whether its bytes from offset on are exactly tail; None where there is none."""
        for _, answer in self._ask(keys, slice(offset, None)):
            try:
                found = answer.result()
            except STORAGE_ERRORS:  # OUT_OF_RANGE: the object is shorter than offset
                yield False
            else:
                yield found.value == tail if found.state == "value" else None

    def _ask(self, keys: Iterable[str], byte_range: slice | None) -> Iterator[tuple[str, ts.Future]]:
        """Reads of many objects in order, REQUESTS_IN_FLIGHT under way at a time."""
        pending: deque[tuple[str, ts.Future]] = deque()
        for key in keys:
            pending.append((key, self.store.read(key, byte_range=byte_range)))
            if len(pending) == REQUESTS_IN_FLIGHT:
                yield pending.popleft()
        yield from pending

    def announce(self, key: str, offset: int, n_bytes: int) -> None:
        """Asks the disk to fetch a range that will be read soon, without waiting; does nothing at a URL."""
        if self.local is None or not hasattr(os, "posix_fadvise"):
            return
        # An object that cannot be opened is reported by the read.
        with suppress(OSError), open(self.local / key, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), offset, n_bytes, os.POSIX_FADV_WILLNEED)

    def read_into(self, key: str, offset: int, out: np.ndarray) -> None:
        """Fills a contiguous array with the object's bytes from offset on.

        Raises UserError naming the object when it is missing or too short.
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

    def write(self, key: str, value: bytes | str) -> None:
        """Writes an object, durable on return. UserError with the cure where the disk is full."""
        try:
            self.store.write(key, value).result()
        except STORAGE_ERRORS as error:
            raise write_error(self.name(key), error) from error

    def write_if_absent(self, key: str, value: bytes | str) -> bytes | None:
        """Writes an object unless there is one, whichever host wrote it; returns that one, or None."""
        try:
            found = self.store.read(key).result()
            if found.state == "value":
                return found.value
            stamp = self.store.write(key, value, if_equal=found.stamp.generation).result()
        except STORAGE_ERRORS as error:
            raise write_error(self.name(key), error) from error
        # The loser of a race gets no exception but an empty generation.
        return None if stamp.generation else self.read(key)

    def delete(self, key: str) -> None:
        """Deletes an object; nothing happens if there is none."""
        try:
            self.store.write(key, None).result()
        except STORAGE_ERRORS as error:
            raise write_error(self.name(key), error) from error

    def open_array(self, array: ArraySpec, mode: Literal["create", "check", "write"]) -> ts.TensorStore:
        """Opens a zarr array to create or check its metadata, or to write shards without reading it."""
        spec = {
            "driver": "zarr3",
            "kvstore": (self.store / f"{array.path}/").spec().to_json(),
            "metadata": array.metadata(),
            # A missing chunk reads as zeros, and a chunk of zeros is not written, unless told otherwise.
            "fill_missing_data_reads": False,
            "store_data_equal_to_fill_value": True,
        }
        new, assume = mode == "create", mode == "write"
        try:
            return ts.open(spec, context=self.context, open=True, create=new, assume_metadata=assume).result()
        except STORAGE_ERRORS as error:
            if mode == "create":
                raise write_error(self.name(array.path), error) from error
            raise UserError(f"{self.name(array.path)}/zarr.json is damaged: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The first sentence of a tensorstore message, without its source locations and spec dumps."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return re.split(r" \[(?:source locations|tensorstore_spec)=", text)[0]


def write_error(name: str, error: BaseException) -> UserError:
    """The error for a failed write: what to do when the disk is full, else the reason."""
    if "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error):
        return UserError(f"no space left to write {name}; free some and run the same command to go on")
    return UserError(f"cannot write {name}: {reason(error)}")


def _prefix_end(prefix: str) -> str:
    """The smallest key above all those that begin with prefix."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)
