"""The run, top to bottom: state, data, steps, checkpoints, record.

loader (step t) --> rows over all devices --> step of each member --> metrics of t, fetched while t+1 runs
                                               |
                                               +--> checkpoint: on an interval, on SIGTERM, at the end

A run has one member, or a set of them that learn from the same batches (training/members.py). A member leaves a set
after its last step, with a checkpoint of its own, or when its loss is not finite. The others go on.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sae_jax import config as configs
from sae_jax import mesh as meshes
from sae_jax.progress import Progress, console
from sae_jax.saes.base import Batch, InputNorm, Sample
from sae_jax.training import logs
from sae_jax.training.checkpoint import Checkpoints, check_members, check_resumable, latest_step
from sae_jax.training.members import Lane, Member, check_lanes, initial_states, lanes_of, place
from sae_jax.training.state import TrainState, abstract
from sae_jax.training.step import Metrics
from sae_jax.types import Sites, UsageError, UserError


class Batches(Protocol):
    """Where rows come from. The rows of step t depend on t alone, so the step is all the state there is."""

    wait_seconds: float  # so far, for input

    def batches(self, start_step: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(step, {source: [B / processes, D]}) from `start_step` on, without end."""
        ...

    def row_ids(self, step: int) -> np.ndarray:
        """i64[B / processes]: which rows of the set this process's part of a batch holds."""
        ...


class Marks(Protocol):
    """Where members are measured on rows that they do not learn from, and who is told."""

    rows: list[dict[str, np.ndarray]]  # batches of one size: {source: this process's part}

    def due(self, member: Member, step: int) -> bool:
        """Whether the member is measured after `step` steps."""
        ...

    def note(self, member: Member, step: int, found: dict[str, float]) -> bool:
        """Take finite fvu, l0 and dead_fraction down. Whether the member goes on; all processes say the same."""
        ...


def train(
    run: Path,
    members: Sequence[Member],
    mesh: Mesh,
    loader: Batches,
    sites: Sites,
    sample: Callable[[InputNorm], Sample],
    prepare: Callable[[Batch], Batch] | None = None,
    marks: Marks | None = None,
) -> int:
    """Train every member until its `train.steps`, or until the machine is to be taken away (SIGTERM).

    The same call resumes: it goes on from the last checkpoint in `run`.

    Args:
        run: directory of the run, shared by all processes.
        members: what to train; they agree in all that belongs to the pass over the data (state.SHARED).
        mesh: devices; batches are split over all of them.
        loader: rows of any step.
        sites: sources that are encoded, and reconstructed.
        sample: called for a run without checkpoint, to learn what initialisation needs to know of the data.
        prepare: makes the batch that members learn from of the one on the devices, where that is not the loader's.
        marks: where members are measured on the way, and may end early. A run that is killed does those again that
            come after its last checkpoint.

    Returns:
        The step the run stands at.

    Raises:
        UsageError: `run` was started with other settings.
        UserError: the loss of a member was not finite; failure-<process>.json in its folder names step and rows.
    """
    first = jax.process_index() == 0
    sample = functools.cache(sample)
    check_lanes(members, mesh)
    # All of these may refuse, so before anything is written.
    if (run / "config.json").exists():
        _check_resumable(run, members)
    else:
        for member in members:
            sample(member.sae.input_norm)

    with jax.set_mesh(mesh), Checkpoints(run) as checkpoints:
        failed = {member: f"see {_failure(member)}" for member in members if member.name and _failure(member).exists()}
        active, states, start = _take_up(run, [m for m in members if m not in failed], checkpoints, mesh, sample)
        if first:
            _write_configs(run, members)
        attempt = logs.Attempts(run, start, not first, mesh=meshes.sizes(mesh), n_processes=jax.process_count())
        lanes = lanes_of(active, states, mesh)
        unseen = [place(rows, sites, mesh) for rows in marks.rows] if marks else []
        with _Record(active, loader, start, not first) as record:

            def finish(step: int, queued: list[tuple[Lane, Metrics]]) -> list[Member]:
                """Log a step; the members that go on after it."""
                metrics = _fetch(queued, active)
                # A gradient that is not finite spoils the weights that a checkpoint of this very step would hold.
                bad = [m for m, of in metrics.items() if not np.isfinite(of["loss"] + of["grad_norm"])]
                for member in bad:
                    of = metrics.pop(member)
                    what = f"loss is {of['loss']}, gradient norm {of['grad_norm']}"
                    failed[member] = _fail(run, member, step, what, of, loader, checkpoints, mesh)
                record.write(step, metrics)
                return [member for member in active if member not in bad]

            done, pending = start, []
            for step, rows in loader.batches(start):
                if not active:
                    break
                batch = place(rows, sites, mesh)
                batch = prepare(batch) if prepare else batch
                queued = [(lane, lane.step(batch)) for lane in lanes]
                active = finish(step, pending)
                done, pending = step + 1, queued
                ended: list[Member] = []
                if marks and any(marks.due(member, done) for member in active):
                    active, pending = finish(done, pending), []
                    due = [member for member in active if marks.due(member, done)]
                    for member, found in _measure(due, lanes, unseen).items():
                        # The last update may have spoilt weights that no batch has met since.
                        if not np.isfinite(found["fvu"]):
                            what = f"FVU on held-out rows is {found['fvu']}"
                            failed[member] = _fail(run, member, done, what, found, loader, checkpoints, mesh)
                        elif not marks.note(member, done, found):
                            ended.append(member)
                    active = [member for member in active if member not in failed]
                # JAX counts from 0: a SIGTERM from before the first question is agreed upon for step 1 of the attempt.
                stopping = multihost_utils.reached_preemption_sync_point(done - start)
                if _is_due(done, active) or ended or stopping:
                    # The save before this one ends before this step is on record. With two saves an interval, a run
                    # is thus never further than one interval from its last complete checkpoint.
                    checkpoints.wait()
                    active, pending = finish(done, pending), []
                    active = _save(done, active, ended, lanes, checkpoints)
                    attempt.record(record.done, "running")
                lanes = [lane for lane in lanes if any(member in active for member in lane.members)]
                if stopping:
                    break
    attempt.record(record.done, "preempted" if active else "failed" if failed else "finished")
    if active:
        if first:
            console.print(f"stopped by SIGTERM at step {done}; the same command goes on from there")
        return done
    if members[0].name:
        _remove_checkpoints(run)  # of the set: every member has its own
    if failed:
        raise UserError(_summary(members, failed))
    return done


