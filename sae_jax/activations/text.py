"""Text by reference: which documents it has, in a fixed order.

    stdlib                      source and licence files of the running Python's standard library
    heldout                     the bundled text, which the bundled model was never trained on
    a file, directory or glob   formats.py says what a file is; a directory gives those with usual names, at any depth
    hf:dataset[@revision][:split]
                                fields of a hub dataset, streamed; the split is `train` by default

What a user writes is made a reference that means the same in any folder (`resolve`), once: it is read and recorded.
Files come in order of path, or in one by seed (shuffle.py), so that a set can be resumed and made again; `harvest`
says which of them it did not reach. Of several files those that are not text are left out, and named; a single one is
refused. `scan` reads all of them and finds that out, once: what is read later are the files that it names.

Files of the standard library are held out by a hash of their name. The same rule excludes them from `stdlib`
and from the bundled model's training text, and chose `heldout`, so these never overlap, whatever the version
of Python.
"""

from __future__ import annotations

import copy
import glob
import hashlib
import itertools
import os
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from sae_jax.activations.blocks import PACKED, UnreadableError, kind
from sae_jax.activations.conversations import roles_of
from sae_jax.activations.fields import TEXT_FIELD, Fields
from sae_jax.activations.formats import IN_FOLDERS, documents_of
from sae_jax.activations.shuffle import buffered, permuted
from sae_jax.progress import say_once
from sae_jax.storage import absolute
from sae_jax.types import UsageError, UserError

HELDOUT = Path(__file__).parent.parent / "assets" / "bundled_lm" / "heldout.jsonl"
WORDS = ("stdlib", "heldout")
MARK_EVERY = 100  # documents of a dataset

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
_NAMES = f"{', '.join(IN_FOLDERS)} (or these with {' or '.join(PACKED)})"
_HUB = re.compile(r"hf:(?P<id>[^@:]+)(@(?P<revision>[^:]+))?(:(?P<split>.+))?")


@dataclass(frozen=True)
class Scan:
    """A text that has been read once."""

    digest: str  # what identifies its content: sha256 (hex) over its documents, or the name of a dataset of the hub
    n_bytes: int  # of its documents, and one for each; 0 for a dataset of the hub, which is not read
    n_documents: int = 0
    n_empty: int = 0  # documents beside those, which are left out
    files: tuple[str, ...] = ()  # that have documents; none where it is not made of local files
    left_out: dict[str, list[Path]] = field(default_factory=dict)  # files, by the reason
    roles: tuple[str, ...] = ()  # of conversations


