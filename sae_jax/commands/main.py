"""`sae-jax <command>`: find the command, run it, say what went wrong in one line."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sae_jax import __version__
from sae_jax.errors import UsageError, UserError
from sae_jax.progress import console

COMMANDS = {
    "harvest": "text through a language model into an activation set on disk",
    "plan": "compile the train step for machines that are not there: does it fit, what does it do",
    "train": "a sparse autoencoder on an activation set; repeat the command to resume",
    "sweep": "train a grid of autoencoders and measure each at every budget; repeat the command to go on",
    "evaluate": "reconstruction, sparsity and effect on the language model, for a run",
    "dashboard": "a static site to look at the latents of a run",
    "fit": "scaling laws from the table of a sweep, with intervals and figures",
    "advise": "latents, tokens, learning rate and error for a budget, by the laws of a fit",
    "verify": "check every byte of an activation set",
    "demo": "all of the above on the bundled language model, offline, in minutes",
}
RESUMING = ("harvest", "train", "sweep", "demo")
INTERRUPTED = 130  # what shells give a command that Ctrl-C ended

_FREE_SPACE = (errno.ENOSPC, errno.EDQUOT)
_WRONG_PATH = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


def usage() -> str:
    """What `sae-jax --help` says."""
    lines = [f"  {name:10} {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sae-jax COMMAND [RECIPE.yaml] [--key=value ...]",
            "",
            "Sparse autoencoders on language-model activations, from text to a page to look at.",
            "",
            *lines,
            "",
            "`sae-jax COMMAND --help` lists a command's options, `sae-jax --version` says which version this is.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 1 failure, 2 usage, 130 interrupted.

    Without `argv` the words are those of this process, which then does not outlive an interrupt.
    """
    if argv is None:
        _in_huge_pages(sys.argv[1:])
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
        importlib.import_module(f"sae_jax.commands.{argv[0]}").run(argv[1:])
    except UserError as error:
        return _say(str(error), error.exit_code)
    except KeyboardInterrupt:
        again = "goes on from what is on disk" if argv[0] in RESUMING else "starts over"
        return _say(f"interrupted; the same command {again}", INTERRUPTED)
    except OSError as error:
        if error.filename is None and error.errno not in _FREE_SPACE:
            raise
        return _say(*_of_storage(error))
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        return _say(
            f"out of memory: {str(error).splitlines()[0][:200]}; use a smaller sae.n_latents or batch, or more devices",
            1,
        )
    return 0


def _in_huge_pages(argv: list[str]) -> None:
    """Start over with large arrays in pages of 2 MiB, where a program that trains on the CPU has to ask for them.

    XLA takes the memory of a step anew each time; in pages of 4 KiB a fifth of a step went to the kernel handing them
    out (d=768, n=32768, batch 2048: 0.67 s became 0.55). Only the C library can ask, and reads this only at its start.
    """
    pages, set_already = Path("/sys/kernel/mm/transparent_hugepage/enabled"), os.environ.get("GLIBC_TUNABLES", "")
    has_accelerator = any(next(Path("/dev").glob(pattern), None) for pattern in ("nvidia*", "accel*", "kfd"))
    if argv[:1] not in (["train"], ["sweep"], ["demo"]) or has_accelerator or "hugetlb" in set_already:
        return
    try:
        asks = "[madvise]" in pages.read_text()
    except OSError:  # not Linux
        return
    if asks:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (set_already, "glibc.malloc.hugetlb=1")))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _say(line: str, code: int) -> int:
    console.print(f"sae-jax: {line}", markup=False)
    return code


def _of_storage(error: OSError) -> tuple[str, int]:
    """One line for an error of the file system, and the exit code."""
    what = f"{error.filename or 'the disk'}: {error.strerror}"
    if error.errno in _WRONG_PATH:
        return f"{what}; choose another path", UsageError.exit_code
    cure = "free space" if error.errno in _FREE_SPACE else "see that it exists and may be used"
    return f"{what}; {cure} or choose another path", UserError.exit_code


def _is_out_of_memory(error: Exception) -> bool:
    # By name, since JAX may not be imported yet: numpy raises MemoryError, XLA its own error for the devices.
    from_xla = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    said = str(error)
    return isinstance(error, MemoryError) or (from_xla and ("RESOURCE_EXHAUSTED" in said or "ut of memory" in said))


def _leave_the_others(code: int) -> None:
    # Only a command that has imported it can have joined others.
    if runtime := sys.modules.get("sae_jax.commands.runtime"):
        runtime.leave_the_others(code)


if __name__ == "__main__":
    sys.exit(main())
