"""Keeping other libraries from talking beside our one line. For commands alone."""

from __future__ import annotations

import logging
import sys
import warnings


def leave_errors_to_us() -> None:
    """training/on_disk.py says what is wrong in one line; Orbax and tensorstore would add pages from threads."""
    for talker in ("absl", "asyncio"):
        logging.getLogger(talker).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    others = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        # From each write that was under way when another one failed and Orbax closed the loop.
        if str(unraisable.exc_value) != "Event loop is closed":
            others(unraisable)

    sys.unraisablehook = hook