class Mark(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From where a dataset of the hub can be read on."""

    n_documents: int  # before it, of those that are not empty
    n_rows: int  # before it
    state: dict[str, Any]  # what the `datasets` library says of the stream


def resolve(reference: str) -> str:
    """A user's reference as one that means the same in any folder: a word, an absolute path or glob, or hf:...

    Raises UsageError for one that could be a word and is a path too, and for one that names nothing.
    """
    hub = reference.startswith("hf:")
    name = _hub(reference)["id"] if hub else reference
    if reference in WORDS or (hub and not name.startswith((".", "/"))):
        if os.path.exists(name):
            raise UsageError(
                f"text {reference!r} is a word and the name of what is here, too; write {'hf:' * hub}./{name} for the "
                f"path, or run elsewhere for the word"
            )
        return reference
    if hub:
        return reference.replace(name, str(absolute(name)), 1)
    if not os.path.exists(reference) and glob.has_magic(reference):
        # The folder that a pattern starts from may have brackets in its name.
        return os.path.normpath(os.path.join(glob.escape(os.getcwd()), reference))
    if not reference or not os.path.exists(reference):  # an empty name would be the current folder
        raise _missing(reference)
    return str(absolute(reference))


def is_there(reference: str) -> bool:
    """Whether a recorded text can be read from here, as far as can be seen without reading it."""
    path = _hub(reference)["id"] if reference.startswith("hf:") else reference
    return not os.path.isabs(path) or os.path.exists(path) or bool(glob.glob(path, recursive=True))


def documents(reference: str, fields: Fields = TEXT_FIELD) -> Iterator[str]:
    """The non-empty documents of a text, in a fixed order; errors as `named_documents`."""
    return (document for _, document in named_documents(reference, fields))


def named_documents(
    reference: str,
    fields: Fields = TEXT_FIELD,
    files: Sequence[str] = (),
    seed: int | None = None,
    mark: Mark | None = None,
    on_mark: Callable[[Mark], None] = lambda mark: None,
) -> Iterator[tuple[str, str]]:
    """(file, document) of the non-empty documents of a text, in a fixed order.

    Args:
        reference: see the head of this file.
        fields: of records that make a document.
        files: those that `scan` found to have documents; without them it is asked first.
        seed: of the order (shuffle.py); None: as they lie.
        mark: leave out the documents before it; None: from the first one on.
        on_mark: called now and then with the place that has been reached, where the text can be read on from there.

    Yields: the file is "" where the text is not made of local files.

    Raises UsageError for a text that does not exist, and UserError for one that is empty or cannot be read.
    """
    if _is_elsewhere(reference):
        pairs = (("", document) for document in _documents_elsewhere(reference, fields, seed, mark, on_mark))
    else:
        files = files or scan(reference, fields).files
        files = files if seed is None else permuted(files, seed)
        pairs = ((file, document) for file in files for document in documents_of(Path(file), fields))
    pairs = pairs if seed is None else buffered(pairs, seed)
    empty = mark is None
    for file, document in pairs:
        if document:
            empty = False
            yield file, document
    if empty:
        raise _empty(reference)


def scan(
    reference: str,
    fields: Fields = TEXT_FIELD,
    progress: Callable[[int], None] = lambda n_bytes: None,
    skip_unreadable: bool = False,
) -> Scan:
    """Read all of a text that is here. A dataset of the hub is not read: without a revision it may change.

    Args:
        reference: see the head of this file.
        fields: of records that make a document.
        progress: called with the bytes that have been read, of `local_bytes`.
        skip_unreadable: leave out any file that is damaged, of several. The content is that of the others.

    Raises UsageError for a text that does not exist, and UserError for one that is empty or cannot be read.
    """
    if reference.startswith("hf:") and not os.path.isabs(_hub(reference)["id"]):
        return Scan(reference if fields == TEXT_FIELD else f"{reference} {fields.template or fields.column}", 0)
    content = _Content(fields.is_chat)
    if _is_elsewhere(reference):
        for document in _documents_elsewhere(reference, fields):
            content.add(document)
        return content.scanned(reference, (), {})
    paths, left_out = _paths(reference)
    is_single = paths == [Path(reference)]
    if is_single and kind(paths[0]) not in IN_FOLDERS:
        say_once(f"{reference} is read as plain text, if it is text")
    files, unreadable, n_before = [], set(), 0
    for path in paths:
        before, size = content.copy(), path.stat().st_size

        def on_position(n_bytes: int, n_before: int = n_before) -> None:
            progress(n_before + n_bytes)

        try:
            for document in documents_of(path, fields, on_position):
                content.add(document)
        except UnreadableError as error:
            if is_single or not (error.is_other or skip_unreadable):
                raise
            content = before
            left_out.setdefault(error.reason, []).append(path)
            unreadable.add(path)
        if content.n_documents > before.n_documents:
            files.append(str(path))
        n_before += size
        progress(n_before)
    if not content.n_documents and len(unreadable) == len(paths):
        reasons = "; ".join(f"{len(left)} {why}" for why, left in left_out.items())
        raise UserError(f"text {reference!r} has no file that can be read ({reasons}); name others")
    return content.scanned(reference, tuple(files), left_out)


class _Content:
    """The documents of a text as `scan` goes through them."""

    def __init__(self, is_chat: bool) -> None:
        self.n_bytes = self.n_documents = self.n_empty = 0
        self._roles: set[str] | None = set() if is_chat else None
        self._sha = hashlib.sha256()

    def copy(self) -> _Content:
        copied = copy.copy(self)
        copied._sha, copied._roles = self._sha.copy(), copy.copy(self._roles)
        return copied

    def add(self, document: str) -> None:
        if not document:
            self.n_empty += 1
            return
        data = document.encode("utf-8")
        self._sha.update(len(data).to_bytes(8, "little"))  # so that moving a document boundary changes the digest
        self._sha.update(data)
        self.n_bytes += len(data) + 1
        self.n_documents += 1
        if self._roles is not None:
            self._roles |= roles_of(document)

    def scanned(self, reference: str, files: tuple[str, ...], left_out: dict[str, list[Path]]) -> Scan:
        if not self.n_documents:
            raise _empty(reference)
        roles = tuple(sorted(self._roles or ()))
        return Scan(self._sha.hexdigest(), self.n_bytes, self.n_documents, self.n_empty, files, left_out, roles)


def _empty(reference: str) -> UserError:
    return UserError(f"text {reference!r} is empty; name a text with at least one document")


def local_bytes(reference: str) -> int:
    """About how much `scan` has to read; 0 where that is not known."""
    return 0 if _is_elsewhere(reference) else sum(path.stat().st_size for path in _paths(reference)[0])


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


def _is_elsewhere(reference: str) -> bool:
    return reference in WORDS or reference.startswith("hf:")


def _documents_elsewhere(
    reference: str,
    fields: Fields,
    seed: int | None = None,
    mark: Mark | None = None,
    on_mark: Callable[[Mark], None] = lambda mark: None,
) -> Iterator[str]:
    """The documents of a text that is not made of local files."""
    if fields.is_chat and reference in WORDS:
        raise UsageError(f"text {reference!r} has no conversations; name another one, or leave out harvest.chat")
    if reference == "stdlib":
        return (text for _, text in stdlib_files(held_out=False))
    return documents_of(HELDOUT) if reference == "heldout" else _from_hub(reference, fields, seed, mark, on_mark)


def _paths(reference: str) -> tuple[list[Path], dict[str, list[Path]]]:
    """Files that the reference names, in order of path; and what else is there, by the reason to leave it out."""
    path = Path(reference)
    if path.is_file():
        return [path], {}
    is_folder = bool(reference) and path.is_dir()
    found = _below(path) if is_folder else [Path(name) for name in glob.glob(reference, recursive=True)]
    files: list[Path] = []
    left_out: dict[str, list[Path]] = {}
    for each in sorted(found, key=Path.as_posix):
        reason = ""
        if each.is_dir():
            reason = "links to folders" if is_folder else "folders"
        elif not each.is_file():
            reason = "no regular files"
        elif is_folder and kind(each) not in IN_FOLDERS:
            reason = f"not named {_NAMES}"
        if reason:
            left_out.setdefault(reason, []).append(each)
        else:
            files.append(each)
    if not files and is_folder:
        raise UserError(f"directory {reference!r} holds no text; it needs files in {_NAMES}")
    if not files:
        raise _missing(reference)
    return files, left_out


def _below(folder: Path) -> list[Path]:
    """All in a folder but folders; links to some are not followed, as they may lead back."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}")

    walk = os.walk(folder, onerror=refuse)
    return [
        Path(root, name)
        for root, folders, names in walk
        for name in (*names, *(each for each in folders if os.path.islink(os.path.join(root, each))))
    ]


