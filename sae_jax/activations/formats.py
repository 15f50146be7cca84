"""Files as documents: what a file is, by its name and its content, and what is in it.

    .jsonl .ndjson .jsonlines     one JSON object a line, a document in a field of each
    .json                         the same, or an array of such objects
    .csv .tsv                     a table whose first row names the columns, a document in a column of each row
    .parquet                      the same
    .txt .md .py, any other name  plain text, if it looks like that: one document, or several where it is long

Each may be packed: `.jsonl.gz`, `.txt.zst`. Case does not matter. What is none of these is refused: archives, binary
files, JSON under another name. All but a .json array is read in a stream.

Plain text of more than WHOLE characters is cut into documents of at most PART, so that there is something to shuffle.
No more of it is in memory than WHOLE characters and a block. A document ends after the last empty line in the second
half of PART characters; where there is none, after the last end of a line there, the last space, or with the part.
"""

from __future__ import annotations

import csv
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sae_jax.activations.blocks import (
    PACKED,
    OnPosition,
    UnreadableError,
    blocks_of,
    damaged,
    head_of,
    kind,
    lines_of,
    unpacked,
)
from sae_jax.activations.fields import TEXT_FIELD, Fields

JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
TABLES = {".csv": ",", ".tsv": "\t"}
IN_FOLDERS = (".txt", ".md", ".py", ".json", *JSON_LINES, *TABLES, ".parquet")  # what a folder gives, packed or not
# Text in another form, which read as it stands would be other text.
_OTHER_FORMATS = (
    *(*PACKED, ".bz2", ".xz", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".rar"),
    *(".arrow", ".feather", ".avro", ".orc", ".xls", ".xlsx", ".ods", ".sqlite", ".db"),
    *(".pkl", ".pickle", ".npy", ".npz", ".h5", ".hdf5", ".pt", ".bin", ".safetensors"),
    *(".pdf", ".doc", ".docx", ".odt", ".epub", ".rtf", ".ipynb"),
)
_ROWS = 64  # of a Parquet file that are in memory

# Of plain text, in characters. Both decide what the documents are, and so what is in a set.
WHOLE = 2**20  # a file of no more is one document
PART = 2**16  # of documents that a longer one is cut into, at most: far above the context of a model


def documents_of(
    path: Path, fields: Fields = TEXT_FIELD, on_position: OnPosition = lambda n_bytes: None
) -> Iterator[str]:
    """The documents of a file, also empty ones. Raises UnreadableError for a file that holds none, or is damaged.

    Args:
        path: of the file.
        fields: of its records that make a document.
        on_position: called with the bytes of the file that have been read.
    """
    suffix = kind(path)
    if suffix in _OTHER_FORMATS:
        raise _of_another_format(path, f"{suffix} is not a format that is read")
    if fields.is_chat and suffix not in (".json", *JSON_LINES, ".parquet"):
        cure = "use JSON Lines or Parquet with a list of messages in each record, or leave out harvest.chat"
        raise UnreadableError(str(path), "can hold no conversations", cure, "without conversations", is_other=True)
    if suffix == ".parquet":
        yield from _of_parquet(path, fields, on_position)
    elif suffix in TABLES:
        yield from _of_table(path, fields, on_position)
    elif suffix in (".json", *JSON_LINES):
        yield from _of_json(path, suffix, fields, on_position)
    else:
        if _first_object(head_of(path)):
            raise _of_another_format(path, "JSON objects under a name that does not end in .json or .jsonl")
        yield from _of_plain_text(blocks_of(path, on_position))


def _of_plain_text(blocks: Iterable[str]) -> Iterator[str]:
    """The documents of a text, which depend on the text alone and not on where its blocks end."""
    held, at, limit = "", 0, WHOLE
    for block in blocks:
        held, at = held[at:] + block, 0
        if len(held) > limit:
            limit = PART
            while len(held) - at > PART:
                cut = _cut(held, at)
                yield held[at:cut]
                at = cut
    yield held[at:]


