"""The text of a file in blocks: unpacked, decoded from UTF-8, with "\\n" at the end of every line.

A file of any size takes the memory of a block. `.gz` and `.zst` at the end of a name say that a file is packed; its
first bytes have to agree. A packed file that is damaged or cut short is refused at the place where that shows.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sae_jax.storage import one_line
from sae_jax.types import UserError

BLOCK_BYTES = 2**20
# What packed files begin with, by the suffix of their names. A zst file may begin with a frame to be skipped.
PACKED = {
    ".gz": (b"\x1f\x8b",),
    ".zst": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + i]) + b"\x2a\x4d\x18" for i in range(16))),
}
# What else tells by its first bytes that it is no text.
_MAGIC = {".gz": PACKED[".gz"][0], ".zst": PACKED[".zst"][0], ".parquet": b"PAR1"}

OnPosition = Callable[[int], None]  # called with the bytes of a file, as it lies on the disk, that have been read


class UnreadableError(UserError):
    """A file, or a record of it, that cannot be read as text."""

    def __init__(self, place: str, problem: str, cure: str, reason: str = "", is_other: bool = False) -> None:
        """Args:
        place: the file, and where in it.
        problem: what is wrong there, after `place` in a sentence.
        cure: what to do.
        reason: what is wrong, for a list of such files.
        is_other: it is no damaged text, but something else than text: of several files it is left out.
        """
        super().__init__(f"{place} {problem}; {cure}")
        self.reason = reason or f"which {problem}"
        self.is_other = is_other


def packing(path: Path) -> str:
    """The suffix of `path` that says how it is packed, in lower case, or ""."""
    suffix = path.suffix.lower()
    return suffix if suffix in PACKED else ""


def kind(path: Path) -> str:
    """The suffix of `path` that says what is in it, in lower case, without that of the packing."""
    return Path(path.stem if packing(path) else path.name).suffix.lower()


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[tuple[BinaryIO, Any]]:
    """(the file as it lies on the disk, a stream of its bytes unpacked). Raises UnreadableError, also in between."""
    try:
        with path.open("rb") as file:
            suffix, head = packing(path), file.read(4)
            file.seek(0)
            if suffix and not head.startswith(PACKED[suffix]):
                raise UnreadableError(
                    str(path), f"is not packed as {suffix} files are", "get it again, or rename it as what it is"
                )
            if suffix == ".gz":
                with gzip.GzipFile(fileobj=file) as stream:
                    yield file, stream
            elif suffix == ".zst":
                import pyarrow

                with pyarrow.input_stream(file, compression="zstd") as stream:
                    yield file, stream
            else:
                yield file, file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise damaged(path, error) from None
    except OSError as error:
        if error.strerror is None:  # pyarrow's
            raise damaged(path, error) from None
        raise UnreadableError(
            str(path), f"cannot be read: {error.strerror}", "make it readable, or name others"
        ) from None


def damaged(path: Path, error: Exception) -> UnreadableError:
    """What `error`, of a library that reads a file, says of it."""
    return UnreadableError(
        str(path), f"is damaged or cut short ({one_line(error)})", "get it again", reason="damaged or cut short"
    )


def head_of(path: Path) -> str:
    """About the first million characters of a file, whatever it is. Raises UnreadableError."""
    with unpacked(path) as (_, stream):
        data = stream.read(BLOCK_BYTES)
    for suffix, magic in _MAGIC.items():
        if data.startswith(magic) and suffix != kind(path):
            what = f"{suffix[1:]} under a name that does not end in {suffix}"
            raise UnreadableError(str(path), f"is {what}", "rename it, or name others", reason=what, is_other=True)
    return data.decode("utf-8-sig", errors="replace")


def blocks_of(path: Path, on_position: OnPosition = lambda n_bytes: None) -> Iterator[str]:
    """The text of a file in blocks of about a million characters, none empty. Raises UnreadableError."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    lines = io.IncrementalNewlineDecoder(decoder, translate=True)
    n_bytes = 0
    with unpacked(path) as (file, stream):
        while True:
            data = stream.read(BLOCK_BYTES)
            n_bytes += len(data)
            on_position(file.tell())
            try:
                block = lines.decode(data, final=not data)
            except UnicodeDecodeError as error:
                place = n_bytes - len(error.object) + error.start
                raise UnreadableError(
                    str(path), f"is not UTF-8 (byte {place})", "convert it, or name other files", "not UTF-8", True
                ) from None
            if "\0" in block:
                raise UnreadableError(
                    str(path),
                    "has zero bytes: it is binary, or text in UTF-16",
                    "convert it to UTF-8",
                    reason="not UTF-8",
                    is_other=True,
                )
            if block:
                yield block
            if not data:
                return


def lines_of(blocks: Iterable[str]) -> Iterator[str]:
    """The lines of a text in blocks, without their ends."""
    pieces: list[str] = []  # of a line that goes on in the next block
    for block in blocks:
        first, *others = block.split("\n")
        pieces.append(first)
        for line in others:
            yield "".join(pieces)
            pieces = [line]
    if any(pieces):  # nothing comes after the end of the last line
        yield "".join(pieces)
