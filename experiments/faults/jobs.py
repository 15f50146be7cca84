"""The long commands at their smallest, in folders with copies of what they begin with; and what they have committed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import sae_jax
from sae_jax import storage
from sae_jax.training.checkpoint import latest_step

ROOT = Path(__file__).parents[2]
WRITES = """
import numpy as np, sae_jax
rows = np.random.default_rng(0).standard_normal((2000, 8)).astype("float32")
sae_jax.write_activations("made", rows, dtype="float32")
"""
SAVES = "import sae_jax; sae_jax.load('run').save('made')"
SMALL = ("--sae.n-latents=32", "--sae.k=4", "--sae.dtype=float32", "--train.batch-size=64", "--train.log-every=1")
TRAIN = ("train", "--data=set", "--out=made", *SMALL, "--train.steps=6", "--train.checkpoint-every=4")
SWEEP = ("sweep", "--data=set", "--out=made", *SMALL, "--train.checkpoint-every=4", "--sweep.grid", "sae.k=2 4")
SWEEP = (*SWEEP, "--sweep.tokens", "128", "256", "--sweep.held-out=128", "--sweep.per-pass=1")


class Job(NamedTuple):
    """A command whose result is the folder `made`, beside its inputs."""

    words: tuple[str, ...]  # after `sae-jax`, or one text of Python
    inputs: tuple[str, ...] = ()
    n: int = 1  # processes that work as one
    is_resumed: bool = True  # else what a kill has left is refused by name, and deleted before it is run again


JOBS = {
    "write_activations": Job((WRITES,), is_resumed=False),
    "save": Job((SAVES,), ("run",), is_resumed=False),
    "harvest": Job(("harvest", "--out=made", "--harvest.tokens=4096", "--harvest.context=64")),
    "train": Job(TRAIN, ("set",)),
    "train by two": Job(TRAIN, ("set",), n=2),
    "members": Job((*TRAIN, "--members", "k4", "k8 --sae.k=8 --train.steps=4"), ("set",)),
    "sweep": Job(SWEEP, ("set",)),
    "evaluate": Job(("evaluate", "made", "--tokens=256"), ("made", "set")),
    "dashboard": Job(("dashboard", "text-run", "--out=made", "--tokens=512"), ("text-run", "text-set")),
}


def prepare(inputs: Path, needed: Collection[str]) -> None:
    """Sets and runs that jobs begin with."""
    rows = np.random.default_rng(0).standard_normal((1024, 8)).astype(np.float32)
    small = {"n_latents": 32, "k": 4, "dtype": "float32", "steps": 4, "batch_size": 64}
    inputs.mkdir(exist_ok=True)
    make: dict[str, Callable[[Path], Any]] = {
        "set": lambda path: sae_jax.write_activations(path, rows, dtype="float32"),
        "text-set": lambda path: sae_jax.harvest(path, tokens=4096, context=64, heldout="heldout"),
        "run": lambda path: sae_jax.train("set", out=path, **small),
        "made": lambda path: shutil.copytree("run", path),
        "text-run": lambda path: sae_jax.train("text-set", out=path, **small),
    }
    needs = {"run": {"set"}, "made": {"set", "run"}, "text-run": {"text-set"}}
    needed = {*needed, *(name for each in needed for name in needs.get(each, ()))}
    before = os.getcwd()
    os.chdir(inputs)  # runs name their sets as seen from there
    try:
        for name in [name for name in make if name in needed]:
            if not Path(name).exists():
                make[name](Path(name))
    finally:
        os.chdir(before)


def environment(out: Path, **more: str) -> dict[str, str]:
    """One device, and programs that are compiled once for all trials, in OUT/compiled."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0",  # commands need not start over to ask for it
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(out / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        **more,
    }


class Committed(NamedTuple):
    """What a folder holds that must never be made again."""

    steps: dict[Path, tuple[int, int]]  # run: (step of its last checkpoint, attempts so far)
    shards: dict[Path, int]  # commit of a shard of a set: when it was written


def committed(made: Path) -> Committed:
    """What a command that was killed has left done."""
    runs = [path.parent for path in made.rglob("checkpoints")]
    steps = {run: (latest_step(run) or 0, len(_attempts(run))) for run in runs}
    return Committed(
        steps, {path: path.stat().st_mtime_ns for path in made.rglob("commits/*.json") if path.stem.isdigit()}
    )


def lost(before: Committed) -> list[str]:
    """What was committed and has been made again since."""
    again = [path for path, at in before.shards.items() if not path.exists() or path.stat().st_mtime_ns != at]
    for run, (step, n) in before.steps.items():
        if any(attempt["start_step"] < step for attempt in _attempts(run)[n:]):
            again.append(run)
    return [str(path) for path in again]


def _attempts(run: Path) -> list[dict[str, Any]]:
    return storage.read_lines(run / "attempts.jsonl")
