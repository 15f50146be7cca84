"""`sae-jax selftest --out DIR`: whether this machine computes, sends and stores what it should."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from sae_jax import config, selftest, storage
from sae_jax.commands import gpu, runtime
from sae_jax.mesh import MeshConfig
from sae_jax.ops.tuning import EngineConfig
from sae_jax.selftest.run import Part
from sae_jax.types import UserError
from sae_jax.units import duration, number, size


@dataclass(frozen=True)
class Selftest:
    """Try this machine before training on it, in minutes: on all devices, on one process or several. Writes
    OUT/selftest.json."""

    out: str
    """directory that all processes share, on the storage that is to be tried"""
    json: bool = False
    """print the report as JSON, instead of a line a part"""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)


def run(argv: Sequence[str]) -> None:
    """Parse, join the other processes, try every part, say which failed."""
    command = config.parse(Selftest, argv, "sae-jax selftest")
    runtime.start_distributed()
    gpu.warn_of_idle_gpu()
    speaks = jax.process_index() == 0

    def say(part: Part) -> None:
        if speaks and not command.json:
            sys.stdout.write(line(part) + "\n")
            sys.stdout.flush()

    report = selftest.selftest(command.out, command.mesh, command.engine, say)
    if speaks and command.json:
        sys.stdout.write(storage.json_text(report, "--json"))
    if not report["passed"]:
        failed = [part["name"] for part in report["parts"] if part["outcome"] == "failed"]
        n = len(report["parts"])
        raise UserError(f"{len(failed)} of {n} parts failed: {', '.join(failed)}; see {command.out}/selftest.json")


def line(part: Part) -> str:
    """A part for a person to read."""
    what = _figures(part.figures) if part.outcome == "passed" else part.seen
    if part.outcome == "failed":
        what = f"{part.seen}; expected {part.expected}"
    return f"{part.name:18}{part.outcome:10}{duration(part.seconds):>8}  {what}".rstrip()


def _figures(figures: dict[str, Any]) -> str:
    shown = []
    for name, value in figures.items():
        if name.endswith("bytes"):
            shown.append(f"{name.removesuffix('bytes').rstrip('_')} {size(value)}".strip())
        elif name.endswith("_seconds"):
            shown.append(f"{name.removesuffix('_seconds')} {duration(value)}")
        elif name.endswith("_gb_per_second"):
            shown.append(f"{name.removesuffix('_gb_per_second')} {value:g} GB/s")
        else:
            shown.append(f"{name.replace('_', ' ')} {number(value)}")
    return ", ".join(shown)
