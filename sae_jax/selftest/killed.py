"""A run that is killed in the midst of a save, and taken up again.

It must end in the bits of one that nobody disturbed.

Processes of a job die together and give their devices back late, so the run that is killed is a process of its own
which trains on the CPU of the first process's machine. What it tries is the storage, and how a save is begun, cut off,
recognised and repeated. It kills itself, with SIGKILL, once the arrays of a save are on their way.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sae_jax import storage
from sae_jax.selftest import saves
from sae_jax.selftest.checks import Figures, MismatchError, Where
from sae_jax.training import on_disk as saving
from sae_jax.training import run
from sae_jax.training.checkpoint import Checkpoints
from sae_jax.training.state import abstract
from sae_jax.types import Widths

STEPS, EVERY = 8, 4  # saves begin after 2, 4, 6 and 8 steps
KILLED_AT, WHOLE = 4, 2  # the save that is cut off, and the one before it
ONE_DEVICE = "--xla_force_host_platform_device_count=1"  # whatever was said before
SECONDS = 240  # for one process


def killed(where: Where) -> Figures:
    """Kill, resume, compare. The first process alone: the others have nothing to try."""
    if jax.process_index() > 0:
        return {}
    run_folder, reference = where.folder / "killed", where.folder / "undisturbed"
    with contextlib.ExitStack() as left_over:
        dies, undisturbed = _start(where, left_over, run_folder, KILLED_AT), _start(where, left_over, reference)
        code, said = _end(dies)
        if code != -signal.SIGKILL:
            raise MismatchError(f"a run that kills itself in a save ended with exit code {code}: {said}", "SIGKILL")
        if not (mark := run_folder / "checkpoints" / saving.mark_name(KILLED_AT)).exists():
            raise MismatchError(f"{mark} is not there, so the kill met no save", "it says that a save was cut off")
        _succeed(*_end(undisturbed))
        _succeed(*_end(_start(where, left_over, run_folder)))
    starts = [attempt["start_step"] for attempt in storage.read_lines(run_folder / "attempts.jsonl")]
    if starts[1:] != [WHOLE]:
        raise MismatchError(f"the run was taken up at step {starts[1:]}", f"[{WHOLE}], the last save that had ended")
    seen, expected = (storage.read_json(folder / "bits.json") or {} for folder in (run_folder, reference))
    for name in sorted(expected.keys() | seen.keys()):
        if seen.get(name) != expected.get(name):
            raise MismatchError(f"{name} of the resumed run is other bits", "those of the run that nobody disturbed")
    return {"killed_at": KILLED_AT, "resumed_at": WHOLE, "steps": STEPS, "arrays": len(expected)}


def child() -> None:
    """A run, in a process of its own. argv: its folder, and the step in whose save it dies, or 0."""
    folder, dies_at = Path(sys.argv[1]), int(sys.argv[2])
    finish = saving.finish_save

    def finish_or_die(response: Any, checkpoint: Path, lease: storage.Lease) -> None:
        if checkpoint.name == str(dies_at):
            os.kill(os.getpid(), signal.SIGKILL)
        finish(response, checkpoint, lease)

    saving.finish_save = finish_or_die
    job = saves.job_of(1, str(folder), STEPS)
    job = replace(job, train=replace(job.train, checkpoint_every=EVERY))
    run.run({"": job}, saves.rows())
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpoints(folder, writes=False) as checkpoints:
        state = checkpoints.restore({"": abstract(job.sae, job.train, Widths.one(saves.D), here)})[""]
    leaves = jax.tree_util.tree_leaves_with_path(state)
    bits = {jax.tree_util.keystr(p, simple=True, separator="."): np.asarray(leaf).tobytes() for p, leaf in leaves}
    storage.write_json(folder / "bits.json", {name: hashlib.sha256(each).hexdigest() for name, each in bits.items()})


def _start(where: Where, left_over: contextlib.ExitStack, folder: Path, dies_at: int = 0) -> subprocess.Popen[str]:
    """A process that trains; `left_over` kills it if nobody has waited for its end."""
    # Neither the devices of this process nor its job, and one folder of compiled programs for all.
    others = ("JAX_COORDINATOR", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_", "OMPI_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(where.folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import child; child()", str(folder), str(dies_at)],
        env={
            **compiled,
            **kept,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {ONE_DEVICE}",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    left_over.callback(process.wait)
    left_over.callback(process.kill)
    return process


def _end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, the last line that it said); one that does not end is killed."""
    try:
        said = process.communicate(timeout=SECONDS)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise MismatchError(f"a run of {STEPS} steps has not ended after {SECONDS} s", "its end") from None
    return process.returncode, next(reversed(said.strip().splitlines()), "")[:300]


def _succeed(code: int, said: str) -> None:
    if code:
        raise MismatchError(f"a run ended with exit code {code}: {said}", "0")
