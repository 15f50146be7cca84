"""Text by reference: which documents it has, in a fixed order.

    stdlib                      source and licence files of the running Python's standard library
    heldout                     the bundled text, which the bundled model was never trained on
    a file, directory or glob   .jsonl: one document a line, in a field; any other file is one document; a
                                directory gives its .txt, .py and .jsonl files, at any depth
    hf:dataset[@revision][:split]
                                a column of a hub dataset, streamed; the split is `train` by default

Files come in order of path, not shuffled, so that a set can be resumed and made again; `harvest` says which of them it
did not reach. Of several files those that are not UTF-8 are left out, and named; a single one is refused.

Files of the standard library are held out by a hash of their name. The same rule excludes them from `stdlib`
and from the bundled model's training text, and chose `heldout`, so these never overlap, whatever the version
of Python.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sae_jax.types import UsageError, UserError

HELDOUT = Path(__file__).parent.parent / "assets" / "bundled_lm" / "heldout.jsonl"
COLUMN = "text"  # of .jsonl files and hub datasets, unless another one is asked for

_SUFFIXES = (".jsonl", ".py", ".txt")
# Tests and codec tables repeat themselves; the others are not part of the library or mostly its tests.
_STDLIB_SKIPPED = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "idle_test",
        "lib2to3",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
_STDLIB_CHARACTERS = range(200, 900_001)  # stubs and generated tables left out
_HUB = re.compile(r"hf:(?P<id>[^@:]+)(@(?P<revision>[^:]+))?(:(?P<split>.+))?")
_BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class Scan:
    """A text that has been read once."""

    digest: str  # what identifies its content: sha256 (hex) over its documents, or a hub dataset's own name
    n_bytes: int  # of its documents, and one for each; 0 for a hub dataset, which is not read
    files: tuple[str, ...] = ()  # that have documents; none where it is not made of local files
    not_utf8: tuple[str, ...] = ()  # files that were left out


def documents(reference: str, column: str = COLUMN) -> Iterator[str]:
    """The non-empty documents of a text, in a fixed order.

    Raises UsageError for a text that does not exist, and UserError for one that is empty or cannot be read.
    """
    return (document for _, document in named_documents(reference, column))


def named_documents(reference: str, column: str = COLUMN) -> Iterator[tuple[str, str]]:
    """(file, document), as `documents`. The file is "" where the text is not made of local files."""
    if reference == "stdlib":
        pairs: Iterator[tuple[str, str]] = (("", text) for _, text in stdlib_files(held_out=False))
    elif reference == "heldout":
        pairs = (("", text) for text in _from_file(HELDOUT, COLUMN))
    elif reference.startswith("hf:"):
        pairs = (("", text) for text in _from_hub(reference, column))
    else:
        paths = _local_files(reference)
        if paths != [Path(reference)]:
            paths = [path for path in paths if _is_utf8(path)]
        pairs = ((str(path), text) for path in paths for text in _from_file(path, column))
    empty = True
    for name, text in pairs:
        if text:
            empty = False
            yield name, text
    if empty:
        raise UserError(f"text {reference!r} is empty; name a text with at least one document")


def scan(reference: str, column: str = COLUMN, progress: Callable[[int], None] = lambda n_bytes: None) -> Scan:
    """Read all of a local text. A hub dataset is not read, and without a revision may change under its name.

    Args:
        reference: see the head of this file.
        column: of .jsonl files and hub datasets.
        progress: called with the bytes read so far.
    """
    if reference.startswith("hf:"):
        return Scan(reference if column == COLUMN else f"{reference} {column}", 0)
    sha, n_bytes, files = hashlib.sha256(), 0, {}
    for name, text in named_documents(reference, column):
        data = text.encode("utf-8")
        sha.update(len(data).to_bytes(8, "little"))  # so that moving a document boundary changes the digest
        sha.update(data)
        n_bytes += len(data) + 1
        files[name] = None
        progress(n_bytes)
    local = reference not in ("stdlib", "heldout")
    not_utf8 = [str(path) for path in _local_files(reference) if not _is_utf8(path)] if local else []
    return Scan(sha.hexdigest(), n_bytes, tuple(files) if local else (), tuple(not_utf8))


def local_bytes(reference: str) -> int:
    """About how much `scan` has to read; 0 where that is not known."""
    if reference in ("stdlib", "heldout") or reference.startswith("hf:"):
        return 0
    return sum(path.stat().st_size for path in _local_files(reference))


def stdlib_files(*, held_out: bool) -> Iterator[tuple[str, str]]:
    """Path (relative, posix) and content of the standard library's files, in order of path.

    Args:
        held_out: the files kept from all training, instead of all others.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _STDLIB_SKIPPED]
        paths += [
            Path(folder, name).relative_to(root)
            for name in files
            if (name.endswith(".py") or name.upper().startswith("LICENSE")) and _is_held_out(name) == held_out
        ]
    for path in sorted(paths, key=Path.as_posix):
        try:
            text = (root / path).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # not the user's to cure
        if len(text) in _STDLIB_CHARACTERS:
            yield path.as_posix(), text


