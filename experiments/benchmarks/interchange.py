"""How much memory do import and export of a very wide dictionary need, and how near are they to the disk's speed?

A SAELens folder of 1M latents x 512 is imported, exported as each format and imported again, every step in a process of
its own: its peak resident memory, and bytes read plus bytes written a second. The disk's speed is that of copying the
same file, with an fsync. `export` reads the arrays a second time, for their digest.

    python experiments/benchmarks/interchange.py --out interchange.json
    python experiments/benchmarks/interchange.py --smoke

Guess beforehand: 0.6 GB, most of it JAX, whatever the width; two thirds of the disk's speed for safetensors, and half
of that for .npz and .pt, which a transposed array reaches by way of a temporary file.

Answer: RESULTS.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import tyro

from sae_jax import storage
from sae_jax.interchange.formats import saelens
from sae_jax.interchange.lazy import Lazy
from sae_jax.interchange.tensors import write_safetensors

FORMATS = ("saelens", "dictionary_learning", "gemma_scope")
BLOCK = 16 << 20


@dataclass(frozen=True)
class Benchmark:
    """Sizes of the benchmark."""

    n_latents: int = 1 << 20
    d: int = 512
    folder: Path | None = None
    """where the files go, some 15 GB; default: the system's temporary folder"""
    smoke: bool = False
    """1,024 latents x 64"""
    out: Path | None = None
    """write the numbers as JSON"""


def main(settings: Benchmark) -> None:
    """Write, convert, measure."""
    n, d = (1024, 64) if settings.smoke else (settings.n_latents, settings.d)
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory(dir=settings.folder) as name:
        folder = Path(name)
        weights = folder / "theirs" / saelens.WEIGHTS
        write_sample(folder / "theirs", n, d)
        n_bytes = weights.stat().st_size
        run("import", folder / "theirs", "--out", folder / "ours")
        for format in FORMATS:
            for words in (
                ("export", folder / "ours", f"--format={format}", "--out", folder / format),
                ("import", folder / format, "--out", folder / "back"),
            ):
                speed = copy_speed(weights, folder / "copy")  # each time: other jobs use the disk, too
                seconds, peak = run(*words)
                rows.append([f"{words[0]} {format}", *told(seconds, peak, n_bytes, speed)])
            for each in (format, "back"):
                shutil.rmtree(folder / each)
    columns = ["what", "peak resident GB", "read + written GB/s", "copy GB/s", "of a copy"]
    record = {"n_latents": n, "d": d, "bytes": n_bytes, "rows": rows}
    common.report(common.table(f"import and export of {n:,} x {d}", columns, rows), record, settings.out)


def told(seconds: float, peak: int, n_bytes: int, speed: float) -> list[str]:
    """Cells of a row."""
    rate = 2 * n_bytes / seconds
    return [f"{peak / 1e9:.2f}", f"{rate / 1e9:.2f}", f"{speed / 1e9:.2f}", f"{rate / speed:.2f}"]


def write_sample(folder: Path, n: int, d: int) -> None:
    """A JumpReLU of random weights, as SAELens has it."""
    folder.mkdir()
    block = np.random.default_rng(0).standard_normal(4099).astype(np.float32)

    def weights(part: tuple[slice, ...]) -> np.ndarray:
        shape = [p.stop - p.start for p in part]
        return np.resize(np.roll(block, part[0].start), shape)

    arrays = {"W_enc": Lazy((d, n), weights), "W_dec": Lazy((n, d), weights)}
    arrays |= {"b_enc": Lazy.zeros((n,)), "threshold": Lazy((n,), lambda part: np.abs(weights(part)))}
    write_safetensors(folder / saelens.WEIGHTS, {**arrays, "b_dec": Lazy.zeros((d,))})
    cfg = {"architecture": "jumprelu", "d_in": d, "d_sae": n, "apply_b_dec_to_input": False, "dtype": "float32"}
    storage.write_json(folder / saelens.CONFIG, {**cfg, "metadata": {"sae_lens_version": saelens.VERSION}})


def copy_speed(path: Path, to: Path) -> float:
    """Bytes read plus bytes written a second, when a file is copied."""
    start = time.perf_counter()
    with path.open("rb") as source, to.open("wb") as target:
        shutil.copyfileobj(source, target, BLOCK)
        target.flush()
        os.fsync(target.fileno())
    seconds = time.perf_counter() - start
    to.unlink()
    return 2 * path.stat().st_size / seconds


def run(*words: Any) -> tuple[float, int]:
    """(seconds, peak resident bytes) of a command in a process of its own."""
    start = time.perf_counter()
    code = (
        "import resource, sys; from sae_jax.commands.main import main; code = main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=True)
    return time.perf_counter() - start, 1024 * int(done.stdout.split()[-1])


if __name__ == "__main__":
    main(tyro.cli(Benchmark, description=__doc__))
