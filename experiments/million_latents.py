"""Does a dictionary of a million latents train on a laptop, and what do eight times the latents buy in a short run?

Question: does an SAE of 2^20 latents train on two CPU cores, in how much memory, how many of its latents come alive,
and what is its held-out FVU beside that of 2^17 latents after equal tokens? Is it the same run in two processes, each
with half of the state?
Guess: it does, at some seconds a step; after so few tokens the wide one is no better, since most of its latents have
hardly been seen; two processes agree to rounding.
Command: sae-jax harvest configs/demo.yaml --out SET
         python experiments/million_latents.py --data SET --out OUT
Cost: 16 minutes on two busy cores.
Answer: yes. State (weights and two moments in f32, d_model 128) 3.0 GiB, batch 1024, k = 32, 120 steps, 122,880 tokens:

    latents     FVU of batch, first and last   held out   fired in training     tokens/s    GiB at most
    1,048,576   0.1857   0.1438                0.1444     644,876 (62 %)         195        5.6
    131,072     0.2292   0.1520                0.1530     129,435 (99 %)       1,805        not measured

So the guess was wrong: the wide one is ahead from the first step, since the best 32 of more random directions fit
better, and is still 6 % ahead at the end. Rates are of a machine with other work. Two processes follow one to 1e-7 for
two steps and are within 1.4e-3 of its loss and FVU after ten: rows go to other devices in bf16, and early on latents
trade places. Over three steps one process took 5.2 GiB, the larger of two 3.0, half of the state in each.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from bundled import demo_recipe, harvested, held_out_rows

import sae_jax
from sae_jax.evaluation.evaluate import on_rows
from sae_jax.progress import console
from sae_jax.training import logs

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "configs" / "demo.yaml"
BATCH = 1024


@dataclasses.dataclass(frozen=True)
class Config:
    """Where things are, and how long to train."""

    out: Path = Path("build/million_latents")
    """Folder for the runs and results.json."""
    data: Path | None = None
    """The demo's activation set; made in `out` if not given."""
    steps: int = 250
    """Optimiser steps of each of the two widths."""
    compared: int = 10
    """Steps after which one process and two are compared."""
    smoke: bool = False
    """Small widths, few steps: does it run?"""


def main(config: Config) -> None:
    """Train both widths, then the wide one for a few steps as two processes; write OUT/results.json."""
    wide, narrow = (4096, 512) if config.smoke else (2**20, 2**17)
    steps, compared = (20, 3) if config.smoke else (config.steps, config.compared)
    settings = demo_recipe(config.smoke)
    data = harvested(settings, config.data, config.out)
    results: dict[str, Any] = {}
    # Training first: a child's peak counts from that of the process that starts it, which evaluation makes large.
    for name, n_latents, n_steps, n_processes in (
        (f"{wide}", wide, steps, 1),
        (f"{narrow}", narrow, steps, 1),
        ("processes-1", wide, compared, 1),
        ("processes-2", wide, compared, 2),
    ):
        seconds, peak = train(data, config.out / name, n_latents, n_steps, n_processes)
        results[name] = {**curve(config.out / name), "seconds": seconds, "gib_of_largest_process": peak}
    heldout_ND = held_out_rows(settings, data, config.smoke, 2**31)[: 512 if config.smoke else 8192]
    for n_latents in (wide, narrow):
        results[str(n_latents)] |= held_out_figures(config.out / str(n_latents), heldout_ND)
    for name, found in results.items():
        console.print(f"{name}: {json.dumps(found)}")
    (config.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def train(data: Path, run: Path, n_latents: int, steps: int, n_processes: int = 1) -> tuple[float, float]:
    """`sae-jax train`, as that many processes: seconds, and GiB that the largest process took at most."""
    words = [sys.executable, "-m", "sae_jax.commands.main", "train", str(RECIPE), f"--data={data}", f"--out={run}"]
    words += [
        f"--sae.n-latents={n_latents}",
        "--sae.k=32",
        "--sae.dtype=bfloat16",
        "--train.lr=3e-4",
        "--train.decay=0",
    ]
    words += [f"--train.batch-size={BATCH}", f"--train.steps={steps}", "--train.checkpoint-every=100000"]
    words += [
        "--train.ema=0",
        "--train.log-every=1",
        f"--train.dead-after-tokens={(steps - 1) * BATCH}",
        "--sae.aux-coefficient=0",
    ]
    if n_processes > 1:
        words = [str(ROOT / "launch" / "local.sh"), str(n_processes), *words]
    began = time.monotonic()
    process = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(ROOT)})
    _, status, usage = os.wait4(process.pid, 0)  # of this child and those it waited for, the largest
    if status:
        raise SystemExit(f"training ended with code {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - began, usage.ru_maxrss / 2**20


def curve(run: Path) -> dict[str, Any]:
    """How training went: FVU of batches at ten places, and the rate."""
    rows = logs.read_metrics(run)
    places = np.unique(np.linspace(0, len(rows) - 1, 10).astype(int))
    rates = [row["tokens_per_second"] for row in rows[2:]] or [rows[-1]["tokens_per_second"]]
    fvu = {int(rows[i]["step"]): round(rows[i]["fvu"], 5) for i in places}
    return {"batch_fvu": fvu, "tokens": rows[-1]["tokens"], "tokens_per_second": float(np.median(rates))}


def held_out_figures(run: Path, heldout_ND: np.ndarray) -> dict[str, Any]:
    """FVU and L0 on rows that it did not learn from, and how many latents fire on them at all."""
    d = sae_jax.load(run)
    metrics, n_latents = on_rows(d.sae, heldout_ND, block_rows=512), d.config.n_latents
    return {
        "fvu": metrics["fvu"],
        "l0": metrics["l0"],
        # Counters of silent tokens stand below the tokens of the run for latents that fired at least once.
        "alive_in_training": round((1 - d.record.metrics["dead_fraction"]) * n_latents),
        "alive_on_heldout": round((1 - metrics["silent_fraction"]) * n_latents),
        "heldout_rows": len(heldout_ND),
    }


if __name__ == "__main__":
    main(tyro.cli(Config))
