"""The points of a sweep as they are measured: DIR/points/<member>.json, a file a member, replaced whole at each mark.

A sweep that was killed measures again what comes after its last checkpoint, and finds the same. Later points then no
longer count, so a file is cut to what comes before the mark that is written.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sae_jax import storage
from sae_jax.activations.source import place_rows
from sae_jax.saes.base import Batch
from sae_jax.scaling import table
from sae_jax.scaling.table import Point
from sae_jax.storage import AnyPath
from sae_jax.training.groups import Member
from sae_jax.types import Sites, UserError

POINTS = "points"


@dataclass(frozen=True)
class Requested:
    """Where a member of a sweep is to be measured, and what its points have in common."""

    marks: dict[int, float | None]  # {step to measure it after: the budget that is used up there}
    flop_per_token: int
    fields: dict[str, Any]  # of its points, the same at each


class SweepMeasurements:
    """Measures the members of a pass at their marks, and writes the points (training/members.py `Measurements`)."""

    def __init__(
        self,
        out: AnyPath,
        rows: dict[str, np.ndarray],
        sites: Sites,
        batch_size: int,
        requested: Mapping[str, Requested],
        tolerance: float | None,
        window: int,
    ) -> None:
        """Args:
        out: of the sweep.
        rows: to measure on: {source: f32[N, D]}, the same on every process.
        sites: what the members encode and reconstruct.
        batch_size: rows of a batch, at most.
        requested: {member: where it is measured}.
        tolerance: a member ends where its FVU has changed by less than this share over a window.
        window: steps.
        """
        self._out, self._rows, self._sites, self._batch_size = out, rows, sites, batch_size
        self._requested, self._tolerance, self._window = requested, tolerance, window
        self._points = {name: read(out, name) for name in requested}
        self._began = time.monotonic()
        self._before = max((p.seconds or 0.0 for points in self._points.values() for p in points), default=0.0)

    def batches(self, mesh: Mesh) -> list[Batch]:
        """See Measurements. Raises UserError if there are fewer rows than devices."""
        n = len(next(iter(self._rows.values())))
        size = min(self._batch_size, n // mesh.size * mesh.size)
        if not size:
            raise UserError(f"{n} rows to measure on do not divide over {mesh.size} devices; raise sweep.held_out")
        part = size // jax.process_count()
        first = jax.process_index() * part
        return [
            place_rows(
                {name: rows[i + first : i + first + part] for name, rows in self._rows.items()}, self._sites, mesh
            )
            for i in range(0, n - size + 1, size)
        ]

    def is_due(self, member: Member, step: int) -> bool:
        """See Measurements."""
        return step in self._requested[member.name].marks

    def note(self, member: Member, step: int, metrics: dict[str, float]) -> bool:
        """Write the point down. Whether the member continues."""
        requested, batch_size = self._requested[member.name], member.train.batch_size
        tokens = step * batch_size
        earlier = [point for point in self._points[member.name] if point.tokens < tokens]
        before = next((point for point in earlier if point.tokens == tokens - self._window * batch_size), None)
        converged = bool(self._tolerance and before and abs(metrics["fvu"] / before.fvu - 1) < self._tolerance)
        measured = {
            **requested.fields,
            **metrics,
            "tokens": tokens,
            "steps": step,
            "flops": float(tokens * requested.flop_per_token),
            "budget": requested.marks[step],
            "converged": converged,
            "seconds": round(self._before + time.monotonic() - self._began, 1),
        }
        try:
            point = Point.from_json(measured)
        except UserError as error:
            raise UserError(
                f"member {member.name} at step {step}: {error}; see to the rows it is measured on"
            ) from None
        self._points[member.name] = [*earlier, point]
        if jax.process_index() == 0:
            points = [point.to_json() for point in self._points[member.name]]
            storage.write_json(_path(self._out, member.name), storage.sealed({"points": points}))
        return not converged


def read(out: AnyPath, name: str) -> list[Point]:
    """The points of a member so far. Raises UserError if the file is damaged."""
    path = _path(out, name)
    content = storage.read_json(path)
    if content is None:
        return []
    points = storage.as_type(storage.unsealed(content, path).get("points"), list[dict[str, Any]], path)
    try:
        return [Point.from_json(values) for values in points]
    except UserError as error:
        raise UserError(f"{path}: {error}; {storage.DAMAGED}") from None


def collect(out: AnyPath) -> int:
    """Write DIR/results.jsonl from the points of all members, whoever trained them; their number."""
    before = _files(out)
    points = [point for path in before for point in read(out, path.name.removesuffix(".json"))]
    table.write(out, points)
    # Another worker may have written one in between, and its table before this one.
    return len(points) if _files(out) == before else collect(out)


def _files(out: AnyPath) -> dict[AnyPath, bytes | None]:
    return {path: storage.read_bytes(path) for path in sorted((out / POINTS).glob("*.json"))}


def _path(out: AnyPath, name: str) -> AnyPath:
    return out / POINTS / f"{name}.json"
