"""`sae-jax <command>`: find the command, run it, say what went wrong in one line."""

from __future__ import annotations

import importlib
import keyword
import sys
from collections.abc import Sequence

from sae_jax import __version__
from sae_jax.commands import signals
from sae_jax.commands.failures import one_line, reader_left
from sae_jax.commands.startup import restart_with_huge_pages
from sae_jax.commands.usage import COMMANDS, RESUMING, usage
from sae_jax.errors import UsageError, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, by default that of this process. The exit codes are those of `usage`."""
    is_process, argv = argv is None, list(sys.argv[1:] if argv is None else argv)
    try:
        if is_process:
            signals.catch()
            restart_with_huge_pages(argv)
        code = _run(argv)
        sys.stdout.flush()
        if code == 0 and is_process and (stopped := sys.modules.get("sae_jax.training.preemption")):
            # All processes leave alike, by the usual way out.
            return signals.stopped_code() if stopped.was_preempted() else 0
    except (KeyboardInterrupt, signals.Terminated) as error:
        code = _say(*signals.outcome(error, bool(argv) and argv[0] in RESUMING))
    except BrokenPipeError:
        code = reader_left()
    except Exception:
        _leave_the_others(1)
        raise
    if code:
        _leave_the_others(code)
    if is_process and code in signals.AT_ONCE:
        signals.leave(code)
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
        name = argv[0] + "_" * keyword.iskeyword(argv[0])  # import
        command = importlib.import_module(f"sae_jax.commands.{name}")
        if gpu := sys.modules.get("sae_jax.commands.gpu"):  # only of commands that use devices
            gpu.set_gpu_flags()
        command.run(argv[1:])
    except UserError as error:
        return _say(str(error), error.exit_code)
    except SystemExit as stop:  # of --help
        return int(stop.code or 0)
    except Exception as error:
        if (said := one_line(error)) is None:
            raise
        return _say(*said)
    return 0


def _say(line: str, code: int) -> int:
    sys.stderr.write(f"sae-jax: {line}\n")
    return code


def _leave_the_others(code: int) -> None:
    # Only a command that has imported it can have joined others.
    if runtime := sys.modules.get("sae_jax.commands.runtime"):
        runtime.leave_the_others(code)


if __name__ == "__main__":
    sys.exit(main())
