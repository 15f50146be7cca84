"""Files at a path or a URL (gs://, s3://): read, write whole, create if absent, append lines.

Everything that outlives a process is written here: sets, runs, sweeps, claims, pages. A reader sees the old content or
the new, never half of it, and what a function has written is on the disk when the function returns. Paths on a disk
take plain system calls; URLs go through tensorstore's key-value stores, which write an object with one request.

On a disk, errors are OSErrors that name the file. At a URL they are UserErrors.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import re
import secrets
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from sae_jax.errors import UsageError, UserError
from sae_jax.progress import console

if TYPE_CHECKING:  # importing it takes a third of a second, which `sae-jax --help` need not wait for
    import tensorstore as ts

StrPath = str | os.PathLike[str]

REQUESTS_IN_FLIGHT = 64  # of small objects, when many are read at once
LEFTOVER_SECONDS = 24 * 3600  # no write takes this long, so an older temporary belongs to a process that was killed
ROWS_PER_SEGMENT, SECONDS_PER_SEGMENT = 64, 30.0  # of lines at a URL

# tensorstore reports a failed request as ValueError, KeyError or OSError with the status in the text.
STORAGE_ERRORS = (ValueError, KeyError, OSError, RuntimeError)
_NO_HARD_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)


def is_url(path: StrPath) -> bool:
    """Whether it is a URL, else a path on a disk."""
    return "://" in os.fspath(path)


# ---------------------------------------------------------------------------------------------------- whole files


def read_bytes(path: StrPath) -> bytes | None:
    """The content of a file; None if there is none."""
    if not is_url(path):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return Path(path).read_bytes()
        return None
    try:
        found = _object(path).read("").result()
    except STORAGE_ERRORS as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    return found.value if found.state == "value" else None


def read_json(path: StrPath) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no file. Raises UserError if it holds something else."""
    data = read_bytes(path)
    if data is None:
        return None
    try:
        content = json.loads(data)
    except ValueError:  # not JSON, or not even text
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object, so it is damaged; delete it and run the command that wrote it")
    return content


def write_bytes(path: StrPath, data: bytes) -> None:
    """Write or replace a file, whole and durable. Folders on the way are made."""
    if not is_url(path):
        _write_on_disk(Path(path), data, os.replace)
        return
    try:
        _object(path).write("", data).result()
    except STORAGE_ERRORS as error:
        raise write_error(os.fspath(path), error) from error


