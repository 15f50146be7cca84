"""Does a command that is killed at any call of the file system go on as if nothing had happened?

Question: each long command is killed before, after and in the middle of every distinct call that it makes on its files
(a call and the path, numbers apart: its first and its last), and its storage fails there. Run again, does it end with
what an undisturbed run leaves, without having lost what was committed? What is said when storage fails?
Guess: yes everywhere; a failure of storage is one line.
Command: python experiments/faults/kills.py --out OUT      (the same command resumes; needs gcc)
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from contents import content
from rich.console import Console
from rich.table import Table

import sae_jax
from sae_jax import storage

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KILLED = -9
WELL = ("equal", "not met")  # outcomes
WRITES = """
import numpy as np, sae_jax
rows = np.random.default_rng(0).standard_normal((2000, 8)).astype("float32")
sae_jax.write_activations("made", rows, dtype="float32")
"""
SAVES = "import sae_jax; sae_jax.load('run').save('made')"
SMALL = ("--sae.n-latents=32", "--sae.k=4", "--sae.dtype=float32", "--train.batch-size=64", "--train.log-every=1")
TRAIN = ("train", "--data=set", "--out=made", *SMALL, "--train.steps=12", "--train.checkpoint-every=4")
SWEEP = ("sweep", "--data=set", "--out=made", *SMALL, "--train.checkpoint-every=4", "--sweep.grid", "sae.k=2 4")
SWEEP = (*SWEEP, "--sweep.tokens", "256", "512", "--sweep.held-out=128", "--sweep.per-pass=1")


class Job(NamedTuple):
    """A command, in a folder that holds a copy of its inputs."""

    words: tuple[str, ...]  # after `sae-jax`, or one text of Python
    inputs: tuple[str, ...] = ()
    is_resumed: bool = True  # else what a kill has left is refused by name, and deleted before it is run again


JOBS = {
    "write_activations": Job((WRITES,), is_resumed=False),
    "save": Job((SAVES,), ("run",)),
    "harvest": Job(("harvest", "--out=made", "--harvest.tokens=4096", "--harvest.context=64")),
    "train": Job(TRAIN, ("set",)),
    "members": Job((*TRAIN, "--members", "k4", "k8 --sae.k=8 --train.steps=8"), ("set",)),
    "sweep": Job(SWEEP, ("set",)),
    "evaluate": Job(("evaluate", "made", "--tokens=256"), ("made", "set")),
    "dashboard": Job(("dashboard", "text-run", "--out=made", "--tokens=512"), ("text-run", "text-set")),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is disturbed, and how often."""

    out: Path = Path("build/kills")
    """Folder for the trials, trials.jsonl and the table."""
    jobs: tuple[str, ...] = tuple(JOBS)
    """Which commands."""
    random: int = 300
    """Further kills at calls drawn at random."""
    seed: int = 0
    """Of those."""
    without: str = ""
    """A mechanism of without.py that is switched off, such as "whole files"."""
    smoke: bool = False
    """Two kills of `save`: does it run?"""


class Trial(NamedTuple):
    """One disturbance of one job."""

    job: str
    number: int  # of the call
    how: str  # FAULT_HOW, see kill_at.c
    where: str  # the call and its path, numbers apart


def main(config: Config) -> None:
    """Run every job undisturbed, then every trial that is not in OUT/trials.jsonl; write OUT/table.json; show it."""
    if shutil.which("gcc") is None:
        raise SystemExit("there is no gcc, which has to compile kill_at.c; install it")
    out = config.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    library = out / "kill_at.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "kill_at.c", "-ldl"], check=True)
    jobs = ("save",) if config.smoke else config.jobs
    prepare(out / "inputs", {name for job in jobs for name in JOBS[job].inputs})
    references = {job: Reference(job, out, library, config.without) for job in jobs}
    trials = [trial for job in jobs for trial in planned(references[job])]
    draw = random.Random(config.seed)
    for _ in range(0 if config.smoke else config.random):
        reference = references[draw.choice(jobs)]
        number, call, path = draw.choice(reference.calls)
        trials.append(Trial(reference.job, number, draw.choice(("before", "after")), site(call, path)))
    trials = trials[:2] if config.smoke else trials
    done = {(row["job"], row["number"], row["how"]) for row in storage.read_lines(out / "trials.jsonl")}
    todo = [trial for trial in dict.fromkeys(trials) if (trial.job, trial.number, trial.how) not in done]
    with storage.Lines(out / "trials.jsonl") as lines, ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda trial: references[trial.job].disturbed(trial), todo)
        for i, (trial, result) in enumerate(zip(todo, results, strict=True), 1):
            lines.write({**trial._asdict(), **result})
            Console(stderr=True).print(f"{i}/{len(todo)} {trial.job}: {result['outcome']}", markup=False)
    rows = storage.read_lines(out / "trials.jsonl")
    show(rows, out)
    if any(row["outcome"] not in WELL for row in rows):
        raise SystemExit("not every command went on as if nothing had happened, see above")


