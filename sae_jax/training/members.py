"""What only runs of several members need: who takes part, who fails, who leaves.

A run has one member, or a set of them that learn from the same batches. A member leaves a set after its last step, with
a checkpoint of its own, or is dropped when its loss is not finite; the others continue. How members lie on the devices
is in training/groups.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from sae_jax import storage
from sae_jax.activations.source import Batches
from sae_jax.record import MembersRecord
from sae_jax.saes.base import Batch
from sae_jax.saes.init import Sample
from sae_jax.saes.normalise import InputNorm
from sae_jax.storage import AnyPath
from sae_jax.training import checkpoint
from sae_jax.training.checkpoint import Checkpoints, check_members, check_resumable, latest_step, set_aside_damaged
from sae_jax.training.groups import Member, MemberGroup, group_members, initial_states
from sae_jax.training.state import TrainState
from sae_jax.training.step import DENSITY_BINS, Metrics, densities, lowest_density
from sae_jax.types import PartialError, UsageError, UserError

Queued = list[tuple[MemberGroup, Metrics]]


class Measurements(Protocol):
    """Where members are measured on rows that they do not learn from, and who is told."""

    def batches(self, mesh: Mesh) -> list[Batch]:
        """Rows to measure on, in batches of one size, on the devices of the mesh in use."""
        ...

    def is_due(self, member: Member, step: int) -> bool:
        """Whether the member is measured after `step` steps."""
        ...

    def note(self, member: Member, step: int, metrics: dict[str, float]) -> bool:
        """Take down what `MemberGroup.measure` found, of which fvu is finite. Whether the member continues.

        All processes say the same.
        """
        ...


class MemberSet:
    """The members of a run that are in training, with their states on the devices."""

    def __init__(
        self,
        run: AnyPath | None,
        members: Sequence[Member],
        mesh: Mesh,
        checkpoints: Checkpoints,
        sample: Callable[[InputNorm], Sample],
        source: Batches,
        lease: storage.Lease,
    ) -> None:
        """Take up the run: new states, or those of its last checkpoint. Raises UsageError where that cannot be.

        Args: as `loop.train`.
        """
        self._run, self._members, self._mesh, self._lease = run, members, mesh, lease
        self._checkpoints, self._source = checkpoints, source
        self.failed = {m: f"see {_failure(m)}" for m in members if m.name and m.folder and _failure(m).exists()}
        waiting = [member for member in members if member not in self.failed]
        self.active, states, self.start = _take_up(run, waiting, checkpoints, mesh, sample)
        self.groups = group_members(self.active, states, mesh)
        self.n_steps = max((member.train.steps for member in self.active), default=self.start)
        self.final: dict[str, TrainState] = {}  # of members that have left a run without a folder
        self._unseen: list[Batch] | None = None

    def step(self, batch: Batch) -> Queued:
        """Queue a step of every group."""
        return [(group, group.step(batch)) for group in self.groups]

    def fetch(self, step: int, queued: Queued) -> dict[Member, dict[str, float]]:
        """Metrics of a queued step from the devices, of the members that are active. Drops those that fail.

        A gradient that is not finite spoils the weights that a checkpoint of this very step would hold.
        """
        fetched = [(group, jax.device_get(metrics)) for group, metrics in queued]
        metrics = {m: group.metrics_of(m, part) for group, part in fetched for m in group.members if m in self.active}
        for member, values in list(metrics.items()):
            if not np.isfinite(values["loss"] + values["grad_norm"]):
                what = f"loss is {values['loss']}, gradient norm {values['grad_norm']}"
                self._drop(member, step, what, metrics.pop(member))
        return metrics

    def measure(self, step: int, measurements: Measurements) -> list[Member]:
        """Measure the members that are due. Those that end here, though they have steps left."""
        due = [member for member in self.active if measurements.is_due(member, step)]
        if not due:
            return []
        if self._unseen is None:
            self._unseen = measurements.batches(self._mesh)
        metrics: dict[Member, dict[str, float]] = {}
        for group in self.groups:
            if any(member in due for member in group.members):
                metrics |= group.measure(self._unseen)
        ended = []
        self._lease.check()
        for member in due:
            # The last update may have spoilt weights that no batch has met since.
            if not np.isfinite(metrics[member]["fvu"]):
                self._drop(member, step, f"FVU on held-out rows is {metrics[member]['fvu']}", metrics[member])
            elif not measurements.note(member, step, metrics[member]):
                ended.append(member)
        return ended

    def save(self, step: int, ended: Sequence[Member] = ()) -> None:
        """Save all active members. A member that leaves is saved before the set is saved without it."""
        self._lease.check()
        leaving = [member for member in self.active if member.train.steps == step or member in ended]
        staying = [member for member in self.active if member not in leaving]
        states: dict[str, TrainState] = {}
        for group in self.groups:
            states |= group.states([member for member in group.members if member in self.active])
        for member in leaving:
            if member.folder is None:
                self.final[member.name] = states.pop(member.name)
            elif member.name:
                with Checkpoints(member.folder, lease=self._lease) as of_member:
                    of_member.save(step, {"": states.pop(member.name)})
        if states:
            self._checkpoints.save(step, states)
        self.active = staying
        self._forget_empty_groups()

    def densities(self, batch: Batch) -> dict[Member, dict[str, Any]]:
        """A histogram of how often latents are active in a batch, of each active member (step.densities).

        All processes must call it together. A member whose code would be too large has none.
        """
        found: dict[Member, dict[str, Any]] = {}
        low = lowest_density(batch.x.shape[0])
        edges = np.linspace(low, 0.0, DENSITY_BINS + 1).tolist()
        for group in self.groups:
            members = [member for member in group.members if member in self.active]
            for member, state in zip(members, group.states(members).values(), strict=True):
                histogram = jax.device_get(densities(state, batch))
                if histogram is not None:
                    counts, silent = histogram["counts"].tolist(), float(histogram["silent"])
                    found[member] = {"counts": counts, "edges": edges, "silent": silent}
        return found

    def end(self) -> None:
        """Every member has left. Raises UserError, in one line, if some failed; PartialError if not all did."""
        self._lease.check()
        if self._run is not None and self._members[0].name:
            checkpoint.remove(self._run)  # of the set: every member has its own
        if self.failed:
            texts = [f"{m.name}: {what}" if m.name else what for m, what in self.failed.items()]
            summary = f"{len(self.failed)} of {len(self._members)} members failed: " if self._members[0].name else ""
            kind = UserError if len(self.failed) == len(self._members) else PartialError
            raise kind(summary + "; ".join(texts))

    def _drop(self, member: Member, step: int, what: str, metrics: dict[str, float]) -> None:
        """Leave what is needed to replay the step: its number, its rows, the checkpoint before it."""
        self.active = [other for other in self.active if other is not member]
        self._forget_empty_groups()
        if member.folder is None or self._run is None:
            self.failed[member] = f"{what} at step {step}; lower lr, or give out= to keep what shows the rows"
            return
        self._lease.check()
        self._checkpoints.wait()
        last = latest_step(self._run, member.name)
        if member.name and last is not None:  # the set's checkpoints will be without it
            target = {member.name: member.abstract(self._mesh)}
            with Checkpoints(member.folder, lease=self._lease) as of_member:
                of_member.save(last, {"": self._checkpoints.restore(target)[member.name]})
        path, rows = _failure(member, jax.process_index()), self._source.row_ids(step - 1).tolist()
        texts = {name: str(value) for name, value in metrics.items()}
        storage.write_json(path, {"step": step, "metrics": texts, "row_ids": rows, "last_checkpoint": last})
        self.failed[member] = (
            f"{what} at step {step}; {path} names its rows and the checkpoint before it; lower train.lr or look at "
            f"these rows of the set"
        )

    def _forget_empty_groups(self) -> None:
        self.groups = [g for g in self.groups if any(member in self.active for member in g.members)]


def is_save_due(step: int, members: Sequence[Member]) -> bool:
    """Whether a checkpoint begins at this step: on the interval, half-way between, and where a member ends."""
    every = {member.train.checkpoint_every for member in members}
    return any(step % n in (0, n // 2) for n in every) or any(step == member.train.steps for member in members)


def check_settings(run: AnyPath | None, members: Sequence[Member]) -> bool:
    """Whether there is a run already; refuses, with UsageError, to continue one with other members or settings."""
    if run is None:
        return False
    # A kill at the start of a run may leave it without its last records. Once there are weights they are all there.
    for member in members:
        has_weights = latest_step(run, member.name) is not None or latest_step(_folder(member)) is not None
        for folder in (run, _folder(member)) if has_weights else ():
            if not (folder / "config.json").exists():
                raise UserError(
                    f"{folder} has checkpoints but no config.json, so nobody knows their settings; restore it, or give "
                    f"another --out"
                )
    if not (run / "config.json").exists():
        return False
    check_members(run, [member.name for member in members if member.name])
    for member in members:
        if (_folder(member) / "config.json").exists():
            check_resumable(_folder(member), member.record)
    return True


def write_records(run: AnyPath | None, members: Sequence[Member], lease: storage.Lease) -> None:
    """config.json of the run and of each member."""
    records = {member.folder: member.record.to_json() for member in members if member.folder is not None}
    if run is not None and members[0].name:
        records = {run: MembersRecord(tuple(member.name for member in members)).to_json(), **records}
    for folder, record in records.items():
        lease.check()
        storage.write_json(folder / "config.json", record)


def _take_up(
    run: AnyPath | None,
    members: Sequence[Member],
    checkpoints: Checkpoints,
    mesh: Mesh,
    sample: Callable[[InputNorm], Sample],
) -> tuple[list[Member], dict[str, TrainState], int]:
    """The members that are not at their end, their states, and the step they stand at."""
    if run is None:
        return list(members), initial_states(members, sample, mesh), 0
    for member in members:
        # The state of a member that has left is not read.
        if member.name and (latest_step(_folder(member)) or 0) >= member.train.steps:
            set_aside_damaged(_folder(member))
    stands = {m: max(latest_step(run, m.name) or 0, latest_step(_folder(m)) or 0) for m in members}
    for member, step in stands.items():
        if step > member.train.steps:
            raise UsageError(
                f"{member.folder} stands at step {step}; train.steps={member.train.steps} must be at least that"
            )
    # A run without members is read even at its end: where its newest checkpoint is damaged, it is not there yet.
    active = [member for member in members if not member.name or stands[member] < member.train.steps]
    if not active:
        return [], {}, max(stands.values(), default=0)
    start = _common_step({member: stands[member] for member in active})
    if start == 0:
        states = initial_states(active, sample, mesh)
    else:
        targets = {m: m.abstract(mesh) for m in active}
        in_set = {m.name: target for m, target in targets.items() if latest_step(run, m.name) == start}
        states = checkpoints.restore(in_set) if in_set else {}
        for member, target in targets.items():
            if member.name not in states:  # it had left, and has got more steps since
                with Checkpoints(_folder(member)) as of_member:
                    states[member.name] = of_member.restore({"": target})[""]
    start = _common_step({member: int(states[member.name].step) for member in active})
    return [member for member in active if member.train.steps > start], states, start


def _common_step(steps: dict[Member, int]) -> int:
    (one, low), (other, high) = (choose(steps.items(), key=lambda item: item[1]) for choose in (min, max))
    if low < high:
        raise UsageError(
            f"{one.folder} stands at step {low} and {other.folder} at {high}, but members learn from the same batches; "
            f"leave the train.steps of {one.name} as they were, or give another --out"
        )
    return low


def _folder(member: Member) -> AnyPath:
    assert member.folder is not None
    return member.folder


def _failure(member: Member, process: int = 0) -> AnyPath:
    """Where it is written that a member failed. A set continues without it; a run without members is tried again."""
    return _folder(member) / f"failure-{process}.json"
