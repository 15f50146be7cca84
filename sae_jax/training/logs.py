"""The log of a run: RUN/metrics.jsonl, one object a logged step, and RUN/attempts.jsonl, one object an attempt.

Both are written by the first process alone. When a run resumes, metrics are cut to the step it resumes from, so that
the file reads as if the run had never stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from sae_jax import storage
from sae_jax.progress import console
from sae_jax.storage import AnyPath

WALL_CLOCK = ("tokens_per_second", "input_wait", "seconds")  # fields that differ between two runs of the same steps


class Metrics:
    """Appends to RUN/metrics.jsonl. A context manager."""

    def __init__(
        self,
        run: AnyPath | None,
        lease: storage.Lease,
        start_step: int,
        is_logged: Callable[[int], bool],
    ) -> None:
        """`run` None: nothing is written. `lease`: of the run; who has lost it must not cut another's log."""
        self._lines = None
        self.past: list[dict[str, Any]] = []  # logged before this attempt
        self.last = 0  # step that was logged last, and may have been cut
        if run is None:
            return
        # The row of start_step may be there only because an earlier attempt was to end at that step.
        last = start_step if is_logged(start_step) else start_step - 1
        rows = read_metrics(run)
        self.last = max((row["step"] for row in rows), default=0)
        self.past = [row for row in rows if row["step"] <= last]
        lease.check()
        storage.write_lines(run / "metrics.jsonl", self.past)
        self._lines = storage.Lines(run / "metrics.jsonl", lease.check)

    def write(self, row: dict[str, Any]) -> None:
        """One logged step; on a disk flushed at once, so that a killed run loses nothing it said."""
        if self._lines is not None:
            self._lines.write(row)

    def flush(self) -> None:
        """Put down what waits, at a URL: before a checkpoint that covers it, from which a killed run resumes."""
        if self._lines is not None:
            self._lines.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lines:
            self._lines.__exit__(kind, error, trace)


class Attempts:
    """Keeps the last line of RUN/attempts.jsonl true: where this attempt started and how far it is known to be."""

    def __init__(self, run: AnyPath | None, lease: storage.Lease, start_step: int, **machine: Any) -> None:
        """Args:
        run: None: nothing is written.
        lease: of the run; without it nothing is written, either.
        start_step: where the attempt begins.
        **machine: what it runs on.
        """
        self._path, self._lease = None if run is None else run / "attempts.jsonl", lease
        self._earlier = [] if self._path is None else storage.read_lines(self._path)
        number = 1 + max((row["attempt"] for row in self._earlier if isinstance(row.get("attempt"), int)), default=-1)
        self._row = {"attempt": number, "start_step": start_step, "end_step": start_step, **machine}
        self.record(start_step, "running")

    def record(self, end_step: int, outcome: str) -> None:
        """`outcome` is running, finished, preempted or failed; an attempt left at running was killed."""
        self._row.update(end_step=end_step, outcome=outcome)
        if self._path is not None:
            self._lease.check()
            storage.write_lines(self._path, [*self._earlier, self._row])


def read_metrics(run: AnyPath) -> list[dict[str, Any]]:
    """All logged steps of a run, in order. Says so where it passes over a line that is none."""
    rows = storage.read_lines(run / "metrics.jsonl")
    steps = [row for row in rows if type(row.get("step")) is int]
    if len(steps) < len(rows):
        n = len(rows) - len(steps)
        console.print(f"{run / 'metrics.jsonl'}: {n} lines have no step and are passed over")
    return steps
