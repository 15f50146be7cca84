"""JSON lines: logs that grow by a line at a time.

An object at a URL cannot be appended to. There a log is a prefix with segments:

    <number>.jsonl              lines of one writer
    <number>-whole.jsonl        all lines until then: what has a lower number is replaced by it
    <first>-to-<last>.jsonl     the lines of these segments, which are replaced by it

What is replaced is deleted, so that a log of many days is some hundreds of objects; a reader that finds one gone which
was there a moment ago looks again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
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
GATHERED = 64  # segments that are put into one

_SEGMENT = re.compile(r"(?P<first>\d+)(?P<whole>-whole)?(-to-(?P<last>\d+))?\.jsonl")


class Lines:
    """Appends JSON objects, one a line, to a file; each is out of this process when `write` returns.

    At a URL the lines go into segments of ROWS_PER_SEGMENT lines, or SECONDS_PER_SEGMENT, which `read_lines` puts
    together. A number that is not finite becomes null, since a log line must not end a run.
    """

    def __init__(self, path: StrPath, check: Callable[[], None] = lambda: None) -> None:
        """`check` raises where lines must not be put at a URL any more: a file on a disk that another has replaced
        takes the lines with it, an object does not.
        """
        self.path, self._check = os.fspath(path), check
        self._next: int | None = None  # number of the next segment; None: it is not known yet
        self._own: list[tuple[int, str]] = []  # the last segments, of consecutive numbers, that this writer has put
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

    def flush(self) -> None:
        """Put down the lines that wait, at a URL."""
        if self._waiting:
            self._put(time.monotonic())

    def close(self) -> None:
        """Make all lines durable. Must be called at a URL, where the last lines wait for it."""
        if self._file is not None and not self._file.closed:
            with disk.naming(self.path), self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
        else:
            self.flush()

    def _put(self, now: float) -> None:
        self._check()
        text = "".join(self._waiting)
        if self._next is None:
            self._next = _next_number(Files(self.path).keys(""))
        number = _put_segment(self.path, self._next, text)
        if number != self._next:
            self._own = []  # another writer's are between
        self._own.append((number, text))
        self._waiting, self._last_segment, self._next = [], now, number + 1
        if len(self._own) == GATHERED:
            self._gather()

    def _gather(self) -> None:
        """Put the last segments into one object."""
        numbers, texts = zip(*self._own, strict=True)
        write_text(f"{self.path.rstrip('/')}/{numbers[0]:08d}-to-{numbers[-1]:08d}.jsonl", "".join(texts))
        Files(self.path).delete_many(f"{number:08d}.jsonl" for number in numbers)
        self._own = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError, UserError) if error else contextlib.nullcontext():
            self.close()


def read_lines(path: StrPath) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, in order; none if there is no file.

    Says so on stderr when it drops the last line because a kill cut it short, and when it passes over a line that is
    not a JSON object.
    """
    data = _at_url(os.fspath(path)) if is_url(path) else read_bytes(path) or b""
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
    if not is_url(path):
        write_text(path, text)
        return
    files = Files(path)
    replaced = files.keys("")
    _put_segment(files.path, _next_number(replaced), text, "-whole")
    files.delete_many(key for key in replaced if _SEGMENT.fullmatch(key))


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


def _at_url(path: str) -> bytes:
    """What all segments hold, in order."""
    files = Files(path)
    while True:
        found = [*files.read_many(_that_count(files.keys("")))]
        if None not in found:
            return b"".join(filter(None, found))


def _that_count(keys: Iterable[str]) -> list[str]:
    """The segments that none replaces, in order."""
    found = [(int(match["first"]), match) for key in keys if (match := _SEGMENT.fullmatch(key))]
    begin = max((number for number, match in found if match["whole"]), default=0)
    counted, end = [], -1
    # Of those that begin alike, one that replaces others comes first.
    for first, match in sorted(found, key=lambda each: (each[0], not (each[1]["whole"] or each[1]["last"]))):
        if first > end and first >= begin:
            counted.append(match[0])
            end = int(match["last"] or end)
    return counted


def _next_number(keys: Iterable[str]) -> int:
    matches = [match for key in keys if (match := _SEGMENT.fullmatch(key))]
    return max((int(match["last"] or match["first"]) for match in matches), default=-1) + 1


def _put_segment(path: str, number: int, text: str, suffix: str = "") -> int:
    """Write a segment of the first number from this one on that is free; which that is."""
    while not create(f"{path.rstrip('/')}/{number:08d}{suffix}.jsonl", text.encode()):
        number += 1  # another writer took it
    return number
