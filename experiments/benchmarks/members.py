"""Does one pass over the data for eight members take longer than eight passes?

`sae-jax train` itself, on a set in the page cache: one autoencoder, and eight of them that differ in rate and seed, in
turn. Seconds a step of the eight, over eight times those of the one; the first steps, which compile, are left out. A
member's log has the rate of the whole pass.

    python experiments/benchmarks/members.py --out members.json        # a few minutes
    python experiments/benchmarks/members.py --smoke

Guess beforehand: below 1, by the seven readings and copies that are saved; never above 1.05.

Answer: RESULTS.md.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import tyro

import sae_jax
from sae_jax.training import logs

N_MEMBERS = 8


@dataclass(frozen=True)
class Benchmark:
    """Sizes of the benchmark."""

    rows: int = 200_000
    d: int = 128
    batch_size: int = 2048
    latents: tuple[int, ...] = (512, 4096)
    steps: int = 100
    rounds: int = 3
    folder: Path | None = None  # where set and runs are written; a temporary folder if not given
    out: Path | None = None  # JSON with every measurement
    smoke: bool = False  # small sizes, seconds


def main(config: Benchmark) -> None:
    if config.smoke:
        config = Benchmark(8_000, 32, 256, (64,), 10, 1, config.folder, config.out, True)
    results = []
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        work = Path(folder)
        sae_jax.write_activations(work / "set", common.structured_rows(config.rows, config.d, seed=0))
        for n_latents in config.latents:
            times: dict[int, list[float]] = {1: [], N_MEMBERS: []}
            for _ in range(config.rounds):
                for n_members, seconds in times.items():
                    seconds.append(step_seconds(config, work, n_latents, n_members))
            results.append({"n_latents": n_latents, "one": times[1], "eight": times[N_MEMBERS]})
    rows: list[list[Any]] = []
    for r in results:
        ratios = [eight / one / N_MEMBERS for one, eight in zip(r["one"], r["eight"], strict=True)]
        one, eight = (f"{1e3 * statistics.median(r[name]):.3g}" for name in ("one", "eight"))
        rows.append([r["n_latents"], one, eight, f"{statistics.median(ratios):.3f}", f"{max(ratios):.3f}"])
    title = f"d={config.d}, batch {config.batch_size}, k=16; milliseconds a step, median of {config.rounds}"
    columns = ["n", "one", "eight", "eight / (8 x one)", "largest of the rounds"]
    common.report(common.table(title, columns, rows), {"config": asdict(config), "results": results}, config.out)


def step_seconds(config: Benchmark, work: Path, n_latents: int, n_members: int) -> float:
    """Of a fresh run: the median over what it logs, every tenth of its steps."""
    run = Path(tempfile.mkdtemp(dir=work))
    every = max(config.steps // 10, 1)
    words = [
        *(sys.executable, "-m", "sae_jax.commands.main", "train", f"--data={work / 'set'}", f"--out={run}"),
        *(f"--sae.n-latents={n_latents}", "--sae.k=16", f"--train.batch-size={config.batch_size}", "--train.ema=0"),
        *(f"--train.steps={config.steps}", f"--train.log-every={every}", f"--train.checkpoint-every={10**9}"),
        *("--members", *(f"m{i} --train.lr={1e-3 * (i + 1)} --train.seed={i}" for i in range(n_members))),
    ]
    subprocess.run(words, check=True, stderr=subprocess.DEVNULL)
    rows = logs.read_metrics(run / "members" / "m0")[2:-1]  # the last is logged just after the one before
    return statistics.median(config.batch_size / row["tokens_per_second"] for row in rows)


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
