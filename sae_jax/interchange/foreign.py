"""A dictionary on its way in or out: settings of a variant of ours, and arrays under our names that nobody has read.

`Foreign` is one that another program wrote, read as a variant computes it; `Ours` is one that shall be written for
another program. What both ways need to be exact is here: biases that are subtracted or not, norms, thresholds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sae_jax import storage
from sae_jax.interchange.lazy import Lazy
from sae_jax.interchange.tensors import SUFFIXES, Tensors, open_tensors
from sae_jax.record import Record, SourceRecord
from sae_jax.saes import gated, jumprelu, relu, relu_norm, topk, transcoder
from sae_jax.saes.base import SaeConfig
from sae_jax.saes.normalise import PER_VECTOR
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

    @property
    def has_all(self) -> bool:
        """Whether nothing has to be calibrated: a selection over a batch has a threshold for rows by themselves."""
        return self.config.variant not in ("batch_topk", "matryoshka") or "threshold" in self.arrays


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
        return np.full(self.config.n_latents, self.array("threshold"), np.float32)


@dataclass(frozen=True)
class Files:
    """The files of a dictionary, by their paths below its folder. `given`: the one that was named, if one was."""

    folder: Path
    names: tuple[str, ...]
    given: str | None = None
    words: str = ""  # its path, or that on a hub: names of folders often say what no file does
    _tensors: dict[str, Tensors] = field(default_factory=dict, repr=False)
    _json: dict[str, dict[str, Any] | None] = field(default_factory=dict, repr=False)

    @classmethod
    def at(cls, path: Path, place: str | None = None) -> Files:
        """Those of a folder, or a file with the settings that lie beside it. UserError if there is nothing."""
        words = place or "/".join(path.absolute().parts[-6:])
        if path.is_dir():
            found: list[str] = []
            for folder, below, names in os.walk(path):
                below[:] = [name for name in below if not name.startswith(".")]
                here = [Path(folder) / name for name in names if not name.startswith(".")]
                found += [each.relative_to(path).as_posix() for each in here if each.is_file()]
                if len(found) + len(below) > MAX_FILES:
                    raise UserError(f"{path} has over {MAX_FILES:,} files; give the folder of one dictionary")
            return cls(path, tuple(sorted(found)), words=words)
        if not path.is_file():
            raise UserError(f"{path}: no such file or folder; give one that holds a dictionary")
        beside = sorted(each.name for each in path.parent.iterdir() if each.suffix in (".json", ".yaml", ".yml"))
        return cls(path.parent, (path.name, *beside), path.name, words)

    @property
    def weights(self) -> tuple[str, ...]:
        """Those of tensors."""
        return tuple(name for name in self.names if Path(name).suffix in SUFFIXES)

    @property
    def one(self) -> str | None:
        """The one file of tensors in the folder itself, if there is one."""
        here = [name for name in self.weights if "/" not in name]
        return here[0] if len(here) == 1 else None

    def json(self, name: str) -> dict[str, Any] | None:
        """The object in a JSON file; None if there is no such file."""
        if name not in self.names:
            return None
        if name not in self._json:
            self._json[name] = storage.read_json(self.folder / name)
        return self._json[name]

    def settings(self, name: str) -> Settings:
        """What a JSON file says. UserError if there is no such file."""
        content = self.json(name)
        if content is None:
            raise UserError(f"{self.folder} has no {name}, which says how the arrays are meant; get it, too")
        return Settings(content, self.folder / name)

    def tensors(self, name: str) -> Tensors:
        """What a file of tensors holds."""
        if name not in self.names:
            raise UserError(f"{self.folder} has no {name}; get it, too")
        if name not in self._tensors:
            self._tensors[name] = open_tensors(self.folder / name)
        return self._tensors[name]

    def has_arrays(self, name: str | None, *arrays: str) -> bool:
        """Whether a file of tensors is there and has arrays of these names."""
        return name is not None and name in self.names and {*arrays} <= self.tensors(name).arrays.keys()


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


def shape_of(array: Lazy, n_axes: int = 2) -> tuple[int, ...]:
    """The shape of an array. UserError if it has another number of axes, or one of them is empty."""
    if len(array.shape) != n_axes or 0 in array.shape:
        raise UserError(f"{array.name} has shape {list(array.shape)}, where {n_axes} axes are needed; get it again")
    return array.shape


def product(w_enc: Lazy, vector: np.ndarray) -> np.ndarray:
    """W [F, X] times a vector [X], f64[F]."""
    out = np.zeros(shape_of(w_enc)[0])
    if vector.shape != w_enc.shape[1:]:
        raise UserError(
            f"{w_enc.name} has rows of {w_enc.shape[1]}, and what is subtracted from them has {vector.shape}"
        )
    for (rows, columns), values in w_enc.slabs():
        out[rows] += values.astype(np.float64) @ vector[columns].astype(np.float64)
    return out


def row_norms(w_dec: Lazy) -> np.ndarray:
    """Norms of rows, f64[F]."""
    squares = np.zeros(shape_of(w_dec)[0])
    for (rows, _), values in w_dec.slabs():
        squares[rows] += np.square(values.astype(np.float64)).sum(1)
    return np.sqrt(squares)


def shifted(bias: Lazy, by: np.ndarray) -> Lazy:
    """A bias plus a vector of float64."""
    if bias.shape != by.shape:
        raise UserError(f"{bias.name} has shape {list(bias.shape)}, where {list(by.shape)} is needed; get it again")
    return Lazy.of((bias.array().astype(np.float64) + by).astype(np.float32), bias.name)


def make_up(arrays: dict[str, Lazy], *biases: str, gains: tuple[Any, ...] = (1.0,)) -> tuple[str, ...]:
    """Ours subtracts b_dec before encoding and theirs does not: biases that make up for it. What was changed."""
    along = product(arrays["w_enc"], arrays["b_dec"].array())
    for name, gain in zip(biases, gains, strict=True):
        arrays[name] = shifted(arrays[name], gain * along)
    what = " and ".join(biases)
    return (f"b_dec is not subtracted before encoding: what subtracting it here takes away was added to {what}",)


def fold_norms(arrays: dict[str, Lazy], what: str) -> tuple[str, ...]:
    """Norms of decoder rows into the encoder, where values are not negative or latents rank by value times norm.

    Returns what was changed, () if all norms are 1.
    """
    norms = row_norms(arrays["w_dec"])
    for name in ("b_enc", "w_enc"):
        if (array := arrays[name]).shape[:1] != norms.shape:
            rows = f"{arrays['w_dec'].name} has {len(norms)} rows"
            raise UserError(f"{rows}, and {array.name} the shape {list(array.shape)}; they are not of one dictionary")
    if (np.abs(norms - 1) <= UNIT).all():
        return ()
    arrays["b_enc"] = Lazy.of((arrays["b_enc"].array() * norms).astype(np.float32), arrays["b_enc"].name)
    arrays["w_enc"] = arrays["w_enc"].scaled(norms)
    arrays["w_dec"] = arrays["w_dec"].scaled(1 / np.where(norms == 0, 1, norms))  # 0: a latent that writes nothing
    return (f"norms of decoder rows were folded into the encoder, so values are times the norm: {what}",)


def autoencoder(
    activation: Literal["topk", "relu", "jumprelu"],
    arrays: dict[str, Lazy],
    is_subtracted: bool,
    k: int | None = None,
    threshold: np.ndarray | None = None,
    norm: Any = "none",
) -> tuple[SaeConfig, dict[str, Lazy], tuple[str, ...]]:
    """The variant that computes an autoencoder, its arrays, and what was changed.

    Args:
        activation: of latents.
        arrays: w_enc, b_enc, w_dec, b_dec.
        is_subtracted: b_dec is, before encoding.
        k: with topk.
        threshold: [F], with jumprelu.
        norm: of each vector, as SaeConfig.input_norm.
    """
    arrays, settings = dict(arrays), {"n_latents": shape_of(arrays["w_enc"])[0], "input_norm": norm}
    if activation == "jumprelu" and threshold is not None:
        arrays["log_threshold"], said = log_threshold(threshold, arrays["w_enc"].name)
        return jumprelu.Config(pre_bias=is_subtracted, **settings), arrays, said
    if activation == "relu":
        return (relu.Config if is_subtracted else relu_norm.Config)(**settings), arrays, ()
    if k is None:
        raise UserError(f"{arrays['w_enc'].name}: nothing says how many latents are active; give --k")
    return topk.Config(k=k, **settings), arrays, () if is_subtracted else make_up(arrays, "b_enc")


def maps(
    arrays: dict[str, Lazy],
    w_skip: Lazy | None = None,
    k: int | None = None,
    threshold: np.ndarray | None = None,
    norm: Any = "none",
) -> tuple[SaeConfig, dict[str, Lazy], tuple[str, ...]]:
    """As `autoencoder`, of a transcoder: with a selection of k, above thresholds, or, with neither, of all positive."""
    n_latents, said = shape_of(arrays["w_enc"])[0], ()
    arrays = {**arrays, **({} if w_skip is None else {"w_skip": w_skip})}
    if threshold is not None:
        arrays["log_threshold"], said = log_threshold(threshold, arrays["w_enc"].name)
    activation = "jumprelu" if threshold is not None else "relu" if k is None else "topk"
    settings = {"n_latents": n_latents, "k": min(32, n_latents) if k is None else k, "skip": w_skip is not None}
    return transcoder.Config(activation=activation, input_norm=norm, **settings), arrays, said


def thresholded(ours: Ours, name: str) -> dict[str, Lazy]:
    """A dictionary of one source as thresholds alone: z = pre * 1[pre > threshold], pre = W_enc x + b_enc.

    Args:
        ours: one without a norm of each vector, and without a selection of k latents.
        name: the format, for messages.

    Returns:
        w_enc [F, X], b_enc [F], w_dec [F, Y], b_dec [Y], threshold [F] (0 for a ReLU), and w_skip [Y, X] if there is.
    """
    config, arrays = ours.config, dict(ours.arrays)
    if config.input_norm in PER_VECTOR:
        raise refuse(name, config, f"it has no input_norm={config.input_norm}", "train with a dataset_* norm")
    if config.variant == "crosscoder":
        raise refuse(name, config, "it has one source", "export it as another format")
    if selects_k(config):
        raise refuse(name, config, "it knows thresholds and no selection of k latents", "give --calibrate SET")
    arrays.setdefault("w_dec", arrays["w_enc"])
    b_enc = arrays["b_enc"].array()
    threshold = ours.threshold if has_threshold(config) else np.zeros(len(b_enc), np.float32)
    if isinstance(config, gated.Config):
        gain = np.exp(arrays["log_gain"].array().astype(np.float64))
        threshold = np.maximum(b_enc - gain * arrays["b_gate"].array(), 0).astype(np.float32)
        arrays["w_enc"] = arrays["w_enc"].scaled(gain)
    if getattr(config, "pre_bias", config.variant not in ("transcoder", "relu_norm")):
        arrays["b_enc"] = shifted(arrays["b_enc"], -product(arrays["w_enc"], arrays["b_dec"].array()))
    names = ("w_enc", "b_enc", "w_dec", "b_dec", "w_skip")
    return {**{each: arrays[each] for each in names if each in arrays}, "threshold": Lazy.of(threshold)}


def has_threshold(config: Any) -> bool:
    """Whether latents are active above thresholds that are stored."""
    is_set = config.variant in ("jumprelu", "batch_topk", "matryoshka")
    return is_set or getattr(config, "activation", "") in ("jumprelu", "batch_topk")


def selects_k(config: SaeConfig) -> bool:
    """Whether the k strongest latents of a row are active."""
    return config.n_active is not None and config.variant in ("topk", "transcoder", "end_to_end")


def sources(
    hook: str | None, width: int, model: str | None = None, name: str | None = None
) -> tuple[tuple[SourceRecord], tuple[SourceRecord]]:
    """Of an autoencoder at a hook "point.layer", or at a place that no hook here is."""
    source = (SourceRecord(hook or name or "x", width, hook, model),)
    return source, source


def pairs(
    hooks: tuple[str | None, str | None], widths: tuple[int, int], model: str | None = None
) -> tuple[tuple[SourceRecord], tuple[SourceRecord]]:
    """Of a transcoder."""
    x, y = (
        (SourceRecord(hook or name, width, hook, model),)
        for hook, name, width in zip(hooks, ("x", "y"), widths, strict=True)
    )
    return x, y


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


def number_in(words: str, pattern: str) -> int | None:
    """The last whole number that a pattern with one group finds in a path."""
    found = re.findall(pattern, words)
    return int(found[-1]) if found else None


def refuse(format_name: str, config: SaeConfig, why: str, cure: str) -> UsageError:
    """For what a format cannot hold."""
    return UsageError(f"{format_name} cannot hold this {config.variant}: {why}; {cure}")
