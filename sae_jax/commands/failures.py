"""What went wrong, in one line, for errors that are not ours: of storage and of memory."""

from __future__ import annotations

import errno
import os
import sys

from sae_jax.errors import UsageError, UserError

_FREE_SPACE = (errno.ENOSPC, errno.EDQUOT)
_WRONG_PATH = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
READER_LEFT = 141  # what shells give a command whose output nobody reads any more


def one_line(error: Exception) -> tuple[str, int] | None:
    """(what to say, exit code) of an error that a user can cause; None of any other."""
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _FREE_SPACE):
        return _of_storage(error)
    if _is_out_of_memory(error):
        what = str(error).splitlines()[0][:200] if str(error) else "of this machine"
        return f"out of memory: {what}; use a smaller sae.n_latents or batch, or more devices", UserError.exit_code
    if _is_of_a_lost_process(error):
        what = f"another process of this job does not answer ({str(error).splitlines()[0][:200]})"
        return f"{what}; see what it said, and repeat the command", UserError.exit_code
    return None


def reader_left() -> int:
    """The exit code of a command whose output nobody reads any more, as of `sae-jax --help | head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes in the end
    return READER_LEFT


def _of_storage(error: OSError) -> tuple[str, int]:
    """One line for an error of the file system, and the exit code."""
    what = f"{error.filename or 'the disk'}: {error.strerror}"
    if error.errno in _WRONG_PATH:
        return f"{what}; choose another path", UsageError.exit_code
    cure = "free space" if error.errno in _FREE_SPACE else "see that it exists and may be used"
    return f"{what}; {cure} or choose another path", UserError.exit_code


def _is_out_of_memory(error: Exception) -> bool:
    said = str(error)
    return isinstance(error, MemoryError) or (
        _is_of_xla(error) and ("RESOURCE_EXHAUSTED" in said or "ut of memory" in said)
    )


def _is_of_a_lost_process(error: Exception) -> bool:
    """As gloo says it, by which processes talk on CPUs. What the libraries of GPUs and TPUs say was not seen yet."""
    return _is_of_xla(error) and "Gloo" in str(error)


def _is_of_xla(error: Exception) -> bool:
    # By name, since JAX may not be imported yet: numpy raises MemoryError, XLA its own error for the devices.
    return type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
