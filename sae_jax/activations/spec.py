"""What an activation set is made of: sources, sizes, origin, and the arrays these imply on disk.

The spec is fixed before the first row is written and its SHA-256 stands beside it in dataset.json. The
content of shard s is a function of (spec, s), so any host may make any shard, and two hosts that start the
same harvest agree.

Text, language models and tokenizer are known by their content. Where they lie is recorded beside their digests, but is
no part of the SHA-256, and may change.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from sae_jax.activations.fields import COLUMN, Fields
from sae_jax.activations.rows import DTYPES, stored_width
from sae_jax.storage import as_type, parse_json
from sae_jax.types import UsageError, UserError

FORMAT = 3

INDEX_NAMES = ("token", "seq", "pos")
# Fields that say where something lies, by the field with the digest that says what it is.
PLACES = {"text_digest": "text", "heldout_digest": "heldout", "tokenizer_digest": "tokenizer", "model_digest": "model"}

# Fields that were added to format 3: recorded where they say something, so that the SHA-256 of older sets is the same.
ADDED = ("text_template", "shuffled", "chat", "chat_template_digest", "precision", "first_token", "backend", "sequence")

CHUNK_BYTES = 4 << 20  # one read: flat in speed from 1 to 12 MiB locally; on object stores the request is the unit
SHARD_BYTES = 256 << 20  # one write of the widest source
SHARD_BYTES_ALL_SOURCES = 1 << 30  # the writer holds one shard of every source in memory
MIN_CHUNKS = 128  # chunks are what is shuffled: a small set gets small ones
MIN_SHARDS = 4
# Above all that is real, and small enough to allocate.
MAX_WIDTH, MAX_ROWS, MAX_CHUNKS, MAX_SHARD_BYTES = 1 << 24, 1 << 40, 1 << 22, 1 << 44

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def as_bits(values: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers: numpy is slow to gather bfloat16, and hashing cannot read it."""
    return values.view(np.dtype(f"u{values.dtype.itemsize}"))


@dataclass(frozen=True)
class SourceSpec:
    """One stream of activations, a (model, hook) pair. Sources of a set have the same rows, same order."""

    name: str  # a folder name: letters, digits, '.', '_', '-'
    d: int
    dtype: str = "bfloat16"  # of rows.DTYPES
    model: str | None = None  # "bundled", hub-id@revision or a path; None for rows whose origin is not known
    model_digest: str | None = None
    hook: str | None = None

    def __post_init__(self) -> None:
        if not _SAFE_NAME.fullmatch(self.name):
            raise UsageError(
                f"source name {self.name!r} is not a folder name; use letters, digits, '.', '_' and '-', "
                "starting with a letter or digit"
            )
        if self.dtype not in DTYPES:
            raise UsageError(f"source {self.name!r}: dtype={self.dtype!r}; use one of {', '.join(DTYPES)}")
        if not 1 <= self.d <= MAX_WIDTH:
            raise UsageError(f"source {self.name!r}: d={self.d}; rows need at least 1 value, and {MAX_WIDTH:,} at most")


