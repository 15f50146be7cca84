"""Numbers with units, as a person reads them: the one place where commands and pages turn seconds and bytes to text."""

from __future__ import annotations

import math

_DURATIONS = (("ms", 1e-3), ("s", 1), ("min", 60), ("hours", 3600), ("days", 86400))
_FEW = {"ms": 1000, "s": 120, "min": 120, "hours": 48}  # up to so many of a unit before the next one is taken


def duration(seconds: float) -> str:
    """As 35 ms, 11 s, 45 min, 3.2 hours, 12.5 days."""
    if not math.isfinite(seconds):
        return "unknown"
    for name, size in _DURATIONS:
        if seconds / size < _FEW.get(name, math.inf):
            break
    return f"{_short(seconds / size)} {name}"


def size(n_bytes: float) -> str:
    """Of a file or of traffic, in powers of 1000: "16.4 GB"."""
    return _in_steps(n_bytes, 1000, ("bytes", "kB", "MB", "GB", "TB", "PB"))


def memory(n_bytes: float) -> str:
    """Of a device or a process, in powers of 1024: "1.25 GiB"."""
    return _in_steps(n_bytes, 1024, ("bytes", "KiB", "MiB", "GiB", "TiB"))


def number(value: float) -> str:
    """Four digits, or all before the point: "31,930", "0.4217"."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _in_steps(value: float, step: int, names: tuple[str, ...]) -> str:
    sign, value = "-" * (value < 0), abs(value)
    for name in names[:-1]:
        if value < step - 0.5:
            return f"{sign}{_short(value)} {name}"
        value /= step
    return f"{sign}{_short(value)} {names[-1]}"


def _short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"
