"""Do two writers of one folder ever mix?

Question: two commands that write to one folder start at once, with different settings. Does one of them win, is the
other refused by name, and is the folder what the winner leaves when it is alone? In every third pair the one that came
first is stopped as soon as it writes, and woken when the other has taken over.
Guess: always.
Command: python experiments/faults/two_at_once.py --out OUT
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from contents import content
from jobs import SMALL, environment, prepare
from rich.console import Console
from rich.table import Table

from sae_jax import storage
from sae_jax.progress import Progress

LEASE_SECONDS = 4.0  # instead of a minute: pairs with a stopped process wait for it
RUN = """
import sys
from sae_jax.storage import lease
lease.SECONDS = float(sys.argv[1])
lease.Lease.__init__.__defaults__ = (*lease.Lease.__init__.__defaults__[:-1], lease.SECONDS)
from sae_jax.commands import main
sys.exit(main.main(sys.argv[2:]))
"""
WRITE = """
import sys
from sae_jax.storage import lease
lease.Lease.__init__.__defaults__ = (*lease.Lease.__init__.__defaults__[:-1], float(sys.argv[1]))
import numpy as np, sae_jax
rows = np.random.default_rng(int(sys.argv[2])).standard_normal((200_000, 8)).astype("float32")
try:
    sae_jax.write_activations("made", (rows[i : i + 1000] for i in range(0, len(rows), 1000)), dtype="float32")
except sae_jax.UserError as error:
    sys.exit(f"sae-jax: {error}")
"""


class Job(NamedTuple):
    """Two commands that differ in the last word; and what they need."""

    script: str
    words: tuple[str, ...]
    last: tuple[str, str]
    inputs: tuple[str, ...] = ()


TRAIN = ("train", "--data=set", "--out=made", *SMALL, "--train.steps=60", "--train.checkpoint-every=5")
SWEEP = ("sweep", "--data=set", "--out=made", *SMALL, "--train.checkpoint-every=4", "--sweep.tokens=1280")
JOBS = {
    "write_activations": Job(WRITE, (), ("1", "2")),
    "harvest": Job(
        RUN, ("harvest", "--out=made", "--harvest.tokens=8192"), tuple(f"--harvest.seed={i}" for i in (1, 2))
    ),
    "train": Job(RUN, TRAIN, ("--train.lr=1e-3", "--train.lr=1e-2"), ("set",)),
    "sweep": Job(RUN, (*SWEEP, "--sweep.held-out=128"), ("--sae.k=2", "--sae.k=3"), ("set",)),
    "dashboard": Job(
        RUN, ("dashboard", "text-run", "--out=made"), ("--tokens=512", "--tokens=1024"), ("text-run", "text-set")
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is tried, and how often."""

    out: Path = Path("build/two_at_once")
    """Folder for the pairs, pairs.jsonl and table.json."""
    jobs: tuple[str, ...] = tuple(JOBS)
    """Which commands."""
    pairs: int = 50
    """Of each."""
    smoke: bool = False
    """One pair of `write_activations`: does it run?"""


def main(config: Config) -> None:
    """Run each command alone with both settings, then the pairs; write OUT/pairs.jsonl and OUT/table.json."""
    out, jobs, n = config.out.absolute(), config.jobs, config.pairs
    if config.smoke:
        jobs, n = ("write_activations",), 1
    (out / "inputs").mkdir(parents=True, exist_ok=True)
    prepare(out / "inputs", {name for job in jobs for name in JOBS[job].inputs})
    counts: dict[str, Counter[str]] = {job: Counter() for job in jobs}
    with storage.Lines(out / "pairs.jsonl") as lines, Progress("pairs", len(jobs) * n, "pairs", first="") as progress:
        for job in jobs:
            alone = [content(ended(start(job, out, f"alone-{i}", i))[2] / "made") for i in (0, 1)]
            for i in range(n):
                is_stopped = i % 3 == 2
                outcome, said = pair(job, out, is_stopped, alone)
                counts[job][outcome] += 1
                lines.write({"job": job, "stopped": is_stopped, "outcome": outcome, "said": said})
                progress.update(sum(count.total() for count in counts.values()))
    (out / "table.json").write_text(json.dumps(counts, indent=2) + "\n")
    kinds = sorted({kind for count in counts.values() for kind in count})
    table = Table("two of", *kinds)
    for job, count in counts.items():
        table.add_row(job, *(str(count[kind] or "") for kind in kinds))
    Console(width=140).print(table)


Started = tuple[subprocess.Popen[str], Path]


def start(job: str, out: Path, folder: str, which: int) -> Started:
    """One of the two commands, in a folder that is made if it is not there."""
    path, (script, words, last, inputs) = out / f"{job}-{folder}", JOBS[job]
    if not path.exists():
        path.mkdir()
        for name in inputs:
            shutil.copytree(out / "inputs" / name, path / name)
    command = [sys.executable, "-c", script, str(LEASE_SECONDS), *words, last[which]]
    process = subprocess.Popen(command, cwd=path, env=environment(out), stderr=subprocess.PIPE, text=True)
    return process, path


def ended(started: Started) -> tuple[int, str, Path]:
    """(exit code, last line on stderr, folder)."""
    process, path = started
    said = process.communicate(timeout=300)[1].strip().splitlines()
    return process.returncode, said[-1] if said else "", path


def pair(job: str, out: Path, is_stopped: bool, alone: list[Any]) -> tuple[str, list[str]]:
    """What came of two at once."""
    shutil.rmtree(out / f"{job}-pair", ignore_errors=True)
    first = start(job, out, "pair", 0)
    if is_stopped:
        wait_for(lambda: (first[1] / "made").exists() or first[0].poll() is not None)
        first[0].send_signal(signal.SIGSTOP)
    second = start(job, out, "pair", 1)
    if is_stopped:
        wait_for(lambda: second[0].poll() is not None, seconds=LEASE_SECONDS * 20)
        first[0].send_signal(signal.SIGCONT)
    results = [ended(process) for process in (first, second)]
    said = [line for _, line, _ in results]
    won = [i for i, (code, _, _) in enumerate(results) if code == 0]
    if any("Traceback" in line or line.startswith(("Error", "ValueError")) for line in said):
        return "traceback", said
    if len(won) != 1:
        return f"{len(won)} won", said
    if not said[1 - won[0]].startswith("sae-jax: "):
        return "not refused by name", said
    made = content(first[1] / "made")
    return "one won, the other was refused" if made == alone[won[0]] else "MIXED", said


def wait_for(condition: Any, seconds: float = 120) -> None:
    """Until it holds, or so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.02)


if __name__ == "__main__":
    main(tyro.cli(Config))
