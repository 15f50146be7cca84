"""JSON lines: logs that grow by a line at a time."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sae_jax.errors import UserError
from sae_jax.progress import console
from sae_jax.storage import disk
from sae_jax.storage.disk import StrPath, is_url
from sae_jax.storage.guarded import parse_json
from sae_jax.storage.many import Files
from sae_jax.storage.whole import create, read_bytes, write_text

ROWS_PER_SEGMENT, SECONDS_PER_SEGMENT = 64, 30.0  # of lines at a URL


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
            disk.make_folder(on_disk.parent)
            _cut_torn_line(on_disk)
            self._file = on_disk.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one line."""
        line = _line(row)
        if self._file is not None:
            with disk.naming(self.path):
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
            with disk.naming(self.path), self._file:
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
        if (row := _object(line)) is not None:
            rows.append(row)
        elif number == len(lines):
            console.print(f"{path}: the last line was cut off and is dropped")
        else:
            console.print(f"{path}, line {number}: not a JSON object; passed over")
    return rows


def write_lines(path: StrPath, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace all lines of a file."""
    text = "".join(map(_line, rows))
    if is_url(path):
        _put_segment(os.fspath(path), text, "-whole")
    else:
        write_text(path, text)


def _object(line: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(UserError):
        return parse_json(line, "", dict[str, Any])
    return None


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
        if _object(data[end:]) is None:
            console.print(f"{path}: the last line was cut off and is dropped")
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
