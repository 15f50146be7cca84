"""Ownership: one writer at a time of a run, a shard or a page, on whatever host.

    PATH.<n>.json    who holds the lease: host, process, a random token. The highest n counts.

The file is created if absent, and touched by a thread while its holder lives. Whoever finds a holder dead creates the
next number, which one of any number of callers can. A holder that was stopped, and has lost its lease meanwhile, learns
so from `check`, which it calls before every commit.

The clocks of two machines are never compared: a holder elsewhere is dead when its file has not changed while somebody
watched it for SECONDS. One in this machine's table of processes is known to be dead as soon as it is.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import secrets
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from sae_jax.errors import UserError
from sae_jax.progress import console
from sae_jax.storage.disk import StrPath, is_url
from sae_jax.storage.many import Files
from sae_jax.storage.whole import create, delete, read_bytes, write_bytes

SECONDS = 60.0  # without a sign of life, after which a holder is taken to be dead
BEATS = 12  # signs of life in that time
LOOKS = 60  # at the file in that time, while somebody watches it


class HeldError(UserError):
    """Another process is at it."""


class LostError(UserError):
    """Another process took over from this one. A command leaves at once: a save may wait for files that are gone."""

    exit_code = 4


class Lease:
    """Sole right to write something. A context manager; entering raises HeldError while another process has it.

    Leaving it after an error raises LostError instead if the lease is lost: what failed did so because of the other.
    """

    def __init__(self, path: StrPath | None, what: StrPath, is_patient: bool = True, seconds: float = 0) -> None:
        """Args:
        path: beginning of the name of its files. None: there is nothing to own, and every call does nothing.
        what: is owned, for messages.
        is_patient: watch a holder on another host until it is known to live. Else it lives if its file looks new.
        seconds: instead of SECONDS. The same for all who want the lease.
        """
        self._path, self._what = None if path is None else os.fspath(path), os.fspath(what)
        self._is_patient, self._seconds = is_patient, seconds or SECONDS
        self._number, self._released, self._new_folders = 0, threading.Event(), []
        self._me: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "start": (_process(os.getpid()) or _Process("", "")).start,
            "process_table": _process_table(),
            "since": datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds").removesuffix("+00:00"),
            "token": secrets.token_hex(16),
        }

    def check(self) -> None:
        """Raise LostError unless this process still holds the lease."""
        if self._path is None:
            return
        newest = self._newest()
        if newest is None or _parse(newest.content).get("token") != self._me["token"]:
            whom = f"{_named(_parse(newest.content))} has taken over" if newest else "others took over, or deleted it,"
            raise LostError(
                f"{self._what}: {whom} while this process was stopped or could not reach it; nothing more is written"
            )

    def holder(self) -> str:
        """Who has it, dead or alive, for a message; "" where nobody has."""
        newest = None if self._path is None else self._newest()
        return "" if newest is None else _named(_parse(newest.content))

    def forget_the_dead(self) -> None:
        """Remove what a holder that died just before its end has left, where there is nothing more to do for others."""
        with contextlib.suppress(OSError, UserError):
            if self._path is not None and (holder := self._newest()) is not None and not self._lives(holder):
                delete(self._file(holder.number))

    def __enter__(self) -> Self:
        if self._path is not None:
            if not is_url(self._path):
                folder = Path(self._path).absolute().parent
                self._new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
            self._acquire()
            self._thread = threading.Thread(target=self._beat, name=f"lease of {self._what}", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._path is None:
            return
        self._released.set()
        self._thread.join()
        try:
            if isinstance(error, Exception) and not isinstance(error, LostError):
                self.check()
        finally:
            self._release()

    def _acquire(self) -> None:
        while True:
            holder = self._newest()
            if holder is not None and self._lives(holder):
                raise HeldError(
                    f"{self._what} is in use: {_named(_parse(holder.content))} writes it; wait until it has ended, "
                    f"stop it, or write elsewhere"
                )
            self._number = 0 if holder is None else holder.number + 1
            if not create(self._file(self._number), json.dumps(self._me).encode()):
                continue
            # Somebody else may have been here after the look at the holder: only a successor of that very one stays.
            newest = self._newest()
            is_newest = newest is not None and newest.number == self._number
            if is_newest and (holder is None or read_bytes(self._file(holder.number)) == holder.content):
                if holder is not None:
                    delete(self._file(holder.number))
                return
            delete(self._file(self._number))

    def _lives(self, holder: _Found) -> bool:
        """Whether a holder is not known to be dead. May take SECONDS."""
        who = _parse(holder.content)
        if self._me["process_table"] and who.get("process_table") == self._me["process_table"]:
            process = _process(who.get("pid"))
            if process is not None and (process.start != who.get("start") or process.state in ("Z", "X")):
                return False
            if process is not None and process.state not in ("T", "t"):  # not stopped
                return True
            if process is None and not _exists(who.get("pid")):
                return False
        elif not self._is_patient and abs(time.time() - holder.touched) < self._seconds / 2:
            return True
        console.print(f"{self._what}: waiting to see whether {_named(who)} is still at it")
        end = time.monotonic() + self._seconds
        while time.monotonic() < end:
            time.sleep(self._seconds / LOOKS)
            if (now := self._newest()) != holder:
                return now is not None  # it has given a sign of life, ended, or been taken over
        return False

    def _beat(self) -> None:
        """Give signs of life, until the lease is released or lost."""
        path = self._file(self._number)
        while not self._released.wait(self._seconds / BEATS):
            # Storage that is out of reach for a while is no reason to stop trying: `check` asks when it matters.
            with contextlib.suppress(OSError, UserError):
                if not is_url(path):
                    os.utime(path)
                    continue
                self.check()
                self._me["beat"] = self._me.get("beat", 0) + 1
                write_bytes(path, json.dumps(self._me).encode())

    def _release(self) -> None:
        # Where this cannot be done, the lease ends with the process.
        with contextlib.suppress(OSError, UserError):
            content = read_bytes(self._file(self._number))
            if content is not None and _parse(content).get("token") == self._me["token"]:
                try:
                    delete(self._file(self._number))
                except OSError:  # storage may fail for a moment
                    delete(self._file(self._number))
            for folder in self._new_folders:  # a refused command leaves nothing
                folder.rmdir()

    def _newest(self) -> _Found | None:
        """What is in the file of the highest number."""
        while numbers := self._numbers():
            path = self._file(number := max(numbers))
            with contextlib.suppress(FileNotFoundError):
                # On a network disk, opening a file is what makes its age up to date.
                if (content := read_bytes(path)) is not None:
                    return _Found(number, content, 0.0 if is_url(path) else os.stat(path).st_mtime)
        return None

    def _numbers(self) -> list[int]:
        folder, _, prefix = str(self._path).rpartition("/")
        if is_url(str(self._path)):
            names = [key.rpartition("/")[2] for key in Files(folder).keys(prefix)]
        else:
            try:
                names = os.listdir(folder or ".")
            except (FileNotFoundError, NotADirectoryError):
                return []
        return [int(found[1]) for name in names if (found := re.fullmatch(re.escape(prefix) + r"\.(\d+)\.json", name))]

    def _file(self, number: int) -> str:
        return f"{self._path}.{number}.json"


class _Found(NamedTuple):
    """The file of a lease as it was read."""

    number: int
    content: bytes
    touched: float  # by the clock of the disk


class _Process(NamedTuple):
    """What the system says of a process."""

    start: str  # in ticks since the machine started
    state: str  # T: stopped, Z: dead but not yet waited for


def _process(pid: Any) -> _Process | None:
    """None if there is none, or the system does not say."""
    with contextlib.suppress(OSError, ValueError, TypeError, IndexError):
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
        return _Process(fields[19], fields[0])
    return None


def _exists(pid: Any) -> bool:
    """Whether there may be such a process: /proc can be told to hide those of other users."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, TypeError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _process_table() -> str:
    """Names the table in which a number stands for one process at a time; "" where that cannot be told."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # containers have tables of their own
    return ""


def _parse(content: bytes) -> dict[str, Any]:
    """Who holds a lease; {} if the file is damaged."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(found := json.loads(content), dict):
            return found
    return {}


def _named(who: dict[str, Any]) -> str:
    if "pid" not in who:
        return "another process"
    return f"process {who['pid']} on host {who.get('host')}, since {who.get('since')} UTC,"
