"""Which share of its time does training wait for input, when the set does not fit in the page cache?

`sae-jax train` itself, over one epoch: every chunk is read once. Before the run the kernel is told to forget the set
(/proc/sys/vm/drop_caches as root, else posix_fadvise on each file), so that all of it comes from the disk, as in every
epoch over a set that is larger than the memory. Then the same run with the set in the cache, for comparison, and the
rate at which the files can be read from beginning to end after another such drop. Two widths: a small dictionary takes
rows as fast as an accelerator would take them for a large one.

    python experiments/benchmarks/input_wait.py --out input_wait.json        # writes 3.2 GB; some minutes
    python experiments/benchmarks/input_wait.py --rows 20000000 --folder DIR  # 31 GB: larger than the memory indeed
    python experiments/benchmarks/input_wait.py --smoke

Guess beforehand: below 2 % as long as rows are taken at less than half the rate of the disk.

Answer: RESULTS.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import tyro

import sae_jax
from sae_jax.training import logs

SKIPPED = 2  # first steps of a run: they compile, and the loader fills its first groups


@dataclass(frozen=True)
class Benchmark:
    """Sizes of the benchmark."""

    rows: int = 2_000_000
    d: int = 768
    batch_size: int = 8192
    latents: tuple[int, ...] = (512, 8192)
    max_steps: int = 200
    folder: Path | None = None  # where the set is written; a temporary folder if not given
    out: Path | None = None  # JSON with every measurement
    smoke: bool = False  # small sizes, seconds


def main(config: Benchmark) -> None:
    if config.smoke:
        config = Benchmark(40_000, 32, 1024, (64,), 20, config.folder, config.out, True)
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        work = Path(folder)
        sae_jax.write_activations(work / "set", common.structured_rows(config.rows, config.d, seed=0))
        results = []
        for n_latents in config.latents:
            how = drop_caches(work / "set")
            results.append({"cache": how, **train(config, work, n_latents)})
            read_all(work / "set")
            results.append({"cache": "in the cache", **train(config, work, n_latents)})
        how = drop_caches(work / "set")
        disk = read_all(work / "set")
    rows: list[list[Any]] = [
        [r["n_latents"], r["cache"], f"{r['wait']:.2%}", f"{r['bytes_per_second'] / 1e6:,.0f}", f"{r['steps']}"]
        for r in results
    ]
    gigabytes = config.rows * config.d * 2 / 1e9
    title = (
        f"{gigabytes:.2f} GB, d={config.d}, batch {config.batch_size}; read end to end, {how}: {disk / 1e6:,.0f} MB/s"
    )
    columns = ["n", "set beforehand", "waits for input", "takes MB/s", "steps"]
    facts = {"config": asdict(config), "disk_bytes_per_second": disk, "disk_cache": how, "results": results}
    common.report(common.table(title, columns, rows), facts, config.out)


def train(config: Benchmark, work: Path, n_latents: int) -> dict[str, Any]:
    """An epoch, or `max_steps`, of a fresh run: the share of its time that it waits, and the rate at which it reads."""
    steps = min(config.rows // config.batch_size, config.max_steps)
    run = Path(tempfile.mkdtemp(dir=work))
    words = [
        *(sys.executable, "-m", "sae_jax.commands.main", "train", f"--data={work / 'set'}", f"--out={run}"),
        *(f"--sae.n-latents={n_latents}", "--sae.k=8", f"--train.batch-size={config.batch_size}", "--train.ema=0"),
        *(f"--train.steps={steps}", "--train.log-every=1", f"--train.checkpoint-every={10**9}"),
    ]
    subprocess.run(words, check=True, stderr=subprocess.DEVNULL)
    rows = [row for row in logs.read_metrics(run) if row["step"] > SKIPPED]
    seconds = [config.batch_size / row["tokens_per_second"] for row in rows]
    waited = sum(row["input_wait"] * s for row, s in zip(rows, seconds, strict=True))
    rate = len(rows) * config.batch_size * config.d * 2 / sum(seconds)
    return {"n_latents": n_latents, "steps": steps, "wait": waited / sum(seconds), "bytes_per_second": rate}


def drop_caches(path: Path) -> str:
    """Make the kernel forget what it holds of these files; how that was done."""
    os.sync()  # pages that are not on disk yet cannot be dropped
    switch = Path("/proc/sys/vm/drop_caches")
    if os.access(switch, os.W_OK):
        switch.write_text("1\n")
        return "dropped (drop_caches)"
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    return "dropped (posix_fadvise)"


def read_all(path: Path) -> float:
    """Bytes per second of reading every file from beginning to end, which also puts them into the cache."""
    began, n_bytes = time.perf_counter(), 0
    for file in sorted(path.rglob("*")):
        if file.is_file():
            with file.open("rb", buffering=0) as opened:
                while part := opened.read(2**24):
                    n_bytes += len(part)
    return n_bytes / (time.perf_counter() - began)


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
