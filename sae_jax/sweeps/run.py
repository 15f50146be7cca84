"""Training and measuring what a sweep has planned, pass after pass.

DIR/sweep.json       what is trained, and where each member is measured
DIR/passes/<i>/      members that learn from one pass: a run such as `sae-jax train` makes
DIR/points/          what was measured so far, a file a member
DIR/results.jsonl    all of it, a point a line: for `sae-jax fit`
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import numpy as np

from sae_jax import config, storage
from sae_jax.activations.source import RowSource
from sae_jax.activations.stored import StoredRows
from sae_jax.evaluation.text import unseen_rows
from sae_jax.progress import console
from sae_jax.storage import AnyPath, HeldError, Lease, LostError
from sae_jax.sweeps import points
from sae_jax.sweeps.plan import Planned, SweepJob, in_passes
from sae_jax.sweeps.points import SweepMeasurements
from sae_jax.training import checkpoint, run, trackers
from sae_jax.training.ownership import as_the_first_says, owned
from sae_jax.training.preemption import is_preempted
from sae_jax.training.run import TrainJob
from sae_jax.types import PartialError, Sites, UsageError, UserError

MAY_CHANGE = ("memory_gib", "per_pass", "split", "log_every", "checkpoint_every", ".log", "tensorboard")  # of the plan


def sweep(job: SweepJob, planned: dict[str, Planned], source: RowSource) -> list[str]:
    """Train what is not there yet, pass after pass; a line for each pass that something is wrong with.

    Raises:
        UsageError: another sweep is at `job.out`.
        HeldError: another worker is at a pass, and the job does not say to go by such passes (`claim`).
        PartialError: so it does, and other workers are at all that is left.
    """
    out, is_first, worker = storage.path(job.out), jax.process_index() == 0, config.share(job.shard)
    trackers.check(job.train.log, job.out)  # before sweep.json is there
    _keep_plan(out, _plan(job, planned), job.data, is_first)
    passes = _kept_passes(out, in_passes(job, planned, worker), worker, is_first)
    problems: dict[str, str] = {}
    held: list[str] = []
    n_trained, is_stopped = 0, False

    def say(line: str) -> None:
        if is_first:
            console.print(line)

    # Passes that others seem to be at are looked at again in the end: those workers may have died.
    for is_patient in (False, True) if job.claim else (True,):
        held = []
        for i, (folder, names) in enumerate(passes.items()):
            path = out / "passes" / folder
            if folder in problems or as_the_first_says(not _to_train(out, path, names, planned)):
                continue
            if is_stopped:
                break
            if is_stopped := is_preempted():
                say("stopped by SIGTERM between two passes; the same command resumes there")
                break
            try:
                with owned(path, is_patient) as lease:
                    say(f"pass {i + 1} of {len(passes)}: {len(names)} members")
                    problem, is_stopped = _train_pass(job, out, path, names, planned, source, lease)
            except HeldError as error:
                if not job.claim:
                    raise HeldError(f"{error}; or give each worker its --shard=i/n, or all of them --claim") from None
                held.append(str(error))
                continue
            n_trained += 1
            if problem:
                problems[folder] = problem
            if is_first:
                points.collect(out)
    if is_first:
        for folder in passes:
            path = out / "passes" / folder
            left = Lease(path / "owner", path, is_patient=False)
            if left.holder() and not _to_train(out, path, passes[folder], planned):
                left.forget_the_dead()
        n, total = points.collect(out), sum(len(m.requested.marks) for m in planned.values())
        say(f"{out / 'results.jsonl'}: {n} points of {total}")
    if held and not n_trained and not is_stopped:
        raise PartialError(f"{out}: other workers are at all passes that are left, {len(held)}; {held[0]}")
    return list(problems.values())


def member_folders(out: AnyPath) -> dict[str, AnyPath]:
    """{member: its run} of all members that have a checkpoint, by name."""
    found = {path.parent.name: path.parent for path in out.glob("passes/*/members/*/checkpoints")}
    return dict(sorted(found.items()))


def failure(out: str, problems: list[str]) -> UserError:
    """What to raise for a sweep with problems."""
    has_points = any((storage.path(out) / points.POINTS).glob("*.json"))
    return (PartialError if has_points else UserError)(f"{out}: {'; '.join(problems)}")


def _train_pass(
    job: SweepJob,
    out: AnyPath,
    path: AnyPath,
    names: list[str],
    planned: dict[str, Planned],
    source: RowSource,
    lease: Lease,
) -> tuple[str, bool]:
    """Train the members of a pass, measuring each at its marks. (What is wrong, whether SIGTERM stopped it)."""
    names = _to_train(out, path, names, planned)
    if as_the_first_says(not names):
        return "", False  # another worker has trained it in the meantime
    settings, batch_size = job.sweep, job.train.batch_size
    sites = planned[names[0]].sites
    try:
        measurements = SweepMeasurements(
            out,
            _rows_to_measure(source, sites, settings.held_out, settings.split),
            sites,
            batch_size,
            {name: planned[name].requested for name in names},
            settings.tolerance,
            window=max(round(settings.window / batch_size), 1),
        )
        jobs: dict[str, TrainJob] = {name: _as_run(out, path, name, planned) for name in names}
        is_stopped = run.run(jobs, source, measurements, lease).is_stopped
    except LostError:
        raise
    except UserError as error:
        return str(error), False
    undone = [name for name in names if not _is_done(out, path, name, planned)]
    if is_stopped or as_the_first_says(not undone):
        return "", is_stopped
    what = f"{', '.join(undone)}: trained to the end, but {out / points.POINTS} lacks points"
    return f"{what}; restore them, or delete {path} to train again", False


def _rows_to_measure(source: RowSource, sites: Sites, n_rows: int, split: int) -> dict[str, np.ndarray]:
    """{source: f32[N, D]}: held-out rows where there are some; a sample of the rows themselves is said to be that."""
    if isinstance(source, StoredRows):
        return unseen_rows(source.activations, sites, n_rows, split)
    if jax.process_index() == 0:
        console.print(f"{source.name} have no held-out part: members are measured on rows they have learned from")
    return {name: source.sample(name)[:n_rows] for name in sites.all}


def _as_run(out: AnyPath, path: AnyPath, name: str, planned: dict[str, Planned]) -> SweepJob:
    """A member's part of a pass: as long as its last mark, or as it took to converge."""
    measured, member = points.read(out, name), planned[name]
    steps = max(member.requested.marks)
    if measured and measured[-1].converged:
        steps = measured[-1].tokens // member.job.train.batch_size
    train = dataclasses.replace(member.job.train, steps=steps)
    return dataclasses.replace(member.job, out=str(path), train=train, members=())


