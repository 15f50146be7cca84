"""Saving a run and taking it up again, on the same mesh or another; reading an SAE back.

A checkpoint is one Orbax step directory, RUN/checkpoints/<step>/, that exists whole or not at all:

    sae          master weights            average      running average of the weights (train.ema above 0)
    moments      the optimiser's           run          step, statistics (counters, constants), PRNG key

RUN/config.json beside them holds the resolved config. Only this file knows Orbax.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
from orbax.checkpoint import v1 as ocp

from sae_jax import config as configs
from sae_jax.saes import base
from sae_jax.saes.base import AbstractSae
from sae_jax.train.state import MAY_CHANGE, TrainConfig, TrainState, abstract
from sae_jax.train.step import averaged
from sae_jax.types import UsageError, UserError

KEPT = 2  # a save that is cut off must leave the one before it


class Checkpoints:
    """The checkpoints of one run. A context manager: leaving it waits for the save under way."""

    def __init__(self, run: Path) -> None:
        policy: Any = ocp.training.preservation_policies.LatestN(KEPT)
        self._orbax = ocp.training.Checkpointer(
            str((run / "checkpoints").absolute()), preservation_policy=policy, cleanup_tmp_directories=True
        )

    @property
    def latest(self) -> int | None:
        """The last complete step, or None."""
        return None if self._orbax.latest is None else self._orbax.latest.step

    def save(self, step: int, state: TrainState) -> None:
        """Queue a save; returns once the arrays are copied, so that the state may be donated."""
        if self.latest != step:
            self._orbax.save_checkpointables_async(step, _to_tree(state), force=True)

    def restore(self, target: TrainState) -> TrainState:
        """The last complete state, placed as `target` (abstract, see train/state.py) says."""
        tree = self._orbax.load_checkpointables(None, _to_tree(target))
        return TrainState(sae=tree["sae"], moments=tree["moments"], average=tree.get("average"), **tree["run"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._orbax.close()


def load(run: str | Path, ema: bool = False) -> AbstractSae:
    """The SAE of a run, from its last checkpoint.

    Args:
        run: the directory that `sae-jax train` wrote.
        ema: the averaged weights instead of the live ones.

    Returns:
        An SAE of plain arrays on the default device, no mesh.

    Raises:
        UserError: no run there, no checkpoint yet, or averages asked of a run that kept none.
    """
    run = Path(run)
    facts = read_config(run)
    sae_config = configs.from_dict(base.config_class(facts["sae"]["variant"]), facts["sae"])
    train_config = configs.from_dict(TrainConfig, facts["train"])
    if ema and not train_config.ema:
        raise UsageError(f"{run}: train.ema was 0, so the run kept no averaged weights; load it without ema")
    with Checkpoints(run) as checkpoints:
        if checkpoints.latest is None:
            raise UserError(f"{run}: no complete checkpoint yet; let training reach train.checkpoint_every steps")
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = _to_tree(abstract(sae_config, train_config, facts["d_model"], here))
        part = "average" if ema else "sae"
        tree = checkpoints._orbax.load_checkpointables(None, {part: target[part], "run": target["run"]})
    if not ema:
        return tree["sae"]
    state = TrainState(sae=None, moments=None, average=tree["average"], **tree["run"])  # type: ignore[arg-type]
    return averaged(state, train_config.ema)


def read_config(run: Path) -> dict[str, Any]:
    """RUN/config.json. Raises UserError where there is none."""
    path = run / "config.json"
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        raise UserError(
            f"{run}: not a run, {path} is missing or unreadable; give the --out of `sae-jax train`"
        ) from None


def check_resumable(run: Path, facts: dict[str, Any]) -> None:
    """Refuse to continue a run with settings that would make it another one."""
    before, now = dict(configs.flatten(read_config(run))), dict(configs.flatten(facts))
    for key in sorted(before.keys() | now.keys()):
        if key not in MAY_CHANGE and before.get(key) != now.get(key):
            raise UsageError(
                f"{run} was started with {key}={before.get(key)}, not {now.get(key)}; keep it to resume, "
                f"or give another --out"
            )


def _to_tree(state: TrainState) -> dict[str, Any]:
    run = {"step": state.step, "statistics": state.statistics, "key": state.key}
    average = {} if state.average is None else {"average": state.average}
    return {"sae": state.sae, "moments": state.moments, "run": run, **average}
