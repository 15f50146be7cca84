"""Showing long work on stderr: a live line on a terminal or in a notebook, else a plain line every few seconds."""

from __future__ import annotations

import functools
import sys
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from sae_jax.errors import printable
from sae_jax.units import duration

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_UPDATES = 0.1  # of a live line


class _Plain(Console):
    """Shows characters alone: a name in a file cannot move the cursor, or anything else that a terminal does."""

    def print(self, *objects: Any, **options: Any) -> None:
        lines = ("\n".join(map(printable, each.split("\n"))) if isinstance(each, str) else each for each in objects)
        super().print(*lines, **options)


def plain_console(**options: Any) -> Console:
    """A console that prints text as it is: `[x]` and `:x:` in a path or a token are no markup."""
    return _Plain(markup=False, emoji=False, highlight=False, **options)


console = plain_console(stderr=True, soft_wrap=True)


@functools.cache
def say_once(line: str) -> None:
    """A line on stderr, however often it is said."""
    console.print(line)


class Progress:
    """Progress of one piece of work counted in `unit`, with figures beside it. A context manager.

    The first update comes after whatever has to be compiled, so the time left is estimated from what follows it. A
    silent one (on processes other than the first) takes the same calls and shows nothing.
    """

    def __init__(
        self, title: str, total: int, unit: str, start: int = 0, silent: bool = False, first: str = "compiling"
    ) -> None:
        """Args:
        title: of the work.
        total: when it is done.
        unit: what is counted, in the plural.
        start: where an earlier attempt ended.
        silent: show nothing.
        first: what happens before the first update; "" if nothing does that takes long.
        """
        self._title, self._total, self._unit, self._start = title, total, unit, start
        self._silent, self._first = silent, first
        self._began = self._last_line = time.monotonic()
        self._counted_from: tuple[int, float] | None = None  # what was done at the first update, and when that was
        self._bar: Bar | None = None
        self._notebook: Any = None
        self._said = False
        if silent:
            return
        if display := _notebook_display():
            self._notebook = display({"text/plain": ""}, raw=True, display_id=True)
        elif console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[count]} " + unit, markup=False),
                TextColumn("{task.fields[figures]}", markup=False),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(
                title, total=total, completed=start, count=self._count(start), figures=f"{first} ..." if first else ""
            )

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        resumes = f"resumes at {self._start:,} of {self._total:,} {self._unit}" if self._start else ""
        said = "; ".join(filter(None, (resumes, f"{self._first} ..." if self._first else "")))
        if said and self._start < self._total and not self._silent:
            if self._notebook:
                self._show(f"{self._title}: {said}")
            elif resumes or not self._bar:
                console.print(f"{self._title}: {said}")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, figures: str = "") -> None:
        """`done` of `total` are finished; `figures` is shown beside it."""
        if self._silent:
            return
        self._total = max(self._total, done)  # a total may be an estimate
        now = time.monotonic()
        is_first = self._counted_from is None
        if self._counted_from is None:
            self._counted_from = (done, now)
        is_live = bool(self._bar or self._notebook)
        waited = now - self._last_line
        # Work that was over before there was anything to say needs no last word.
        unsaid = waited < SECONDS_BETWEEN_LINES and not (self._first or is_live or self._said)
        if unsaid or (waited < (SECONDS_BETWEEN_UPDATES if is_live else SECONDS_BETWEEN_LINES) and done < self._total):
            return
        self._last_line, self._said = now, True
        if self._bar:
            self._bar.update(self._task, completed=done, total=self._total, count=self._count(done), figures=figures)
            return
        took = duration(now - self._began)
        if is_first and self._first and done < self._total:
            time_left = f"{self._first} took {took}"
        else:
            time_left = f"{took}, {self._left(done, now)}"
        self._show("  ".join(filter(None, (f"{self._title}: {self._count(done)} {self._unit}", figures, time_left))))

    def _left(self, done: int, now: float) -> str:
        """How long it will take from here, at the rate since the first update."""
        assert self._counted_from is not None
        counted, seconds = done - self._counted_from[0], now - self._counted_from[1]
        if done >= self._total:
            return "done"
        return (
            f"{duration((self._total - done) / counted * seconds)} left" if counted > 0 and seconds > 0 else "starting"
        )

    def _count(self, done: int) -> str:
        return f"{done:,}/{self._total:,}"

    def _show(self, line: str) -> None:
        if self._notebook:
            self._notebook.update({"text/plain": line}, raw=True)
        else:
            console.print(line)


def _notebook_display() -> Any:
    """IPython's `display` in a notebook, where a line that was shown can be changed; else None."""
    # Without importing IPython: a process that has not is no notebook.
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if type(shell).__name__ in ("NoneType", "TerminalInteractiveShell"):
        return None
    from IPython.display import display  # pyrefly: ignore[missing-import] (there only where a notebook is)

    return display
