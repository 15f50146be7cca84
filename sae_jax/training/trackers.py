"""W&B and TensorBoard beside RUN/metrics.jsonl: what `train.log` names.

    run --rows, densities--> queue --> thread --> stdin of one process a tracker (tracker_process.py)

A tracker never stops a run, nor changes what it computes: it is fed by a thread, through a queue with an end, and is a
process that can be killed. One that fails is said once, and the run goes on without it. Only the first process of a job
has trackers.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import queue
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from sae_jax import storage
from sae_jax.progress import console
from sae_jax.record import program
from sae_jax.storage import StrPath, is_url
from sae_jax.training import tracker_process
from sae_jax.training.groups import Member
from sae_jax.types import UsageError

PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboardX"}
MOST_WAITING = 100_000  # messages, of a tracker that does not keep up
SECONDS_TO_END = 30.0


def check(kinds: Sequence[str], out: StrPath | None) -> None:
    """Refuse, with UsageError, trackers that are not installed or cannot follow a run at `out`."""
    for kind in kinds:
        spec = importlib.util.find_spec(PACKAGES[kind])
        if spec is None or spec.origin is None:  # a folder of that name, which RUN/wandb is
            raise UsageError(f"train.log={kind} needs the package {kind}: pip install 'sae_jax[{kind}]'")
    if kinds and not out:
        raise UsageError(f"train.log={' '.join(kinds)} follows a run on the disk; give --out, or leave train.log out")
    if out and is_url(out) and "tensorboard" in kinds:
        raise UsageError(f"train.log=tensorboard writes to a disk, not to {out}; use train.log=wandb")


class Trackers:
    """The trackers of a run of one or more members. A context manager, which waits for their ends, but not for long."""

    def __init__(self, kinds: Sequence[str]) -> None:
        """`kinds`: of train.log; none: nothing happens."""
        self._processes = [_Process(kind) for kind in kinds]

    def open(
        self, member: Member, lease: storage.Lease, start: int, past: Sequence[Mapping[str, Any]], last: int
    ) -> None:
        """Begin to follow a member.

        Args:
            member: it has a folder.
            lease: of the run.
            start: the step that this attempt begins at.
            past: its logged steps up to there.
            last: the last logged step of the attempt before.
        """
        for process in self._processes:
            message = {"do": "open", "member": member.name, "start": start, "config": _config(member)}
            if process.kind == "wandb":
                message |= _of_wandb(member, lease) | {"past": [*past], "last": last}
            else:
                message |= {"folder": str(member.folder)}
            process.send(message)

    def row(self, member: Member, row: Mapping[str, Any]) -> None:
        """A logged step."""
        for process in self._processes:
            process.send({"do": "row", "member": member.name, "row": row})

    def density(self, member: Member, step: int, histogram: Mapping[str, Any]) -> None:
        """The histogram of `MemberSet.densities` at a save."""
        for process in self._processes:
            process.send({"do": "density", "member": member.name, "step": step, **histogram})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._processes:
            process.send({"do": "end", "failed": error is not None})
            process.send(None)
        for process in self._processes:
            process.close()


class _Process:
    """One tracker, and the threads that write to it and listen to it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._is_over = False
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(MOST_WAITING)
        # A session of its own: Ctrl-C and the end of a terminal are for the run, which then ends its trackers.
        self._process = subprocess.Popen(
            [sys.executable, "-P", tracker_process.__file__, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self._threads = [threading.Thread(target=act, daemon=True) for act in (self._write, self._listen)]
        for thread in self._threads:
            thread.start()

    def send(self, message: dict[str, Any] | None) -> None:
        """Queue a message, or the end. Never waits, never raises."""
        if self._is_over:
            return
        try:
            self._waiting.put_nowait(message)
        except queue.Full:
            self._give_up(f"does not keep up, {MOST_WAITING:,} messages wait for it")

    def close(self) -> None:
        """Wait for its end, and then end it."""
        for thread in self._threads:
            thread.join(SECONDS_TO_END / len(self._threads))
        if not self._is_over and self._process.poll() is None:
            self._give_up(f"has not ended within {SECONDS_TO_END:.0f} s")

    def _write(self) -> None:
        assert self._process.stdin is not None
        try:
            while (message := self._waiting.get()) is not None:
                self._process.stdin.write(json.dumps(message) + "\n")
                self._process.stdin.flush()
            self._process.stdin.close()
        except (OSError, ValueError):  # it has ended, of which _listen hears
            return

    def _listen(self) -> None:
        assert self._process.stdout is not None
        before = ""
        for line in self._process.stdout:
            if before:
                console.print(f"{self.kind}: {before}")
            before = line.strip()
        code = self._process.wait()
        if code:
            self._give_up(before if code == 1 and before else f"its process ended with {code}")
        elif before:
            console.print(f"{self.kind}: {before}")

    def _give_up(self, why: str) -> None:
        if not self._is_over:
            self._is_over = True
            console.print(f"{self.kind}: {why.rstrip('.')}; the run goes on without it")
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)


def _of_wandb(member: Member, lease: storage.Lease) -> dict[str, Any]:
    """Names of a member's run at W&B. FOLDER/wandb.json keeps its id, so that it stays one run there."""
    assert member.folder is not None
    folder = member.folder
    path = folder / "wandb.json"
    kept = storage.read_json(path)
    if kept is None:
        lease.check()
        kept = {"id": secrets.token_hex(5)}
        storage.write_json(path, kept)
        is_new = True
    else:
        is_new = False
    names = {"name": folder.name, "group": None}
    if member.name:
        run = folder.parent.parent  # of RUN/members/<name>, where RUN may be a pass of a sweep
        names = {"name": member.name, "group": (run.parent.parent if run.parent.name == "passes" else run).name}
    local = folder if isinstance(folder, Path) else Path(tempfile.gettempdir()) / f"sae_jax-wandb-{kept['id']}"
    local.mkdir(parents=True, exist_ok=True)
    return {**names, "id": kept["id"], "is_new": is_new, "folder": str(local)}


def _config(member: Member) -> dict[str, Any]:
    """The record of a run, and the machine that it is on."""
    devices = jax.devices()
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy", "optax")}
    system = {
        "host": socket.gethostname(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
        "python": platform.python_version(),
        "sae_jax": program(),
        **versions,
    }
    return {**member.record.to_json(), "system": system}
