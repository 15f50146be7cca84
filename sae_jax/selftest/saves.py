"""Saving a run and taking it up again on the whole mesh.

The state that comes back is the one that was saved, bit for bit. And a run that was cut in two ends where one that was
not ends: in the same bits, but for GPUs, where sums run in any order and the two agree to rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sae_jax import progress
from sae_jax.activations.memory import ArrayRows
from sae_jax.saes import topk
from sae_jax.selftest.checks import Figures, MismatchError, Where, check
from sae_jax.training import run
from sae_jax.training.checkpoint import Checkpoints
from sae_jax.training.run import TrainJob
from sae_jax.training.settings import TrainConfig
from sae_jax.training.state import TrainState, abstract
from sae_jax.types import Widths

D, K, ROWS = 16, 4, 2048
LATENTS, BATCH = 16, 8  # of a device
CUT, STEPS = 3, 6
ROUNDING = 1e-2  # on a GPU, as a share of the largest number: Adam's first steps follow the sign of a gradient


def saves(where: Where) -> Figures:
    """Save and restore a state; then train in two parts, and at once."""
    with _silent():
        whole = train(where, "", STEPS)
        with Checkpoints(where.folder / "saved") as checkpoints:
            checkpoints.save(STEPS, {"": whole})
        restored = _restored(where, where.folder / "saved")
        train(where, "run", CUT)
        train(where, "run", STEPS)
        resumed = _restored(where, where.folder / "run")
    _compare("restored", restored, whole)
    if int(resumed.step) != STEPS:
        raise MismatchError(f"the resumed run stands at step {int(resumed.step)}", str(STEPS))
    _compare("resumed", resumed, whole, ROUNDING if where.platform == "gpu" else 0.0)
    n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(whole))
    return {"steps": STEPS, "cut_at": CUT, "state_bytes": n_bytes}


def train(where: Where, folder: str, steps: int) -> Any:
    """A run of that many steps in this folder, or in memory, whose last state is then returned."""
    job = job_of(where.mesh.size, str(where.folder / folder) if folder else "", steps)
    return run.run({"": replace(job, mesh=where.mesh_config, engine=where.engine)}, rows()).states.get("")


def job_of(n_devices: int, out: str, steps: int) -> TrainJob:
    """A tiny run that saves at its end, and may be prolonged."""
    sae = topk.Config(n_latents=LATENTS * n_devices, k=K, dtype="float32")
    config = TrainConfig(steps=steps, batch_size=BATCH * n_devices, lr=1e-3, decay=0.0, dead_after_tokens=10**6)
    return TrainJob(data="", out=out, sae=sae, train=config)


def rows() -> ArrayRows:
    """Rows to learn from, the same on every process."""
    return ArrayRows(np.random.default_rng(0).standard_normal((ROWS, D)).astype(np.float32))


def _restored(where: Where, folder: Path) -> TrainState:
    job = job_of(where.mesh.size, "", STEPS)
    target = abstract(job.sae, job.train, Widths.one(D), where.mesh)
    with Checkpoints(folder, writes=False) as checkpoints:
        return checkpoints.restore({"": target})[""]


def _compare(what: str, state: TrainState, expected: TrainState, tolerance: float = 0.0) -> None:
    """Every array of two states."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    for (path, leaf), should in zip(leaves, jax.tree.leaves(expected), strict=True):
        parts = {str(shard.index): np.asarray(shard.data) for shard in should.addressable_shards}
        name = f"{what} {jax.tree_util.keystr(path, simple=True, separator='.')}"
        check(name, leaf, lambda index, parts=parts: parts[str(index)], tolerance)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Of runs within the test nobody wants progress."""
    before, progress.console.quiet = progress.console.quiet, True
    try:
        yield
    finally:
        progress.console.quiet = before
