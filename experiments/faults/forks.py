"""A process that has imported everything and forks a child for each command, so that a trial costs no imports.

A child is a process like any other: it gets signals, has its own descriptors and threads, and ends as Python does.

python forks.py MECHANISM      (reads a line of JSON each: {words, folder, said, faults, n}; answers pids, exit codes)
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import pkgutil
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from jobs import environment

HERE = Path(__file__).parent
SECONDS = 600  # after which a command is taken to hang
HUNG = -1000  # instead of an exit code


class Ended(NamedTuple):
    """What came of a command."""

    codes: list[int]  # exit codes of its processes; those of signals are negative
    seconds: float  # of processors
    said: str  # on stderr


class Server:
    """One such process, and the command that it runs; used by one thread."""

    def __init__(self, out: Path, library: Path, without: str) -> None:
        """Args:
        out: holds the compiled programs, which all share.
        library: what kill_at.c was compiled to.
        without: a mechanism of without.py.
        """
        self._process = subprocess.Popen(
            [sys.executable, HERE / "forks.py", without],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(out, LD_PRELOAD=str(library), OPENBLAS_NUM_THREADS="1"),  # threads do not survive a fork
        )
        self._said = out / f"said-{self._process.pid}"

    def start(self, words: tuple[str, ...], folder: Path, n: int = 1, **faults: str) -> list[int]:
        """Begin a command, or a text of Python, as n processes that work as one; their pids."""
        job = {"words": words, "folder": str(folder), "said": str(self._said), "faults": faults, "n": n}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        self._pids = self._answer()
        return self._pids

    def wait(self) -> Ended:
        """What came of it."""
        is_hung = threading.Event()

        def end() -> None:
            is_hung.set()
            for pid in self._pids:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)

        timer = threading.Timer(SECONDS, end)
        timer.start()
        codes, seconds = self._answer()
        timer.cancel()
        return Ended([HUNG] if is_hung.is_set() else codes, seconds, self._said.read_text(errors="replace"))

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """No more commands."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(mechanism: str) -> int:
    """Fork until there is nothing more to do; in a child, run its command and return its exit code."""
    import without

    import sae_jax
    from sae_jax import record

    for module in pkgutil.walk_packages(sae_jax.__path__, "sae_jax."):
        importlib.import_module(module.name)
    without.MECHANISMS[mechanism]()
    record.program()  # asks git, once
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        Path(job["said"]).write_text("")
        pids, address, before = [], free_address(), computed()
        for i in range(job["n"]):
            pids.append(os.fork())
            if pids[-1] == 0:
                answers.close()
                become(job, {} if job["n"] == 1 else joined(address, job["n"], i))
                return without.run(job["words"])
        print(json.dumps(pids), file=answers, flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps([codes, computed() - before]), file=answers, flush=True)
    return 0


def computed() -> float:
    """Seconds of processors that all children have had that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def wait_until_computed(pid: int, seconds: float) -> None:
    """Return when a process has had a processor for so long, which is about the same place each time, or has ended."""
    with contextlib.suppress(OSError):
        while True:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if fields[0] == "Z" or (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") >= seconds:
                return
            time.sleep(0.005)


def free_address() -> str:
    """Where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def joined(address: str, n: int, i: int) -> dict[str, str]:
    """What launch/local.sh tells process i of n."""
    told = {"COORDINATOR_ADDRESS": address, "COORDINATOR_BIND_ADDRESS": address, "NUM_PROCESSES": n, "PROCESS_ID": i}
    return {f"JAX_{name}": str(value) for name, value in told.items()}


def become(job: dict[str, Any], told: dict[str, str]) -> None:
    """What a shell does for a process that it starts."""
    os.setsid()
    said = os.open(job["said"], os.O_WRONLY | os.O_APPEND)
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (os.open(os.devnull, os.O_WRONLY), 1), (said, 2)):
        os.dup2(source, target)
        os.close(source)
    os.chdir(job["folder"])
    os.environ.update(job["faults"] | told)
    ctypes.CDLL(None).kill_at_begin()


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1]))
