"""Training and measuring what a sweep has planned, pass after pass.

DIR/sweep.json       what is trained, and where each member is measured
DIR/passes/<i>/      members that learn from one pass: a run such as `sae-jax train` makes
DIR/points/          what was measured so far, a file a member
DIR/results.jsonl    all of it, a point a line: for `sae-jax fit`
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from sae_jax import config, storage
from sae_jax.activations.source import RowSource
from sae_jax.activations.stored import StoredRows
from sae_jax.evaluation.text import unseen_rows
from sae_jax.progress import console
from sae_jax.sweeps import points
from sae_jax.sweeps.plan import Planned, SweepJob, in_passes
from sae_jax.sweeps.points import SweepMeasurements
from sae_jax.training import checkpoint, run
from sae_jax.types import Sites, UsageError, UserError

MAY_CHANGE = ("memory_gib", "per_pass", "log_every", "checkpoint_every", "tensorboard")  # of the plan


def sweep(job: SweepJob, planned: dict[str, Planned], source: RowSource) -> list[str]:
    """Train what is not there yet, pass after pass; a line for each pass that something is wrong with."""
    out, is_first = Path(job.out), jax.process_index() == 0
    _keep_plan(out, job, planned, is_first)
    passes = _kept_passes(out, in_passes(job, planned, config.share(job.shard)), config.share(job.shard), is_first)
    problems: list[str] = []
    for i, (folder, names) in enumerate(passes.items()):
        path = out / "passes" / folder
        names = checkpoint.members(path) or [name for name in names if not _is_done(out, name, planned)]
        if all(_is_done(out, name, planned) for name in names):
            continue
        with _held(path, is_first) as is_held:
            if not is_held and job.claim:
                continue
            if not is_held:
                raise UserError(f"{path}: another worker is at it; give each --shard=i/n, or all of them --claim")
            if is_first:
                console.print(f"pass {i + 1} of {len(passes)}: {len(names)} members")
            try:
                _train_pass(job, out, path, names, planned, source)
            except UserError as error:
                problems.append(str(error))
            else:
                if not _as_the_first(all(_is_done(out, name, planned) for name in names)):
                    break  # the machine is to be taken away; the loop has said so
        if is_first:
            points.collect(out)
    if is_first:
        n, total = points.collect(out), sum(len(m.requested.marks) for m in planned.values())
        console.print(f"{out / 'results.jsonl'}: {n} points of {total}")
    return problems


def _train_pass(
    job: SweepJob, out: Path, path: Path, names: list[str], planned: dict[str, Planned], source: RowSource
) -> None:
    """Train the members of a pass, measuring each at its marks."""
    settings, batch_size = job.sweep, job.train.batch_size
    sites = planned[names[0]].sites
    measurements = SweepMeasurements(
        out,
        _rows_to_measure(source, sites, settings.held_out),
        sites,
        batch_size,
        {name: planned[name].requested for name in names},
        settings.tolerance,
        window=max(round(settings.window / batch_size), 1),
    )
    run.run({name: _as_run(out, path, name, planned) for name in names}, source, measurements)


def _rows_to_measure(source: RowSource, sites: Sites, n_rows: int) -> dict[str, np.ndarray]:
    """{source: f32[N, D]}: held-out rows where there are some; a sample of the rows themselves is said to be that."""
    if isinstance(source, StoredRows):
        return unseen_rows(source.activations, sites, n_rows)
    if jax.process_index() == 0:
        console.print(f"{source.name} have no held-out part: members are measured on rows they have learned from")
    return {name: source.sample(name)[:n_rows] for name in sites.all}


def _as_run(out: Path, path: Path, name: str, planned: dict[str, Planned]) -> SweepJob:
    """A member's part of a pass: as long as its last mark, or as it took to converge."""
    measured, member = points.read(out, name), planned[name]
    steps = max(member.requested.marks)
    if measured and measured[-1].converged:
        steps = measured[-1].tokens // member.job.train.batch_size
    train = dataclasses.replace(member.job.train, steps=steps)
    return dataclasses.replace(member.job, out=str(path), train=train, members=())


def _is_done(out: Path, name: str, planned: dict[str, Planned]) -> bool:
    measured = points.read(out, name)
    last_mark = max(planned[name].requested.marks)
    return bool(measured) and (measured[-1].converged or measured[-1].steps == last_mark)


def _keep_plan(out: Path, job: SweepJob, planned: dict[str, Planned], is_first: bool) -> None:
    """Write DIR/sweep.json; refuse to resume with another plan."""
    plan = {
        "sweep": config.to_dict(job.sweep),
        "members": {
            name: {**member.requested.fields["config"], "marks": [*member.requested.marks]}
            for name, member in planned.items()
        },
    }
    before = storage.read_json(out / "sweep.json")
    if before is None:
        if is_first:
            storage.write_json(out / "sweep.json", plan)
        return
    old, new = (dict(config.flatten(content)) for content in (before, json.loads(json.dumps(plan))))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.endswith(MAY_CHANGE):
            raise UsageError(
                f"{out} was started with {key}={old.get(key)}, not {new.get(key)}; keep the plan to resume, or give "
                f"another --out"
            )


def _kept_passes(
    out: Path, passes: dict[str, list[str]], worker: tuple[int, int], is_first: bool
) -> dict[str, list[str]]:
    """The passes as this worker's first attempt made them: another machine's memory may suggest others."""
    path = out / "passes" / f"{worker[0]}of{worker[1]}.json"
    before = storage.read_json(path)
    if before is None and is_first:
        storage.write_json(path, passes)
    return before or passes


@contextlib.contextmanager
def _held(path: Path, is_first: bool) -> Iterator[bool]:
    """Whether this worker has a pass for itself, until it ends in whatever way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        is_held = True
        if is_first:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                is_held = False
        yield _as_the_first(is_held)


def _as_the_first(answer: bool) -> bool:
    """What the first process says: it has written the files, and others may see them later."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(answer)))