def _is_held_out(file_name: str) -> bool:
    # By bare name, because files move between folders from one Python to the next. About one in 25.
    return hashlib.md5(file_name.encode(), usedforsecurity=False).digest()[0] < 10


def _local_files(reference: str) -> list[Path]:
    path = Path(reference)
    if path.is_file():
        return [path]
    if path.is_dir() and reference:  # an empty name would be the current folder
        files = [file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file()]
        if not files:
            raise UserError(f"directory {reference!r} holds no text; it needs files in {', '.join(_SUFFIXES)}")
    else:
        files = [Path(name) for name in glob.glob(reference, recursive=True) if Path(name).is_file()]
        if not files:
            raise UsageError(
                f"text {reference!r} does not exist; use stdlib, heldout, hf:dataset[@revision][:split], "
                "a file, a directory or a glob"
            )
    return sorted(files, key=Path.as_posix)


def _is_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return True


def _from_file(path: Path, column: str) -> Iterator[str]:
    try:
        if path.suffix != ".jsonl":
            yield path.read_text(encoding="utf-8")
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _text_field(line, column, f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it, or name other files") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _text_field(line: str, column: str, place: str) -> str:
    try:
        record = json.loads(line)
        text = record.get(column)
    except (ValueError, AttributeError):
        record, text = {}, None
    if not isinstance(text, str):
        texts = [key for key, value in record.items() if isinstance(value, str)]
        cure = f"it has {', '.join(texts)}; choose one with harvest.text_column" if texts else "every line must be one"
        raise UserError(f'{place} is not a JSON object with a string "{column}"; {cure}')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        escape = f"\\u{ord(text[error.start]):04x}"
        raise UserError(f"{place} has {escape}, half of a surrogate pair, which is no text; remove it") from None
    return text


def _from_hub(reference: str, column: str) -> Iterator[str]:
    match = _HUB.fullmatch(reference)
    if match is None:
        raise UsageError(f"text {reference!r} is no hub dataset; write hf:dataset[@revision][:split]")
    import datasets

    try:
        rows = datasets.load_dataset(
            match["id"], revision=match["revision"], split=match["split"] or "train", streaming=True
        )
        for row in rows:
            if not isinstance(row.get(column), str):
                raise UserError(
                    f'dataset {reference!r} has no column "{column}" of text, but {", ".join(row)}; choose one with '
                    f"harvest.text_column"
                )
            yield row[column]
    except UserError:
        raise
    except Exception as error:
        # The client raises whatever its transport does; the first line says which it was.
        reason = str(error).partition("\n")[0]
        raise UserError(f"dataset {reference!r} cannot be read: {reason}; check its name and the network") from error