class Reference:
    """A job that was left alone: what it made, and the calls that it took."""

    def __init__(self, job: str, out: Path, library: Path, without: str) -> None:
        self.job, self._out, self._library, self._without = job, out, library, without
        folder, log = self.folder("alone"), out / f"{job}.calls"
        log.unlink(missing_ok=True)
        code, said = self.run(folder, FAULT_LOG=str(log))
        assert code == 0, f"{job}: {said}"
        self.made = content(folder / "made")
        rows = (line.split("\t") for line in log.read_text().splitlines())
        self.calls = [(int(number), call, path.removeprefix(f"{folder}/")) for number, call, path in rows]
        shutil.rmtree(folder)

    def folder(self, name: str) -> Path:
        """A new folder with the inputs of the job."""
        folder = self._out / f"{self.job}-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in JOBS[self.job].inputs:
            shutil.copytree(self._out / "inputs" / name, folder / name)
        return folder

    def run(self, folder: Path, **fault: str) -> tuple[int, str]:
        """(exit code, stderr) of the command of the job."""
        command = [HERE / "without.py", self._without, *JOBS[self.job].words]
        faults = {"FAULT_UNDER": str(folder), "LD_PRELOAD": str(self._library), **fault} if fault else {}
        done = subprocess.run(
            [sys.executable, *command],
            cwd=folder,
            env=environment(self._out, **faults),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=600,
        )
        return done.returncode, done.stderr

    def disturbed(self, trial: Trial) -> dict[str, Any]:
        """What came of a trial: {outcome, what was said}."""
        folder = self.folder(f"{trial.number}-{trial.how.strip('+')}")
        code, said = self.run(folder, FAULT_AT=str(trial.number), FAULT_HOW=trial.how)
        first = {"code": code, "said": said[-2000:]}
        if code != KILLED and trial.how in ("before", "after", "torn"):
            outcome = "not met" if code == 0 else "another end"  # its threads took their calls in another order
        elif "Traceback" in said:
            outcome = "traceback"
        else:
            outcome = self._again(folder)
        if outcome in ("equal", "not met"):
            shutil.rmtree(folder)
        return {"outcome": outcome, **first}

    def _again(self, folder: Path) -> str:
        """The command is run once more in what the fault has left."""
        code, said = self.run(folder)
        if code and not JOBS[self.job].is_resumed and "delete it" in said:
            shutil.rmtree(folder / "made")
            code, said = self.run(folder)
        if code:
            return f"cannot go on: {said.strip().splitlines()[-1] if said.strip() else code}"[:300]
        made = content(folder / "made")
        differs = sorted(name for name in made.keys() | self.made.keys() if made.get(name) != self.made.get(name))
        return f"differs: {', '.join(differs)}"[:300] if differs else "equal"


def environment(out: Path, **faults: str) -> dict[str, str]:
    """One device; programs are compiled once for all trials."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(out / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    cache["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **cache, **faults}


def planned(reference: Reference) -> list[Trial]:
    """The first and the last call of every site, killed in every way; and storage that is full or broken there."""
    places: dict[str, list[int]] = {}
    for number, call, path in reference.calls:
        places.setdefault(site(call, path), []).append(number)
    trials = []
    for where, numbers in places.items():
        for number in dict.fromkeys((numbers[0], numbers[-1])):
            ways = ["before", "after", *["torn"] * where.startswith("write ")]
            trials += [Trial(reference.job, number, how, where) for how in ways]
        trials += [Trial(reference.job, numbers[0], how, where) for how in ("28+", "5")]
    return trials


def site(call: str, path: str) -> str:
    """A call and its path without what differs from one run or step to the next."""
    path = re.sub(r"[0-9a-f]{12,}", "#", path)
    return f"{call} {re.sub(r'[0-9]+', '0', path)}"


def prepare(inputs: Path, needed: Collection[str]) -> None:
    """Sets and runs that jobs begin with."""
    rows = np.random.default_rng(0).standard_normal((1024, 8)).astype(np.float32)
    small = {"n_latents": 32, "k": 4, "dtype": "float32", "steps": 4, "batch_size": 64}
    inputs.mkdir(exist_ok=True)
    make: dict[str, Callable[[Path], Any]] = {
        "set": lambda path: sae_jax.write_activations(path, rows, dtype="float32"),
        "text-set": lambda path: sae_jax.harvest(path, tokens=4096, context=64, heldout="heldout"),
        "run": lambda path: sae_jax.train("set", out=path, **small),
        "made": lambda path: sae_jax.train("set", out=path, **small),
        "text-run": lambda path: sae_jax.train("text-set", out=path, **small),
    }
    needed = {*needed, *("text-set" if name == "text-run" else "set" for name in needed)}
    before = os.getcwd()
    os.chdir(inputs)  # runs name their sets as seen from there
    try:
        for name in [name for name in make if name in needed]:
            if not Path(name).exists():
                make[name](Path(name))
    finally:
        os.chdir(before)


def show(rows: list[dict[str, Any]], out: Path) -> None:
    """How many trials of each job and way came out how; and each that did not come out well."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        way = {"28+": "disk full", "5": "input/output error"}.get(row["how"], row["how"])
        kind = row["outcome"] if row["outcome"] in WELL else row["outcome"].partition(":")[0]
        counts.setdefault(f"{row['job']}, {way}", Counter())[kind] += 1
    (out / "table.json").write_text(json.dumps(counts, indent=2) + "\n")
    kinds = sorted({kind for count in counts.values() for kind in count})
    table = Table("job, killed or failing", *kinds, "sites")
    for name, count in sorted(counts.items()):
        sites = {row["where"] for row in rows if name.startswith(f"{row['job']}, ")}
        table.add_row(name, *(str(count[kind] or "") for kind in kinds), str(len(sites)))
    Console(width=140).print(table)
    for row in rows:
        if row["outcome"] not in WELL:
            Console(width=200).print(f"{row['job']} {row['how']} {row['where']}: {row['outcome']}", markup=False)


if __name__ == "__main__":
    main(tyro.cli(Config))
