"""Showing long work: a live line on a terminal, a plain line every few seconds elsewhere. Always on stderr."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 5.0

console = Console(stderr=True, highlight=False, soft_wrap=True)


class Progress:
    """Progress of one piece of work counted in `unit`, with figures beside it. A context manager.

    A silent one (on processes other than the first) takes the same calls and shows nothing.
    """

    def __init__(self, title: str, total: int, unit: str, start: int = 0, silent: bool = False) -> None:
        self._title, self._total, self._unit, self._start = title, total, unit, start
        self._silent = silent
        self._began = self._last_line = time.monotonic()
        self._done = start
        self._bar: Bar | None = None
        if console.is_terminal and not silent:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total} " + unit),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(title, total=total, completed=start, figures="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, figures: str = "") -> None:
        """`done` of `total` are finished; `figures` is shown beside it."""
        self._done = done
        if self._silent:
            return
        if self._bar:
            self._bar.update(self._task, completed=done, figures=figures)
            return
        now = time.monotonic()
        if now - self._last_line < SECONDS_BETWEEN_LINES and done < self._total:
            return
        self._last_line = now
        seconds = now - self._began
        rate = (done - self._start) / seconds if seconds > 0 else 0.0
        left = f"{(self._total - done) / rate:.0f} s left" if rate > 0 else "starting"
        console.print(f"{self._title}: {done}/{self._total} {self._unit}  {figures}  {seconds:.0f} s, {left}")
