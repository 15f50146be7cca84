"""Saving a run and taking it up again, on the same mesh or another; reading an SAE back.

A checkpoint is one Orbax step directory, RUN/checkpoints/<step>/. A save that is cut off leaves none; one that is
damaged afterwards is set aside as checkpoints/damaged-<step> and the run goes on from the one before.

    sae          master weights            average      running average of the weights (train.ema above 0)
    moments      the optimiser's           run          step, statistics (counters, constants), PRNG key

RUN/config.json beside them holds the resolved config. A set of members is one such directory, the parts of each under
its name (`k16.sae`, ...); RUN/config.json then lists the members, and RUN/members/<name>/ is a run in all but this: it
has checkpoints of its own only once the member has left the set. Only this file knows Orbax.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from sae_jax import config as configs
from sae_jax.progress import console
from sae_jax.saes import base
from sae_jax.saes.base import AbstractSae
from sae_jax.training import optim
from sae_jax.training.settings import MAY_CHANGE, TrainConfig
from sae_jax.training.state import TrainState, abstract
from sae_jax.types import UsageError, UserError, Widths

MEMBERS = "members"  # folder of a set's members
IN_RUN = ("step", "statistics", "key", "values")
KEPT = 2  # a save that is cut off must leave the one before it


class Checkpoints:
    """The checkpoints of one run. A context manager: leaving it waits for the save under way.

    Only the command that trains may have one with `writes`: it removes what saves that were cut off have left.
    """

    def __init__(self, run: Path, writes: bool = True) -> None:
        self._folder = (run / "checkpoints").absolute()
        policy: Any = ocp.training.preservation_policies.LatestN(KEPT)
        self._orbax = ocp.training.Checkpointer(
            str(self._folder), preservation_policy=policy, cleanup_tmp_directories=writes
        )
        # When a save is done, Orbax's thread asks JAX about preemption at the step of that save, and JAX takes the last
        # step it was asked about for the step this process is at: a SIGTERM then was agreed upon for a step that had
        # passed, and never seen.
        self._orbax._manager.reached_preemption = lambda step: False

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, which may still be on its way to the disk; None if there is none."""
        return None if self._orbax.latest is None else self._orbax.latest.step

    def save(self, step: int, states: dict[str, TrainState]) -> None:
        """Queue a save of {member: state}; returns once the arrays are copied, so that the states may be donated.

        The only state of a run without members has the name "". Raises UserError if this save or the one before it
        cannot be written.
        """
        if self.latest != step:
            with self._reported():
                self._orbax.save_checkpointables_async(step, _to_tree(states), force=True)

    def wait(self) -> None:
        """Return when all saves are on the disk. Raises UserError if one cannot be written."""
        with self._reported():
            self._orbax.wait()

    def restore(self, targets: dict[str, TrainState]) -> dict[str, TrainState]:
        """The newest states that can be read, placed as `targets` (abstract, see training/state.py) say.

        Checkpoints that cannot be read are set aside once an older one has been. UserError if none can be.
        """
        step, tree = self.read(_to_tree(targets))
        damaged = [c.step for c in self._orbax.checkpoints if c.step > step]
        if damaged:
            if jax.process_index() == 0:
                for newer in damaged:
                    shutil.rmtree(self._folder / f"damaged-{newer}", ignore_errors=True)
                    (self._folder / str(newer)).rename(self._folder / f"damaged-{newer}")
            multihost_utils.sync_global_devices("damaged checkpoints set aside")
            self._orbax.reload()
        return {name: _from_tree(tree, name) for name in targets}

    def read(self, target: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """(step, the parts in `target`) of the newest checkpoint that all processes can read."""
        problem = ""
        for step in reversed([checkpoint.step for checkpoint in self._orbax.checkpoints]):
            tree, problem = {}, ""
            try:
                tree = self._orbax.load_checkpointables(step, target)
            except Exception as error:  # Orbax passes on whatever the layers below it raise
                problem = _reason(error)
            if not multihost_utils.process_allgather(np.array(bool(problem))).any():
                return step, tree
            if jax.process_index() == 0:
                console.print(f"{self._folder / str(step)} cannot be read: {problem}", markup=False)
        raise UserError(f"{self._folder}: no checkpoint can be read ({problem}); restore one, or give another --out")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._reported():
            self._orbax.close()

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Errors of the storage below, in one line that says what remains."""
        try:
            yield
        except Exception as error:
            raise UserError(
                f"cannot write to {self._folder}: {_reason(error)}; see to the disk and repeat the command, which goes "
                f"on from the last checkpoint"
            ) from error


@dataclass(frozen=True)
class Loaded:
    """The end of a run, so far."""

    sae: AbstractSae  # plain arrays on the default device, no mesh
    step: int  # of the checkpoint they come from
    dead_fraction: float  # latents that had not fired for train.dead_after_tokens
    facts: dict[str, Any]  # RUN/config.json


def load(run: str | Path, ema: bool = False) -> AbstractSae:
    """The SAE of a run, from its last checkpoint, as plain arrays on the default device; errors as `load_run`.

    Args:
        run: the directory that `sae-jax train` wrote.
        ema: the averaged weights instead of the live ones.
    """
    return load_run(run, ema).sae


def load_run(run: str | Path, ema: bool = False) -> Loaded:
    """As `load`, with what else the checkpoint and the config say.

    Raises:
        UserError: no run there, no checkpoint yet, or averages asked of a run that kept none.
    """
    run = Path(run)
    facts = read_config(run)
    sae_config = configs.from_dict(base.config_class(facts["sae"]["variant"]), facts["sae"])
    train_config = configs.from_dict(TrainConfig, facts["train"])
    if ema and not train_config.ema:
        raise UsageError(f"{run}: train.ema was 0, so the run kept no averaged weights; load it without ema")
    where, name = _newest(run)
    with Checkpoints(where, writes=False) as checkpoints:
        if checkpoints.latest is None:
            raise UserError(f"{run}: no complete checkpoint yet; let training reach train.checkpoint_every steps")
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = _to_tree({name: abstract(sae_config, train_config, Widths.of(facts["widths"]), here)})
        weights, counters = _part(name, "average" if ema else "sae"), _part(name, "run")
        step, tree = checkpoints.read({part: target[part] for part in (weights, counters)})
    statistics = tree[counters]["statistics"]
    sae = optim.read(tree[weights]).folded(statistics.scale)
    return Loaded(sae, step, float(statistics.dead.mean()), facts)


def latest_step(run: Path, name: str = "") -> int | None:
    """The step of the newest checkpoint in RUN/checkpoints, and of those that hold the member `name`; None without."""
    steps = [int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()]
    held = [step for step in steps if not name or (run / "checkpoints" / str(step) / _part(name, "sae")).exists()]
    return max(held, default=None)


def read_config(run: Path) -> dict[str, Any]:
    """RUN/config.json. Raises UserError where there is none, or it lacks what describes a run."""
    facts = _facts(run)
    needed = {"sae": dict, "train": dict, "widths": dict, "sites": dict, "data": str}
    if names := members(run):
        raise UserError(f"{run}: a set of members; name one: {', '.join(str(run / MEMBERS / name) for name in names)}")
    if not all(isinstance(facts.get(name), kind) for name, kind in needed.items()) or "variant" not in facts["sae"]:
        raise UserError(
            f"{run}: not a run, {run / 'config.json'} is missing or damaged; give the --out of `sae-jax train`"
        )
    return facts


def members(run: Path) -> list[str]:
    """Names of the members that a set was started with; none for a run of one SAE, or no run."""
    names = _facts(run).get("members")
    return names if isinstance(names, list) else []


def check_resumable(run: Path, facts: dict[str, Any]) -> None:
    """Refuse to continue a run with settings that would make it another one."""
    before, now = dict(configs.flatten(read_config(run))), dict(configs.flatten(facts))
    for key in sorted(before.keys() | now.keys()):
        bound = key == "train.steps" and now.get("train.decay_steps")  # the rate falls towards the last step
        if (key in MAY_CHANGE and not bound) or before.get(key) == now.get(key):
            continue
        if key == "set":
            raise UsageError(f"{run} was started on other rows than {facts['data']} holds now; give another --out")
        raise UsageError(
            f"{run} was started with {key}={before.get(key)}, not {now.get(key)}; keep it to resume, "
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


def _reason(error: BaseException) -> str:
    """What went wrong at the bottom, in one line."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return "no space left on the disk" if "No space left" in text or "RESOURCE_EXHAUSTED" in text else text[:200]


def _facts(run: Path) -> dict[str, Any]:
    try:
        facts = json.loads((run / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _newest(run: Path) -> tuple[Path, str]:
    """Which run has the newest checkpoint of this one, and under which name: itself, or the set of which it is one."""
    path = run.absolute()
    if path.parent.name == MEMBERS:
        of_set = latest_step(path.parents[1], path.name)
        if of_set is not None and of_set > (latest_step(run) or 0):
            return path.parents[1], path.name
    return run, ""


def _part(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _to_tree(states: dict[str, TrainState]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, state in states.items():
        tree[_part(name, "sae")], tree[_part(name, "moments")] = state.sae, state.moments
        tree[_part(name, "run")] = {field: getattr(state, field) for field in IN_RUN}
        if state.average is not None:
            tree[_part(name, "average")] = state.average
    return tree


def _from_tree(tree: dict[str, Any], name: str) -> TrainState:
    parts: dict[str, Any] = {part: tree.get(_part(name, part)) for part in ("sae", "moments", "average")}
    return TrainState(**parts, **tree[_part(name, "run")])