@dataclass(frozen=True)
class SetSpec:
    """An activation set: its sources, how rows are cut into shards and chunks, and the text they come from.

    A shard has room for `shard_rows` rows and is written at once; a chunk of `chunk_rows` rows is read at
    once. Sets with text give `context` and `sequences_per_shard`; shard s then holds the token
    sequences [s * sequences_per_shard, (s + 1) * sequences_per_shard) and the rows which their tokens left.
    """

    sources: tuple[SourceSpec, ...]
    n_shards: int
    shard_rows: int
    chunk_rows: int
    seed: int = 0
    tokenizer: str | None = None
    tokenizer_digest: str | None = None
    text: str | None = None
    text_digest: str | None = None
    text_column: str | None = None  # of JSON records, tables and hub datasets; None: "text"
    text_template: str | None = None  # over several fields, as "{title}\n{text}"; None: `text_column` alone
    chat: str | None = None  # the texts are conversations, with rows of this role, or of "all" tokens
    chat_template_digest: str | None = None
    shuffled: bool | None = None  # whether documents come in an order of `seed`; None: as they lie
    heldout: str | None = None  # text for evaluation, in the same notation as `text`
    heldout_digest: str | None = None
    first_token: int | None = None  # that every sequence begins with
    context: int | None = None  # tokens
    sequence: Literal["document"] | None = None  # each is one document, cut or filled up; None: they are packed
    sequences_per_shard: int | None = None
    precision: str | None = None  # of the language model; None: float32
    backend: Literal["torch"] | None = None  # that ran the language model; None: JAX
    max_norm_multiple: float | None = None  # rows above this multiple of the median norm were left out

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if not names:
            raise UsageError("a set needs at least one source")
        if len(set(names)) < len(names):
            raise UsageError(f"source names must differ, got {', '.join(names)}")
        for field in ("n_shards", "shard_rows", "chunk_rows"):
            if not 1 <= getattr(self, field) <= MAX_ROWS:
                raise UsageError(f"{field}={getattr(self, field)}; it must be at least 1, and {MAX_ROWS:,} at most")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"seed={self.seed}; it must be 0 or more and below 2^64")
        if self.shard_rows % self.chunk_rows:
            raise UsageError(f"shard_rows={self.shard_rows} is not a multiple of chunk_rows={self.chunk_rows}")
        if self.shard_rows // self.chunk_rows > MAX_CHUNKS:
            raise UsageError(f"a shard has {self.shard_rows // self.chunk_rows:,} chunks; at most {MAX_CHUNKS:,}")
        if (self.context is None) != (self.sequences_per_shard is None):
            raise UsageError("give both context and sequences_per_shard (a set with text) or neither")
        if self.context is not None and self.sequences_per_shard is not None:
            if self.sequences_per_shard * self.context > self.shard_rows:
                raise UsageError(
                    f"{self.sequences_per_shard} sequences of {self.context} tokens do not fit in "
                    f"shard_rows={self.shard_rows}; use at most {self.shard_rows // self.context}"
                )
            if self.n_shards * self.sequences_per_shard >= 2**31:
                raise UsageError("a set holds fewer than 2^31 sequences; write several sets")
        for array in array_specs(self).values():
            if array.shard_bytes > MAX_SHARD_BYTES:
                raise UsageError(
                    f"a shard of {array.path} has {array.shard_bytes:,} bytes; at most {MAX_SHARD_BYTES:,}: lower "
                    f"shard_rows"
                )

    @property
    def fields(self) -> Fields:
        """What of a record of the text is the document."""
        return Fields(self.text_column or COLUMN, self.text_template, self.chat is not None)

    @property
    def has_text(self) -> bool:
        """Whether every row knows its token, sequence and position."""
        return self.context is not None

    def source(self, name: str) -> SourceSpec:
        """The source of that name. UsageError naming those which exist otherwise."""
        for source in self.sources:
            if source.name == name:
                return source
        raise UsageError(f"the set has no source {name!r}; it has {', '.join(source.name for source in self.sources)}")

    @property
    def sha256(self) -> str:
        """SHA-256, hex, of the canonical JSON (sorted keys, no spaces) of all but the places of what has a digest."""
        return _sha256(_without_places(self._recorded()))

    def _recorded(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in ADDED or value is not None}

    def to_json(self) -> str:
        """The text of dataset.json."""
        spec = self._recorded()
        digests = {"sha256": self.sha256, "sha256_with_places": _sha256(spec)}
        return json.dumps({"format": FORMAT, **digests, "spec": spec}, indent=1)

    @classmethod
    def from_json(cls, text: bytes) -> SetSpec:
        """Parses dataset.json. ValueError saying what is wrong with it."""
        try:
            record = parse_json(text, "dataset.json", dict[str, Any])
            version, values = as_type(record["format"], int, "format"), record["spec"]
            digests = [record[name] for name in ("sha256", "sha256_with_places")] if version == FORMAT else []
        except (UserError, KeyError) as error:
            raise ValueError("it is not the JSON that sae_jax writes") from error
        if version != FORMAT:
            cure = "update sae_jax" if version > FORMAT else "harvest or write the set again"
            raise ValueError(f"format {version}, this version reads format {FORMAT}; {cure}")
        try:
            spec = as_type(values, cls, "spec")
        except UserError as error:
            raise ValueError(f"{error}") from error
        if digests != [spec.sha256, _sha256(spec._recorded())]:
            raise ValueError("its spec does not match its sha256; it was edited or cut")
        return spec

    def first_difference(self, other: SetSpec) -> str | None:
        """The first field in which two specs differ, as "shard_rows is 64, not 128" (self first), or None.

        A text or model that lies elsewhere is the same.
        """
        a, b = (_without_places(asdict(spec)) for spec in (self, other))
        names = [[source["name"] for source in spec["sources"]] for spec in (a, b)]
        if names[0] != names[1]:
            return f"sources is {names[0]!r}, not {names[1]!r}"
        for mine, theirs in zip(a["sources"], b["sources"], strict=True):
            if difference := _difference(mine, theirs):
                return difference.replace(" is ", f" of source {mine['name']!r} is ", 1)
        return _difference(a, b)


