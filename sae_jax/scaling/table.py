"""DIR/results.jsonl: the points of a sweep, one JSON object a line.

A member of a sweep has a point at each of its token marks. The file is sorted by member and tokens, and each version of
it replaces the one before at once. Each line holds the digest of all else in it: whoever edits one takes that out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from sae_jax import storage
from sae_jax.errors import UsageError, UserError
from sae_jax.storage import StrPath
from sae_jax.storage.digests import SEAL

FILE = "results.jsonl"


@dataclass(frozen=True)
class Point:
    """One member at one token mark. Raises UserError if a value cannot be one of a real point.

    A table that something else wrote needs the fields without a default.
    """

    n_latents: int
    k: int | None  # None where the variant has none
    lr: float
    seed: int
    tokens: int  # seen in training
    flops: float  # FLOP of all training up to these tokens, by the dense count (scaling/flops.py)
    fvu: float  # on held-out rows
    name: str = ""  # of the member; made of the above if it has none
    variant: str = "topk"
    d_model: int | None = None
    steps: int | None = None
    budget: float | None = None  # FLOP: the point stands where these were used up
    l0: float | None = None
    dead_fraction: float | None = None
    decoder_cosine: float | None = None  # and the next: signs of mixed features (ops/mixing.py)
    decoder_projection: float | None = None
    converged: bool = False  # the convergence rule stopped the member here
    seconds: float | None = None  # of the pass it was trained in
    commit: str = ""
    data: str = ""  # the activation set
    config: dict[str, Any] = field(default_factory=dict)  # settings of the autoencoder and its training

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
                raise UserError(f"{name}={value!r} is not {_WORDS[kind]}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{name}={value} is not finite")
            if isinstance(value, int) and abs(value) >= 2**63:
                raise UserError(f"{name} is a number of {value.bit_length()} bits; at most 63 can be real")
        try:
            msgspec.convert(self.config.get("sites", {}), dict[str, list[str]])
        except msgspec.ValidationError as error:
            raise UserError(f"config.sites={self.config['sites']!r} lists no sources by side ({error})") from None
        for name in ("n_latents", "lr", "d_model", "tokens", "steps", "flops", "fvu"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name}={getattr(self, name)} must be above 0")
        if self.k is not None and not 0 < self.k <= self.n_latents:
            raise UserError(f"k={self.k} must be from 1 to n_latents={self.n_latents}")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Point:
        """The inverse of `to_json`; ignores keys that are no fields. Raises UserError if one is missing or wrong."""
        missing = [n for n, field in _FIELDS.items() if field.default is field.default_factory and n not in values]
        if missing:
            raise UserError(f"lacks {', '.join(missing)}")
        known = {name: values[name] for name in _FIELDS if name in values}
        if not known.get("name"):
            known["name"] = f"n{known['n_latents']}-k{known['k']}-lr{known['lr']}-seed{known['seed']}"
        return cls(**known)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {name: getattr(self, name) for name in _FIELDS}

    @property
    def key(self) -> tuple[str, int]:
        """What no two points of a table share, and their order."""
        return self.name, self.tokens


_FIELDS = {field.name: field for field in dataclasses.fields(Point)}
_NUMBER = (int, float)
_NO = type(None)
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("name", "variant", "commit", "data"), str),
    **dict.fromkeys(("n_latents", "seed", "tokens"), int),
    **dict.fromkeys(("k", "d_model", "steps"), (int, _NO)),
    **dict.fromkeys(("lr", "flops", "fvu"), _NUMBER),
    **dict.fromkeys(
        ("budget", "l0", "dead_fraction", "decoder_cosine", "decoder_projection", "seconds"), (*_NUMBER, _NO)
    ),
    "converged": bool,
    "config": dict,
}
_WORDS: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    _NUMBER: "a number",
    (int, _NO): "a whole number or null",
    (*_NUMBER, _NO): "a number or null",
    bool: "true or false",
    dict: "an object",
}


def read(folder: StrPath) -> list[Point]:
    """The points of a sweep, sorted by member and tokens.

    Raises UsageError if there is no table, UserError, naming file, line and point, if a line is not a point or one
    stands twice.
    """
    path = storage.path(folder) / FILE
    try:
        lines = storage.read_limited(path).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}), so it is damaged; repeat the sweep") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; give the directory that `sae-jax sweep` wrote") from None
    points, seen = [], {}
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        values = storage.parse_json(line.encode(), where, dict[str, Any])
        where += f" (member {values.get('name', '?')}, tokens {values.get('tokens', '?')})"
        if SEAL in values:  # else something else wrote it
            values = storage.unsealed(values, where)
        try:
            point = Point.from_json(values)
        except UserError as error:
            raise UserError(f"{where}: {error}; delete the line and repeat the sweep") from None
        if point.key in seen:
            raise UserError(f"{where}: the same point stands in line {seen[point.key]}; delete one of the two")
        seen[point.key] = number
        points.append(point)
    if not points:
        raise UserError(f"{path}: holds no points; repeat the sweep")
    return sorted(points, key=lambda point: point.key)


def write(folder: StrPath, points: Iterable[Point]) -> None:
    """Replace the table with these points, sorted; a reader sees the old one or the new one."""
    rows = sorted(points, key=lambda point: point.key)
    text = "".join(storage.json_text(storage.sealed(point.to_json()), FILE, indent=None) for point in rows)
    storage.write_text(storage.path(folder) / FILE, text)
