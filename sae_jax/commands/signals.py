"""Ctrl-C and SIGTERM in a process that is a command: the first ends it in one line, the second at once.

`train` and `sweep` hand SIGTERM on to JAX once they have joined the other processes (runtime.py), so that all of them
save at one step.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn

INTERRUPTED, TERMINATED = 130, 143  # what shells give a command that Ctrl-C ended, and SIGTERM
AT_ONCE = (INTERRUPTED, TERMINATED, 4)  # 4: LostError
SECONDS_UNTIL_AGAIN = 0.1
STOPPED_CODE = "SAE_JAX_STOPPED_CODE"

_heard: list[int] = []  # signals
_is_deferred = False


class Terminated(BaseException):
    """SIGTERM, as KeyboardInterrupt is Ctrl-C."""


def catch() -> None:
    """Take both signals over. To be called first of all, as whatever is imported takes seconds."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as of what a shell starts in the background
        signal.signal(signal.SIGINT, _hear)
    signal.signal(signal.SIGTERM, _hear)
    sys.unraisablehook = _not_lost


def defer_sigterm() -> bool:
    """Whether SIGTERM has come. From the first call on, the first SIGTERM no longer interrupts: ask again for it."""
    global _is_deferred
    _is_deferred = True
    return signal.SIGTERM in _heard


def stopped_code() -> int:
    """The exit code of `train` and `sweep` after SIGTERM, when they have saved: 0, or what the environment asks for.

    To some launchers 0 says that there is nothing left to do.
    """
    text = os.environ.get(STOPPED_CODE, "0")
    if text.isdecimal() and int(text) < 256:
        return int(text)
    sys.stderr.write(f"sae-jax: {STOPPED_CODE}={text!r} must be a number from 0 to 255; leaving with 1\n")
    return 1


def outcome(error: BaseException, resumes: bool) -> tuple[str, int]:
    """(what to say, exit code) of a command that a signal has ended."""
    again = f"the same command {'resumes from what is on disk' if resumes else 'starts over'}"
    if isinstance(error, Terminated):
        return f"stopped by SIGTERM; {again}", TERMINATED
    return f"interrupted; {again}", INTERRUPTED


def leave(code: int) -> NoReturn:
    """The usual way out takes Python down under JAX's threads, which may be compiling, and ends in a segfault."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _hear(number: int, frame: FrameType | None) -> Any:
    _heard.append(number)
    if len(_heard) > 1:
        # Nothing on the disk is ever half there, so there is nothing to wait for.
        os.write(2, b"sae-jax: ended at once\n")
        os._exit(128 + number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    if not _is_deferred:
        raise Terminated


def _not_lost(unraisable: sys.UnraisableHookArgs) -> None:
    """A signal may meet a callback, such as JAX's of the garbage collector, out of which Python lets nothing pass."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt | Terminated):
        sys.__unraisablehook__(unraisable)
        return
    number = signal.SIGINT if issubclass(unraisable.exc_type, KeyboardInterrupt) else signal.SIGTERM
    _heard.clear()
    threading.Thread(target=_send_again, args=(number,), daemon=True).start()


def _send_again(number: int) -> None:
    """Until it is heard: one that comes just before a system call lets that wait to its end."""
    # To the main thread, which alone hears it, and whose waiting only a signal of its own ends.
    main = threading.main_thread().ident
    assert main is not None
    while True:
        time.sleep(SECONDS_UNTIL_AGAIN)
        if _heard:
            return
        signal.pthread_kill(main, number)