def _to_train(out: AnyPath, path: AnyPath, names: list[str], planned: dict[str, Planned]) -> list[str]:
    """The members to train in a pass: none if it is done, all if it has begun and was not ended."""
    begun = checkpoint.members(path)
    undone = [name for name in begun or names if not _is_done(out, path, name, planned)]
    return begun if begun and (undone or checkpoint.has_remains(path)) else undone


def _is_done(out: AnyPath, path: AnyPath, name: str, planned: dict[str, Planned]) -> bool:
    """Whether a member has its last point, and the weights that the point is of."""
    measured = points.read(out, name)
    if not measured or not (measured[-1].converged or measured[-1].steps == max(planned[name].requested.marks)):
        return False
    folder = path / checkpoint.MEMBERS / name
    if checkpoint.latest_step(folder) != measured[-1].steps:
        return False
    # All bytes are read, but not by workers that only look for something to do, and not by one process of many.
    return planned[name].job.claim or jax.process_count() > 1 or not checkpoint.problem(folder)


def _plan(job: SweepJob, planned: dict[str, Planned]) -> dict[str, Any]:
    """What must stay as it is while points are added."""
    return {
        "data": next(iter(planned.values())).requested.fields["data"],
        "sweep": config.to_dict(job.sweep),
        "members": {
            name: {**member.requested.fields["config"], "marks": [*member.requested.marks]}
            for name, member in planned.items()
        },
    }


def _keep_plan(out: AnyPath, plan: dict[str, Any], data: str, is_first: bool) -> None:
    """Write DIR/sweep.json; refuse to resume with another plan."""
    path = out / "sweep.json"
    before = storage.read_json(path)
    if before is None and any((out / points.POINTS).glob("*.json")):
        raise UserError(
            f"{out} has points but no sweep.json, so nobody knows what they are of; restore it, or give another --out"
        )
    if before is None:
        if not is_first or storage.create(path, storage.json_text(storage.sealed(plan), path).encode()):
            return
        before = storage.read_json(path) or {}  # another worker was faster
    before = storage.unsealed(before, path)
    old, new = (dict(config.flatten(content)) for content in (before, json.loads(json.dumps(plan))))
    for key in sorted(old.keys() | new.keys()):
        if key == "data" and old.get(key) != new[key]:
            raise UsageError(f"{out} was started on other rows than {data}; give another --out")
        if old.get(key) != new.get(key) and not key.endswith(MAY_CHANGE):
            raise UsageError(
                f"{out} was started with {key}={old.get(key)}, not {new.get(key)}; keep the plan to resume, or give "
                f"another --out"
            )


def _kept_passes(
    out: AnyPath, passes: dict[str, list[str]], worker: tuple[int, int], is_first: bool
) -> dict[str, list[str]]:
    """The passes as this worker's first attempt made them: another machine's memory may suggest others."""
    path = out / "passes" / f"{worker[0]}of{worker[1]}.json"
    before = storage.read_json(path)
    made = storage.json_text(storage.sealed(passes), path).encode()
    if before is None and is_first and not storage.create(path, made):
        before = storage.read_json(path)  # another worker was faster
    return storage.as_type(storage.unsealed(before, path), dict[str, list[str]], path) if before else passes
