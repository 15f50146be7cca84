"""What latents stand for, from a file that somebody wrote.

A .csv file has a first line with the columns `latent` and `label`, a .jsonl file an object with these on each line;
`explanation` for `label`, and other columns, are taken as well, so that the labels.jsonl of `sae-jax explain` is such a
file.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from sae_jax import storage
from sae_jax.errors import printable
from sae_jax.storage import AnyPath
from sae_jax.types import UsageError

LONGEST = 500  # characters of a label
_NAMES = ("label", "explanation")
_CURE = "give a .csv or .jsonl file with latent and label in each line"


def read_labels_file(path: storage.StrPath, n_latents: int) -> dict[int, tuple[str, str]]:
    """(label, where it is from) of each latent that a file names; the last one counts where a latent comes twice.

    Raises UsageError for a file that is none of labels, naming the line, and for a latent that does not exist.
    """
    path = storage.path(path)
    rows = {".csv": _csv, ".jsonl": _json_lines}.get(path.suffix.lower())
    if rows is None:
        raise UsageError(f"{path}: the name ends in {path.suffix or 'nothing'}, not in .csv or .jsonl; {_CURE}")
    try:
        data = storage.read_limited(path).decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; {_CURE}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: no UTF-8 text at byte {error.start}; {_CURE}") from None
    labels: dict[int, tuple[str, str]] = {}
    for line, row in rows(path, data):
        latent, label = _read(f"{path}, line {line}", row, n_latents)
        labels[latent] = label, f"from {path.name}"
    if not labels:
        raise UsageError(f"{path} has no labels; {_CURE}")
    return labels


def _csv(path: AnyPath, data: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(data, newline=""))
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise UsageError(f"{path}, line {reader.line_num}: {error}; {_CURE}") from None


def _json_lines(path: AnyPath, data: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(data.split("\n"), 1):
        if text.strip():
            yield line, storage.parse_json(text.encode(), f"{path}, line {line}", dict[str, Any])


def _read(where: str, row: dict[str, Any], n_latents: int) -> tuple[int, str]:
    number, label = row.get("latent"), next((row[name] for name in _NAMES if row.get(name) is not None), None)
    text = str(number).strip()
    if number is None or label is None or isinstance(number, bool) or not text.isdecimal():
        raise UsageError(f"{where}: no latent and label, but {', '.join(map(str, row)) or 'nothing'}; {_CURE}")
    if int(text) >= n_latents:
        raise UsageError(f"{where}: latent {text} does not exist; choose from 0 to {n_latents - 1}")
    label = printable(" ".join(str(label).split()))
    if len(label) > LONGEST:
        raise UsageError(f"{where}: a label of {len(label):,} characters; give at most {LONGEST}")
    return int(text), label