def _missing(reference: str) -> UsageError:
    what = "is no file and no folder" if os.path.exists(reference) else "does not exist"
    return UsageError(
        f"text {reference!r} {what}; use stdlib, heldout, hf:dataset[@revision][:split], a file, a directory or a glob"
    )


def _hub(reference: str) -> re.Match[str]:
    match = _HUB.fullmatch(reference)
    if match is None:
        raise UsageError(f"text {reference!r} is no hub dataset; write hf:dataset[@revision][:split]")
    return match


def _from_hub(
    reference: str, fields: Fields, seed: int | None, mark: Mark | None, on_mark: Callable[[Mark], None]
) -> Iterator[str]:
    match = _hub(reference)
    import datasets

    n_documents, n_rows = (0, 0) if mark is None else (mark.n_documents, mark.n_rows)
    try:
        dataset = datasets.load_dataset(
            match["id"], revision=match["revision"], split=match["split"] or "train", streaming=True
        )
        rows = dataset
        if seed is not None:  # a shard is a file, or a few
            n = dataset.num_shards
            rows = itertools.chain.from_iterable(dataset.shard(n, number) for number in permuted(range(n), seed))
        elif mark is not None:
            dataset.load_state_dict(mark.state)
        # Without a revision it may change, which is seen by counting what comes before. The buffer that documents are
        # shuffled in is no part of the stream's state.
        has_marks = seed is None and match["revision"] is not None and hasattr(dataset, "state_dict")
        for number, row in enumerate(rows, n_rows):
            document = fields.document(row, f"dataset {reference!r}, row {number},")
            n_documents += document != ""
            if has_marks and document and n_documents % MARK_EVERY == 0:
                on_mark(Mark(n_documents, number + 1, dataset.state_dict()))
            yield document
    except UserError:
        raise
    except Exception as error:
        # The client raises whatever its transport does; the first line says which it was.
        reason = str(error).partition("\n")[0]
        raise UserError(f"dataset {reference!r} cannot be read: {reason}; check its name and the network") from error
