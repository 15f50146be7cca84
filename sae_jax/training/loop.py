"""The run, top to bottom: state, data, steps, checkpoints, log.

source (batch of step t) --> devices --> step of each member --> metrics of t, fetched while t+1 runs
                                         |
                                         +--> checkpoint: on an interval, on SIGTERM, at the end
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple, Self

import jax
from jax.sharding import Mesh

from sae_jax import mesh as meshes
from sae_jax.activations.source import Batches
from sae_jax.progress import Progress, console
from sae_jax.saes import penalty
from sae_jax.saes.base import Batch
from sae_jax.saes.init import Sample
from sae_jax.saes.normalise import InputNorm
from sae_jax.storage import AnyPath, Lease
from sae_jax.training import logs
from sae_jax.training.checkpoint import Checkpoints
from sae_jax.training.groups import Member, check_groups
from sae_jax.training.members import Measurements, MemberSet, check_settings, is_save_due, write_records
from sae_jax.training.ownership import owned
from sae_jax.training.preemption import is_preempted
from sae_jax.training.state import TrainState
from sae_jax.training.trackers import Trackers

BEGINNING = 0.2  # share of a run in which many latents may be active
MANY_DEAD = 0.3


class Trained(NamedTuple):
    """Where a run stands."""

    step: int
    is_stopped: bool  # by SIGTERM, with members that have steps left
    states: dict[str, TrainState]  # of a run without a folder: the last state of each member; otherwise on the disk


def train(
    run: AnyPath | None,
    members: Sequence[Member],
    mesh: Mesh,
    source: Batches,
    sample: Callable[[InputNorm], Sample],
    measurements: Measurements | None = None,
    lease: Lease | None = None,
) -> Trained:
    """Train every member until its `train.steps`, or until the machine is to be taken away (SIGTERM).

    The same call resumes: it continues from the last checkpoint in `run`.

    Args:
        run: directory of the run, shared by all processes; None: nothing is written.
        members: what to train; they agree in all that belongs to the pass over the data (settings.SHARED).
        mesh: devices; batches are split over all of them.
        source: batches of any step.
        sample: called for a run without checkpoint, to learn what initialisation needs to know of the data.
        measurements: where members are measured on the way, and may end early. A run that is killed repeats those that
            come after its last checkpoint.
        lease: of `run`, if the caller holds it already.

    Raises:
        HeldError: another job is at `run`.
        UsageError: `run` was started with other settings.
        UserError: the loss of a member was not finite; failure-<process>.json in its folder names step and rows.
    """
    with owned(run) if lease is None else contextlib.nullcontext(lease) as held:
        return _train(run, members, mesh, source, sample, measurements, held)


def _train(
    run: AnyPath | None,
    members: Sequence[Member],
    mesh: Mesh,
    source: Batches,
    sample: Callable[[InputNorm], Sample],
    measurements: Measurements | None,
    lease: Lease,
) -> Trained:
    is_first = jax.process_index() == 0
    check_groups(members, mesh)
    # All of these may refuse, so before anything is written.
    if not check_settings(run, members):
        for member in members:
            sample(member.sae.input_norm)

    # Trackers are the outermost: the last save does not wait for their ends.
    with (
        Trackers(members[0].train.log if is_first else ()) as trackers,
        jax.set_mesh(mesh),
        Checkpoints(run, lease=lease) as checkpoints,
    ):
        active = MemberSet(run, members, mesh, checkpoints, sample, source, lease)
        if is_first:
            write_records(run, members, lease)
        machine = {"mesh": meshes.sizes(mesh), "n_processes": jax.process_count()}
        attempt = logs.Attempts(run if is_first else None, lease, active.start, **machine)
        with _Log(active, source, is_first, lease, trackers) as log:
            done, saved, pending = active.start, active.start, []
            for step, rows in source.batches(active.start):
                if not active.active:
                    break
                batch = source.place(rows, mesh)
                queued = active.step(batch)
                log.write(done, active.fetch(done, pending))  # of the step before, while this one runs
                done, pending = step + 1, queued
                ended: list[Member] = []
                if measurements and any(measurements.is_due(member, done) for member in active.active):
                    log.write(done, active.fetch(done, pending))
                    pending, ended = [], active.measure(done, measurements)
                is_stopping, is_needed = is_preempted(), source.needs_save
                if is_stopping or ended or is_needed or is_save_due(done, active.active):
                    # The save before this one ends before this step is on record. With two saves an interval, a run
                    # is thus never further than one interval from its last complete checkpoint.
                    checkpoints.wait()
                    source.saved(saved, is_over=False)
                    log.write(done, active.fetch(done, pending))
                    log.flush()
                    pending = []
                    if members[0].train.log:
                        log.densities(done, active, batch)
                    active.save(done, ended)
                    saved = done
                    attempt.record(log.done, "running")
                    if is_needed:
                        checkpoints.wait()
                        source.saved(saved, is_over=False)
                if is_stopping or not active.active:
                    break
    if not active.active:
        source.saved(done, is_over=True)
    attempt.record(log.done, "preempted" if active.active else "failed" if active.failed else "finished")
    if not active.active:
        active.end()
    elif is_first and run is not None:
        console.print(f"stopped by SIGTERM at step {done}; the same command resumes there")
    return Trained(done, bool(active.active), active.final)


class _Log:
    """What the steps leave behind: a row of each member's log where it is due, and the progress line."""

    def __init__(self, members: MemberSet, source: Batches, is_first: bool, lease: Lease, trackers: Trackers) -> None:
        self.done = members.start  # steps that were finite for some member
        self._source, self._is_first, self._trackers = source, is_first, trackers
        self._warned: set[tuple[Member, int]] = set()
        self._began = self._last_time = time.monotonic()
        self._last_step, self._last_waited = members.start, source.wait_seconds
        self._open = contextlib.ExitStack()
        self._files = {
            member: self._open.enter_context(
                logs.Metrics(
                    member.folder if is_first else None,
                    lease,
                    members.start,
                    functools.partial(_is_logged, member),
                )
            )
            for member in members.active
        }
        if is_first:
            for member, file in self._files.items():
                trackers.open(member, lease, members.start, file.past, file.last)
                file.past.clear()
        self._progress = self._open.enter_context(
            Progress("train", members.n_steps, "steps", members.start, silent=not is_first)
        )

    def write(self, step: int, metrics: dict[Member, dict[str, float]]) -> None:
        """Note a step of the members in `metrics`."""
        self.done = step if metrics else self.done
        due = [member for member in metrics if _is_logged(member, step)]
        if not due:
            return
        now = time.monotonic()
        elapsed = max(now - self._last_time, 1e-9)
        waited = self._source.wait_seconds - self._last_waited
        batch_size = due[0].train.batch_size
        rate = (step - self._last_step) * batch_size / elapsed
        self._last_time, self._last_step, self._last_waited = now, step, self._source.wait_seconds
        wall_clock = {
            "tokens_per_second": round(rate, 1),
            "input_wait": round(min(waited / elapsed, 1.0), 4),
            "seconds": round(now - self._began, 3),
        }
        for member in due:
            if self._is_first:
                self._warn(member, step, metrics[member])
            row = {"step": step, "tokens": step * batch_size, **metrics[member], **wall_clock}
            self._files[member].write(row)
            self._trackers.row(member, row)
        wait = f"input wait {wall_clock['input_wait']:.0%}"
        self._progress.update(step, f"{rate:,.0f} tokens/s  {_figures(metrics)}  {wait}")

    def flush(self) -> None:
        """All rows are where a resumed run finds them."""
        for file in self._files.values():
            file.flush()

    def densities(self, step: int, members: MemberSet, batch: Batch) -> None:
        """Send trackers how often latents are active in the batch of a save. All processes must call it together."""
        histograms = members.densities(batch)
        for member in members.active:
            if member in histograms:
                self._trackers.density(member, step, histograms[member])
            elif self._is_first and (member, -1) not in self._warned:
                self._warned.add((member, -1))
                console.print(f"{member}: at step {step:,} too many latents are active in a row to show their density")

    def _warn(self, member: Member, step: int, values: dict[str, float]) -> None:
        """Say once, past the beginning, that a member has too many active latents, or too many dead ones."""
        if step < BEGINNING * member.train.steps:
            return
        d_model, l0, dead = max(member.record.dictionary.widths.x), values["l0"], values["dead_fraction"]
        what = f"{l0:.0f} latents are active in a row of {d_model}, so little is sparse"
        said = {
            f"{what}; {penalty.how_to_have_fewer(member.sae)}": l0 > d_model / 2,
            f"{dead:.0%} of its latents are dead; lower train.lr, or sae.n_latents": dead > MANY_DEAD,
        }
        for i, (what, holds) in enumerate(said.items()):
            if holds and (member, i) not in self._warned:
                self._warned.add((member, i))
                console.print(f"{member}: at step {step:,} {what}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.__exit__(kind, error, trace)


def _is_logged(member: Member, step: int) -> bool:
    return step % member.train.log_every == 0 or step in (1, member.train.steps)


def _figures(metrics: dict[Member, dict[str, float]]) -> str:
    """The progress line's figures: all of one SAE, the best and the worst of several."""
    if len(metrics) == 1:
        (values,) = metrics.values()
        return f"fvu {values['fvu']:.4f}  l0 {values['l0']:.1f}  dead {values['dead_fraction']:.1%}"
    ranked = sorted(metrics, key=lambda member: metrics[member]["fvu"])
    fvu = " to ".join(f"{metrics[m]['fvu']:.4f} ({m.name})" for m in (ranked[0], ranked[-1]))
    dead = max(values["dead_fraction"] for values in metrics.values())
    return f"{len(metrics)} members  fvu {fvu}  dead up to {dead:.1%}"
