"""The record of a run: RUN/metrics.jsonl, one object a logged step, and RUN/attempts.jsonl, one object an attempt.

Both are written by the first process only. When a run resumes, metrics are cut to the step it resumes from, so that
the file reads as if the run had never stopped.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sae_jax import config as configs

WALL_CLOCK = ("tokens_per_second", "input_wait", "seconds")  # fields that differ between two runs of the same steps


class Metrics:
    """Appends to RUN/metrics.jsonl and, if asked, to TensorBoard. A context manager."""

    def __init__(
        self, run: Path, start_step: int, wanted: Callable[[int], bool], tensorboard: bool, silent: bool
    ) -> None:
        self._file = self._board = None
        if silent:
            return
        path = run / "metrics.jsonl"
        # The row of start_step may be there only because an earlier attempt was to end at that step.
        last = start_step if wanted(start_step) else start_step - 1
        _replace(path, [row for row in read_metrics(run) if row["step"] <= last])
        self._file = path.open("a")
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start_step)

    def write(self, row: dict[str, Any]) -> None:
        """One logged step; flushed at once, so that a killed run loses nothing it said."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as problem:
            problem.filename = self._file.name  # a write that fails, on a full disk, does not say where
            raise
        if self._board:
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name, value, row["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file:
            with contextlib.suppress(OSError) if error else contextlib.nullcontext():
                self._file.close()
        if self._board:
            self._board.close()


class Attempts:
    """Keeps the last line of RUN/attempts.jsonl true: where this attempt started and how far it is known to be."""

    def __init__(self, run: Path, start_step: int, silent: bool, **facts: Any) -> None:
        self._path = run / "attempts.jsonl"
        self._earlier = read_lines(self._path)
        self._row = {"attempt": len(self._earlier), "start_step": start_step, "end_step": start_step, **facts}
        self._silent = silent
        self.record(start_step, "running")

    def record(self, end_step: int, outcome: str) -> None:
        """`outcome` is running, finished, preempted or failed; an attempt left at running was killed."""
        self._row.update(end_step=end_step, outcome=outcome)
        if not self._silent:
            _replace(self._path, [*self._earlier, self._row])


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All logged steps of a run, in order."""
    return read_lines(run / "metrics.jsonl")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _replace(path: Path, rows: list[dict[str, Any]]) -> None:
    configs.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
