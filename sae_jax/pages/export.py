"""A dictionary's examples, logits and statistics for another program's pages (pages/exports)."""

from __future__ import annotations

import importlib
import itertools
import json
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from sae_jax import storage
from sae_jax.pages import exports
from sae_jax.pages.about import without_folders
from sae_jax.pages.dashboard import Site
from sae_jax.pages.latents import BEFORE, Latent, describe
from sae_jax.record import Record
from sae_jax.storage import AnyPath
from sae_jax.types import UsageError

T = TypeVar("T")

SITE = "site"  # the dashboard itself
RECORD = "export.json"  # in the folder: what it is of, and that it may be replaced
_STRANGE = re.compile("[\x00\ud800-\udfff]")  # what neither UTF-8 nor a database's text can hold


@dataclass(frozen=True)
class Exported:
    """A dictionary whose latents are shown, as exports need it."""

    site: Site
    record: Record

    @cached_property
    def tokens(self) -> list[str]:
        """Text of each token id. A byte that is no character by itself is \\xNN, as circuit-tracer's pages read it."""
        return [text(string) for string in self.site.token_strings]

    @property
    def model(self) -> str:
        """Name of the language model, without the place it came from."""
        model = self.record.encodes[0].model
        return slug(model.rpartition("/")[2].rpartition(":")[2]) if model else "model"

    @property
    def layer(self) -> int:
        """See `layer_of`."""
        return layer_of(self.record)

    @property
    def title(self) -> str:
        """Name of the dictionary."""
        return text(self.site.title)

    @property
    def dataset(self) -> str:
        """What the sample of text is called, without folders."""
        data = self.record.data
        return text(without_folders(data.text or "")) if data else ""


@dataclass(frozen=True)
class Example:
    """A stretch of text around an activation, and the values of the latent there."""

    ids: np.ndarray  # i32[T]
    values: list[float]  # of each token, 0 where it is silent
    peak: int  # which token it is about
    interval: tuple[float, float, int] | None  # low, high and count of values like it; None: among the strongest


def formats() -> list[str]:
    """What can be written, the site first."""
    return [SITE, *sorted(_modules())]


def write(
    format: str,
    out: AnyPath,
    exported: Exported,
    progress: Callable[[int], None] | None = None,
    lease: storage.Lease | None = None,
) -> None:
    """Write the files of a format, in a temporary folder beside `out` that takes its place when it is complete.

    Args:
        format: one of `formats()`, but the site.
        out: where they go; an earlier export there is replaced.
        exported: what is shown.
        progress: called with the number of latents written.
        lease: `storage.lease_of_folder(out)`, if the caller holds it already.

    Raises:
        UsageError: an unknown format, `out` holds something else, or a dictionary that the format has no place for.
    """
    check(format, exported.record, out)
    module, chosen = _modules()[format], exported.site.numbers
    with storage.new_folder(out, replace=True, lease=lease) as building:
        about = {"program": "sae_jax", "format": format, "title": exported.title, "about": text(exported.site.about)}
        storage.write_json(building / RECORD, about)
        before = storage.read_json(out / RECORD) or {}
        earlier = out if before.get("format") == format else None
        module.write(building, exported, _counted(describe(exported.site.subject, chosen), progress), earlier)
        refuse_to_overwrite(out)


def check(format: str, record: Record, out: AnyPath) -> None:
    """Refuse with UsageError what `write` would refuse: before there is something to show, which takes long."""
    if format not in (modules := _modules()):
        raise UsageError(f"there is no format {format!r}; choose {', '.join(formats())}")
    modules[format].check(record)
    refuse_to_overwrite(out)


def refuse_to_overwrite(out: AnyPath) -> None:
    """UsageError if there is something at `out` that is not an export."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out.is_dir() and (storage.read_json(out / RECORD) or {}).get("program") == "sae_jax"):
        raise UsageError(f"{out} exists and is not an export; choose another folder or remove it")


def examples(latent: Latent) -> Iterator[Example]:
    """The stretches that are shown of a latent: the strongest first, then those of intervals; none if it is silent."""
    shown = latent.contexts
    if shown is None:
        return
    intervals: list[tuple[float, float, int] | None] = [None] * shown.n_top
    for interval in shown.intervals:
        intervals += [(interval.low, interval.high, interval.count)] * len(interval.examples.seq)
    for i, ids in enumerate(shown.windows):
        first = max(int(shown.pos[i]) - BEFORE, 0)
        offset, value = shown.values[i]
        values, at = np.zeros(len(ids), np.float32), offset + shown.pos[i] - first
        inside = (at >= 0) & (at < len(ids))
        values[at[inside]] = value[inside]
        yield Example(ids, numbers(values), int(shown.pos[i]) - first, intervals[i])


def numbers(values: Any) -> list[float]:
    """As JSON holds them: six digits, which is what float32 has."""
    return [float(f"{value:.6g}") for value in np.asarray(values, np.float64).ravel()]


def batches(items: Iterable[T], n: int) -> Iterator[list[T]]:
    """Lists of n, the last one shorter."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, n)):
        yield batch


def layer_of(record: Record) -> int:
    """The layer of a language model that a dictionary reads. UsageError where it reads no single one."""
    number = (record.encodes[0].hook or "").rpartition(".")[2]
    if len(record.encodes) > 1 or not number.isdigit():
        sources = " + ".join(source.name for source in record.encodes)
        raise UsageError(f"{sources} is not one layer of a language model, as this format needs; choose --format=site")
    return int(number)


def text(string: str) -> str:
    """Text that UTF-8 and databases can hold, with the rest escaped."""
    return _STRANGE.sub(_escaped, string)


def json_bytes(content: Any) -> bytes:
    """One line of JSON."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def slug(name: str) -> str:
    """A name that an address can hold."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "unnamed"


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code & 0xFF:02x}" if code == 0 or 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def _counted(latents: Iterable[Latent], progress: Callable[[int], None] | None) -> Iterator[Latent]:
    for done, latent in enumerate(latents, 1):
        yield latent
        if progress is not None:
            progress(done)


def _modules() -> dict[str, Any]:
    names = [module.name for module in pkgutil.iter_modules(exports.__path__)]
    found = [importlib.import_module(f"{exports.__name__}.{name}") for name in names]
    return {module.NAME: module for module in found}