def _sha256(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _without_places(values: dict) -> dict:
    """A spec as JSON without the fields that only say where something lies."""
    sources = {"sources": [_without_places(source) for source in values["sources"]]} if "sources" in values else {}
    places = {place for digest, place in PLACES.items() if values.get(digest) is not None}
    return {name: value for name, value in values.items() if name not in places} | sources


def _difference(mine: dict, theirs: dict) -> str | None:
    """The first field that differs, but for the sources."""
    for name in {**mine, **theirs}:
        if name != "sources" and mine.get(name) != theirs.get(name):
            return f"{name} is {mine.get(name)!r}, not {theirs.get(name)!r}"
    return None


@dataclass(frozen=True)
class ArraySpec:
    """One zarr array of a set. Shard s is the object `<path>/c/<s>[/0]`: its chunks, then their index."""

    path: str
    dtype: np.dtype
    row_shape: tuple[int, ...]
    n_shards: int
    shard_rows: int
    chunk_rows: int

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a full chunk."""
        return self.chunk_rows * math.prod(self.row_shape) * self.dtype.itemsize

    @property
    def shard_index(self) -> bytes:
        """The chunk index at the end of every shard object: offset and length of each chunk, uint64 pairs."""
        n_chunks = self.shard_rows // self.chunk_rows
        offsets = np.arange(n_chunks, dtype="<u8") * self.chunk_bytes
        return np.stack([offsets, np.full(n_chunks, self.chunk_bytes, "<u8")], axis=1).tobytes()

    @property
    def shard_bytes(self) -> int:
        """Bytes of a shard object."""
        return self.shard_rows // self.chunk_rows * (self.chunk_bytes + 16)

    def shard_key(self, shard: int) -> str:
        """The key of a shard object inside the set."""
        return "/".join([self.path, "c", str(shard)] + ["0"] * len(self.row_shape))

    def metadata(self) -> dict:
        """The zarr v3 metadata. No crc32c codec: it halves the speed of reading, and commits hold digests."""
        raw = [{"name": "bytes", "configuration": {"endian": "little"}}]
        inner = {"chunk_shape": [self.chunk_rows, *self.row_shape], "codecs": raw, "index_codecs": raw}
        return {
            "shape": [self.n_shards * self.shard_rows, *self.row_shape],
            "data_type": self.dtype.name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [self.shard_rows, *self.row_shape]},
            },
            "codecs": [{"name": "sharding_indexed", "configuration": inner}],
        }


def array_specs(spec: SetSpec) -> dict[str, ArraySpec]:
    """All arrays of a set by path: `acts/<source>`, and with text `index/<name>` and `sequences`."""
    rows = (spec.n_shards, spec.shard_rows, spec.chunk_rows)
    arrays = [ArraySpec(f"acts/{s.name}", DTYPES[s.dtype], (stored_width(s.d, s.dtype),), *rows) for s in spec.sources]
    if spec.context is not None and spec.sequences_per_shard is not None:
        int32, per_shard = np.dtype(np.int32), spec.sequences_per_shard
        arrays += [ArraySpec(f"index/{name}", int32, (), *rows) for name in INDEX_NAMES]
        arrays += [ArraySpec("sequences", int32, (spec.context,), spec.n_shards, per_shard, per_shard)]
    return {array.path: array for array in arrays}


def layout(n_rows: int, row_bytes: Sequence[int], unit_rows: int = 1) -> tuple[int, int, int]:
    """Chooses how to cut a set.

    Args:
      n_rows: rows of the set, at most.
      row_bytes: of one stored row of each source.
      unit_rows: rows which must stay in one shard: the context length of a set with text.

    Returns:
      (n_shards, shard_rows, chunk_rows): chunks of 4 MiB of the widest source and shards of 256 MiB, smaller
      where a set has less than 128 chunks or 4 shards. Each shard has room for shard_rows // unit_rows units.
    """
    n_units = max(1, math.ceil(n_rows / unit_rows))
    most_rows = min(SHARD_BYTES // max(row_bytes), SHARD_BYTES_ALL_SOURCES // sum(row_bytes))
    n_shards = max(min(MIN_SHARDS, n_units), math.ceil(n_units * unit_rows / max(most_rows, unit_rows)))
    units = math.ceil(n_units / n_shards)
    n_shards = math.ceil(n_units / units)
    rows = units * unit_rows
    n_chunks = max(math.ceil(MIN_CHUNKS / n_shards), math.ceil(rows * max(row_bytes) / CHUNK_BYTES))
    chunk_rows = max(1, rows // min(n_chunks, rows))
    return n_shards, math.ceil(rows / chunk_rows) * chunk_rows, chunk_rows
