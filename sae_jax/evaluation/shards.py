"""Adding up the sums of several workers: the processes of one job, or workers that leave their sums on disk.

    RUN/evaluation/shard-I-of-N.npz    the sums of one worker's share, with what they are sums of

The worker that finds the shares of all N adds them up.
"""

from __future__ import annotations

import functools
import io
import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sae_jax import storage
from sae_jax.evaluation import base
from sae_jax.evaluation.base import Sums
from sae_jax.progress import console
from sae_jax.storage import AnyPath
from sae_jax.types import UserError

FOLDER = "evaluation"
_ABOUT = "about"


def over_processes(sums: dict[str, Sums]) -> dict[str, Sums]:
    """The sums of all processes of this job, on each of them."""
    if jax.process_count() == 1:
        return sums
    data = np.frombuffer(_pack(sums, {}), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data)))
    filled = np.pad(data, (0, int(sizes.max()) - len(data)))
    everyone = multihost_utils.process_allgather(filled)
    return _added(
        _unpack(part[:size].tobytes(), "sums of another process")[0] for part, size in zip(everyone, sizes, strict=True)
    )


def write(folder: AnyPath, shard: tuple[int, int], sums: dict[str, Sums], about: dict[str, Any]) -> None:
    """Keep the sums of the share (i, n) beside a dictionary. `about` says all that they depend on."""
    storage.write_bytes(_path(folder, shard), _pack(sums, about))


def merge(folder: AnyPath, n: int, about: dict[str, Any]) -> tuple[dict[str, Sums] | None, list[int]]:
    """(the sums of all n shares, the shares that are not there yet); no sums while any is missing.

    A share of another evaluation counts as missing, and is named. Raises UserError for one that is damaged.
    """
    parts, missing = [], []
    for i in range(n):
        path = _path(folder, (i, n))
        data = storage.read_bytes(path)
        if data is None:
            missing.append(i)
            continue
        try:
            sums, its_about = _unpack(data, path)
        except UserError as error:
            raise UserError(f"{path} is damaged; delete it and evaluate --shard {i}/{n} again") from error
        if different := [key for key in about if its_about.get(key) != json.loads(json.dumps(about[key]))]:
            console.print(f"{path} was measured with another {', '.join(different)} and does not count")
            missing.append(i)
        parts.append(sums)
    try:
        return (None if missing else _added(parts)), missing
    except (ValueError, LookupError) as error:
        raise UserError(
            f"{folder / FOLDER}: the shares do not fit together ({error}); delete them, and evaluate again"
        ) from None


def _added(parts: Any) -> dict[str, Sums]:
    def add(a: dict[str, Sums], b: dict[str, Sums]) -> dict[str, Sums]:
        return {name: base.add(a.get(name, {}), b.get(name, {})) for name in {**a, **b}}

    return functools.reduce(add, parts, {})


def _path(folder: AnyPath, shard: tuple[int, int]) -> AnyPath:
    return folder / FOLDER / f"shard-{shard[0]}-of-{shard[1]}.npz"


def _pack(sums: dict[str, Sums], about: dict[str, Any]) -> bytes:
    arrays = {f"{kind}/{name}": value for kind, parts in sums.items() for name, value in parts.items()}
    data = io.BytesIO()
    np.savez(data, **{_ABOUT: np.array(json.dumps(about)), **arrays})  # pyrefly: ignore[bad-argument-type]
    return data.getvalue()


def _unpack(data: bytes, where: object) -> tuple[dict[str, Sums], dict[str, Any]]:
    sums: dict[str, Sums] = {}
    arrays = storage.parse_npz(data, where)
    about = storage.parse_json(str(arrays.pop(_ABOUT, "")).encode(), where, dict[str, Any])
    for key, array in arrays.items():
        kind, _, name = key.partition("/")
        sums.setdefault(kind, {})[name] = array
    return sums, about
