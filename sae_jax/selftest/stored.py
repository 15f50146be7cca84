"""A small activation set written and read back at the folder that is tested: every number, and how fast.

Each process writes a set of its own, then reads that of the next one: what one machine writes another must find, and
finds it in no memory of its own. A single process reads its own, once the system has been asked to forget it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils

from sae_jax.activations.ingest import write_activations
from sae_jax.activations.store import open_activations
from sae_jax.selftest.checks import Figures, MismatchError, Where

T = TypeVar("T")

ROWS, WIDTH = 1 << 17, 256  # 64 MiB in bfloat16
READERS = 8  # chunks read at once, as training does
DIGIT = 128  # of a row's number: whole numbers up to 256 are exact in bfloat16


def stored(where: Where) -> Figures:
    """Bytes/s of writing and of reading, of all processes together."""
    process, n = jax.process_index(), jax.process_count()
    rows_NW = _rows(process, np.arange(ROWS, dtype=np.int32))
    _, write_seconds = _together(lambda: write_activations(_folder(where, process), rows_NW))
    if hasattr(os, "posix_fadvise"):
        _forget(_folder(where, process))
    owner = (process + 1) % n
    chunks, read_seconds = _together(lambda: _read(_folder(where, owner)))
    _check(_folder(where, owner), owner, chunks)
    n_bytes = 2 * ROWS * WIDTH
    return {
        "bytes": n * n_bytes,
        "write_gb_per_second": round(n * n_bytes / write_seconds / 1e9, 3),
        "read_gb_per_second": round(n * n_bytes / read_seconds / 1e9, 3),
    }


def _folder(where: Where, process: int) -> str:
    return str(where.folder / f"set-{process}")


def _rows(process: int, number_N: np.ndarray) -> np.ndarray:
    """bf16[N, WIDTH]: rows by their number in the set of a process. The first three columns are the number's digits."""
    digits = np.stack([number_N // DIGIT**i % DIGIT for i in range(3)], axis=1)
    mixed_NW = (number_N[:, None] * 31 + np.arange(3, WIDTH) * 17 + process * 101) % 257 - 128
    return np.concatenate([digits, mixed_NW], axis=1).astype(ml_dtypes.bfloat16)


def _together(do: Callable[[], T]) -> tuple[T, float]:
    """What `do` returns, and the seconds of the process that takes longest; all begin at once, and end together."""
    multihost_utils.sync_global_devices("storage")
    began = time.monotonic()
    seconds = 0.0
    try:
        result = do()
    finally:  # the others wait for this also where it failed
        seconds = float(np.max(multihost_utils.process_allgather(np.array(time.monotonic() - began))))
    return result, seconds


def _read(path: str) -> list[np.ndarray]:
    """Every chunk of a set, bf16[n, WIDTH] each."""
    activations = open_activations(path)
    (source,) = activations.sources
    with ThreadPoolExecutor(READERS) as pool:
        return [*pool.map(lambda chunk: activations.read_chunk(source, chunk), range(activations.n_chunks))]


def _check(path: str, owner: int, chunks: list[np.ndarray]) -> None:
    """Raises MismatchError unless each row is there once, with the bits that were written."""
    numbers = []
    for chunk, rows_NW in enumerate(chunks):
        numbers.append((np.asarray(rows_NW[:, :3], np.float64) @ DIGIT ** np.arange(3)).astype(np.int32))
        should_NW = _rows(owner, numbers[-1])
        if (wrong := np.argwhere(rows_NW != should_NW)).size:
            row, column = wrong[0]
            raise MismatchError(
                f"{path}: chunk {chunk}, row {row}, column {column} is {rows_NW[row, column]}",
                f"{should_NW[row, column]}, as it was written",
            )
    found = np.concatenate(numbers)
    if (np.sort(found) != np.arange(ROWS)).any():
        raise MismatchError(
            f"{path} has {len(np.unique(found)):,} different rows of {len(found):,}", f"each of {ROWS:,} once"
        )


def _forget(path: str) -> None:
    """Ask the system to drop files from its memory, so that they are read from where they are stored."""
    for folder, _, names in os.walk(path):
        for name in names:
            file = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)