def _cut(text: str, at: int) -> int:
    """Where a document that begins at `at` ends, in a text of which more than PART characters follow."""
    for end in ("\n\n", "\n", " "):
        if (place := text.rfind(end, at + PART // 2, at + PART)) >= 0:
            return place + len(end)
    return at + PART


def _of_another_format(path: Path, problem: str) -> UnreadableError:
    cure = "make it plain text, JSON Lines (.jsonl), CSV or Parquet, or name others"
    return UnreadableError(str(path), f"cannot be read: {problem}", cure, problem, is_other=True)


def _of_json(path: Path, suffix: str, fields: Fields, on_position: OnPosition) -> Iterator[str]:
    head = head_of(path) if suffix == ".json" else ""
    if head.strip() and not _first_object(head):
        raise _of_another_format(path, "neither JSON Lines nor an array of JSON objects")
    blocks = blocks_of(path, on_position)
    if head.lstrip().startswith("["):
        records = _parse("".join(blocks))
        if not isinstance(records, list):
            raise UnreadableError(str(path), "is not a whole JSON array", "get it again", "damaged or cut short")
        placed = ((f"{path}, record {number},", record) for number, record in enumerate(records))
    else:
        placed = ((f"{path}:{number}", _parse(line)) for number, line in enumerate(lines_of(blocks), 1) if line.strip())
    for number, (place, record) in enumerate(placed):
        try:
            document = fields.document(record, place)
        except UnreadableError as error:
            # A .json file may be anything, and JSON Lines are records.
            error.is_other = suffix == ".json" and number == 0
            error.reason = f"JSON without records that have {fields.what}" if error.is_other else error.reason
            raise
        yield document


def _of_table(path: Path, fields: Fields, on_position: OnPosition) -> Iterator[str]:
    header: list[str] | None = None
    for place, row in rows_of_table(path, on_position):
        if header is None:
            header = row
            _check_columns(path, fields, header, header, is_other=True)
        else:
            yield fields.document(dict(zip(header, row, strict=True)), place)


def rows_of_table(path: Path, on_position: OnPosition = lambda n_bytes: None) -> Iterator[tuple[str, list[str]]]:
    """(place, fields) of each row of a .csv or .tsv file, first of the header. Raises UnreadableError.

    Rows that are not as long as the header are refused.
    """
    lines = (line + "\n" for line in lines_of(blocks_of(path, on_position)))
    reader = csv.reader(lines, delimiter=TABLES[kind(path)], strict=True)
    header: list[str] | None = None
    while (row := _next_row(reader, path)) is not None:
        if not row:
            continue
        header = header or row
        if len(row) != len(header):
            raise UnreadableError(
                f"{path}:{reader.line_num}",
                f"has {len(row)} fields, and the header {len(header)}",
                "put what holds a delimiter in double quotes",
            )
        yield f"{path}:{reader.line_num}", row


def _next_row(reader: Any, path: Path) -> list[str] | None:
    limit = csv.field_size_limit(2**31 - 1)  # of the whole process; documents may be longer than it is
    try:
        return next(reader, None)
    except csv.Error as error:
        raise UnreadableError(
            f"{path}:{reader.line_num}", f"is not CSV: {error}", "write quotes inside of quotes twice"
        ) from None
    finally:
        csv.field_size_limit(limit)


def _check_columns(path: Path, fields: Fields, columns: list[str], texts: list[str], is_other: bool) -> None:
    """Refuse a table that does not have each of the fields, once. `texts`: the columns that could be fields."""
    for name in fields.names:
        if columns.count(name) != 1 or name not in texts:
            has = "has no column" if name not in columns else f"has no {fields.kind} in column"
            problem = f'has two columns "{name}"' if columns.count(name) > 1 else f'{has} "{name}"'
            cure = fields.cure(texts)
            raise UnreadableError(str(path), problem, cure, f"which {problem}; {cure}", is_other)


def _of_parquet(path: Path, fields: Fields, on_position: OnPosition) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    with unpacked(path) as (file, stream), tempfile.TemporaryFile() as seekable:
        if stream is not file:
            shutil.copyfileobj(stream, seekable)
            stream = seekable
        number, size = 0, path.stat().st_size
        try:
            table = parquet.ParquetFile(stream, buffer_size=2**20)
            schema = table.schema_arrow
            suitable = [each.name for each in schema if _suits(each.type, fields.is_chat)]
            _check_columns(path, fields, schema.names, suitable, is_other=False)
            for batch in table.iter_batches(_ROWS, columns=[*fields.names], use_threads=False):
                for record in batch.to_pylist():
                    yield fields.document(record, f"{path}, row {number},")
                    number += 1
                on_position(size * number // table.metadata.num_rows)
        except UnicodeDecodeError:
            raise UnreadableError(
                f"{path}, row {number} or after it,", "is not UTF-8", "convert it", "not UTF-8"
            ) from None
        except (pyarrow.ArrowException, OSError) as error:
            raise damaged(path, error) from None


def _suits(kind: Any, is_chat: bool) -> bool:
    """Whether a type of pyarrow can be a document, or is null, as of a column that nobody filled in."""
    from pyarrow import types

    value = kind.value_type if types.is_dictionary(kind) else kind
    tests = (types.is_list, types.is_large_list) if is_chat else (types.is_string, types.is_large_string)
    return any(test(value) for test in (*tests, types.is_null))


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


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
