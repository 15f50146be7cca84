"""Do two writers of one folder ever mix?

Question: two commands that write to one folder start within half a second, with different settings. Does one of them
win, is the other refused by name, and is the folder what the winner leaves when it is alone? In every third pair the
one that came first is stopped within half a second of its first write, and woken when the other has ended.
Guess: always.
Command: python experiments/faults/two_at_once.py --out OUT      (--without leases: to see it find something)
Answer: always, in 50 pairs of each of five commands, 80 of the 250 with a process that was stopped and woken: one won,
the other was refused, and the folder was the winner's (one page had ended before the other began, which replaced it).
Before, a `train` that was stopped ahead of its first step and woke when another had ended wrote its own settings over
the other's config.json. Without leases the first pair of `train` ended with neither: each had spoilt the other's saves.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from contents import content
from jobs import ROOT, SMALL, environment, prepare
from rich.console import Console
from rich.table import Table
from without import MECHANISMS

import sae_jax
from sae_jax import storage
from sae_jax.commands import main as commands
from sae_jax.progress import Progress
from sae_jax.storage import lease

LEASE_SECONDS = 4.0  # instead of a minute: pairs with a stopped process wait for it
APART_SECONDS = 0.5  # at most
HUNG_SECONDS = 600
WELL = "one won, the other was refused"
IN_TURN = "the first had ended"  # before the second began to write, which may replace it
REPLACE = ("dashboard",)
IMPORTS = ("sae_jax.runs", "sae_jax.commands.harvest", "sae_jax.commands.sweep", "two_at_once")


class Job(NamedTuple):
    """Two commands that differ in the last word; and what they need."""

    words: tuple[str, ...]  # none: `write_activations` with the last word for a seed
    last: tuple[str, str]
    inputs: tuple[str, ...] = ()


TRAIN = ("train", "--data=set", "--out=made", *SMALL, "--train.steps=60", "--train.checkpoint-every=5")
SWEEP = ("sweep", "--data=set", "--out=made", *SMALL, "--train.checkpoint-every=4", "--sweep.tokens=1280")
JOBS = {
    "write_activations": Job((), ("1", "2")),
    "harvest": Job(("harvest", "--out=made", "--harvest.tokens=8192"), ("--harvest.seed=1", "--harvest.seed=2")),
    "train": Job(TRAIN, ("--train.lr=1e-3", "--train.lr=1e-2"), ("set",)),
    "sweep": Job((*SWEEP, "--sweep.held-out=128"), ("--sae.k=2", "--sae.k=3"), ("set",)),
    "dashboard": Job(
        ("dashboard", "text-run", "--out=made"), ("--tokens=512", "--tokens=1024"), ("text-run", "text-set")
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is tried, and how often."""

    out: Path = Path("build/two_at_once")
    """Folder for the pairs, pairs.jsonl and table.json. Pairs that are in pairs.jsonl are not repeated."""
    jobs: tuple[str, ...] = tuple(JOBS)
    """Which commands."""
    pairs: int = 50
    """Of each."""
    seed: int = 0
    """Of how far apart they start, and when one is stopped."""
    without: str = ""
    """A mechanism of without.py that is switched off, such as "leases"."""
    smoke: bool = False
    """One pair of `write_activations`: does it run?"""


def main(config: Config) -> None:
    """Run each command alone with both settings, then the pairs; write OUT/pairs.jsonl and OUT/table.json."""
    out, jobs, n = config.out.absolute(), config.jobs, config.pairs
    if config.smoke:
        jobs, n = ("write_activations",), 1
    (out / "inputs").mkdir(parents=True, exist_ok=True)
    prepare(out / "inputs", {name for job in jobs for name in JOBS[job].inputs})
    processes = Processes(out, config.without)
    done = {(row["job"], row["pair"]) for row in storage.read_lines(out / "pairs.jsonl")}
    with storage.Lines(out / "pairs.jsonl") as lines, Progress("pairs", len(jobs) * n, "pairs", first="") as progress:
        for i, job in enumerate(jobs):
            for which in (0, 1):
                processes.forget(job, f"alone-{which}")
            alone = [processes.start(job, f"alone-{which}", which).made() for which in (0, 1)]
            for number in range(n):
                if (job, number) not in done:
                    draw = random.Random(f"{config.seed} {job} {number}")
                    began = time.monotonic()
                    outcome, said = pair(processes, job, number % 3 == 2, draw.uniform(0, APART_SECONDS), alone)
                    row = {"job": job, "pair": number, "stopped": number % 3 == 2, "outcome": outcome, "said": said}
                    lines.write({**row, "seconds": round(time.monotonic() - began, 1)})
                progress.update(i * n + number + 1)
    rows = storage.read_lines(out / "pairs.jsonl")
    show(rows, out)
    if any(row["outcome"] not in (WELL, IN_TURN) for row in rows):
        raise SystemExit("two writers of one folder did not end as they should, see above")


