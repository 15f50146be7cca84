"""A dictionary on its way in or out: settings of a variant of ours, and arrays under our names that nobody has read.

`Foreign` is one that another program wrote, read as a variant computes it; `Ours` is one that shall be written for
another program. What both ways need to be exact is here: biases that are subtracted or not, norms, thresholds.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sae_jax import storage
from sae_jax.interchange.lazy import Lazy
from sae_jax.interchange.tensors import SUFFIXES, Tensors, open_tensors
from sae_jax.record import Record, SourceRecord
from sae_jax.saes.base import SaeConfig
from sae_jax.types import UsageError, UserError

MAX_FILES = 10_000  # that are looked at below a folder
SMALLEST = float(np.finfo(np.float32).tiny)  # stands for a threshold of 0, which has no logarithm
UNIT = 1e-6  # a norm that differs from 1 by less is one that was meant to be 1


@dataclass(frozen=True)
class Foreign:
    """A dictionary of another program, as one of ours."""

    config: SaeConfig
    arrays: dict[str, Lazy]  # latent-major: w_enc [F, X], b_enc [F], w_dec [F, Y], b_dec [Y], ...
    encodes: tuple[SourceRecord, ...]
    reconstructs: tuple[SourceRecord, ...]
    changes: tuple[str, ...] = ()  # in plain words


@dataclass(frozen=True)
class Ours:
    """A dictionary of ours that is written for another program; rows as they are, all scales folded."""

    config: SaeConfig
    record: Record
    arrays: dict[str, Lazy]

    def array(self, name: str) -> np.ndarray:
        """One of its vectors, f32."""
        return self.arrays[name].array()

    @cached_property
    def threshold(self) -> np.ndarray:
        """f32[F]: above it a latent is active, for variants with thresholds."""
        if "log_threshold" in self.arrays:
            threshold = np.exp(self.array("log_threshold").astype(np.float64))
            return np.where(threshold > 2 * SMALLEST, threshold, 0).astype(np.float32)
        return np.full(self.config.n_latents, self.arrays["threshold"].read(()), np.float32)


@dataclass(frozen=True)
class Files:
    """The files of a dictionary, by their paths below its folder. `given`: the one that was named, if one was."""

    folder: Path
    names: tuple[str, ...]
    given: str | None = None
    _json: dict[str, dict[str, Any] | None] = field(default_factory=dict, repr=False)

    @classmethod
    def at(cls, path: Path) -> Files:
        """Those of a folder, or a file with the settings that lie beside it. UserError if there is nothing."""
        if path.is_dir():
            found = []
            for each in sorted(path.rglob("*")):
                if each.is_file() and not any(part.startswith(".") for part in each.relative_to(path).parts):
                    found.append(each.relative_to(path).as_posix())
                if len(found) > MAX_FILES:
                    raise UserError(f"{path} has over {MAX_FILES:,} files; give the folder of one dictionary")
            return cls(path, tuple(found))
        if not path.is_file():
            raise UserError(f"{path}: no such file or folder; give one that holds a dictionary")
        beside = sorted(each.name for each in path.parent.iterdir() if each.suffix in (".json", ".yaml", ".yml"))
        return cls(path.parent, (path.name, *beside), path.name)

    @property
    def weights(self) -> tuple[str, ...]:
        """Those of tensors."""
        return tuple(name for name in self.names if Path(name).suffix in SUFFIXES)

    @property
    def words(self) -> str:
        """The path of what was given: the names of its last folders often say what a file does not."""
        return "/".join((self.folder.resolve() / (self.given or "")).parts[-6:])

    def json(self, name: str) -> dict[str, Any] | None:
        """The object in a JSON file; None if there is no such file."""
        if name not in self.names:
            return None
        if name not in self._json:
            self._json[name] = storage.read_json(self.folder / name)
        return self._json[name]

    def tensors(self, name: str) -> Tensors:
        """What a file of tensors holds."""
        return open_tensors(self.folder / name)


class Settings:
    """What a config file of another program says; a value of another type, or none, is one line."""

    def __init__(self, values: Any, where: object) -> None:
        self.values, self.where = storage.as_type(values, dict[str, Any], where), where

    def get(self, name: str, kind: Any, default: Any = None) -> Any:
        """A value, or the default if it is not there or null."""
        value = self.values.get(name)
        return default if value is None else storage.as_type(value, kind, f"{self.where}: {name}")

    def require(self, name: str, kind: Any) -> Any:
        """A value that has to be there."""
        if self.values.get(name) is None:
            raise UserError(f"{self.where} lacks {name}, without which nothing can be computed; get the file again")
        return self.get(name, kind)

    def below(self, name: str) -> Settings:
        """A nested object; empty if there is none."""
        return Settings(self.get(name, dict[str, Any], {}), f"{self.where}: {name}")


def take(tensors: Tensors, where: object, names: Collection[str], optional: Collection[str] = ()) -> dict[str, Lazy]:
    """The arrays of a file by name. UserError if one lacks, or there is one that nothing is known of."""
    arrays = tensors.arrays
    for name in names:
        if name not in arrays:
            raise UserError(f"{where} lacks {name}; it has {', '.join(sorted(arrays)) or 'no arrays'}")
    if unknown := sorted(arrays.keys() - {*names, *optional}):
        raise UserError(f"{where} has {', '.join(unknown[:5])}, and nothing says what for; it cannot be imported whole")
    return dict(arrays)


def shape_of(array: Lazy, where: object, name: str, n_axes: int) -> tuple[int, ...]:
    """The shape of an array. UserError if it has another number of axes, or none of them may be empty."""
    if len(array.shape) != n_axes or 0 in array.shape:
        raise UserError(f"{where}: {name} has shape {list(array.shape)}, where {n_axes} axes are needed; get it again")
    return array.shape


def product(w_enc: Lazy, vector: np.ndarray) -> np.ndarray:
    """W [F, X] times a vector [X], f64[F]."""
    out = np.zeros(w_enc.shape[0])
    if vector.shape != w_enc.shape[1:]:
        raise UserError(
            f"{w_enc.name} has rows of {w_enc.shape[1]}, and what is subtracted from them has {vector.shape}"
        )
    for (rows, columns), values in w_enc.slabs():
        out[rows] += values.astype(np.float64) @ vector[columns].astype(np.float64)
    return out


def row_norms(w_dec: Lazy) -> np.ndarray:
    """Norms of rows, f64[F]."""
    squares = np.zeros(w_dec.shape[0])
    for (rows, _), values in w_dec.slabs():
        squares[rows] += np.square(values.astype(np.float64)).sum(1)
    return np.sqrt(squares)


def shifted(bias: Lazy, by: np.ndarray) -> Lazy:
    """A bias plus a vector of float64."""
    if bias.shape != by.shape:
        raise UserError(f"{bias.name} has shape {list(bias.shape)}, where {list(by.shape)} is needed; get it again")
    return Lazy.of((bias.array().astype(np.float64) + by).astype(np.float32), bias.name)


def log_threshold(threshold: np.ndarray, where: object) -> tuple[Lazy, tuple[str, ...]]:
    """Logarithms whose exponentials are not below the thresholds, so that a value of exactly that stays inactive.

    And what had to be changed: values are never negative, so a threshold below 0 is one of 0.
    """
    threshold = threshold.astype(np.float64)
    if not np.isfinite(threshold).all():
        raise UserError(f"{where}: a threshold is not finite; get the file again")
    n_negative = int((threshold < 0).sum())
    threshold = np.maximum(threshold, SMALLEST)
    logs = np.log(threshold).astype(np.float32)
    for _ in range(4):  # exp in float32 may be off by an ulp or two
        low = np.exp(logs.astype(np.float64)) < threshold * (1 + 2.0**-22)
        logs = np.where(low, np.nextafter(logs, np.float32(np.inf)), logs)
    said = (f"{n_negative:,} thresholds below 0 became 0, which is the same after the ReLU",) if n_negative else ()
    return Lazy.of(logs), said


def any_k(n_latents: int) -> int:
    """A k for settings of dictionaries that select none, which must state one all the same."""
    return min(32, n_latents)


def number_in(words: str, pattern: str) -> int | None:
    """The last whole number that a pattern with one group finds in a path."""
    found = re.findall(pattern, words)
    return int(found[-1]) if found else None


def refuse(format_name: str, config: SaeConfig, why: str, cure: str) -> UsageError:
    """For what a format cannot hold."""
    return UsageError(f"{format_name} cannot hold this {config.variant}: {why}; {cure}")
