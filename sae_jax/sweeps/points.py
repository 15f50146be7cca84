"""The points of a sweep as they are found: DIR/points/<member>.json, one file a member, replaced whole at every mark.

A sweep that was killed measures again what comes after its last checkpoint, and finds the same. What later points say
then stands no more, so a file is cut to what comes before the mark that is written.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae_jax import storage
from sae_jax.scaling import table
from sae_jax.scaling.table import Point
from sae_jax.training.members import Member

POINTS = "points"


class Wanted(NamedTuple):
    """What a sweep wants of a member."""

    marks: dict[int, float | None]  # {step to measure it after: the budget that is used up there}
    flop_per_token: int
    facts: dict[str, Any]  # those fields of its points that are the same at each


class Marks:
    """Where the members of a pass are measured (training/loop.py), and what was found."""

    def __init__(
        self,
        out: Path,
        rows: list[dict[str, np.ndarray]],
        wanted: Mapping[str, Wanted],
        tolerance: float | None,
        window: int,
        silent: bool,
    ) -> None:
        """Args:
        out: of the sweep.
        rows: batches of one size to measure on: {source: this process's part}.
        wanted: {member: what of it}.
        tolerance: a member ends where its FVU has changed by less than this share over a window.
        window: steps.
        silent: write nothing, as processes other than the first.
        """
        self.rows = rows
        self._out, self._wanted, self._silent = out, wanted, silent
        self._tolerance, self._window = tolerance, window
        self._found = {name: read(out, name) for name in wanted}
        self._began = time.monotonic()
        self._before = max((p.seconds or 0.0 for points in self._found.values() for p in points), default=0.0)

    def due(self, member: Member, step: int) -> bool:
        """Whether the member is measured after `step` steps."""
        return step in self._wanted[member.name].marks

    def note(self, member: Member, step: int, found: dict[str, float]) -> bool:
        """Write the point down. Whether the member goes on."""
        wanted, batch_size = self._wanted[member.name], member.train.batch_size
        tokens = step * batch_size
        earlier = [point for point in self._found[member.name] if point.tokens < tokens]
        then = next((point for point in earlier if point.tokens == tokens - self._window * batch_size), None)
        converged = bool(self._tolerance and then and abs(found["fvu"] / then.fvu - 1) < self._tolerance)
        point = Point.of(
            {
                **wanted.facts,
                **found,
                "tokens": tokens,
                "steps": step,
                "flops": float(tokens * wanted.flop_per_token),
                "budget": wanted.marks[step],
                "converged": converged,
                "seconds": round(self._before + time.monotonic() - self._began, 1),
            }
        )
        self._found[member.name] = [*earlier, point]
        if not self._silent:
            path = _path(self._out, member.name)
            storage.write_json(path, {"points": [point.to_json() for point in self._found[member.name]]})
        return not converged


def read(out: Path, name: str) -> list[Point]:
    """The points of a member so far. Raises UserError if the file is damaged."""
    content = storage.read_json(_path(out, name)) or {}
    return [Point.of(values) for values in content.get("points", [])]


def collect(out: Path) -> int:
    """Write DIR/results.jsonl from the points of all members, whoever trained them; their number."""
    files = sorted((out / POINTS).glob("*.json"))
    stamps = [path.stat().st_mtime_ns for path in files]
    points = [point for path in files for point in read(out, path.stem)]
    table.write(out, points)
    # Another worker may have written one in between, and its table before this one.
    again = sorted((out / POINTS).glob("*.json"))
    return len(points) if [path.stat().st_mtime_ns for path in again] == stamps else collect(out)


def _path(out: Path, name: str) -> Path:
    return out / POINTS / f"{name}.json"
