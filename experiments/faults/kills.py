"""Does a command that is disturbed go on as if nothing had happened?

Question: long commands are killed before, after and in the middle of every distinct call that they make on their files
(a call and the path within a run, numbers apart: in one command of those that have it, at one of the times, drawn at
random), and storage fails there or is full, or a folder becomes read-only. They are also killed, terminated,
interrupted twice, or stopped and woken at random moments, also if one is one of two that work as one; and their clock
jumps by a day.
Run again, does it end with what an undisturbed run leaves, without making anything again that was committed? What is
said when storage fails?
Guess: yes everywhere; a failure of storage is one line.
Command: python experiments/faults/kills.py --out OUT      (the same command resumes; needs gcc)
Answer: of 2,140 trials 2,127 went on to the same bytes: all of 1,000 kills before and after calls but two, of 74 in the
middle of a write, of 309 at random moments and of 135 other signals; of 545 failures of storage but three, and of 77
jumps of the clock but eight. The five left a lease of a process that had ended, which stood in nobody's way: its file
could not be unlinked once (it is tried twice now), or the process died after a pass of a sweep and before that (the
next command removes it now). The eight clocks were set forward by a day during a save, which Orbax timed by that clock
and gave up, in one line. All of its waits go by another clock now, and 72 such jumps after that, five to ten for each
command, changed nothing.

These had been found and mended before: a kill while the oldest checkpoint was removed left one that was called damaged;
one at the end of a set of members, checkpoints that the next start refused or, of a sweep, never removed; a save that
failed on the disk ended in a circle of reasons; a process whose partner was killed, in a traceback; a dictionary saved
to a full disk, in an error of safetensors, an fsync that failed in one without a file's name; and a harvest killed
after a commit left the lease of that shard for ever. Both processors make 12 to 35 trials a minute. With files written
where they belong instead of put in place whole, 3 of 44 trials of `harvest` could not go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from contents import content
from forks import HUNG, Ended, Server, wait_until_computed
from jobs import JOBS, committed, lost, prepare
from rich.console import Console
from rich.table import Table

from sae_jax import storage

HERE = Path(__file__).parent
WELL = ("equal", "not met")  # outcomes
KILLS = ("before", "torn", "after")  # FAULT_HOW of kill_at.c
NAMES = {"28+": "disk full", "5": "input/output error", "30+": "read-only"}
DAY = 24 * 3600


@dataclasses.dataclass(frozen=True)
class Config:
    """What is disturbed, and how often."""

    out: Path = Path("build/kills")
    """Folder for the trials, trials.jsonl and the table."""
    jobs: tuple[str, ...] = tuple(JOBS)
    """Which commands."""
    kills: int = 300
    """Kills at random moments, over all commands of one process."""
    others: int = 5
    """For each command, random moments of each other disturbance."""
    seed: int = 0
    """Of the moments."""
    workers: int = os.cpu_count() or 1
    """Trials at a time."""
    without: str = ""
    """A mechanism of without.py that is switched off, such as "whole files"."""
    smoke: bool = False
    """Two disturbances of `write_activations`: does it run?"""


class Trial(NamedTuple):
    """One disturbance of one job."""

    job: str
    number: int  # of a call, or thousandths of what the job computes
    how: str  # FAULT_HOW, or signals
    where: str  # the call and its path, numbers apart


def main(config: Config) -> None:
    """Run every job undisturbed, then every trial that is not in OUT/trials.jsonl; write OUT/table.json; show it."""
    if shutil.which("gcc") is None:
        raise SystemExit("there is no gcc, which has to compile kill_at.c; install it")
    out = config.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    library = out / "kill_at.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "kill_at.c", "-ldl"], check=True)
    config = dataclasses.replace(config, jobs=("write_activations",), workers=1) if config.smoke else config
    prepare(out / "inputs", {name for job in config.jobs for name in JOBS[job].inputs})
    servers: queue.Queue[Server] = queue.Queue()
    for _ in range(config.workers):
        servers.put(Server(out, library, config.without))
    references = {job: Reference(job, out, servers) for job in config.jobs}
    trials = in_turn(config, [*at_random(config, references), *at_calls(config, references)])
    trials = trials[:2] if config.smoke else trials
    done = {(row["job"], row["number"], row["how"]) for row in storage.read_lines(out / "trials.jsonl")}
    todo = [trial for trial in trials if (trial.job, trial.number, trial.how) not in done]
    with storage.Lines(out / "trials.jsonl") as lines, ThreadPoolExecutor(config.workers) as pool:
        running = {pool.submit(references[trial.job].disturbed, trial): trial for trial in todo}
        for i, ended in enumerate(as_completed(running), 1):
            trial, result = running[ended], ended.result()
            lines.write({**trial._asdict(), **result})
            Console(stderr=True).print(f"{i}/{len(todo)} {trial.job}: {result['outcome']}", markup=False)
    while not servers.empty():
        servers.get().close()
    rows = storage.read_lines(out / "trials.jsonl")
    show(rows, out)
    if any(row["outcome"] not in WELL for row in rows):
        raise SystemExit("not every command went on as if nothing had happened, see above")


class Reference:
    """A job that was left alone: what it made, the calls that it took, and seconds of a processor."""

    def __init__(self, job: str, out: Path, servers: queue.Queue[Server]) -> None:
        self.job, self._out, self._servers = job, out, servers
        path = out / f"{job}.json"
        known = storage.read_json(path)
        if known is None:
            storage.write_json(path, known := self._alone(out / f"{job}.calls"))
        self.made, self.calls, self.seconds = known["made"], known["calls"], known["seconds"]

    def _alone(self, log: Path) -> dict[str, Any]:
        folder = self.folder("alone")
        for _ in range(2):  # the first compiles
            log.unlink(missing_ok=True)
            folder = self.folder("alone")
            ended = self.run(folder, FAULT_LOG=str(log))
            assert not any(ended.codes), f"{self.job}: {ended.said}"
        rows = (line.split("\t") for line in log.read_text().splitlines())
        calls = [(int(number), call, path.removeprefix(f"{folder}/")) for number, call, path in rows]
        alone = {"made": content(folder / "made"), "calls": calls, "seconds": ended.seconds / JOBS[self.job].n}
        shutil.rmtree(folder)
        return alone

    def folder(self, name: str) -> Path:
        """A new folder with the inputs of the job."""
        folder = self._out / f"{self.job}-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in JOBS[self.job].inputs:
            shutil.copytree(self._out / "inputs" / name, folder / name)
        return folder

    def run(
        self, folder: Path, signals: Sequence[int] = (), after: float = 0, process: int = 0, **faults: str
    ) -> Ended:
        """Run the command, of which a process gets the first signal when it has computed `after` so many seconds."""
        server, job = self._servers.get(), JOBS[self.job]
        try:
            pids = server.start(job.words, folder, job.n, FAULT_UNDER=str(folder), **faults)
            for i, number in enumerate(signals):
                if i:
                    time.sleep(2 if number == signal.SIGCONT else 0.1)
                else:
                    wait_until_computed(pids[process], after)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pids[process], number)
            return server.wait()
        finally:
            self._servers.put(server)

    def disturbed(self, trial: Trial) -> dict[str, Any]:
        """What came of a trial: {outcome, exit codes, what was said, seconds}."""
        folder, began = self.folder(f"{trial.number}-{trial.how.replace(' ', '-')}"), time.monotonic()
        if trial.how in SIGNALS:
            process = trial.number % JOBS[self.job].n
            ended = self.run(folder, SIGNALS[trial.how], self.seconds * trial.number / 1000, process)
        else:
            ended = self.run(folder, FAULT_AT=str(trial.number), FAULT_HOW=trial.how)
        seconds = round(time.monotonic() - began, 1)
        outcome = self._judged(trial, folder, ended)
        if outcome in WELL:
            shutil.rmtree(folder)
        return {"outcome": outcome, "codes": ended.codes, "said": ended.said[-2000:], "seconds": seconds}

    def _judged(self, trial: Trial, folder: Path, ended: Ended) -> str:
        if HUNG in ended.codes:
            return "hangs"
        if "Traceback" in ended.said:
            return "traceback"
        if not any(ended.codes):
            outcome = self._compared(folder)
            is_stopped = trial.how == "terminated"  # and may have saved
            if outcome == "equal" or not is_stopped:
                return "not met" if outcome == "equal" and trial.how in KILLS else outcome
        elif trial.how.startswith(("clock", "stopped")) or (trial.how in KILLS and -signal.SIGKILL not in ended.codes):
            return f"another end: {ended.codes} {ended.said.strip()[-200:]}"
        return self._again(folder)

    def _again(self, folder: Path) -> str:
        """The command is run once more in what the fault has left."""
        before = committed(folder / "made")
        ended = self.run(folder)
        if any(ended.codes) and not JOBS[self.job].is_resumed and "delete it" in ended.said:
            shutil.rmtree(folder / "made")
            ended = self.run(folder)
        if any(ended.codes):
            return f"cannot go on: {(ended.said.strip().splitlines() or ended.codes)[-1]}"[:300]
        if JOBS[self.job].is_resumed and (again := lost(before)):
            return f"lost: {', '.join(again)}"
        return self._compared(folder)

    def _compared(self, folder: Path) -> str:
        made = content(folder / "made")
        differs = sorted(name for name in made.keys() | self.made.keys() if made.get(name) != self.made.get(name))
        return f"differs: {', '.join(differs)}"[:300] if differs else "equal"


SIGNALS = {
    "killed": (signal.SIGKILL,),
    "terminated": (signal.SIGTERM,),
    "interrupted twice": (signal.SIGINT, signal.SIGINT),
    "stopped and woken": (signal.SIGSTOP, signal.SIGCONT),
}


def at_calls(config: Config, references: dict[str, Reference]) -> list[Trial]:
    """Every site, killed in every way, and storage that is full or broken there; each in a command drawn at random."""
    places: dict[str, dict[str, list[int]]] = {}  # {site: {job: numbers of its calls}}
    for job, reference in references.items():
        for number, call, path in reference.calls if JOBS[job].n == 1 else ():
            places.setdefault(site(call, path), {}).setdefault(job, []).append(number)
    draw = random.Random(config.seed)
    trials = []
    for where, numbers in places.items():
        for how in ("before", "after", *["torn"] * where.startswith("write "), draw.choice(["28+", "5"])):
            job = draw.choice([*numbers])
            trials.append(Trial(job, draw.choice(numbers[job]), how, where))
    return trials


def at_random(config: Config, references: dict[str, Reference]) -> list[Trial]:
    """Signals at random moments; from a random call on, a folder that cannot be written, and another time of day."""
    draw = random.Random(config.seed)
    of_one = [job for job in config.jobs if JOBS[job].n == 1]
    each = -(-config.kills // len(of_one)) if of_one else 0
    trials = [Trial(job, moment, "killed", "") for job in of_one for moment in draw.sample(range(1000), each)]
    for job, reference in references.items():
        for _ in range(config.others):
            trials += [Trial(job, draw.randrange(1000), how, "") for how in list(SIGNALS)[JOBS[job].n == 1 :]]
            for how in () if JOBS[job].n > 1 else ("30+", f"clock{DAY:+}", f"clock{-DAY:+}"):
                number, call, path = draw.choice(reference.calls)
                trials.append(Trial(job, number, how, site(call, path)))
        trials += [Trial(job, 0, "30+", "")] * (JOBS[job].n == 1)
    return trials


def in_turn(config: Config, trials: list[Trial]) -> list[Trial]:
    """A trial of each job after the other, in random order, so that a campaign that is cut short is a sample."""
    random.Random(config.seed).shuffle(trials)
    by_job = [[trial for trial in dict.fromkeys(trials) if trial.job == job] for job in config.jobs]
    return [trial for turn in itertools.zip_longest(*by_job) for trial in turn if trial is not None]


def site(call: str, path: str) -> str:
    """A call and its path without what differs from one run or step to the next, or is written by the same lines."""
    path = re.sub(r"^made/(passes/\w+/)?(members/\w+/)?", "", path)
    path = re.sub(r"[0-9a-f]{12,}|(?<=index/)(pos|seq|token)", "#", path)  # three arrays of a set
    path = re.sub(r"(?<=/)(\w+\.)?(sae|average|optimiser|counters|run)(?=[./]|$)", "#", path)  # parts of a checkpoint
    return f"{call} {re.sub(r'[0-9]+', '0', path)}"


def show(rows: list[dict[str, Any]], out: Path) -> None:
    """How many trials of each job and way came out how; and each that did not come out well."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        kind = row["outcome"] if row["outcome"] in WELL else row["outcome"].partition(":")[0]
        counts.setdefault(f"{row['job']}, {NAMES.get(row['how'], row['how'])}", Counter())[kind] += 1
    (out / "table.json").write_text(json.dumps(counts, indent=2) + "\n")
    kinds = sorted({kind for count in counts.values() for kind in count})
    table = Table("job, disturbance", *kinds)
    for name, count in sorted(counts.items()):
        table.add_row(name, *(str(count[kind] or "") for kind in kinds))
    Console(width=140).print(table)
    for row in rows:
        if row["outcome"] not in WELL:
            Console(width=200).print(f"{row['job']} {row['how']} {row['where']}: {row['outcome']}", markup=False)


if __name__ == "__main__":
    main(tyro.cli(Config))
