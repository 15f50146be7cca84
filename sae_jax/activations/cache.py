"""Chunks of sets at URLs, kept on a local disk: a run of many epochs asks the network for each chunk once.

One folder serves all sets and all processes of a host, and its files together never exceed a limit. When it is full,
chunks that nobody has read for a day make room, the oldest first; else what is there stays and the rest is read from
the URL each time, since an epoch reads every chunk once and none is worth more than another.

A file is named after the object, the place of the chunk in it and its digest, so a shard that is written anew is never
mistaken for the old one. What it holds is compared with the digest on every read, as what comes from the network is: a
damaged file is replaced. So nothing here need outlive a crash, and no write waits for the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sae_jax.progress import console
from sae_jax.storage import absolute
from sae_jax.storage.disk import temporary_name
from sae_jax.types import UsageError, UserError

GIB = 1 << 30
UNUSED_SECONDS = 24 * 3600  # after which a chunk may make room for another
LOOK_SECONDS = 60  # between two searches for such chunks in a full folder
LOCK = "lock"  # holds the bytes of all files, in decimal


class ChunkCache:
    """The chunks in a folder. Threads and processes may share it."""

    def __init__(self, folder: Path, limit_bytes: int):
        """`limit_bytes`: of all files in it. UserError where it cannot be made or written to."""
        self.folder, self.limit_bytes = folder, limit_bytes
        self._next_look = 0.0
        self._is_off = False
        self._guard = threading.Lock()
        self._wanted: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()  # chunk -> its lock
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._locked() as lock:
                for name, _, _ in self._files():
                    if name.endswith(".tmp"):  # of a process that was killed: whoever writes holds the lock
                        (folder / name).unlink()
                total = sum(n_bytes for _, n_bytes, _ in self._files())
                self._set_total(lock, self._without_oldest(total, 0, 0.0))
        except OSError as error:
            raise UserError(
                f"cannot keep chunks in {folder}: {error.strerror}; set XDG_CACHE_HOME to a folder on a local disk, or "
                f"leave cache_gib out"
            ) from error

    @contextlib.contextmanager
    def alone(self, chunk: str) -> Iterator[None]:
        """One thread of this process at a time, for each chunk: groups of rows share the chunks at their ends."""
        with self._guard:
            lock = self._wanted.setdefault(chunk, threading.Lock())
        with lock:
            yield

    def read_into(self, chunk: str, out: np.ndarray) -> bool:
        """Fills a contiguous array with what is kept of a chunk; False where there is nothing of its size."""
        path, target = self._path(chunk), out.reshape(-1).view(np.uint8).data
        try:
            with open(path, "rb", buffering=0) as file:
                done = 0
                while done < len(target) and (n := file.readinto(target[done:])):
                    done += n
            os.utime(path)
        except OSError:
            return False
        return done == len(target)

    def keep(self, chunk: str, rows: np.ndarray) -> None:
        """Writes a chunk, in the place of what was kept of it, if there is room. A full disk is told once."""
        if self._is_off:
            return
        path, data = self._path(chunk), rows.reshape(-1).view(np.uint8).data
        temporary = temporary_name(path)
        try:
            with self._locked() as lock:
                told = os.pread(lock, 32, 0)  # nothing, if somebody has removed it
                total = int(told) if told else sum(n_bytes for _, n_bytes, _ in self._files())
                if path.exists():
                    total -= path.stat().st_size
                    path.unlink()
                if total + len(data) > self.limit_bytes and time.monotonic() >= self._next_look:
                    total = self._without_oldest(total, len(data), time.time() - UNUSED_SECONDS)
                if total + len(data) > self.limit_bytes:
                    self._next_look = max(self._next_look, time.monotonic() + LOOK_SECONDS)
                    self._set_total(lock, total)
                    return
                self._set_total(lock, total + len(data))  # before the file: a kill leaves too much, not too little
                temporary.write_bytes(data)
                temporary.rename(path)
        except OSError as error:
            self._is_off = True
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            console.print(f"{self.folder}: {error.strerror}; no more chunks are kept there")

    def _path(self, chunk: str) -> Path:
        return self.folder / hashlib.sha256(chunk.encode()).hexdigest()[:40]

    def _files(self) -> list[tuple[str, int, float]]:
        """(name, bytes, time of the last read) of each file."""
        with os.scandir(self.folder) as entries:
            stats = [(entry.name, entry.stat()) for entry in entries if entry.name != LOCK]
        return [(name, stat.st_size, stat.st_mtime) for name, stat in stats]

    def _without_oldest(self, total: int, n_bytes: int, before: float) -> int:
        """Removes files, the oldest first, until there is room for n_bytes; the bytes that are left.

        Only such as were last read before a time, if it is not 0. Under the lock.
        """
        for name, size, last_read in sorted(self._files(), key=lambda file: file[2]):
            if total + n_bytes <= self.limit_bytes or (before and last_read >= before):
                break
            (self.folder / name).unlink()
            total -= size
        return total

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The descriptor of the lock, which one thread of one process has."""
        import fcntl  # not above: Windows has none

        lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock
        finally:
            os.close(lock)

    @staticmethod
    def _set_total(lock: int, total: int) -> None:
        os.pwrite(lock, f"{total:<32}".encode(), 0)


def chunk_cache(gib: float) -> ChunkCache | None:
    """The cache of this user on this host, in $XDG_CACHE_HOME/sae_jax or ~/.cache/sae_jax; None for 0.

    Raises UsageError for a size that is none, UserError where the folder cannot be used.
    """
    if not 0 <= gib < math.inf:
        raise UsageError(f"cache_gib={gib:g} must be 0 or more and finite; 0 keeps nothing")
    if not gib:
        return None
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return ChunkCache(absolute(Path(home).expanduser()) / "sae_jax" / "chunks", int(gib * GIB))