def _check_resumable(run: Path, members: Sequence[Member]) -> None:
    check_members(run, [member.name for member in members if member.name])
    for member in members:
        if (member.folder / "config.json").exists():
            check_resumable(member.folder, member.facts)


def _take_up(
    run: Path,
    members: Sequence[Member],
    checkpoints: Checkpoints,
    mesh: Mesh,
    sample: Callable[[InputNorm], Sample],
) -> tuple[list[Member], dict[str, TrainState], int]:
    """The members that are not at their end, their states, and the step they stand at."""
    stands = {m: max(latest_step(run, m.name) or 0, latest_step(m.folder) or 0) for m in members}
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
        targets = {m: abstract(*m.program, m.widths, mesh) for m in active}
        in_set = {m.name: target for m, target in targets.items() if latest_step(run, m.name) == start}
        states = checkpoints.restore(in_set) if in_set else {}
        for member, target in targets.items():
            if member.name not in states:  # it had left, and has got more steps since
                with Checkpoints(member.folder) as own:
                    states[member.name] = own.restore({"": target})[""]
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


def _write_configs(run: Path, members: Sequence[Member]) -> None:
    if members[0].name:
        configs.write_json(run / "config.json", {"members": [member.name for member in members]})
    for member in members:
        member.folder.mkdir(parents=True, exist_ok=True)
        configs.write_json(member.folder / "config.json", member.facts)


