"""Does a long run need more and more of its machine?

Question: do open descriptors, threads and resident memory of a process grow with the checkpoints that it saves, with
the steps that it takes, and with the shards that it writes or harvests?
Guess: no; a thousand of each leave as many descriptors and threads as a few did, and memory within a few MiB.
Command: python experiments/faults/saves.py --out OUT      (--without "ended saves": to see it find something)
Answer: descriptors and threads do not, nor does memory with steps and shards (at most 1.9 MiB over the last 700 of
1,000, figures/saves.png). With saves memory does a little: 8 MiB over the last 700, 0.011 MiB a save, of 350. It was
0.13 MiB a save before Orbax was kept from asking tensorstore for its counters, which loses 110 lists each time
(`tensorstore.experimental_collect_matching_metrics` by itself shows it), and 0.018 before each save gave back what its
threads had freed and glibc kept. What is in use was flat over 500 saves, to 0.1 MiB; the rest is pieces.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from without import MECHANISMS

import sae_jax
from sae_jax import figures, storage
from sae_jax.activations import ingest, spec, store
from sae_jax.training import checkpoint, logs

WARM_UP = 0.3  # share of the repetitions, after which all that is made once is there
MAY_GROW = {"descriptors": 2, "threads": 2, "resident MiB": 8}  # from there to the end
ROWS, WIDTH = 128, 8  # of a shard
CONTEXT = 16  # tokens of a shard of a harvest
SMALL = {"n_latents": 32, "k": 4, "dtype": "float32", "batch_size": 64}
MANY = 1 << 40


@dataclasses.dataclass(frozen=True)
class Config:
    """What is repeated, and how often."""

    out: Path = Path("build/saves")
    """Folder for what is made, <what>.jsonl, table.json and saves.png."""
    times: int = 1000
    """How often."""
    without: str = ""
    """A mechanism of without.py that is switched off, such as "ended saves"."""
    smoke: bool = False
    """Twenty times: does it run?"""


def main(config: Config) -> None:
    """Repeat each thing in a process of its own; write OUT/table.json and OUT/saves.png."""
    n, out = 20 if config.smoke else config.times, config.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    growths: dict[str, dict[str, float]] = {}
    for what in THINGS:
        process = multiprocessing.get_context("spawn").Process(target=repeat, args=(what, n, out, config.without))
        process.start()
        process.join()
        assert process.exitcode == 0, f"{what}: exit code {process.exitcode}"
        growths[what] = growth(storage.read_lines(out / f"{what}.jsonl"))
        Console(stderr=True).print(f"{what}: {growths[what]}", markup=False)
    (out / "table.json").write_text(json.dumps(growths, indent=2) + "\n")
    draw(out)
    table = Table(f"after {WARM_UP:.0%} of {n}", *MAY_GROW)
    for what, grown in growths.items():
        table.add_row(what, *(f"{grown[name]:+g}" for name in MAY_GROW))
    Console(width=100).print(table)
    grows = any(grown[name] > limit for grown in growths.values() for name, limit in MAY_GROW.items())
    if grows and not config.smoke:  # twenty times are too few to tell: threads still start, and pools still fill
        raise SystemExit("something grows with each repetition, see above")


def repeat(what: str, n: int, out: Path, without: str) -> None:
    """In a process of its own: do it `n` times, and note what the process has after each."""
    MECHANISMS[without]()
    lines, folder = out / f"{what}.jsonl", out / what
    lines.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    owner, method, do = THINGS[what]
    original = getattr(owner, method)
    with storage.Lines(lines) as log:
        numbers = itertools.count(1)

        @functools.wraps(original)
        def and_note(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            log.write({"n": next(numbers), **usage()})
            return result

        setattr(owner, method, and_note)
        do(folder, n)


def usage() -> dict[str, float]:
    """What this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "resident MiB": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
    }


def growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """By how much the least of the last tenth exceeds that of the tenth after the warm-up: threads come and go."""
    tenth, warm = max(len(rows) // 10, 1), int(WARM_UP * len(rows))
    first, last = rows[warm : warm + tenth], rows[-tenth:]
    least = [{name: min(row[name] for row in part) for name in MAY_GROW} for part in (first, last)]
    return {name: round(least[1][name] - least[0][name], 2) for name in MAY_GROW}


def save(folder: Path, n: int) -> None:
    """A checkpoint after each step."""
    train(folder, n, checkpoint_every=1, log_every=MANY)


def step(folder: Path, n: int) -> None:
    """A row of the log, which is what is counted, every tenth step."""
    train(folder, 10 * n, checkpoint_every=MANY, log_every=10)


def train(folder: Path, n: int, **settings: int) -> None:
    """Steps of a tiny run."""
    rows = np.random.default_rng(0).standard_normal((1024, WIDTH)).astype(np.float32)
    sae_jax.write_activations(folder / "set", rows, dtype="float32")
    sae_jax.train(folder / "set", out=folder / "run", steps=n, **SMALL, **settings)


def write(folder: Path, n: int) -> None:
    """A set of small shards."""
    block = np.ones((ROWS, WIDTH), np.float32)
    spec.SHARD_BYTES, ingest.BUFFER_BYTES = block.nbytes, 1
    sae_jax.write_activations(folder / "set", itertools.repeat(block, n), dtype="float32")


def harvest(folder: Path, n: int) -> None:
    """Shards of one sequence each."""
    spec.SHARD_BYTES = 1
    sae_jax.harvest(folder / "set", tokens=n * CONTEXT, context=CONTEXT, batch_tokens=CONTEXT)


Do = Callable[[Path, int], None]
THINGS: dict[str, tuple[Any, str, Do]] = {  # what is repeated: (the method of which each call counts, what calls it)
    "save": (checkpoint.Checkpoints, "save", save),
    "ten steps": (logs.Metrics, "write", step),
    "shard written": (store.Writer, "write_shard", write),
    "shard harvested": (store.Writer, "write_shard", harvest),
}


def draw(out: Path) -> None:
    """OUT/saves.png."""
    figure = figures.new(9, 3.2)
    for axis, name in zip(figure.subplots(1, len(MAY_GROW)), MAY_GROW, strict=True):
        for what in THINGS:
            rows = storage.read_lines(out / f"{what}.jsonl")
            axis.plot([row["n"] for row in rows], [row[name] for row in rows], label=what, linewidth=1)
        axis.set(xlabel="repetitions", title=name, ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.axes[-1].legend(fontsize=8, loc="lower right")  # below all lines
    figures.save(figure, out / "saves.png")


if __name__ == "__main__":
    main(tyro.cli(Config))