class Processes:
    """Starts commands in processes that have imported all: importing takes longer than to run."""

    def __init__(self, out: Path, without: str) -> None:
        self._out, self._without = out, without
        os.environ.update(environment(out) | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"})
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(IMPORTS))

    def forget(self, job: str, folder: str) -> None:
        """Delete what is there from before."""
        shutil.rmtree(self._out / f"{job}-{folder}", ignore_errors=True)

    def start(self, job: str, folder: str, which: int) -> Started:
        """One of the two commands, in a folder that is made if it is not there."""
        path, said = self._out / f"{job}-{folder}", self._out / f"{job}-{folder}-{which}.stderr"
        if not path.exists():
            path.mkdir()
            for name in JOBS[job].inputs:
                shutil.copytree(self._out / "inputs" / name, path / name)
        words = (*JOBS[job].words, JOBS[job].last[which])
        process = self._context.Process(target=run, args=(path, said, words, self._without), daemon=True)
        process.start()
        return Started(process, path, said)


class Started(NamedTuple):
    """A command that has been started."""

    process: Any
    folder: Path
    stderr: Path

    def ended(self) -> tuple[int | None, str]:
        """(exit code, last line on stderr) once it has ended; None if it has to be killed."""
        self.process.join(HUNG_SECONDS)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
        text = self.stderr.read_text(errors="replace")
        return code, "Traceback" if "Traceback" in text else (text.strip().splitlines() or [""])[-1]

    def made(self) -> dict[str, str]:
        """What it has made, once it has ended."""
        code, said = self.ended()
        assert code == 0, said
        return content(self.folder / "made")


def run(folder: Path, stderr: Path, words: tuple[str, ...], without: str) -> None:
    """A process of its own, in `folder`: the command `words`, or one that writes an activation set."""
    os.chdir(folder)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    lease.SECONDS = LEASE_SECONDS
    MECHANISMS[without]()
    sys.argv = ["sae-jax", *words]
    code = commands.main() if len(words) > 1 else write(int(words[0]))
    atexit._run_exitfuncs()  # as at the end of a process that nobody has forked
    sys.exit(code)


def write(seed: int) -> int:
    """An activation set, rows at a time, as a script of a user does."""
    rows = np.random.default_rng(seed).standard_normal((200_000, 8)).astype("float32")
    try:
        sae_jax.write_activations("made", (rows[i : i + 1000] for i in range(0, len(rows), 1000)), dtype="float32")
    except sae_jax.UserError as error:
        sys.stderr.write(f"sae-jax: {error}\n")
        return error.exit_code
    return 0


def pair(
    processes: Processes, job: str, is_stopped: bool, apart: float, alone: list[dict[str, str]]
) -> tuple[str, list[str]]:
    """What came of two at once, and what each said in the end."""
    processes.forget(job, "pair")
    first = processes.start(job, "pair", 0)
    if is_stopped:
        wait_for(lambda: (first.folder / "made").exists() or is_owned(first.folder) or not first.process.is_alive())
    time.sleep(apart)
    if is_stopped and first.process.is_alive():
        os.kill(first.process.pid, signal.SIGSTOP)
    second = processes.start(job, "pair", 1)
    if is_stopped:
        second.process.join(HUNG_SECONDS)
        if first.process.is_alive():
            os.kill(first.process.pid, signal.SIGCONT)
    results = [started.ended() for started in (first, second)]
    said = [line for _, line in results]
    won = [i for i, (code, _) in enumerate(results) if code == 0]
    if "Traceback" in said:
        return "traceback", said
    if any(code is None for code, _ in results):
        return "hung", said
    if len(won) == 2 and job in REPLACE and content(first.folder / "made") == alone[1]:
        return IN_TURN, said
    if len(won) != 1:
        return f"{len(won)} won", said
    if not said[1 - won[0]].startswith("sae-jax: "):
        return "not refused by name", said
    made, expected = content(first.folder / "made"), alone[won[0]]
    differs = sorted(name for name in made.keys() | expected.keys() if made.get(name) != expected.get(name))
    return f"MIXED: {', '.join(differs)}"[:300] if differs else WELL, said


def is_owned(folder: Path) -> bool:
    """Whether there is a lease of what is being made."""
    return any(folder.glob(".made.owner.*")) or any(folder.glob("made/owner.*"))


def wait_for(condition: Callable[[], bool]) -> None:
    """Until it holds, or for so long that something hangs."""
    end = time.monotonic() + HUNG_SECONDS
    while time.monotonic() < end and not condition():
        time.sleep(0.02)


def show(rows: list[dict[str, Any]], out: Path) -> None:
    """How many pairs of each command came out how."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row["job"], Counter())[row["outcome"].partition(":")[0]] += 1
    (out / "table.json").write_text(json.dumps(counts, indent=2) + "\n")
    kinds = sorted({kind for count in counts.values() for kind in count})
    table = Table("two of", *kinds)
    for job, count in counts.items():
        table.add_row(job, *(str(count[kind] or "") for kind in kinds))
    Console(width=140).print(table)


if __name__ == "__main__":
    main(tyro.cli(Config))