def write_text(path: StrPath, text: str) -> None:
    """`write_bytes` of text as UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: StrPath, content: Any) -> None:
    """`write_text` of JSON. Raises UserError for a number that is not finite: JSON has no word for it."""
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except ValueError:
        raise UserError(f"{path}: {_not_finite(content)}, which JSON cannot hold; nothing was written") from None
    write_text(path, text + "\n")


def create(path: StrPath, data: bytes) -> bool:
    """Write a file unless there is one. Of any number of callers at once, on any hosts, one gets True."""
    if is_url(path):
        return _create_in_store(path, data)
    if Path(path).exists():
        return False
    try:
        return _write_on_disk(Path(path), data, _link)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
    return _create_in_store(path, data)


def delete(path: StrPath) -> None:
    """Delete a file; nothing happens if there is none."""
    if not is_url(path):
        Path(path).unlink(missing_ok=True)
        if Path(path).parent.is_dir():
            _sync(Path(path).parent)
        return
    try:
        _object(path).write("", None).result()
    except STORAGE_ERRORS as error:
        raise write_error(os.fspath(path), error) from error


# ---------------------------------------------------------------------------------------------------- whole folders


@contextlib.contextmanager
def new_folder(path: StrPath, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path`, durable, when the block ends; on an error nothing is left.

    Args:
      path: on a disk.
      replace: an existing folder stays until the new one is complete, and then makes way for it. Without this, raises
        UsageError if `path` exists and is not empty.
    """
    if is_url(path):
        raise UsageError(f"{path}: a URL cannot take a folder that appears whole; give a path on a disk")
    final = Path(path).resolve()
    _refuse_occupied(final, path, replace)
    make_folder(final.parent)
    _remove_leftovers(final)
    building = _temporary(final)
    try:
        building.mkdir()
        yield building
        for folder, _, names in os.walk(building, topdown=False):
            for name in names:
                _sync(Path(folder) / name)
            _sync(Path(folder))
        _refuse_occupied(final, path, replace)
        old = building.with_suffix(".old")
        if replace and final.exists():
            final.rename(old)
        building.rename(final)  # takes the place of an empty folder
        _sync(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if error.filename is None:  # as of a write to a full disk
            error.filename = os.fspath(path)
        raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def make_folder(path: StrPath) -> None:
    """A folder and those above it, durable."""
    path = Path(path)
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    _sync(path.parent)


def _refuse_occupied(final: Path, given: StrPath, replace: bool) -> None:
    if final.is_dir():
        if not replace and any(final.iterdir()):
            raise UsageError(f"{given} exists and is not empty; delete it or choose another path")
    elif final.exists():
        raise UsageError(f"{given} is a file; choose another path for a folder")


# ---------------------------------------------------------------------------------------------------- lines


class Lines:
    """Appends JSON objects, one a line, to a file; each is out of this process when `write` returns.

    A URL cannot be appended to. There the lines go into numbered objects under it, ROWS_PER_SEGMENT lines or
    SECONDS_PER_SEGMENT at a time, and `read_lines` puts them together. A number that is not finite becomes null, since
    a log line must not end a run.
    """

    def __init__(self, path: StrPath) -> None:
        self.path = os.fspath(path)
        self._waiting: list[str] = []
        self._last_segment = time.monotonic()
        self._file = None
        if not is_url(path):
            on_disk = Path(path)
            make_folder(on_disk.parent)
            _cut_torn_line(on_disk)
            self._file = on_disk.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one line."""
        line = _line(row)
        if self._file is not None:
            with _naming(self.path):
                self._file.write(line)
                self._file.flush()
            return
        self._waiting.append(line)
        now = time.monotonic()
        if len(self._waiting) == ROWS_PER_SEGMENT or now - self._last_segment > SECONDS_PER_SEGMENT:
            self._put(now)

    def close(self) -> None:
        """Make all lines durable. Must be called at a URL, where the last lines wait for it."""
        if self._file is not None and not self._file.closed:
            with _naming(self.path), self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
        elif self._waiting:
            self._put(time.monotonic())

    def _put(self, now: float) -> None:
        _put_segment(self.path, "".join(self._waiting), "")
        self._waiting, self._last_segment = [], now

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():
            self.close()


def read_lines(path: StrPath) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, in order; none if there is no file.

    Says so on stderr when it drops the last line because a kill cut it short, and when it passes over a line that is
    not a JSON object.
    """
    data = b"".join(_segments(os.fspath(path))) if is_url(path) else read_bytes(path) or b""
    rows, lines = [], data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number == len(lines):
            console.print(f"{path}: the last line was cut off and is dropped", markup=False)
        else:
            console.print(f"{path}, line {number}: not a JSON object; passed over", markup=False)
    return rows


def write_lines(path: StrPath, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace all lines of a file."""
    text = "".join(map(_line, rows))
    if is_url(path):
        _put_segment(os.fspath(path), text, "-whole")
    else:
        write_text(path, text)


def _line(row: Mapping[str, Any]) -> str:
    try:
        return json.dumps(row, allow_nan=False) + "\n"
    except ValueError:
        return json.dumps(_with_nulls(row)) + "\n"


def _with_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_nulls(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut_torn_line(path: Path) -> None:
    """Take away a last line without its end, to which the next line would be glued."""
    data = read_bytes(path)
    if not data or data.endswith(b"\n"):
        return
    end = data.rfind(b"\n") + 1
    with open(path, "r+b") as file:
        try:
            json.loads(data[end:])
        except ValueError:
            console.print(f"{path}: the last line was cut off and is dropped", markup=False)
            file.truncate(end)
        else:  # it lacks nothing but its end
            file.seek(0, os.SEEK_END)
            file.write(b"\n")


def _segment_numbers(path: str) -> list[tuple[int, str]]:
    """(number, key) of the objects that hold the lines at a URL. All before one called whole are replaced by it."""
    matches = (re.fullmatch(r"(\d+)(-whole)?\.jsonl", key) for key in Files(path).keys(""))
    found = sorted((int(match[1]), match[0]) for match in matches if match)
    first = max((i for i, (_, key) in enumerate(found) if "whole" in key), default=0)
    return found[first:]


def _segments(path: str) -> Iterator[bytes]:
    keys = [key for _, key in _segment_numbers(path)]
    return (data for data in Files(path).read_many(keys) if data is not None)


def _put_segment(path: str, text: str, suffix: str) -> None:
    number = max((number for number, _ in _segment_numbers(path)), default=-1) + 1
    while not create(f"{path.rstrip('/')}/{number:08d}{suffix}.jsonl", text.encode()):
        number += 1  # another writer took it


# ---------------------------------------------------------------------------------------------------- many files


class Files:
    """The files under one root. Cheap to open.

    Ranges of files are read at known offsets; on a disk they go straight into the caller's buffer, which takes a
    quarter of the CPU time of a read that allocates.
    """

    def __init__(self, path: StrPath):
        import tensorstore as ts

        self.path = os.fspath(path)
        self.local = None if is_url(path) else Path(self.path).expanduser().absolute()
        try:
            self.store = ts.KvStore.open(_spec(self.local or self.path.rstrip("/"), "/"), context=context()).result()
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

    def read_many(self, keys: Iterable[str]) -> Iterator[bytes | None]:
        """The files in the order of keys, many requests at a time; None for one that does not exist."""
        for key, answer in self._ask(keys, None):
            try:
                found = answer.result()
            except STORAGE_ERRORS as error:
                raise UserError(f"cannot read {self.name(key)}: {reason(error)}") from error
            yield found.value if found.state == "value" else None

    def tails_equal(self, keys: Iterable[str], offset: int, tail: bytes) -> Iterator[bool | None]:
        """For each file, whether its bytes from offset on are exactly tail; None where there is no file."""
        for _, answer in self._ask(keys, slice(offset, None)):
            try:
                found = answer.result()
            except STORAGE_ERRORS:  # OUT_OF_RANGE: the file is shorter than offset
                yield False
            else:
                yield found.value == tail if found.state == "value" else None

    def _ask(self, keys: Iterable[str], byte_range: slice | None) -> Iterator[tuple[str, ts.Future]]:
        """Reads of many files in order, REQUESTS_IN_FLIGHT under way at a time."""
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


# ---------------------------------------------------------------------------------------------------- helpers


def reason(error: BaseException) -> str:
    """The first sentence of a tensorstore message, without its source locations and spec dumps."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return re.split(r" \[(?:source locations|tensorstore_spec)=", text)[0]


def write_error(name: str, error: BaseException) -> UserError:
    """The error for a failed write through tensorstore: what to do when the disk is full, else the reason."""
    if "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error):
        return UserError(f"no space left to write {name}; free some and run the same command to go on")
    return UserError(f"cannot write {name}: {reason(error)}")


@functools.cache
def context() -> ts.Context:
    """What all of tensorstore's stores share here: no cache, and reads that leave the CPU to others."""
    import tensorstore as ts

    return ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_concurrency": {"limit": 16}})


def _spec(path: StrPath, suffix: str = "") -> str | dict[str, str]:
    """What tensorstore opens a key-value store by."""
    name = f"{os.fspath(path)}{suffix}"
    return name if is_url(name) else {"driver": "file", "path": name}


def _object(path: StrPath) -> ts.KvStore:
    """A key-value store whose key "" is the file."""
    import tensorstore as ts

    return ts.KvStore.open(_spec(path), context=context()).result()


def _create_in_store(path: StrPath, data: bytes) -> bool:
    path = path if is_url(path) else Path(path).absolute()
    try:
        store = _object(path)
        found = store.read("").result()
        if found.state == "value":
            return False
        # The loser of a race gets no exception but an empty generation.
        return bool(store.write("", data, if_equal=found.stamp.generation).result().generation)
    except STORAGE_ERRORS as error:
        raise write_error(os.fspath(path), error) from error


def _write_on_disk(path: Path, data: bytes, put: Callable[[Path, Path], bool | None]) -> bool:
    """Write a temporary and put it in place; what `put` answers, if it does."""
    make_folder(path.parent)
    _remove_leftovers(path)
    temporary = _temporary(path)
    with _naming(path):
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            answer = put(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(path.parent)
    return answer is not False


def _link(temporary: Path, path: Path) -> bool:
    """Give a file the name `path` unless that is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        # A network disk may have carried out a request whose answer was lost, and been asked again.
        return temporary.stat().st_nlink == 2
    return True


def _temporary(path: Path) -> Path:
    """A name beside `path` that no other process takes, on whatever host."""
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.tmp")


def _remove_leftovers(path: Path) -> None:
    """Temporaries of `path` that a kill left behind."""
    pattern = re.compile(re.escape(f".{path.name[:200]}.") + r"[0-9a-f]{16}\.tmp")
    for entry in os.scandir(path.parent):
        if pattern.fullmatch(entry.name):
            with contextlib.suppress(OSError):  # another process removed it first
                if time.time() - entry.stat().st_mtime > LEFTOVER_SECONDS:
                    shutil.rmtree(entry) if entry.is_dir() else os.unlink(entry)


@contextlib.contextmanager
def _naming(path: StrPath) -> Iterator[None]:
    """An OSError names the file: a write to a full disk would not say where, a rename would name the temporary."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = os.fspath(path), None
        raise


def _sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network disks cannot do this for folders, whose names are then as durable as they get.
        if not (path.is_dir() and error.errno in _NO_FOLDER_SYNC):
            raise
    finally:
        os.close(descriptor)


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


def _prefix_end(prefix: str) -> str:
    """The smallest key above all those that begin with prefix; "" is above all keys."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""
