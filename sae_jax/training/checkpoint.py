"""Saving a run and taking it up again, on the same mesh or another; reading an SAE back.

A checkpoint is one Orbax step directory, RUN/checkpoints/<step>/. Once Orbax has put it there, each process lists the
files that it wrote with their digests, in digests-<process>-of-<n>.json; without all of these lists a save is not done,
and as long as checkpoints/.saving-<step> is there, it is under way or was cut off. Before anything of a checkpoint is
read, its files are compared with the lists. One that is damaged is set aside as checkpoints/damaged-<step> and the run
goes on from the one before.

    sae          weights in training       average      running average of the weights (train.ema above 0)
    optimiser    its moments               counters     dead counters and the like
    run          step, constants

RUN/config.json beside them holds the record of the run. A set of members is one such directory, the parts of each under
its name (`k16.sae`, ...); RUN/config.json then lists the members, and RUN/members/<name>/ is a run in all but this: it
has checkpoints of its own only once the member has left the set. Only this file knows Orbax.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import re
import shutil
import sys
import time
import types
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from sae_jax import config as configs
from sae_jax import storage
from sae_jax.progress import console
from sae_jax.record import MembersRecord, RunRecord
from sae_jax.storage.digests import SEAL, check_file, read_digests, write_digests
from sae_jax.training.settings import MAY_CHANGE, SHARES, TrainConfig, as_now
from sae_jax.training.state import TrainState
from sae_jax.types import UsageError, UserError

MEMBERS = "members"  # folder of a set's members
SECONDS_BETWEEN_CHECKS = 5.0  # of the lease, while a save is under way
KEPT = 2  # a save that is cut off must leave the one before it

_LIST = re.compile(r"digests-\d+-of-(?P<n>\d+)\.json")
_WRITER = re.compile(r"[^/]+/ocdbt\.process_(?P<process>\d+)/")  # process 0 writes all else


class Checkpoints:
    """The checkpoints of one run. A context manager: leaving it waits for the save under way.

    Only the command that trains may have one with `writes`: it removes what saves that were cut off have left. A run
    without a folder has none: saving does nothing.
    """

    def __init__(self, run: Path | None, writes: bool = True, lease: storage.Lease | None = None) -> None:
        """`lease`: of the run; a save that ends without it does not count."""
        self._orbax: Any = None
        self._saving: Future[None] | None = None
        self._writes, self._lease = writes, lease or storage.Lease(None, "")
        if run is None:
            return
        self._folder = storage.absolute(run / "checkpoints")
        if not writes:
            return
        self._lease.check()  # what looks like the rest of a save may be one that another owner has under way
        self._forget_what_was_cut()
        self._set_unreadable_aside()
        _keep_no_counters()
        _time_by_a_clock_that_nobody_sets()
        self._lease.check()  # Orbax removes what it has not put in place
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        policy: Any = ocp.training.preservation_policies.LatestN(KEPT)
        self._orbax = ocp.training.Checkpointer(
            str(self._folder), preservation_policy=policy, cleanup_tmp_directories=True
        )
        # When a save is done, Orbax's thread asks JAX about preemption at the step of that save, and JAX takes the last
        # step it was asked about for the step this process is at: a SIGTERM then was agreed upon for a step that had
        # passed, and never seen.
        self._orbax._manager.reached_preemption = lambda step: False

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, which may still be on its way to the disk; None if there is none."""
        return next(iter(self._steps()), None)

    def save(self, step: int, states: dict[str, TrainState]) -> None:
        """Queue a save of {member: state}; returns once the arrays are copied, so that the states may be donated.

        The only state of a run without members has the name "". Raises UserError if this save or the one before it
        cannot be written.
        """
        if self._orbax is not None and self.latest != step:
            with self._reported():
                self._end_save()
                self._mark(step)
                response = self._orbax.save_checkpointables_async(step, _to_tree(states), force=True)
                self._saving = self._thread.submit(finish_save, response, self._folder / str(step), self._lease)

    def wait(self) -> None:
        """Return when all saves, of all processes, are on the disk. Raises UserError if one cannot be written."""
        with self._reported():
            self._end_save()
        multihost_utils.sync_global_devices("saves are on the disk")

    def restore(self, targets: dict[str, TrainState]) -> dict[str, TrainState]:
        """The newest states that can be read, placed as `targets` (abstract, see training/state.py) say.

        Checkpoints that cannot be read are set aside once an older one has been. UserError if none can be.
        """
        step, tree = self.read(_to_tree(targets))
        if damaged := [newer for newer in self._steps() if newer > step]:
            _set_aside(self._folder, damaged)
            self._orbax.reload()
        return {name: _from_tree(tree, name) for name in targets}

    def read(self, target: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """(step, the parts in `target`) of the newest checkpoint that all processes can read."""
        steps = self._steps()
        problem = "there is none"
        for step, before in itertools.zip_longest(steps, steps[1:]):
            tree, problem = self._read_step(step, target)
            if not multihost_utils.process_allgather(np.array(bool(problem))).any():
                return step, tree
            problem = problem or "another process says why"
            if before is not None and jax.process_index() == 0:
                console.print(f"{self._folder / str(step)} cannot be read: {problem}; taking step {before} instead")
        raise self._nothing_to_read(problem)

    def _steps(self) -> list[int]:
        """Newest first. To a reader, the save that another process has under way is not there yet."""
        if self._writes:
            return [] if self._orbax is None else [each.step for each in reversed(self._orbax.checkpoints)]
        return sorted(_steps_in(self._folder), reverse=True)

    def _read_step(self, step: int, target: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """The parts in `target`, and what is wrong with them if this process found something."""
        problem = _problem(self._folder / str(step), target)
        if multihost_utils.process_allgather(np.array(bool(problem))).any():
            return {}, problem
        try:
            return ocp.load_checkpointables(str(self._folder / str(step)), target), ""
        except Exception as error:  # Orbax passes on whatever the layers below it raise
            return {}, _reason(error)

    def _end_save(self) -> None:
        """Wait for the save that is under way, of this process."""
        saving, self._saving = self._saving, None
        while saving is not None:
            try:
                return saving.result(SECONDS_BETWEEN_CHECKS)
            except TimeoutError:
                if saving.done():
                    return saving.result()
                self._lease.check()

    def _mark(self, step: int | None = None) -> None:
        """Say that this save is under way, and no longer that those are which all processes have ended."""
        if jax.process_index() == 0:
            for mark in self._folder.glob(mark_name("*")):
                checkpoint = self._folder / mark.name.removeprefix(mark_name(""))
                if is_complete(checkpoint) or not checkpoint.exists():
                    mark.unlink()
            if step is not None:
                (self._folder / mark_name(step)).touch()

    def _forget_what_was_cut(self) -> None:
        """Remove the rest of a checkpoint whose removal was cut off, and then the one whose save was."""
        if jax.process_index() == 0:
            there = [path for path in self._folder.glob("*") if path.name.isdecimal()]
            there.sort(key=lambda checkpoint: int(checkpoint.name))
            # Orbax removes the oldest once the newest is in its place, which is before the end of that save.
            cut = [checkpoint for checkpoint in there[:-KEPT] if _lacks_files(checkpoint)]
            for checkpoint in [*cut, *filter(_is_under_way, there)]:
                shutil.rmtree(checkpoint)
            self._mark()
        multihost_utils.sync_global_devices("only whole checkpoints are left")

    def _set_unreadable_aside(self) -> None:
        """Orbax reads what each checkpoint says of itself, and does not begin where that is damaged."""
        steps = sorted(_steps_in(self._folder))
        problems = [_problem(self._folder / str(step), ()) for step in steps]
        seen = multihost_utils.process_allgather(np.array([bool(problem) for problem in problems]))
        damaged = [
            step for step, of_any in zip(steps, seen.reshape(jax.process_count(), -1).any(0), strict=True) if of_any
        ]
        if not damaged:
            return
        problem = next((problem for problem in problems if problem), "another process says why")
        if len(damaged) == len(steps):
            raise self._nothing_to_read(problem)
        if jax.process_index() == 0:
            which = ", ".join(map(str, damaged))
            console.print(f"{self._folder}: {which} cannot be read ({problem}) and is set aside as damaged-*")
        _set_aside(self._folder, damaged)

    def _nothing_to_read(self, problem: str) -> UserError:
        return UserError(f"{self._folder}: no checkpoint can be read ({problem}); restore one, or give another --out")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._orbax is None:
            return
        if isinstance(error, storage.LostError):
            self._thread.shutdown(wait=False)
            return
        with self._reported():
            try:
                if self._writes and error is None:
                    self.wait()
                else:
                    self._end_save()
                if self._writes:
                    self._lease.check()
                    self._mark()
            finally:
                self._thread.shutdown()
                self._orbax.close()

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Errors of the storage below, in one line that says what remains."""
        try:
            yield
        except storage.LostError:
            raise
        except Exception as error:
            raise UserError(
                f"cannot write to {self._folder}: {_reason(error)}; see to the disk and repeat the command, which "
                f"resumes from the last checkpoint"
            ) from error


def latest_step(run: Path, name: str = "") -> int | None:
    """The step of the newest checkpoint in RUN/checkpoints, and of those that hold the member `name`; None without."""
    folder = run / "checkpoints"
    steps = (step for step in _steps_in(folder) if not name or (folder / str(step) / part_name(name, "sae")).exists())
    return max(steps, default=None)


def problem(run: Path) -> str:
    """What is wrong with the newest checkpoint of a run, of which this process reads its share; "" if nothing."""
    if (step := latest_step(run)) is None:
        return "there is none"
    checkpoint = run / "checkpoints" / str(step)
    return _problem(checkpoint, [path.name for path in checkpoint.iterdir()])


def set_aside_damaged(run: Path) -> None:
    """Of a run that stands at its end, and would not be read: rename its newest checkpoints until one is whole."""
    while (step := latest_step(run)) is not None:
        what = problem(run)
        if not multihost_utils.process_allgather(np.array(bool(what))).any():
            return
        if jax.process_index() == 0:
            console.print(f"{run / 'checkpoints' / str(step)} cannot be read: {what or 'another process says why'}")
        _set_aside(run / "checkpoints", [step])


def is_complete(checkpoint: Path) -> bool:
    """Whether every process has listed the digests of what it wrote, which is the end of a save."""
    lists = [match for path in checkpoint.glob("digests-*") if (match := _LIST.fullmatch(path.name))]
    return any(len(lists) == int(match["n"]) for match in lists)


def read_record(run: Path) -> RunRecord:
    """RUN/config.json. Raises UserError where there is none, or it does not describe a run."""
    content = storage.read_json(run / "config.json")
    if content is None:
        raise UserError(f"{run}: not a run, config.json is missing; give the --out of `sae-jax train`")
    if names := members(run):
        raise UserError(f"{run}: a set of members; name one: {', '.join(str(run / MEMBERS / name) for name in names)}")
    record = RunRecord.from_json(content, run / "config.json")
    train = configs.from_dict(TrainConfig, as_now(record.train), f"{run / 'config.json'}: train")
    return dataclasses.replace(record, train=configs.to_dict(train))  # with the settings that are newer than the run


def begun(run: Path) -> RunRecord | None:
    """The record of a run that has begun; None of another folder."""
    content = storage.read_json(run / "config.json") or {}
    is_run = content.get("kind") == RunRecord.KIND
    return RunRecord.from_json(content, run / "config.json") if is_run else None


def members(run: Path) -> list[str]:
    """Names of the members that a set was started with; none for a run of one SAE, or no run."""
    content = storage.read_json(run / "config.json") or {}
    if content.get("kind") != MembersRecord.KIND:
        return []
    return list(MembersRecord.from_json(content, run / "config.json").members)


def check_resumable(run: Path, record: RunRecord) -> None:
    """Refuse to continue a run with settings that would make it another one."""
    before, after = (_settings(each) for each in (read_record(run), record))
    of_length = [key for key in sorted(after) if key in SHARES and after[key]]
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key) or (key in MAY_CHANGE and not (key == "train.steps" and of_length)):
            continue
        if key == "train.steps":
            shares = " and ".join(f"{share}={after[share]}" for share in of_length)
            raise UsageError(
                f"{run} was started with train.steps={before[key]}, of which {shares} are shares, so it cannot be "
                f"{after[key]}; keep it to resume, or give another --out, with these at 0 for a run to be prolonged"
            )
        if key == "data.content":
            where = record.dictionary.data.path if record.dictionary.data else None
            raise UsageError(f"{run} was started on other rows than {where or 'these'}; give another --out")
        raise UsageError(
            f"{run} was started with {key}={before.get(key)}, not {after.get(key)}; keep it to resume, "
            f"or give another --out"
        )


def check_members(run: Path, names: list[str]) -> None:
    """Refuse to continue a run with other members than it was started with."""
    before = members(run)
    for name in sorted(set(before) ^ set(names)):
        what = "with" if name in before else "without"
        raise UsageError(
            f"{run} was started {what} the member {name}; keep the members to resume, or give another --out"
        )


def newest(run: Path) -> tuple[Path, str]:
    """Which run has the newest checkpoint of this one, and under which name: itself, or the set of which it is one."""
    path = run.absolute()
    if path.parent.name == MEMBERS:
        of_set = latest_step(path.parents[1], path.name)
        if of_set is not None and of_set > (latest_step(run) or 0):
            return path.parents[1], path.name
    return run, ""


def part_name(name: str, part: str) -> str:
    """Under which name a part of a member's state is in a checkpoint."""
    return f"{name}.{part}" if name else part


def _steps_in(folder: Path) -> list[int]:
    """Of the checkpoints that are not under way."""
    return [int(path.name) for path in folder.glob("*") if path.name.isdecimal() and not _is_under_way(path)]


def mark_name(step: object) -> str:
    """The file beside a checkpoint that says its save is under way, or was cut off."""
    return f".saving-{step}"


def _is_under_way(checkpoint: Path) -> bool:
    return checkpoint.with_name(mark_name(checkpoint.name)).exists() and not is_complete(checkpoint)


def _lacks_files(checkpoint: Path) -> bool:
    """Whether files are gone, which is how a removal that was cut off looks. What else may be wrong is not asked."""
    try:
        listed = [name for path in checkpoint.glob("digests-*") for name in read_digests(path)]
    except UserError:
        return False
    return not is_complete(checkpoint) or not all((checkpoint / name).exists() for name in listed)


def _set_aside(folder: Path, steps: Sequence[int]) -> None:
    """Rename checkpoints that cannot be used, on all processes alike."""
    if jax.process_index() == 0:
        for step in steps:
            shutil.rmtree(folder / f"damaged-{step}", ignore_errors=True)
            (folder / str(step)).rename(folder / f"damaged-{step}")
    multihost_utils.sync_global_devices("checkpoints set aside")


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


def finish_save(response: Any, checkpoint: Path, lease: storage.Lease) -> None:
    """The end of a save, in the thread of this process: wait for Orbax, then list the digests of what was written."""
    response.result()  # its thread and event loop end here, and nowhere else
    lease.check()
    process, n = jax.process_index(), jax.process_count()
    names = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    writers = ((name, match) for name in names if not _LIST.fullmatch(name) for match in [_WRITER.match(name)])
    written = [name for name, match in writers if (int(match["process"]) if match else 0) == process]
    write_digests(checkpoint / f"digests-{process}-of-{n}.json", checkpoint, written)
    _give_memory_back()


def _give_memory_back() -> None:
    """What the threads of a save have freed would stay with this process in pieces, more after every save."""
    with contextlib.suppress(OSError, AttributeError):  # where there is no glibc
        ctypes.CDLL(None).malloc_trim(0)


def _problem(checkpoint: Path, parts: Iterable[str]) -> str:
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


def _settings(record: RunRecord) -> dict[str, Any]:
    """A record's settings under the names that users give them."""
    content = record.to_json()
    del content[SEAL]
    dictionary = content.pop("dictionary")
    sites = {"site": record.dictionary.sites.x, "reconstruct": record.dictionary.sites.y}
    content |= {name: dictionary[name] for name in ("variant", "sae", "data")} | sites
    return dict(configs.flatten(content))


def _reason(error: BaseException) -> str:
    """What went wrong at the bottom, in one line."""
    seen = [error]  # it may go in a circle, where an error was raised again by who had handled it
    while (before := error.__cause__ or error.__context__) is not None and before not in seen:
        if isinstance(before, UserError):  # ours, of the save before
            break
        seen.append(error := before)
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return "no space left on the disk" if "No space left" in text or "RESOURCE_EXHAUSTED" in text else text[:200]


def _to_tree(states: dict[str, TrainState]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, state in states.items():
        parts = {"sae": state.sae, "optimiser": state.optimiser_state, "counters": state.counters}
        parts["run"] = {"step": state.step, "constants": state.constants}
        if state.average is not None:
            parts["average"] = state.average
        tree |= {part_name(name, part): arrays for part, arrays in parts.items()}
    return tree


def _from_tree(tree: dict[str, Any], name: str) -> TrainState:
    parts: dict[str, Any] = {part: tree.get(part_name(name, part)) for part in ("sae", "average", "counters")}
    return TrainState(optimiser_state=tree[part_name(name, "optimiser")], **parts, **tree[part_name(name, "run")])
