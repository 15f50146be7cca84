"""How fast does the loader read, beside the least that any reader of shuffled rows must do?

The floor is `numpy.memmap` of one raw file that holds the same rows: for each batch, the same rows in the
same order are copied into one buffer. It checks no digest and computes no order: row numbers are made
beforehand. The loader reads chunks, compares digests, computes the order, reads ahead and gives arrays that
the caller may keep. Both read the page cache, one after the other in the same run; each ratio is of two
neighbouring runs. The loader's time includes its start: threads, memory, the first groups.

    python experiments/benchmarks/loader.py --out loader.json        # writes 3.2 GB; about a minute
    python experiments/benchmarks/loader.py --smoke

Guess beforehand: 0.5 to 1.0 of the memmap on two cores, as copying rows is most of the work of both.

Answer: 0.57 at d=768 on two cores with other work beside (median of 7; RESULTS.md). Earlier, under more load, 0.55 to
0.57 at d=768 and 0.73 at d=4096, single runs down to 0.33.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import ml_dtypes
import numpy as np
import tyro
from rich.table import Table

from sae_jax.activations.loader import Loader
from sae_jax.activations.spec import SetSpec, SourceSpec, as_bits, layout
from sae_jax.activations.store import ActivationSet, create, open_activations
from sae_jax.progress import plain_console


@dataclass(frozen=True)
class Benchmark:
    """Sizes of the benchmark."""

    n_rows: int = 1 << 20
    d: int = 768
    batch_size: int = 8192
    epochs: int = 2
    repeats: int = 5
    folder: Path | None = None  # where the two copies are written; a temporary folder if not given
    out: Path | None = None  # JSON with every measurement
    smoke: bool = False  # small sizes, seconds


def main(config: Benchmark) -> None:
    if config.smoke:
        config = Benchmark(16384, 64, 1024, 2, 2, config.folder, config.out, True)
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        activations = write(config, Path(folder) / "set")
        raw = Path(folder) / "rows.bin"
        np.concatenate([as_bits(activations.read_chunk("acts", i)) for i in range(activations.n_chunks)]).tofile(raw)
        steps = config.epochs * activations.n_rows // config.batch_size
        with Loader(activations, ("acts",), config.batch_size, seed=0) as loader:
            row_ids = [loader.row_ids(step) for step in range(steps)]
            readers, group_chunks = loader.order.n_readers, loader.order.group_chunks
        results = []
        for _ in range(config.repeats):
            floor = time_memmap(raw, config, row_ids)
            seconds, waited = time_loader(activations, config, steps)
            results.append({"memmap_seconds": floor, "loader_seconds": seconds, "waited_seconds": waited})
    gigabytes = steps * config.batch_size * config.d * 2 / 1e9
    report(config, results, gigabytes, f"{readers} readers, groups of {group_chunks} chunks")


def write(config: Benchmark, path: Path) -> ActivationSet:
    """A set without ragged shards, so that row ids are rows of the raw file."""
    n_shards, shard_rows, chunk_rows = layout(config.n_rows, [config.d * 2])
    writer = create(path, SetSpec((SourceSpec("acts", config.d),), n_shards, shard_rows, chunk_rows))
    random = np.random.default_rng(0)
    for shard in range(n_shards):
        rows = random.standard_normal((shard_rows, config.d), np.float32).astype(ml_dtypes.bfloat16)
        writer.write_shard(shard, {"acts": rows})
    writer.finish()
    return open_activations(path)


def time_memmap(raw: Path, config: Benchmark, row_ids: list[np.ndarray]) -> float:
    rows = np.memmap(raw, np.uint16, "r").reshape(-1, config.d)
    batch = np.empty((config.batch_size, config.d), np.uint16)
    began = time.perf_counter()
    for ids in row_ids:
        np.take(rows, ids, axis=0, out=batch, mode="clip")
    return time.perf_counter() - began


def time_loader(activations: ActivationSet, config: Benchmark, steps: int) -> tuple[float, float]:
    began = time.perf_counter()
    with Loader(activations, ("acts",), config.batch_size, seed=0) as loader:
        for _ in islice(loader.batches(), steps):
            pass
        return time.perf_counter() - began, loader.wait_seconds


def report(config: Benchmark, results: list[dict[str, float]], gigabytes: float, order: str) -> None:
    ratios = [result["memmap_seconds"] / result["loader_seconds"] for result in results]
    table = Table(title=f"{gigabytes:.2f} GB, d={config.d}, batch {config.batch_size}, {order}")
    for column in ("", "min", "median", "max"):
        table.add_column(column)
    rows = {
        "memmap GB/s": [gigabytes / result["memmap_seconds"] for result in results],
        "loader GB/s": [gigabytes / result["loader_seconds"] for result in results],
        "ratio": ratios,
    }
    for name, values in rows.items():
        table.add_row(name, *(f"{value:.2f}" for value in (min(values), float(np.median(values)), max(values))))
    plain_console().print(table)
    if config.out is not None:
        record = {"config": asdict(config), "gigabytes": gigabytes, "order": order, "results": results}
        config.out.write_text(json.dumps({**record, "ratio_median": float(np.median(ratios))}, default=str, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
