"""What the scripts for the libraries share. Numpy alone: sae_jax is not in their environments.

python with_LIBRARY.py check FOLDER    load what export.py wrote there, compare
python with_LIBRARY.py write FOLDER    write with the library itself: tests/interchange/golden/LIBRARY
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

TOLERANCE = 1e-5  # of the largest value
D, N, K, B = 8, 24, 4, 16


class Case(NamedTuple):
    """A dictionary that was exported: its files, rows, and what sae_jax makes of them."""

    name: str
    folder: Path
    x: np.ndarray
    z: np.ndarray  # dense
    y: np.ndarray


def cases(folder: Path) -> Iterator[Case]:
    """Those of one format."""
    for path in sorted(folder.glob("*.npz")):
        yield Case(path.stem, path.with_suffix(""), **np.load(path))


def compare(library: str, case: Case, z: np.ndarray, y: np.ndarray) -> None:
    """Code and reconstruction. AssertionError where they are not ours."""
    off = []
    for what, theirs, ours in (("encode", z, case.z), ("decode", y, case.y)):
        assert theirs.shape == ours.shape, (case.name, what, theirs.shape, ours.shape)
        off.append((what, float(np.abs(theirs - ours).max() / np.abs(ours).max())))
    print(f"{library} {case.name}: " + ", ".join(f"{what} {value:.1e}" for what, value in off), flush=True)
    assert max(value for _, value in off) < TOLERANCE, case.name
    assert np.array_equal(z > 0, case.z > 0), case.name


def rows(d: int = D) -> np.ndarray:
    """f32[B, d]."""
    return (np.random.default_rng(9).standard_normal((B, d)) + 0.3).astype(np.float32)


def drawn(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays of these shapes, f32; thresholds are above 0."""
    rng = np.random.default_rng(seed)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: np.abs(array) if "threshold" in name else array for name, array in arrays.items()}


def golden(folder: Path, x: np.ndarray, z: np.ndarray, y: np.ndarray) -> None:
    """What the library computes, beside what it wrote."""
    np.savez(folder.with_suffix(".npz"), x=x, z=z.astype(np.float32), y=y.astype(np.float32))


def main(check: Callable[[Path], None], write: Callable[[Path], None]) -> None:
    """The command line."""
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "write":
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    {"check": check, "write": write}[what](folder)
