"""The program with one of its mechanisms switched off, to see that a campaign finds what the mechanism prevents.

python without.py MECHANISM WORDS...       `sae-jax WORDS`, or a text of Python, without it; "" switches off nothing
"""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path

from sae_jax import record, storage
from sae_jax.activations import commits
from sae_jax.commands import failures, main
from sae_jax.storage import digests, disk, lease
from sae_jax.training import on_disk
from sae_jax.types import UserError


def no_digests() -> None:
    """Checkpoints, dictionaries and records are taken for what was written; rows of sets are still compared."""

    def unchecked(content: dict, path: object) -> dict:
        return {key: value for key, value in content.items() if key != digests.SEAL}

    for module in (storage, digests, record, commits):
        module.unsealed = unchecked
    for module in (digests, on_disk):
        module.check_file = lambda path, expected: None


def no_leases() -> None:
    """Every writer takes itself for the only one."""

    def enter(self: lease.Lease) -> lease.Lease:
        if self._path is not None:
            disk.make_folder(Path(self._path).parent)  # as the file of a lease would
        return self

    lease.Lease.__enter__ = enter
    lease.Lease.__exit__ = lambda self, *error: None
    lease.Lease.check = lambda self: None


def no_whole_files() -> None:
    """Files are written where they belong, instead of beside it and put in place when they are whole."""

    def write(path: Path, data: bytes, put: Callable[[Path, Path], bool | None]) -> bool:
        disk.make_folder(path.parent)
        if put is disk.link and path.exists():
            return False
        path.write_bytes(data)
        return True

    disk.write = write


def no_ended_saves() -> None:
    """The end of a save is seen on the disk, and Orbax is not asked for it: its thread goes on."""
    finish = on_disk.finish_save

    def seen(response: object, path: Path, lease: object) -> None:
        while not path.exists():
            time.sleep(0.01)
        finish(types.SimpleNamespace(result=lambda: None), path, lease)

    on_disk.finish_save = seen


MECHANISMS = {"": lambda: None, "digests": no_digests, "leases": no_leases, "whole files": no_whole_files}
MECHANISMS["ended saves"] = no_ended_saves


def run(words: Sequence[str]) -> int:
    """`sae-jax WORDS`, or a text of Python; its exit code."""
    if len(words) == 1:
        try:
            exec(words[0])
        except (UserError, OSError, KeyboardInterrupt) as error:
            # Of any other error, Python shows where it was raised.
            said = failures.one_line(error) if isinstance(error, OSError) else (f"{type(error).__name__}: {error}", 1)
            if said is None:
                raise
            sys.stderr.write(f"{said[0]}\n")
            return said[1]
        return 0
    sys.argv = ["sae-jax", *words]
    return main.main()


if __name__ == "__main__":
    MECHANISMS[sys.argv[1]]()
    sys.exit(run(sys.argv[2:]))