def _is_due(step: int, members: Sequence[Member]) -> bool:
    """Whether a checkpoint is begun at this step: on the interval, half-way between, and where a member ends."""
    every = {member.train.checkpoint_every for member in members}
    return any(step % n in (0, n // 2) for n in every) or any(step == member.train.steps for member in members)


def _measure(members: list[Member], lanes: list[Lane], batches: list[Batch]) -> dict[Member, dict[str, float]]:
    """What members make of rows that they do not learn from."""
    found: dict[Member, dict[str, float]] = {}
    for lane in lanes:
        if any(member in members for member in lane.members):
            found |= lane.measure(batches)
    return {member: found[member] for member in members}


def _save(
    done: int, active: list[Member], ended: list[Member], lanes: list[Lane], checkpoints: Checkpoints
) -> list[Member]:
    """Save all active members; those that stay. Who leaves the set saves before the set saves without it."""
    states = {}
    for lane in lanes:
        states |= lane.states([member for member in lane.members if member in active])
    leaving = [member for member in active if member.train.steps == done or member in ended]
    for member in leaving:
        if member.name:
            with Checkpoints(member.folder) as own:
                own.save(done, {"": states.pop(member.name)})
    if states:
        checkpoints.save(done, states)
    return [member for member in active if member not in leaving]


def _fetch(queued: list[tuple[Lane, Metrics]], active: Sequence[Member]) -> dict[Member, dict[str, float]]:
    """Metrics of a step from the devices, of the members that count."""
    fetched = [(lane, jax.device_get(metrics)) for lane, metrics in queued]
    return {m: lane.metrics_of(m, metrics) for lane, metrics in fetched for m in lane.members if m in active}


class _Record:
    """What the steps leave behind: a row of each member's log where it is due, and the progress line."""

    def __init__(self, members: Sequence[Member], loader: Batches, start: int, silent: bool) -> None:
        self.done = start  # steps that were finite for some member
        self._loader = loader
        self._began = self._last_time = time.monotonic()
        self._last_step, self._last_waited = start, loader.wait_seconds
        self._open = contextlib.ExitStack()
        self._files = {
            m: self._open.enter_context(
                logs.Metrics(m.folder, start, functools.partial(_is_logged, m), m.train.tensorboard, silent)
            )
            for m in members
        }
        n_steps = max((member.train.steps for member in members), default=start)
        self._progress = self._open.enter_context(Progress("train", n_steps, "steps", start, silent))

    def write(self, step: int, metrics: dict[Member, dict[str, float]]) -> None:
        """Note a step of the members in `metrics`."""
        self.done = step if metrics else self.done
        due = [member for member in metrics if _is_logged(member, step)]
        if not due:
            return
        now = time.monotonic()
        elapsed = max(now - self._last_time, 1e-9)
        waited = self._loader.wait_seconds - self._last_waited
        batch_size = due[0].train.batch_size
        rate = (step - self._last_step) * batch_size / elapsed
        self._last_time, self._last_step, self._last_waited = now, step, self._loader.wait_seconds
        wall_clock = {
            "tokens_per_second": round(rate, 1),
            "input_wait": round(min(waited / elapsed, 1.0), 4),
            "seconds": round(now - self._began, 3),
        }
        for member in due:
            row = {"step": step, "tokens": step * batch_size, **metrics[member], **wall_clock}
            self._files[member].write(row)
        self._progress.update(
            step, f"{rate:,.0f} tokens/s  {_figures(metrics)}  input wait {wall_clock['input_wait']:.0%}"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.__exit__(kind, error, trace)


def _is_logged(member: Member, step: int) -> bool:
    return step % member.train.log_every == 0 or step in (1, member.train.steps)


def _figures(metrics: dict[Member, dict[str, float]]) -> str:
    """The progress line's figures: all of one SAE, the best and the worst of several."""
    if len(metrics) == 1:
        (of,) = metrics.values()
        return f"fvu {of['fvu']:.4f}  l0 {of['l0']:.1f}  dead {of['dead_fraction']:.1%}"
    ranked = sorted(metrics, key=lambda member: metrics[member]["fvu"])
    fvu = " to ".join(f"{metrics[m]['fvu']:.4f} ({m.name})" for m in (ranked[0], ranked[-1]))
    dead = max(of["dead_fraction"] for of in metrics.values())
    return f"{len(metrics)} members  fvu {fvu}  dead up to {dead:.1%}"


def _failure(member: Member, process: int = 0) -> Path:
    """Where it is written that a member failed. A set goes on without it; a run without members is tried again."""
    return member.folder / f"failure-{process}.json"


def _fail(
    run: Path,
    member: Member,
    step: int,
    what: str,
    metrics: dict[str, float],
    loader: Batches,
    checkpoints: Checkpoints,
    mesh: Mesh,
) -> str:
    """Leave what is needed to replay the step: its number, its rows, the checkpoint before it. Returns what to say."""
    checkpoints.wait()
    last = latest_step(run, member.name)
    if member.name and last is not None:  # the set's checkpoints will go on without it
        target = abstract(*member.program, member.widths, mesh)
        with Checkpoints(member.folder) as own:
            own.save(last, {"": checkpoints.restore({member.name: target})[member.name]})
    path = _failure(member, jax.process_index())
    rows = loader.row_ids(step - 1).tolist()
    facts = {"step": step, "metrics": {k: str(v) for k, v in metrics.items()}, "row_ids": rows}
    configs.write_json(path, {**facts, "last_checkpoint": last})
    return (
        f"{what} at step {step}; {path} names its rows and the checkpoint before it; lower train.lr or look at these "
        f"rows of the set"
    )


def _summary(members: Sequence[Member], failed: dict[Member, str]) -> str:
    """One line for all that failed."""
    said = "; ".join(f"{member.name}: {what}" if member.name else what for member, what in failed.items())
    return f"{len(failed)} of {len(members)} members failed: {said}" if members[0].name else said


def _remove_checkpoints(run: Path) -> None:
    multihost_utils.sync_global_devices("all members have left")
    if jax.process_index() == 0:
        shutil.rmtree(run / "checkpoints")
