"""Text to packed token sequences: what the language model reads when activations are harvested.

A text reference is one of

    stdlib                      source and licence files of the running Python's standard library
    heldout                     the bundled text, which the bundled model was never trained on
    a file, directory or glob   .jsonl: one document a line, in the field "text"; any other file is one
                                document; a directory gives its .txt, .py and .jsonl files, at any depth
    hf:dataset[@revision][:split]
                                the column "text" of a hub dataset, streamed; the split is `train` by default

Documents come in a fixed order and are joined, each after a separator token, into one stream that is cut into
sequences of equal length, so that sequence number n always holds the same tokens.

Files of the standard library are held out by a hash of their name. The same rule excludes them from `stdlib`
and from the bundled model's training text, and chose `heldout`, so these never overlap, whatever the version
of Python.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from sae_jax.types import UsageError, UserError

HELDOUT = Path(__file__).parent.parent / "assets" / "bundled_lm" / "heldout.jsonl"

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
_BATCH = 64  # documents a tokeniser call; it works on them in parallel


class Encoder(Protocol):
    """What `sequences` needs of a tokeniser."""

    @property
    def separator_id(self) -> int:
        """The token that goes before each document."""
        ...

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        ...


def documents(reference: str) -> Iterator[str]:
    """The non-empty documents of a text, in a fixed order.

    Raises UsageError for a text that does not exist, and UserError for one that is empty or cannot be read.
    """
    if reference == "stdlib":
        found = (text for _, text in stdlib_files(held_out=False))
    elif reference == "heldout":
        found = _from_file(HELDOUT)
    elif reference.startswith("hf:"):
        found = _from_hub(reference)
    else:
        found = itertools.chain.from_iterable(_from_file(path) for path in _local_files(reference))
    empty = True
    for text in found:
        if text:
            empty = False
            yield text
    if empty:
        raise UserError(f"text {reference!r} is empty; name a text with at least one document")


def text_digest(reference: str) -> str:
    """What identifies the content of a text: sha256 (hex) over its documents, or a hub dataset's own name.

    Reads all of a local text. A hub dataset without a revision may change under its name.
    """
    if reference.startswith("hf:"):
        return reference
    sha = hashlib.sha256()
    for text in documents(reference):
        data = text.encode("utf-8")
        sha.update(len(data).to_bytes(8, "little"))  # so that moving a document boundary changes the digest
        sha.update(data)
    return sha.hexdigest()


def sequences(
    reference: str, tokenizer: Encoder, context: int, start: int = 0, stop: int | None = None
) -> Iterator[np.ndarray]:
    """Sequences `start` to `stop` - 1 of a text, each i32[context]; what is left over at the end is dropped.

    Skipping costs as much as reading: the text before `start` is tokenised and discarded.

    Raises:
        UsageError: for a context below 1 or a range that is none.
        UserError: as `documents`, and if the whole text is shorter than one context.
    """
    if context < 1:
        raise UsageError(f"context={context} is not a length; use 1 or more")
    if start < 0 or (stop is not None and stop < start):
        raise UsageError(f"sequences {start} to {stop} are no range; use 0 <= start <= stop")
    if stop == start:
        return
    number, rest = 0, np.zeros(0, np.int32)
    for texts in _batches(documents(reference), _BATCH):
        pieces = [rest]
        for ids in tokenizer.encode(texts):
            pieces += [np.array([tokenizer.separator_id], np.int32), np.asarray(ids, np.int32)]
        stream = np.concatenate(pieces)
        n_whole = len(stream) // context
        for i in range(max(0, start - number), n_whole):
            if number + i == stop:
                return
            yield stream[i * context : (i + 1) * context].copy()  # a view would keep the whole stream alive
        number, rest = number + n_whole, stream[n_whole * context :]
    if number == 0:
        raise UserError(f"text {reference!r} has {len(rest)} tokens, less than one context of {context}; use more text")


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


def _from_file(path: Path) -> Iterator[str]:
    try:
        if path.suffix != ".jsonl":
            yield path.read_text(encoding="utf-8")
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _text_field(line, f"{path}:{number}")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it, or name other files") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _text_field(line: str, place: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise UserError(f'{place} is not a JSON object with a string "text"; every line must be one')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        escape = f"\\u{ord(text[error.start]):04x}"
        raise UserError(f"{place} has {escape}, half of a surrogate pair, which is no text; remove it") from None
    return text


def _from_hub(reference: str) -> Iterator[str]:
    match = _HUB.fullmatch(reference)
    if match is None:
        raise UsageError(f"text {reference!r} is no hub dataset; write hf:dataset[@revision][:split]")
    import datasets

    try:
        rows = datasets.load_dataset(
            match["id"], revision=match["revision"], split=match["split"] or "train", streaming=True
        )
        for row in rows:
            if "text" not in row:
                raise UserError(f'dataset {reference!r} has no column "text", but {", ".join(row)}')
            yield row["text"]
    except UserError:
        raise
    except Exception as error:
        # The client raises whatever its transport does; the first line says which it was.
        reason = str(error).partition("\n")[0]
        raise UserError(f"dataset {reference!r} cannot be read: {reason}; check its name and the network") from error


def _batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    texts = iter(texts)
    while batch := list(itertools.islice(texts, size)):
        yield batch
