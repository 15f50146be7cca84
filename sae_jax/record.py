"""The record of a dictionary and of a run: what it is, what it was trained on, and which program wrote it.

    DIR/dictionary.json    a `Record`, beside the arrays (artifact.py)
    RUN/config.json        a `RunRecord`: the same record, with the settings of training; or the members of a set

Every file states its kind, the version of its schema and the digest of all else in it. A file of another version, with
a field too many or too few, or that has changed since it was written, is refused in one line.
"""

from __future__ import annotations

import functools
import json
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import msgspec

import sae_jax
from sae_jax.storage.digests import SEAL, sealed, unsealed
from sae_jax.storage.disk import StrPath
from sae_jax.types import Sites, UserError, Widths

SCHEMA = 1
MAX_WIDTH = 1 << 24  # of a source
NEWER = ("origin", "init_from")  # fields that older records lack


class Versioned:
    """A dataclass that is stored as JSON with its kind and the version of its schema."""

    KIND: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return sealed({"kind": self.KIND, "schema": SCHEMA, **_plain(self)})

    @classmethod
    def from_json(cls, content: Any, path: StrPath) -> Self:
        """The record in the JSON of a file. Raises UserError, in one line, for anything else."""
        if not isinstance(content, dict) or content.get("kind") != cls.KIND:
            raise UserError(f"{path}: not a {cls.KIND} record of sae_jax; give what sae_jax wrote")
        schema = content.get("schema")
        if schema != SCHEMA:
            newer = isinstance(schema, int) and schema > SCHEMA
            cure = "update sae_jax" if newer else "write it again with this version"
            raise UserError(f"{path}: a {cls.KIND} record of schema {schema}, and this program reads {SCHEMA}; {cure}")
        fields = {name: value for name, value in content.items() if name not in ("kind", "schema", SEAL)}
        try:
            record = msgspec.convert(fields, cls, strict=True)
        except (msgspec.ValidationError, UserError) as error:
            raise UserError(f"{path}: {error}; the record is damaged, restore it or write it again") from None
        if difference := _difference(fields, _plain(record)):
            raise UserError(f"{path}: {difference}; restore the file, or write it again with this version")
        unsealed(content, path)
        return record


@dataclass(frozen=True)
class SourceRecord:
    """A source: the activations of a language model at a hook, or rows from elsewhere."""

    name: str
    width: int
    hook: str | None = None
    model: str | None = None  # reference
    model_digest: str | None = None  # of its weights

    def __post_init__(self) -> None:
        if not 1 <= self.width < MAX_WIDTH:
            raise UserError(
                f"source {self.name!r} is {self.width} wide; it must be at least 1, and below {MAX_WIDTH:,}"
            )


@dataclass(frozen=True)
class DataRecord:
    """The rows that a dictionary was trained on."""

    content: str  # hash: equal where the rows are, wherever they lie
    path: str | None = None  # where they were
    tokenizer: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class Normalisation:
    """How rows are scaled before the dictionary sees them (saes/normalise.py)."""

    kind: str = "none"
    is_folded: bool = True  # the constants are in the weights; a norm of each vector is applied by the dictionary
    x: tuple[float, ...] = ()  # constant of each source that is encoded; () where there is none
    y: tuple[float, ...] = ()  # and of each that is reconstructed


@dataclass(frozen=True)
class Origin:
    """Where a dictionary that another program wrote came from, and what became of it on the way."""

    format: str  # a name of sae_jax/interchange/formats
    place: str  # a path, or where on a hub
    revision: str | None  # of the hub's repository
    licence: str | None
    changes: tuple[str, ...]  # in plain words; () where every number is as it was
    unit_rows: bool  # decoder rows have norm 1; else they have the norms they came with


@dataclass(frozen=True)
class Record(Versioned):
    """A dictionary: everything that a person, or another program, needs to know beside the arrays."""

    KIND: ClassVar[str] = "dictionary"

    variant: str
    sae: dict[str, Any]  # all settings of the variant
    encodes: tuple[SourceRecord, ...]  # side by side in x
    reconstructs: tuple[SourceRecord, ...]  # side by side in y
    normalisation: Normalisation
    data: DataRecord | None
    steps: int
    tokens: int
    weights: Literal["live", "average"]  # as trained, or their running average
    metrics: dict[str, float]  # where measured
    program: str  # version and commit
    origin: Origin | None = None  # of what was imported; left out of the file where there is none

    def __post_init__(self) -> None:
        if not (self.encodes and self.reconstructs):
            raise UserError("a dictionary needs a source that it encodes and one that it reconstructs")

    @property
    def sites(self) -> Sites:
        """Names of the sources."""
        return Sites(tuple(s.name for s in self.encodes), tuple(s.name for s in self.reconstructs))

    @property
    def widths(self) -> Widths:
        """Dimensions of the sources."""
        return Widths(tuple(s.width for s in self.encodes), tuple(s.width for s in self.reconstructs))


@dataclass(frozen=True)
class RunRecord(Versioned):
    """A run: the dictionary that it trains, and how."""

    KIND: ClassVar[str] = "run"

    dictionary: Record
    train: dict[str, Any]
    mesh: dict[str, Any]
    engine: dict[str, Any]
    allow_partial: bool = False
    init_from: str | None = None  # the dictionary whose weights it began with


@dataclass(frozen=True)
class MembersRecord(Versioned):
    """A run of several dictionaries: RUN/members/<name>/ holds the record of each."""

    KIND: ClassVar[str] = "set of members"

    members: tuple[str, ...] = field(default_factory=tuple)


@functools.cache
def program() -> str:
    """The version of this program, and the commit if it lies in a checkout."""
    version = sae_jax.__version__
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return version
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        )
    except OSError:
        return version
    return f"{version}+{described.stdout.strip()}" if described.stdout.strip() else version


def _plain(record: Any) -> dict[str, Any]:
    """A record as values of JSON. What is newer than other fields is left out where there is none, as it was before."""

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in pairs if value is not None or name not in NEWER}

    return json.loads(json.dumps(asdict(record, dict_factory=fields)))


def _difference(given: Any, known: Any, path: str = "") -> str | None:
    """The first key that nested JSON has too many or lacks, beside what it was read as."""
    if isinstance(given, dict) and isinstance(known, dict):
        for key in sorted(given.keys() | known.keys()):
            if key not in known:
                return f"unknown field {path}{key}"
            if key not in given:
                return f"field {path}{key} is missing"
            if difference := _difference(given[key], known[key], f"{path}{key}."):
                return difference
    if isinstance(given, list) and isinstance(known, list):
        for number, pair in enumerate(zip(given, known, strict=True)):
            if difference := _difference(*pair, f"{path}{number}."):
                return difference
    return None
