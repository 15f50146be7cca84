"""Where shards begin in a text: kept beside a set while it is made, so that a harvest resumes without tokenising again.

    places/<shard>.json   the document in which the first sequence of a shard begins, and how far into it
    places/whole.json     how many sequences the text has, where all of it is harvested

A place follows from the spec of a set and its text, as shards do, and whichever worker comes by notes it. No row
depends on whether one is known. Documents before it are read again, and not tokenised, which is where the time goes: of
31 MB in JSON Lines 0.3 s of processor time against 17 s. A dataset of the hub, whose documents have to be fetched, is
read on from a mark, where there is one (text.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import xxhash

from sae_jax.activations.spec import SetSpec
from sae_jax.activations.store import read_spec
from sae_jax.activations.text import Mark
from sae_jax.progress import say_once
from sae_jax.storage import Files, as_type, parse_json, sealed, unsealed
from sae_jax.types import UserError

_FOLDER = "places/"
_WHOLE = f"{_FOLDER}whole.json"


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a sequence begins in a packed text."""

    document: int  # its number among those that are not empty
    part: int  # of the document (lm.Tokenizer.parts)
    n_tokens: int  # of the part, its separator included, that belong to the sequence before
    xxh3_64: str  # of the document, hex; "" to take any
    mark: Mark | None = None  # up to the document, from where the text can be read on


class _Whole(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    n_sequences: int


START = Place(0, 0, 0, "")


def digest(document: str) -> str:
    """The digest that a place has of its document."""
    return xxhash.xxh3_64_hexdigest(document.encode())


class Places:
    """The places of the shards of a set."""

    def __init__(self, out: str, sequences_per_shard: int) -> None:
        self._files, self.every = Files(out), sequences_per_shard
        names = (key.removeprefix(_FOLDER).removesuffix(".json") for key in self._files.keys(_FOLDER))
        self._noted = {int(name) for name in names if name.isdigit()}

    def before(self, sequence: int) -> tuple[int, Place]:
        """(number, place) of the last sequence that is known, up to this one. A damaged note is named and left out."""
        for shard in sorted(self._noted, reverse=True):
            if shard * self.every <= sequence and (place := _read(self._files, f"{_FOLDER}{shard}.json", Place)):
                return shard * self.every, place
        return 0, START

    def note(self, sequence: int, place: Callable[[], Place]) -> None:
        """Note where a sequence begins, if a shard begins with it and this is not known yet."""
        shard, rest = divmod(sequence, self.every)
        if shard and not rest and shard not in self._noted:
            _write(self._files, f"{_FOLDER}{shard}.json", place())
            self._noted.add(shard)


def note_count(out: str, n_sequences: int) -> None:
    """Note how many sequences the whole text of a set has."""
    _write(Files(out), _WHOLE, _Whole(n_sequences))


def count(out: str | None, spec_of: Callable[[int], SetSpec]) -> int | None:
    """How many sequences a whole text has, if a set that was begun at `out` says so. `spec_of`: the spec of so many."""
    if out is None or Files(out).read("dataset.json") is None:
        return None
    noted, begun = _read(Files(out), _WHOLE, _Whole), read_spec(Files(out))
    if noted is None:
        return None
    # It may be of another text, or tokenizer; the filter of sinks is decided only later.
    spec = replace(spec_of(noted.n_sequences), max_norm_multiple=begun.max_norm_multiple)
    return noted.n_sequences if spec.sha256 == begun.sha256 else None


def remove(out: str) -> None:
    """Of a set that is complete."""
    files = Files(out)
    for key in files.keys(_FOLDER):
        files.delete(key)


def _read(files: Files, key: str, kind: type[Any]) -> Any:
    """A note, or None where there is none or it is damaged."""
    if (data := files.read(key)) is None:
        return None
    name = files.name(key)
    try:
        return as_type(unsealed(parse_json(data, name, dict[str, Any]), name), kind, name)
    except UserError as error:
        say_once(f"{error}; without it the text before is tokenised again")
        return None


def _write(files: Files, key: str, note: Place | _Whole) -> None:
    files.write(key, json.dumps(sealed(msgspec.to_builtins(note))).encode())
