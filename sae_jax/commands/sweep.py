"""`sae-jax sweep RECIPE --data SET --out DIR`: a grid of autoencoders, measured at marks, as one table.

DIR/sweep.json       what is trained, and where each member is measured
DIR/passes/<i>/      members that learn from one pass: a run such as `sae-jax train` makes
DIR/points/          what was found so far, a file a member
DIR/results.jsonl    all of it, a point a line: for `sae-jax fit`
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from sae_jax import config, recipe, storage
from sae_jax.activations.store import ActivationSet, open_activations
from sae_jax.commands import runtime
from sae_jax.commands.sweep_plan import Planned, Sweep, in_passes, plan, show
from sae_jax.commands.train import train
from sae_jax.evaluation.text import unseen_rows
from sae_jax.progress import console
from sae_jax.sweeps import points as marks
from sae_jax.sweeps.points import Marks
from sae_jax.training import checkpoint
from sae_jax.types import Sites, UsageError, UserError

MAY_CHANGE = ("memory_gib", "per_pass", "log_every", "checkpoint_every", "tensorboard")  # of the plan


def run(argv: Sequence[str]) -> None:
    """Parse, join the other processes, sweep."""
    command = recipe.parse(Sweep, argv, "sae-jax sweep")
    worker = runtime.worker(command.shard)
    if "://" in command.out:
        raise UsageError(f"--out={command.out}: a sweep needs a directory that all workers share; URLs are for sets")
    if not command.dry_run:
        runtime.start_distributed()
    runtime.warn_of_idle_gpu()
    activations = open_activations(command.data, command.allow_partial)
    planned, refused = plan(command, argv, activations)
    passes = in_passes(command, planned, worker)
    if jax.process_index() == 0:
        if command.dry_run:
            show(command, planned, passes)
        for line in refused:
            console.print(f"left out: {line}", markup=False)
    problems = [] if command.dry_run else sweep(command, planned, passes)
    if refused or problems:
        what = [f"{len(refused)} left out"] * bool(refused) + problems
        raise UserError(f"{command.out}: {'; '.join(what)}")


def sweep(command: Sweep, planned: dict[str, Planned], passes: dict[str, list[str]]) -> list[str]:
    """Train what is not there yet, pass after pass; a line for each pass that something is wrong with."""
    out, first = Path(command.out), jax.process_index() == 0
    _keep_plan(out, command, planned, first)
    passes, problems = _kept(out, passes, runtime.worker(command.shard), first), []
    for i, (folder, names) in enumerate(passes.items()):
        path = out / "passes" / folder
        names = checkpoint.members(path) or [name for name in names if not _is_done(out, name, planned)]
        if all(_is_done(out, name, planned) for name in names):
            continue
        with _held(path, first) as held:
            if not held and command.claim:
                continue
            if not held:
                raise UserError(f"{path}: another worker is at it; give each --shard=i/n, or all of them --claim")
            if first:
                console.print(f"pass {i + 1} of {len(passes)}: {len(names)} members", markup=False)
            try:
                train({name: _as_run(out, path, name, planned) for name in names}, _marks(command, planned, names))
            except UserError as error:
                problems.append(str(error))
            else:
                if not _as_the_first(all(_is_done(out, name, planned) for name in names)):
                    break  # the machine is to be taken away; the loop has said so
        if first:
            marks.collect(out)
    if first:
        n = marks.collect(out)
        console.print(f"{out / 'results.jsonl'}: {n} points of {sum(len(m.wanted.marks) for m in planned.values())}")
    return problems


def _marks(
    command: Sweep, planned: dict[str, Planned], names: list[str]
) -> Callable[[ActivationSet, Sites, int], Marks]:
    """Where and on what members of a pass are measured, once the set is open."""
    settings, batch_size = command.sweep, command.train.batch_size
    window = max(round(settings.window / batch_size), 1)

    def begin(activations: ActivationSet, sites: Sites, n_devices: int) -> Marks:
        rows = unseen_rows(activations, sites, settings.held_out)
        n = len(next(iter(rows.values())))
        size = min(batch_size, n // n_devices * n_devices)
        if not size:
            raise UserError(f"{activations.path}: {n} rows to measure on do not divide over {n_devices} devices")
        part = size // jax.process_count()
        own = range(jax.process_index() * part, (jax.process_index() + 1) * part)
        batches = [
            {source: of[start + own.start : start + own.stop] for source, of in rows.items()}
            for start in range(0, n - size + 1, size)
        ]
        wanted = {name: planned[name].wanted for name in names}
        silent = jax.process_index() > 0
        return Marks(Path(command.out), batches, wanted, settings.tolerance, window, silent)

    return begin


def _as_run(out: Path, path: Path, name: str, planned: dict[str, Planned]) -> Sweep:
    """A member's part of a pass: as long as its last mark, or as it took to converge."""
    found, member = marks.read(out, name), planned[name]
    steps = max(member.wanted.marks)
    if found and found[-1].converged:
        steps = found[-1].tokens // member.command.train.batch_size
    train_config = dataclasses.replace(member.command.train, steps=steps)
    return dataclasses.replace(member.command, out=str(path), train=train_config, members=())


def _is_done(out: Path, name: str, planned: dict[str, Planned]) -> bool:
    found = marks.read(out, name)
    return bool(found) and (found[-1].converged or found[-1].steps == max(planned[name].wanted.marks))


def _keep_plan(out: Path, command: Sweep, planned: dict[str, Planned], first: bool) -> None:
    """Write DIR/sweep.json; refuse to go on with another plan."""
    now = {
        "sweep": config.to_dict(command.sweep),
        "members": {
            name: {**member.wanted.facts["config"], "marks": [*member.wanted.marks]} for name, member in planned.items()
        },
    }
    before = storage.read_json(out / "sweep.json")
    if before is None:
        if first:
            storage.write_json(out / "sweep.json", now)
        return
    was, is_now = (dict(config.flatten(content)) for content in (before, json.loads(json.dumps(now))))
    for key in sorted(was.keys() | is_now.keys()):
        if was.get(key) != is_now.get(key) and not key.endswith(MAY_CHANGE):
            raise UsageError(
                f"{out} was started with {key}={was.get(key)}, not {is_now.get(key)}; keep the plan to go on, or give "
                f"another --out"
            )


def _kept(out: Path, passes: dict[str, list[str]], worker: tuple[int, int], first: bool) -> dict[str, list[str]]:
    """The passes as this worker's first attempt made them: another machine's memory may suggest others."""
    path = out / "passes" / f"{worker[0]}of{worker[1]}.json"
    before = storage.read_json(path)
    if before is None and first:
        storage.write_json(path, passes)
    return before or passes


@contextlib.contextmanager
def _held(path: Path, first: bool) -> Iterator[bool]:
    """Whether this worker has a pass for itself, until it ends in whatever way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        held = True
        if first:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held = False
        yield _as_the_first(held)


def _as_the_first(finding: bool) -> bool:
    """What the first process finds: it has written the files, and others may see them later."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(finding)))
