"""`sae-jax <command>`: find the command, run it, say what went wrong in one line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from sae_jax import __version__
from sae_jax.commands.failures import one_line
from sae_jax.commands.startup import restart_with_huge_pages
from sae_jax.commands.usage import COMMANDS, usage
from sae_jax.errors import UsageError, UserError
from sae_jax.progress import console

RESUMING = ("harvest", "train", "sweep", "demo")
INTERRUPTED = 130  # what shells give a command that Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, by default that of this process. Exit codes: 0 done, 1 failure, 2 usage, 130 interrupted."""
    if argv is None:
        restart_with_huge_pages(sys.argv[1:])
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
    except Exception:
        _leave_the_others(1)
        raise
    if code:
        _leave_the_others(code)
    if code == INTERRUPTED and argv is None:
        # The usual way out takes Python down under JAX's threads, which may be compiling, and ends in a segfault.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("--help", "-h", "help"):
        sys.stdout.write(usage() + "\n")
        return 0 if argv else 2
    if argv[0] == "--version":
        sys.stdout.write(f"sae-jax {__version__}\n")
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise UsageError(f"there is no command {argv[0]!r}; commands are {', '.join(COMMANDS)}")
        command = importlib.import_module(f"sae_jax.commands.{argv[0]}")
        if gpu := sys.modules.get("sae_jax.commands.gpu"):  # only of commands that use devices
            gpu.set_gpu_flags()
        command.run(argv[1:])
    except UserError as error:
        return _say(str(error), error.exit_code)
    except KeyboardInterrupt:
        again = "resumes from what is on disk" if argv[0] in RESUMING else "starts over"
        return _say(f"interrupted; the same command {again}", INTERRUPTED)
    except Exception as error:
        if (said := one_line(error)) is None:
            raise
        return _say(*said)
    return 0


def _say(line: str, code: int) -> int:
    console.print(f"sae-jax: {line}")
    return code


def _leave_the_others(code: int) -> None:
    # Only a command that has imported it can have joined others.
    if runtime := sys.modules.get("sae_jax.commands.runtime"):
        runtime.leave_the_others(code)


if __name__ == "__main__":
    sys.exit(main())
