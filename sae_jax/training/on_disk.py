"""Checkpoints in a folder on a disk, written by Orbax.

A checkpoint is one Orbax step directory, checkpoints/<step>/. Once Orbax has put it there, each process lists the files
that it wrote with their digests, in digests-<process>-of-<n>.json; without all of these lists a save is not done, and
as long as checkpoints/.saving-<step> is there, it is under way or was cut off. Before anything of a checkpoint is read,
its files are compared with the lists. Only this file knows Orbax.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import shutil
import sys
import time
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from sae_jax import storage
from sae_jax.progress import console
from sae_jax.storage.digests import LIST, are_all_there, check_file, list_name, read_digests, write_digests
from sae_jax.types import UserError

_WRITER = re.compile(r"[^/]+/ocdbt\.process_(?P<process>\d+)/")  # process 0 writes all else
REMOVED = (
    ".checkpoints.removed"  # a removal that is cut off must not leave checkpoints that lack files under their name
)


class OnDisk:
    """The checkpoints in a folder. See `checkpoint.Store`."""

    def __init__(self, folder: Path) -> None:
        self.folder = storage.absolute(folder)
        self._orbax: Any = None
        self._lease = storage.Lease(None, "")

    def begin(self, lease: storage.Lease, n_kept: int) -> None:
        """See Store."""
        self._lease = lease
        self._forget_what_was_cut(n_kept)
        self._set_unreadable_aside()
        _keep_no_counters()
        _time_by_a_clock_that_nobody_sets()
        lease.check()  # Orbax removes what it has not put in place
        policy: Any = ocp.training.preservation_policies.LatestN(n_kept)
        self._orbax = ocp.training.Checkpointer(
            str(self.folder), preservation_policy=policy, cleanup_tmp_directories=True
        )
        # When a save is done, Orbax's thread asks JAX about preemption at the step of that save, and JAX takes the last
        # step it was asked about for the step this process is at: a SIGTERM then was agreed upon for a step that had
        # passed, and never seen.
        self._orbax._manager.reached_preemption = lambda step: False

    def steps(self) -> list[int]:
        """See Store."""
        # To a reader, the save that another process has under way is not there yet.
        if self._orbax is not None:
            return [each.step for each in reversed(self._orbax.checkpoints)]
        return sorted(_steps_in(self.folder), reverse=True)

    def holds(self, step: int, part: str) -> bool:
        """See Store."""
        return (self.folder / str(step) / part).exists()

    def save(self, step: int, tree: dict[str, Any]) -> Callable[[], None]:
        """See Store."""
        self.mark(step)
        response = self._orbax.save_checkpointables_async(step, tree, force=True)
        return functools.partial(finish_save, response, self.folder / str(step), self._lease)

    def problem(self, step: int, parts: Iterable[str] | None = None) -> str:
        """See Store."""
        checkpoint = self.folder / str(step)
        return problem_of(checkpoint, [path.name for path in checkpoint.iterdir()] if parts is None else parts)

    def load(self, step: int, target: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """See Store."""
        problem = self.problem(step, target)
        if multihost_utils.process_allgather(np.array(bool(problem))).any():
            return {}, problem
        try:
            return ocp.load_checkpointables(str(self.folder / str(step)), target), ""
        except Exception as error:  # Orbax passes on whatever the layers below it raise
            return {}, reason(error)

    def set_aside(self, steps: Sequence[int]) -> None:
        """Rename them to damaged-<step>."""
        if jax.process_index() == 0:
            for step in steps:
                shutil.rmtree(self.folder / f"damaged-{step}", ignore_errors=True)
                (self.folder / str(step)).rename(self.folder / f"damaged-{step}")
        multihost_utils.sync_global_devices("checkpoints set aside")
        if self._orbax is not None:
            self._orbax.reload()

    def tidy(self) -> None:
        """See Store."""
        self.mark()

    def close(self) -> None:
        """See Store."""
        if self._orbax is not None:
            self._orbax.close()

    def is_there(self) -> bool:
        """See Store."""
        return self.folder.exists() or self.folder.with_name(REMOVED).exists()

    def remove(self) -> None:
        """See Store."""
        removed = self.folder.with_name(REMOVED)
        shutil.rmtree(removed, ignore_errors=True)
        self.folder.rename(removed)
        shutil.rmtree(removed)

    def mark(self, step: int | None = None) -> None:
        """Say that this save is under way, and no longer that those are which all processes have ended."""
        if jax.process_index() == 0:
            for mark in self.folder.glob(mark_name("*")):
                checkpoint = self.folder / mark.name.removeprefix(mark_name(""))
                if is_complete(checkpoint) or not checkpoint.exists():
                    mark.unlink()
            if step is not None:
                (self.folder / mark_name(step)).touch()

    def _forget_what_was_cut(self, n_kept: int) -> None:
        """Remove the rest of a checkpoint whose removal was cut off, and then the one whose save was."""
        if jax.process_index() == 0:
            there = [path for path in self.folder.glob("*") if path.name.isdecimal()]
            there.sort(key=lambda checkpoint: int(checkpoint.name))
            # Orbax removes the oldest once the newest is in its place, which is before the end of that save.
            cut = [checkpoint for checkpoint in there[:-n_kept] if _lacks_files(checkpoint)]
            for checkpoint in [*cut, *filter(_is_under_way, there)]:
                shutil.rmtree(checkpoint)
            self.mark()
        multihost_utils.sync_global_devices("only whole checkpoints are left")

    def _set_unreadable_aside(self) -> None:
        """Orbax reads what each checkpoint says of itself, and does not begin where that is damaged."""
        steps = sorted(_steps_in(self.folder))
        problems = [self.problem(step, ()) for step in steps]
        seen = multihost_utils.process_allgather(np.array([bool(problem) for problem in problems]))
        damaged = [
            step for step, of_any in zip(steps, seen.reshape(jax.process_count(), -1).any(0), strict=True) if of_any
        ]
        if not damaged:
            return
        problem = next((problem for problem in problems if problem), "another process says why")
        if len(damaged) == len(steps):
            raise nothing_to_read(self.folder, problem)
        if jax.process_index() == 0:
            which = ", ".join(map(str, damaged))
            console.print(f"{self.folder}: {which} cannot be read ({problem}) and is set aside as damaged-*")
        self.set_aside(damaged)


def is_complete(checkpoint: Path) -> bool:
    """Whether every process has listed the digests of what it wrote, which is the end of a save."""
    return are_all_there(path.name for path in checkpoint.glob("digests-*"))


def mark_name(step: object) -> str:
    """The file beside a checkpoint that says its save is under way, or was cut off."""
    return f".saving-{step}"


def finish_save(response: Any, checkpoint: Path, lease: storage.Lease) -> None:
    """The end of a save, in the thread of this process: wait for Orbax, then list the digests of what was written."""
    response.result()  # its thread and event loop end here, and nowhere else
    lease.check()
    process, n = jax.process_index(), jax.process_count()
    names = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    writers = ((name, match) for name in names if not LIST.fullmatch(name) for match in [_WRITER.match(name)])
    written = [name for name, match in writers if (int(match["process"]) if match else 0) == process]
    write_digests(checkpoint / list_name(process, n), checkpoint, written)
    give_memory_back()


def problem_of(checkpoint: Path, parts: Iterable[str]) -> str:
    """What is wrong with the files that hold these parts, of which each process looks at its share; "" if nothing."""
    try:
        if not is_complete(checkpoint):
            return "its lists of digests (digests-*.json) are not complete"
        files = {}
        for path in checkpoint.glob("digests-*"):
            files |= read_digests(path)
        needed = [name for name in files if "/" not in name or name.partition("/")[0] in parts]
        needed.sort(key=lambda name: (-files[name].size, name))
        for name in needed[jax.process_index() :: jax.process_count()]:
            check_file(checkpoint / name, files[name])
    except (UserError, OSError) as error:
        return str(error).replace(f"{checkpoint}/", "")
    return ""


def nothing_to_read(folder: storage.StrPath, problem: str) -> UserError:
    """The error where no checkpoint can be read."""
    return UserError(f"{folder}: no checkpoint can be read ({problem}); restore one, or give another --out")


def reason(error: BaseException) -> str:
    """What went wrong at the bottom, in one line."""
    seen = [error]  # it may go in a circle, where an error was raised again by who had handled it
    while (before := error.__cause__ or error.__context__) is not None and before not in seen:
        if isinstance(before, UserError):  # ours, of the save before
            break
        seen.append(error := before)
    text = storage.reason(error)
    return "no space left on the disk" if "No space left" in text or "RESOURCE_EXHAUSTED" in text else text[:200]


def give_memory_back() -> None:
    """What the threads of a save have freed would stay with this process in pieces, more after every save."""
    with contextlib.suppress(OSError, AttributeError):  # where there is no glibc
        ctypes.CDLL(None).malloc_trim(0)


def _steps_in(folder: Path) -> list[int]:
    """Of the checkpoints that are not under way."""
    return [int(path.name) for path in folder.glob("*") if path.name.isdecimal() and not _is_under_way(path)]


def _is_under_way(checkpoint: Path) -> bool:
    return checkpoint.with_name(mark_name(checkpoint.name)).exists() and not is_complete(checkpoint)


def _lacks_files(checkpoint: Path) -> bool:
    """Whether files are gone, which is how a removal that was cut off looks. What else may be wrong is not asked."""
    try:
        listed = [name for path in checkpoint.glob("digests-*") for name in read_digests(path)]
    except UserError:
        return False
    return not is_complete(checkpoint) or not all((checkpoint / name).exists() for name in listed)


def _keep_no_counters() -> None:
    """Orbax asks tensorstore for its counters at every save, to log them, and each time tensorstore loses 0.1 MiB."""
    with contextlib.suppress(ImportError):
        from orbax.checkpoint._src.serialization import tensorstore_utils

        # Orbax logs nothing of 0.
        tensorstore_utils.get_tensorstore_raw_bytes = lambda *_: 0  # pyrefly: ignore[bad-assignment]


def _time_by_a_clock_that_nobody_sets() -> None:
    """Orbax gives a save up that takes too long by the time of day, which also jumps when a computer wakes up."""
    clock = types.SimpleNamespace(**{**vars(time), "time": time.monotonic})
    for name, module in list(sys.modules.items()):
        if name.startswith("orbax.checkpoint.") and getattr(module, "time", None) is time:
            module.time = clock  # pyrefly: ignore[missing-attribute]
