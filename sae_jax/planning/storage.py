"""What a run asks of its storage: rows to learn from, saves and restores, and what interruptions then cost.

    interval   sqrt(2 C M)                        between saves, the best for M seconds between interruptions on average
    goodput    1 - C / T - T / (2 M) - R / M      of saves every T, each taking C, and restores of R seconds

The first is Young's, and both the first order of Daly's: Young 1974, doi 10.1145/361147.361115; Daly 2006, doi
10.1016/j.future.2004.11.016. C is the whole of a save, as if training stood still meanwhile. It goes on, once the
arrays are copied to the hosts, so this goodput is the least that is to be expected. What it takes to get machines
again and to compile is not in it.

A save is written and read once for its digests, a restore is read twice: digests are compared before anything is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sae_jax.errors import UsageError

PASSES = 2  # over the bytes of a checkpoint, of a save and of a restore
GIGA = 1e9


@dataclass(frozen=True)
class StorageConfig:
    """What a plan takes the storage and the machines to be like; `sae-jax selftest` measures the first."""

    gb_per_second: float = 10.0
    """that the storage takes and gives, from all hosts together"""
    hours_between_preemptions: float = 24.0
    """on average, of the whole machine"""

    def __post_init__(self) -> None:
        for name in ("gb_per_second", "hours_between_preemptions"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"storage.{name}={getattr(self, name)} must be above 0 and finite")


@dataclass(frozen=True)
class Demand:
    """Of a run, on its storage."""

    gb_per_second: float  # that the storage is taken to have
    hours_between_preemptions: float
    input_bytes: int  # of a step
    input_gb_per_second: float  # at the time that a step is taken to need
    most_input_gb_per_second: float  # at the floor of a step
    save_bytes: int
    save_seconds: float
    restore_seconds: float
    checkpoint_every: int  # as it is set; saves begin twice as often
    goodput: float  # with these
    best_checkpoint_every: int
    best_interval_seconds: float  # between two saves
    best_goodput: float


def demand(
    config: StorageConfig,
    input_bytes: int,
    step_seconds: float,
    floor_seconds: float,
    save_bytes: int,
    checkpoint_every: int,
) -> Demand:
    """What a run asks of its storage.

    Args:
        config: rate, and how often machines are taken away.
        input_bytes: of a step.
        step_seconds: that a step is taken to need, of all members; `floor_seconds`: at least.
        save_bytes: of a checkpoint of all members.
        checkpoint_every: steps, as `train.checkpoint_every` says.
    """
    between = 3600 * config.hours_between_preemptions
    seconds = PASSES * save_bytes / config.gb_per_second / GIGA
    best = math.sqrt(2 * seconds * between)
    return Demand(
        **vars(config),
        input_bytes=input_bytes,
        input_gb_per_second=input_bytes / step_seconds / GIGA,
        most_input_gb_per_second=input_bytes / floor_seconds / GIGA,
        save_bytes=save_bytes,
        save_seconds=seconds,
        restore_seconds=seconds,
        checkpoint_every=checkpoint_every,
        goodput=goodput(checkpoint_every / 2 * step_seconds, seconds, seconds, between),
        best_checkpoint_every=max(1, round(2 * best / step_seconds)),
        best_interval_seconds=best,
        best_goodput=goodput(best, seconds, seconds, between),
    )


def goodput(interval: float, save_seconds: float, restore_seconds: float, between: float) -> float:
    """Share of the time that goes into steps which are kept, see the head of this file; 0 where nothing is left."""
    return max(0.0, 1 - save_seconds / interval - interval / (2 * between) - restore_seconds / between)
