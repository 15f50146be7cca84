"""Files as documents: what a file is, by its name and its content, and what is in it.

    .jsonl .ndjson .jsonlines     one JSON object a line, a document in a field of each
    .json                         the same, or an array of such objects
    any other name                one document of plain text, if it looks like that

Case does not matter. What is none of these is refused: packed files, tables, binary files, JSON under another name.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_jax.types import UserError

JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
PLAIN = (".txt", ".py")
IN_FOLDERS = (*PLAIN, ".json", *JSON_LINES)  # what a folder gives
# Text in another form, which read as it stands would be other text.
_OTHER_FORMATS = (
    *(".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".rar"),
    *(".parquet", ".arrow", ".feather", ".avro", ".orc", ".csv", ".tsv", ".xls", ".xlsx", ".ods", ".sqlite", ".db"),
    *(".pkl", ".pickle", ".npy", ".npz", ".h5", ".hdf5", ".pt", ".bin", ".safetensors"),
    *(".pdf", ".doc", ".docx", ".odt", ".epub", ".rtf", ".ipynb"),
)
_HEAD = 2**20  # characters that tell what a file is
_BLOCK_BYTES = 2**20


@dataclass
class TextFiles:
    """The files of a text that are read, in order, and those that are left out, by the reason."""

    read: list[Path] = field(default_factory=list)
    left_out: dict[str, list[Path]] = field(default_factory=dict)


def choose(paths: list[Path], column: str) -> TextFiles:
    """Of several files those that hold documents; the others are left out.

    `column` has to be in the records of a .json file, which may be anything else; one of .jsonl without it is refused.
    """
    files = TextFiles()
    for path in paths:
        head = _head(path)
        reason = _problem(path, head) or ("" if _is_utf8(path) else "not UTF-8")
        if not reason and path.suffix.lower() == ".json" and not isinstance(_first_object(head).get(column), str):
            reason = f'JSON without records that have a string "{column}"'
        if reason:
            files.left_out.setdefault(reason, []).append(path)
        else:
            files.read.append(path)
    return files


def documents_of(path: Path, column: str) -> Iterator[str]:
    """The documents of a file. Raises UserError for a file that holds none, or is damaged."""
    head, suffix = _head(path), path.suffix.lower()
    if problem := _problem(path, head):
        raise UserError(f"{path} cannot be read: {problem}; make it plain text or JSON Lines (.jsonl), or name others")
    try:
        if suffix in JSON_LINES or (suffix == ".json" and not head.lstrip().startswith("[")):
            with path.open(encoding="utf-8-sig") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _text_field(_parse(line), column, f"{path}:{number}")
        elif suffix == ".json":
            for number, record in enumerate(_parse(path.read_text(encoding="utf-8-sig")) or ()):
                yield _text_field(record, column, f"{path}, record {number},")
        else:
            text = path.read_text(encoding="utf-8-sig")
            if "\0" in text:
                raise UserError(f"{path} has zero bytes: it is binary, or text in UTF-16; convert it to UTF-8")
            yield text
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it, or name other files") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _problem(path: Path, head: str) -> str:
    """Why a file is not read, by its name and how it begins; "" if it may be."""
    suffix = path.suffix.lower()
    if suffix in _OTHER_FORMATS:
        return f"{suffix} is not a format that is read"
    if suffix == ".json" and head.strip() and not _first_object(head):
        return "neither JSON Lines nor an array of JSON objects"
    if suffix not in (".json", *JSON_LINES) and _first_object(head):
        return "JSON objects under a name that does not end in .json or .jsonl"
    return ""


def _first_object(head: str) -> dict[str, Any]:
    """The JSON object that a file begins with, in an array or not, if another or nothing comes after it; else {}."""
    head = head.lstrip()
    start = head.removeprefix("[").lstrip()
    try:
        value, end = json.JSONDecoder().raw_decode(start) if start.startswith("{") else (None, 0)
    except (ValueError, RecursionError):
        return {}
    after = start[end:].lstrip()[:1]
    return value if isinstance(value, dict) and after in ("", *(",]" if head.startswith("[") else "{")) else {}


def _head(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            return file.read(_HEAD)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _is_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                if b"\0" in block:
                    return False
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return True


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _text_field(record: Any, column: str, place: str) -> str:
    record = record if isinstance(record, dict) else {}
    text = record.get(column)
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
