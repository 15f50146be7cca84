"""Does a damaged or hostile file end in anything but one line?

Question: whatever stands in a file that a user can bring, does each reader of it end well or in one line of our own; is
there one that ends in a traceback, takes the process down, needs more than 2 s of the processor, or ten times the file
and 64 MiB of memory?
Guess: a few do, in values that nobody thought of.
Command: python experiments/faults/fuzz.py --out OUT          (--without trial: a mechanism off; needs Linux)
Answer: a few did, in nearly an hour: some 470,000 inputs to all 22 readers, to each for 100 to 300 s of the processor.
Tests hold what was mended. Those of a sweep end at its plan, which is always another. Found and mended: any JSON file
took 256 MiB to read; numpy warned beside our line of rows that are no numbers; metadata of a checkpoint with a value of
another type, moments of a commit that overflow, a shard of more bytes than 64 bits count, half of a surrogate pair in a
recipe and a width that is text in a fit.json ended in tracebacks; the moments of a set that claims 8,000,000 columns
filled memory; the names of a model's 1,000,000 claimed layers took 90 MB. After the mends set, text set, plan, run and
fit were fuzzed again for 100 s each, and nothing was found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import functools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from mutate import mutated
from rich.console import Console
from rich.table import Table
from things import READERS, made
from without import MECHANISMS

from sae_jax import progress, storage
from sae_jax.commands import failures
from sae_jax.errors import UserError
from sae_jax.lm import trial
from sae_jax.storage import guarded

SECONDS, MEMORY, TIMES = 2.0, 64 << 20, 10  # what a reader may take: of the processor; bytes, and times the file
STUCK = 120  # seconds after which a process that does not answer is ended
LONGEST = 2000  # characters of a line


@dataclasses.dataclass(frozen=True)
class Config:
    """How long each reader is tried."""

    out: Path = Path("build/fuzz")
    """Folder for the things, the findings and the inputs that led to them."""
    seconds: float = 3600
    """Of the processors, over all readers."""
    seed: int = 0
    """Of the damage; an input is made of it, the reader and a number."""
    readers: tuple[str, ...] = tuple(READERS)
    """Which."""
    first: int = 0
    """Number of the first input of each reader: to go on where another run ended, or to repeat one."""
    without: str = ""
    """A mechanism that is switched off: trial, depth, or one of without.py."""
    smoke: bool = False
    """Three inputs a reader, in this process: does it run?"""


class Slow(BaseException):
    """A reader has used up its time."""


class Finding(NamedTuple):
    """An end that is none of those allowed."""

    kind: str  # type of the error, slow, memory, or how the process ended
    where: str  # innermost place in the package
    said: str


class Trials:
    """Hands damaged files to a reader, in a copy of its thing."""

    def __init__(self, name: str, things: Path, folder: Path) -> None:
        """`folder` is where the copy is made."""
        self.name, self.reader = name, READERS[name]
        self.folder = folder / self.reader.thing
        shutil.copytree(things / self.reader.thing, self.folder)
        found = {path for pattern in self.reader.files for path in self.folder.glob(pattern) if path.is_file()}
        self.whole = {str(path.relative_to(self.folder)): path.read_bytes() for path in sorted(found)}
        self.n_read = self.n_refused = 0
        signal.signal(signal.SIGPROF, _too_slow)
        for _ in range(2):  # what is imported and compiled at first is none of its time
            with contextlib.suppress(UserError):  # a part of a thing may not go on as it is
                self.reader.read(self.folder)

    def damaged(self, seed: int, number: int) -> tuple[str, bytes]:
        """(file, its content) of an input."""
        rng = random.Random(f"{seed} {self.name} {number}")
        file = rng.choice(list(self.whole))
        return file, mutated(Path(file).name, self.whole[file], rng)

    def finding(self, file: str, data: bytes) -> Finding | None:
        """What is wrong with the end of the reader, if something is."""
        found = None
        for _ in range(2):  # time and memory may be those of something else
            (self.folder / file).write_bytes(data)
            try:
                found = self._read(len(data))
            finally:
                (self.folder / file).write_bytes(self.whole[file])
            if found is None or found.kind not in ("slow", "memory"):
                break
        return found

    def _read(self, size: int) -> Finding | None:
        limit = MEMORY + TIMES * size
        began, before = _processor_seconds(), _memory(reset=True)
        resource.setrlimit(resource.RLIMIT_DATA, (before["VmData"] + 4 * limit, resource.RLIM_INFINITY))
        faulthandler.dump_traceback_later(STUCK, exit=True)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            self.reader.read(self.folder)
            self.n_read += 1
        except UserError as error:
            self.n_refused += 1
            if len(str(error)) > LONGEST or not str(error).isprintable():
                return Finding("not one line", _innermost(error), repr(str(error))[:LONGEST])
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if isinstance(error, MemoryError) or not isinstance(error, Exception) or not failures.one_line(error):
                said = "".join(traceback.format_exception(error))
                return Finding(
                    "slow" if isinstance(error, Slow) else type(error).__name__, _innermost(error), said[-LONGEST:]
                )
            self.n_refused += 1
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            faulthandler.cancel_dump_traceback_later()
            resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)
        took, grown = _processor_seconds() - began, _memory()["VmHWM"] - before["VmRSS"]
        if took > SECONDS:
            return Finding("slow", self.name, f"{took:.1f} s")
        return Finding("memory", self.name, f"{grown:,} bytes for {size:,}") if grown > limit else None


def main(config: Config) -> None:
    """Try the readers, each in processes of its own; write OUT/findings.jsonl and OUT/table.json; show them."""
    out = config.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    if config.smoke:
        made(out / "things", config.readers)
        found = [finding for name in config.readers for finding in _smoked(name, out, config.seed)]
        if found:
            raise SystemExit(f"not one line: {found}")
        return
    for path in out.glob("*.jsonl"):
        path.unlink()
    # This process starts no threads, so that it can be forked, which saves imports.
    if in_child(lambda: made(out / "things", config.readers), out / "made.said"):
        raise SystemExit((out / "made.said").read_text()[-LONGEST:])
    counts = {}
    with progress.Progress("fuzz", len(config.readers), "readers", first="") as bar:
        for i, name in enumerate(config.readers, 1):
            counts[name] = tried(name, out, config, config.seconds / len(config.readers))
            bar.update(i)
    show(out, counts)


def tried(name: str, out: Path, config: Config, seconds: float) -> dict[str, float]:
    """Try a reader for so long, in one process after another where an input takes it down; counts of the inputs."""
    done: Counter[str] = Counter()
    at, said = out / f"{name}.at", out / f"{name}.said"
    number = config.first
    while done["seconds"] < 0.95 * seconds:
        at.unlink(missing_ok=True)
        left = seconds - done["seconds"]
        code = in_child(functools.partial(work, name, out, config.seed, number, left, config.without), said)
        if not at.exists():
            raise SystemExit(said.read_text(errors="replace")[-LONGEST:])
        count = json.loads(at.read_text())
        done.update({key: count[key] for key in ("inputs", "read", "refused", "seconds")})
        number = count["number"] + 1
        if code:
            with storage.Lines(out / f"{name}.jsonl") as lines:
                ended = Finding(f"ended: {code}", name, said.read_text(errors="replace")[-LONGEST:])
                lines.write({"number": count["number"], "file": count["file"], **ended._asdict()})
            _keep(out, name, count["number"], count["file"], (out / f"{name}.input").read_bytes())
    return dict(done)


def in_child(act: Callable[[], Any], said: Path) -> int:
    """The exit code of a fork of this process that does something; what it writes to stderr goes to `said`."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        with said.open("wb") as file:
            os.dup2(file.fileno(), 2)
        act()
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def work(name: str, out: Path, seed: int, number: int, seconds: float, without: str) -> None:
    """Try a reader in this process, which may not survive: what it is at stands in OUT/NAME.at and OUT/NAME.input."""
    SWITCHES[without]()
    MECHANISMS["digests"]()  # whoever can write a file can write its digest
    faulthandler.enable()
    seen: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder, storage.Lines(out / f"{name}.jsonl") as lines:
        os.chdir(folder)
        trials = Trials(name, out / "things", Path(folder))
        began, n = _processor_seconds(), 0
        while (so_far := _processor_seconds() - began) < seconds:
            file, data = trials.damaged(seed, number)
            n += 1
            (out / f"{name}.input").write_bytes(data)
            count = {"number": number, "file": file, "inputs": n, "read": trials.n_read, "refused": trials.n_refused}
            (out / f"{name}.at").write_text(json.dumps({**count, "seconds": so_far}))
            found = trials.finding(file, data)
            if found is not None:
                seen[found[:2]] += 1
                if seen[found[:2]] <= 3:
                    lines.write({"number": number, "file": file, **found._asdict()})
                    _keep(out, name, number, file, data)
            number += 1


