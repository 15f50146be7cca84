"""Keeping other libraries from talking beside our one line, and from losing a Ctrl-C. For commands alone."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import warnings

SECONDS_UNTIL_AGAIN = 0.1


def leave_errors_to_us() -> None:
    """training/checkpoint.py says what is wrong in one line; Orbax and tensorstore would add pages from threads."""
    for talker in ("absl", "asyncio"):
        logging.getLogger(talker).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            # Ctrl-C met a callback, such as JAX's of the garbage collector, out of which Python lets nothing pass.
            # To the main thread, or a system call in which it waits would go on to its end.
            to_main = [threading.main_thread().ident, signal.SIGINT]
            threading.Timer(SECONDS_UNTIL_AGAIN, signal.pthread_kill, to_main).start()
        # Closed: from each write that was under way when another one failed and Orbax closed the loop.
        elif str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = hook
