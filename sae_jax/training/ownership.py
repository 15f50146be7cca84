"""Who writes a run: one job at a time, for whose processes the first one holds the lease."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from sae_jax.storage import AnyPath, HeldError, Lease, disk
from sae_jax.types import UserError


@contextlib.contextmanager
def owned(run: AnyPath | None, is_patient: bool = True) -> Iterator[Lease]:
    """The lease of a run's folder, for as long as the block takes. All processes must call it together.

    What is refused before anything was written leaves no empty folders.

    Args:
        run: shared by all processes; None: nothing is written, so there is nothing to own.
        is_patient: as of `Lease`.

    Raises HeldError, on every process, while another job has the run.
    """
    is_first = jax.process_index() == 0
    lease = Lease(run / "owner" if run is not None and is_first else None, run or "", is_patient)
    with contextlib.ExitStack() as stack:
        if isinstance(run, Path) and is_first:  # at a URL there are no folders, and nothing is put in place
            stack.push(lambda kind, *_: _remove_if_empty(run) if kind else None)
        problem: Exception | None = None
        try:
            stack.enter_context(lease)
        except (UserError, OSError) as error:
            problem = error  # the others wait to hear of it
        if as_the_first_says(problem is not None):
            raise problem or HeldError(f"{run} cannot be used; the first process says why")
        if isinstance(run, Path) and is_first:
            for folder in (run, *run.glob("members/*/")):
                # What waits for the lease has temporaries of its own.
                disk.remove_leftovers(folder, lambda name: not name.startswith("owner."), seconds=0)
            stack.push(lambda kind, *_: _remove_if_empty(run / "checkpoints") if kind else None)
        yield lease


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def as_the_first_says(answer: bool) -> bool:
    """The first process's answer, on all: it has written the files, and others may see them later."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(answer)))