def _smoked(name: str, out: Path, seed: int) -> list[Finding]:
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(name, out / "things", Path(folder))
        found = [trials.finding(*trials.damaged(seed, number)) for number in range(3)]
    return [finding for finding in found if finding is not None]


def _keep(out: Path, name: str, number: int, file: str, data: bytes) -> None:
    storage.write_bytes(out / "inputs" / f"{name}-{number}-{Path(file).name}", data)


def show(out: Path, counts: dict[str, dict[str, float]]) -> None:
    """How many inputs each reader was given, and each distinct finding."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(out.glob("*.jsonl")):
        if path.name != "findings.jsonl":
            for row in storage.read_lines(path):
                found.setdefault((row["kind"], row["where"]), []).append({"reader": path.stem, **row})
    storage.write_lines(out / "findings.jsonl", [rows[0] for rows in found.values()])
    storage.write_json(out / "table.json", counts)
    shown = Table("reader", "inputs", "refused", "read", "seconds of the processor")
    for name, count in counts.items():
        shown.add_row(name, *(f"{count[key]:,.0f}" for key in ("inputs", "refused", "read", "seconds")))
    Console(width=120).print(shown)
    for (kind, where), rows in found.items():
        last = rows[0]["said"].strip().splitlines()[-1:] or [""]
        line = f"{kind} {where}: {rows[0]['reader']} {rows[0]['number']} {rows[0]['file']}: {last[0][:200]}"
        Console(width=220).print(line, markup=False)
    if found:
        raise SystemExit(f"{len(found)} distinct ends that are not one line, see above")


def _innermost(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/sae_jax/" in frame.filename]
    return f"{Path(frames[-1].filename).name} {frames[-1].name}" if frames else "elsewhere"


def _too_slow(*_: Any) -> None:
    raise Slow


def _processor_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _memory(reset: bool = False) -> dict[str, int]:
    """Bytes of this process by the names of /proc, and its peak since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.endswith(" kB"))
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}


def _no_trial() -> None:
    trial.try_out = lambda text: None


def _no_depth() -> None:
    guarded._refuse_deep = lambda value, where: None


SWITCHES = {**MECHANISMS, "trial": _no_trial, "depth": _no_depth}


if __name__ == "__main__":
    main(tyro.cli(Config))
