"""A process that has imported everything and forks a child for each command, so that a trial costs no imports.

A child is a process like any other: it gets signals, has its own descriptors and threads, and ends as Python does.

python forks.py MECHANISM      (reads a line of JSON for each: {words, folder, said, faults}; answers pid and exit code)
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

from jobs import environment

HERE = Path(__file__).parent
SECONDS = 600  # after which a command is taken to hang
HUNG = -1000  # instead of an exit code


class Server:
    """One such process, and the child that it has; used by one thread."""

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

    def start(self, words: tuple[str, ...], folder: Path, **faults: str) -> int:
        """Begin a command, or a text of Python; its pid."""
        job = {"words": words, "folder": str(folder), "said": str(self._said), "faults": faults}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        self._pid = int(self._process.stdout.readline())
        return self._pid

    def wait(self) -> tuple[int, str]:
        """(exit code, that of a signal negative; what it said on stderr)."""
        is_hung = threading.Event()
        timer = threading.Timer(SECONDS, lambda: (is_hung.set(), os.killpg(self._pid, signal.SIGKILL)))
        timer.start()
        assert self._process.stdout is not None
        code = int(self._process.stdout.readline())
        timer.cancel()
        return HUNG if is_hung.is_set() else code, self._said.read_text(errors="replace")

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
        if (pid := os.fork()) == 0:
            answers.close()
            become(job)
            return without.run(job["words"])
        for answer in (pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])):
            answers.write(f"{answer}\n")
            answers.flush()
    return 0


def become(job: dict) -> None:
    """What a shell does for a process that it starts."""
    os.setsid()
    said = os.open(job["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (os.open(os.devnull, os.O_WRONLY), 1), (said, 2)):
        os.dup2(source, target)
        os.close(source)
    os.chdir(job["folder"])
    os.environ.update(job["faults"])
    ctypes.CDLL(None).kill_at_begin()


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1]))
