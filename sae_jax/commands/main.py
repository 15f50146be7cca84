"""`sae-jax <command>`: find the command, run it, say what went wrong in one line."""

from __future__ import annotations

import errno
import importlib
import sys
from collections.abc import Sequence

from sae_jax.errors import UsageError, UserError
from sae_jax.progress import console

COMMANDS = {
    "harvest": "text through a language model into an activation set on disk",
    "train": "a sparse autoencoder on an activation set; repeat the command to resume",
    "evaluate": "reconstruction, sparsity and effect on the language model, for a run",
    "dashboard": "a static site to look at the latents of a run",
    "verify": "check every byte of an activation set",
    "demo": "all of the above on the bundled language model, offline, in minutes",
}
INTERRUPTED = 130  # what shells give a command that Ctrl-C ended


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
            "`sae-jax COMMAND --help` lists a command's options.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 1 failure, 2 usage, 130 interrupted."""
    code = _run(list(sys.argv[1:] if argv is None else argv))
    if code and "jax" in sys.modules:
        importlib.import_module("sae_jax.commands.runtime").leave_the_others(code)
    return code


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("--help", "-h", "help"):
        sys.stdout.write(usage() + "\n")
        return 0 if argv else 2
    try:
        if argv[0] not in COMMANDS:
            raise UsageError(f"there is no command {argv[0]!r}; commands are {', '.join(COMMANDS)}")
        importlib.import_module(f"sae_jax.commands.{argv[0]}").run(argv[1:])
    except UserError as error:
        console.print(f"sae-jax: {error}", markup=False)
        return error.exit_code
    except KeyboardInterrupt:
        console.print("sae-jax: interrupted; the same command goes on from what is on disk")
        return INTERRUPTED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        console.print(f"sae-jax: {error.filename}: {error.strerror}; free space or choose another path", markup=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
