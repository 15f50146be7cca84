"""Saving a run and taking it up again, on the same mesh or another; reading an SAE back.

A checkpoint holds the parts of the state of each member at one step. On a disk Orbax writes it (on_disk.py), at a URL
tensorstore does (at_url.py); both count it only once every process has listed what it wrote with digests, and compare
with these before anything of it is used. One that is damaged is set aside and the run goes on from the one before.

    sae          weights in training       average      running average of the weights (train.ema above 0)
    optimiser    its moments               counters     dead counters and the like
    run          step, constants

RUN/config.json beside RUN/checkpoints holds the record of the run. A set of members has one such folder, the parts of
each under its name (`k16.sae`, ...); RUN/config.json then lists the members, and RUN/members/<name>/ is a run in all
but this: it has checkpoints of its own only once the member has left the set.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol, Self

import jax
import numpy as np
from jax.experimental import multihost_utils

from sae_jax import config as configs
from sae_jax import storage
from sae_jax.progress import console
from sae_jax.record import MembersRecord, RunRecord
from sae_jax.storage import AnyPath, Url
from sae_jax.storage.digests import SEAL
from sae_jax.training.at_url import AtUrl
from sae_jax.training.on_disk import OnDisk, nothing_to_read, reason
from sae_jax.training.settings import MAY_CHANGE, SHARES, TrainConfig, as_now
from sae_jax.training.state import TrainState
from sae_jax.types import UsageError, UserError

MEMBERS = "members"  # folder of a set's members
SECONDS_BETWEEN_CHECKS = 5.0  # of the lease, while a save is under way
KEPT = 2  # a save that is cut off must leave the one before it


class Store(Protocol):
    """Where the checkpoints of a run are kept. A tree is {part: arrays}; a target says shapes, dtypes and shardings."""

    @property
    def folder(self) -> AnyPath:
        """RUN/checkpoints."""
        ...

    def begin(self, lease: storage.Lease, n_kept: int) -> None:
        """Become the one that writes: remove what was cut off. All processes together."""

    def steps(self) -> list[int]:
        """Of the checkpoints that count, newest first. Who writes counts the save that is under way, too."""
        ...

    def holds(self, step: int, part: str) -> bool:
        """Whether a checkpoint has a part."""
        ...

    def save(self, step: int, tree: dict[str, Any]) -> Callable[[], None]:
        """Copy the arrays, so that they may be donated. Returns the rest of the save, which is for a thread."""
        ...

    def problem(self, step: int, parts: Iterable[str] | None = None) -> str:
        """What is wrong with what holds these parts, or all, of which each process reads its share; "" if nothing."""
        ...

    def load(self, step: int, target: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """The parts in `target`, and what is wrong with them if this process found something. All together."""
        ...

    def set_aside(self, steps: Sequence[int]) -> None:
        """Count these no longer, since they cannot be read. All processes together."""

    def tidy(self) -> None:
        """The saves of all processes have ended."""

    def close(self) -> None:
        """End what runs in the background."""

    def is_there(self) -> bool:
        """Whether anything is there, or the rest of it."""
        ...

    def remove(self) -> None:
        """Remove all of it, such that nothing counts of which a part is gone. One process."""


def store_of(run: AnyPath) -> Store:
    """Where the checkpoints of a run are."""
    return AtUrl(run / "checkpoints") if isinstance(run, Url) else OnDisk(run / "checkpoints")


class Checkpoints:
    """The checkpoints of one run. A context manager: leaving it waits for the save under way.

    Only the command that trains may have one with `writes`: it removes what saves that were cut off have left. A run
    without a folder has none: saving does nothing.
    """

    def __init__(self, run: AnyPath | None, writes: bool = True, lease: storage.Lease | None = None) -> None:
        """`lease`: of the run; a save that ends without it does not count."""
        self._saving: Future[None] | None = None
        self._store, self._writes = None if run is None else store_of(run), writes and run is not None
        self._lease = lease or storage.Lease(None, "")
        if self._store is None or not writes:
            return
        self._lease.check()  # what looks like the rest of a save may be one that another owner has under way
        self._store.begin(self._lease, KEPT)
        self._thread = ThreadPoolExecutor(1, "checkpoint")

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, which may still be on its way to the disk; None if there is none."""
        return None if self._store is None else next(iter(self._store.steps()), None)

    def save(self, step: int, states: dict[str, TrainState]) -> None:
        """Queue a save of {member: state}; returns once the arrays are copied, so that the states may be donated.

        The only state of a run without members has the name "". Raises UserError if this save or the one before it
        cannot be written.
        """
        if self._store is not None and self.latest != step:
            with self._reported():
                self._end_save()
                self._saving = self._thread.submit(self._store.save(step, _to_tree(states)))

    def wait(self) -> None:
        """Return when all saves, of all processes, are on the disk. Raises UserError if one cannot be written."""
        with self._reported():
            self._end_save()
        multihost_utils.sync_global_devices("saves are on the disk")

    def restore(self, targets: dict[str, TrainState]) -> dict[str, TrainState]:
        """The newest states that can be read, placed as `targets` (abstract, see training/state.py) say.

        Checkpoints that cannot be read are set aside once an older one has been. UserError if none can be.
        """
        assert self._store is not None
        step, tree = self.read(_to_tree(targets))
        if self._writes and (damaged := [newer for newer in self._store.steps() if newer > step]):
            self._store.set_aside(damaged)
        return {name: _from_tree(tree, name) for name in targets}

    def read(self, target: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """(step, the parts in `target`) of the newest checkpoint that all processes can read."""
        assert self._store is not None
        steps = self._store.steps()
        problem = "there is none"
        for step, before in itertools.zip_longest(steps, steps[1:]):
            tree, problem = self._store.load(step, target)
            if not multihost_utils.process_allgather(np.array(bool(problem))).any():
                return step, tree
            problem = problem or "another process says why"
            if before is not None and jax.process_index() == 0:
                where = self._store.folder / str(step)
                console.print(f"{where} cannot be read: {problem}; taking step {before} instead")
        raise nothing_to_read(self._store.folder, problem)

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._store is None or not self._writes:
            return
        if isinstance(error, storage.LostError):
            self._thread.shutdown(wait=False)
            return
        with self._reported():
            try:
                if error is None:
                    self.wait()
                else:
                    self._end_save()
                self._lease.check()
                self._store.tidy()
            finally:
                self._thread.shutdown()
                self._store.close()

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Errors of the storage below, in one line that says what remains."""
        try:
            yield
        except storage.LostError:
            raise
        except Exception as error:
            assert self._store is not None
            folder, place = self._store.folder, "bucket" if isinstance(self._store.folder, Url) else "disk"
            raise UserError(
                f"cannot write to {folder}: {reason(error)}; see to the {place} and repeat the command, which resumes "
                f"from the last checkpoint"
            ) from error


def latest_step(run: AnyPath, name: str = "") -> int | None:
    """The step of the newest checkpoint in RUN/checkpoints, and of those that hold the member `name`; None without."""
    store, part = store_of(run), part_name(name, "sae")
    return next((step for step in store.steps() if not name or store.holds(step, part)), None)


def problem(run: AnyPath) -> str:
    """What is wrong with the newest checkpoint of a run, of which this process reads its share; "" if nothing."""
    step = latest_step(run)
    return "there is none" if step is None else store_of(run).problem(step)


def set_aside_damaged(run: AnyPath) -> None:
    """Of a run that stands at its end, and would not be read: set its newest checkpoints aside until one is whole."""
    while (step := latest_step(run)) is not None:
        what = problem(run)
        if not multihost_utils.process_allgather(np.array(bool(what))).any():
            return
        if jax.process_index() == 0:
            console.print(f"{run / 'checkpoints' / str(step)} cannot be read: {what or 'another process says why'}")
        store_of(run).set_aside([step])


def has_remains(run: AnyPath) -> bool:
    """Whether a run still has checkpoints, or the rest of them. Those of a set go when its last member has left."""
    return store_of(run).is_there()


def remove(run: AnyPath) -> None:
    """Remove the checkpoints of a set. All processes must call it together."""
    multihost_utils.sync_global_devices("all members have left")
    if jax.process_index() == 0:
        store_of(run).remove()


def read_record(run: AnyPath) -> RunRecord:
    """RUN/config.json. Raises UserError where there is none, or it does not describe a run."""
    content = storage.read_json(run / "config.json")
    if content is None:
        raise UserError(f"{run}: not a run, config.json is missing; give the --out of `sae-jax train`")
    if names := members(run):
        raise UserError(f"{run}: a set of members; name one: {', '.join(str(run / MEMBERS / name) for name in names)}")
    record = RunRecord.from_json(content, run / "config.json")
    train = configs.from_dict(TrainConfig, as_now(record.train), f"{run / 'config.json'}: train")
    return dataclasses.replace(record, train=configs.to_dict(train))  # with the settings that are newer than the run


def begun(run: AnyPath) -> RunRecord | None:
    """The record of a run that has begun; None of another folder."""
    content = storage.read_json(run / "config.json") or {}
    is_run = content.get("kind") == RunRecord.KIND
    return RunRecord.from_json(content, run / "config.json") if is_run else None


def members(run: AnyPath) -> list[str]:
    """Names of the members that a set was started with; none for a run of one SAE, or no run."""
    content = storage.read_json(run / "config.json") or {}
    if content.get("kind") != MembersRecord.KIND:
        return []
    return list(MembersRecord.from_json(content, run / "config.json").members)


def check_resumable(run: AnyPath, record: RunRecord) -> None:
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


def check_members(run: AnyPath, names: list[str]) -> None:
    """Refuse to continue a run with other members than it was started with."""
    before = members(run)
    for name in sorted(set(before) ^ set(names)):
        what = "with" if name in before else "without"
        raise UsageError(
            f"{run} was started {what} the member {name}; keep the members to resume, or give another --out"
        )


def newest(run: AnyPath) -> tuple[AnyPath, str]:
    """Which run has the newest checkpoint of this one, and under which name: itself, or the set of which it is one."""
    path = run if isinstance(run, Url) else run.absolute()
    if path.parent.name == MEMBERS:
        of_set = latest_step(path.parent.parent, path.name)
        if of_set is not None and of_set > (latest_step(run) or 0):
            return path.parent.parent, path.name
    return run, ""


def part_name(name: str, part: str) -> str:
    """Under which name a part of a member's state is in a checkpoint."""
    return f"{name}.{part}" if name else part


def _settings(record: RunRecord) -> dict[str, Any]:
    """A record's settings under the names that users give them."""
    content = record.to_json()
    del content[SEAL]
    dictionary = content.pop("dictionary")
    sites = {"site": record.dictionary.sites.x, "reconstruct": record.dictionary.sites.y}
    content |= {name: dictionary[name] for name in ("variant", "sae", "data")} | sites
    return dict(configs.flatten(content))


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
