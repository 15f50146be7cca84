"""The same four commands by launch/local.sh and on a real Slurm: the same set, the same run, the same figures."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from sae_jax import open_activations
from sae_jax.storage.digests import SEAL
from tests import runs
from tests.launch import slurm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(slurm.WHY_NOT), reason=f"no Slurm here: {slurm.WHY_NOT}"),
]

SETTINGS = (
    *("--sae.n-latents=128", "--sae.k=8", "--sae.dtype=float32"),
    *("--train.batch-size=64", "--train.steps=40", "--train.log-every=1", "--train.checkpoint-every=20"),
)
GRID = ("--sweep.tokens", "640", "1280", "--sweep.held-out=256", "--sweep.per-pass=1", "--members", "a --sae.k=2", "b")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Slurm]:
    started = slurm.Slurm(tmp_path_factory.mktemp("slurm"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"def f{i}(x):\n    return x + {i * i}\n\n\n" for i in range(400)))
    return path


Launch = Callable[..., None]  # (command and arguments, whether its two processes join)


def by_local(*words: str | Path, joined: bool) -> None:
    command = [*map(str, runs.command(*words))]
    if not joined:
        shard = '--shard "$JAX_PROCESS_ID/$JAX_NUM_PROCESSES"'
        command = ["bash", "-c", f"SAE_JAX_DISTRIBUTED=none {shlex.join(command)} {shard}"]
    env = runs.environment()
    done = subprocess.run(runs.local(2, command), env=env, cwd=runs.ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr


def by_slurm(cluster: slurm.Slurm, folder: Path) -> Launch:
    def launch(*words: str | Path, joined: bool) -> None:
        log = folder / f"{words[0]}-%a.log"
        if joined:
            assert words[0] == "train", "what slurm_train.sbatch starts"
            how = ("--ntasks-per-node=2", "--cpus-per-task=1", runs.ROOT / "launch/slurm_train.sbatch", *words[1:])
        else:
            how = ("--array=0-1", runs.ROOT / "launch/slurm_array.sbatch", *words)
        assert "error" not in cluster.ask("sbatch", "--test-only", *how)
        job = cluster.submit(f"--output={log}", *how)
        cluster.wait_for(lambda: set(cluster.state(job).split()) <= {"COMPLETED", "FAILED", "TIMEOUT"}, seconds=400)
        said = "".join(path.read_text() for path in folder.glob(f"{words[0]}-*.log"))
        assert set(cluster.state(job).split()) == {"COMPLETED"}, said

    return launch


def make(launch: Launch, folder: Path, text: Path) -> dict[str, float]:
    """Harvest, train, sweep and evaluate in `folder`; seconds that each took."""
    seconds: dict[str, float] = {}

    def timed(*words: str | Path, joined: bool = False) -> None:
        began = time.monotonic()
        launch(*words, joined=joined)
        seconds[str(words[0])] = time.monotonic() - began

    data, run, sweep = folder / "set", folder / "run", folder / "sweep"
    flags = (f"--harvest.text={text}", "--harvest.context=32", "--harvest.tokens=2048")
    timed("harvest", "--out", data, *flags)
    timed("train", "--data", data, "--out", run, *SETTINGS, joined=True)
    timed("sweep", "--data", data, "--out", sweep, *SETTINGS, *GRID)
    timed("evaluate", run, "--tokens=1024")
    return seconds


def test_local_and_slurm_make_the_same(cluster: slurm.Slurm, text: Path, tmp_path: Path) -> None:
    for name, launch in (("local", by_local), ("slurm", by_slurm(cluster, tmp_path))):
        (tmp_path / name).mkdir()
        print(name, make(launch, tmp_path / name, text))
    local, other = tmp_path / "local", tmp_path / "slurm"

    sets = [open_activations(folder / "set") for folder in (local, other)]
    assert sets[0].content == sets[1].content
    (source,) = sets[0].spec.sources
    parts = [np.concatenate([s.read_chunk(source.name, i) for i in range(s.n_chunks)]) for s in sets]
    assert len(parts[0]) > 2000
    assert np.array_equal(*parts), "the set, to the bit"

    runs.assert_same_run(other / "run", local / "run")
    assert [a["n_processes"] for a in runs.attempts(other / "run")] == [2]

    members = [sorted(path.relative_to(f) for path in f.glob("sweep/passes/*/members/*")) for f in (local, other)]
    assert members[0] == members[1]
    assert len(members[0]) == 2
    for member in members[0]:
        runs.assert_same_run(other / member, local / member)
    points = [sorted(map(without_places, (f / "sweep/results.jsonl").read_text().splitlines())) for f in (local, other)]
    assert points[0] == points[1]
    assert len(points[0]) == 4

    measured = [without_places((folder / "run/evaluation.json").read_text()) for folder in (local, other)]
    assert measured[0] == measured[1]
    assert '"fvu"' in measured[0]

    # One process with two devices: the mesh is the same, what passes between them goes another way. At the rate of so
    # short a run rounding grows tenfold in a few steps.
    alone = tmp_path / "alone"
    runs.complete(runs.command("train", "--data", local / "set", "--out", alone, *SETTINGS), n_devices=2)
    runs.assert_metrics_close(runs.rows_of(alone)[:4], runs.rows_of(local / "run")[:4])


def without_places(text: str) -> str:
    """What was measured, without where the set lies and how long it took; in one order."""
    content = {k: v for k, v in json.loads(text).items() if k not in ("data", "seconds", SEAL)}
    return json.dumps(content, sort_keys=True)


def test_a_job_that_is_cancelled_goes_on_when_it_is_submitted_again(
    cluster: slurm.Slurm, small_set: Path, tmp_path: Path
) -> None:
    run, script = tmp_path / "run", runs.ROOT / "launch/slurm_train.sbatch"
    how = ("--ntasks-per-node=2", "--cpus-per-task=1", f"--output={tmp_path}/log", script, "--data", small_set)
    settings = ("--out", run, *runs.SETTINGS, "--train.checkpoint-every=1000")
    job = cluster.submit(*how, *settings, "--train.steps=100000")
    cluster.wait_for(lambda: run.exists() and runs.step_of(run) >= 3, seconds=120)
    cluster.ask("scancel", str(job))
    cluster.wait_for(lambda: cluster.state(job) in ("CANCELLED", "COMPLETED", "FAILED"))
    stopped = runs.attempts(run)[-1]
    said = (tmp_path / "log").read_text()
    assert stopped["outcome"] == "preempted", said
    steps = stopped["end_step"] + 5
    job = cluster.submit(*how, *settings, f"--train.steps={steps}")
    cluster.wait_for(lambda: cluster.state(job) in ("COMPLETED", "FAILED"), seconds=120)
    assert cluster.state(job) == "COMPLETED", (tmp_path / "log").read_text()
    assert [a["start_step"] for a in runs.attempts(run)] == [0, stopped["end_step"]]
    assert [row["step"] for row in runs.rows_of(run)] == list(range(1, steps + 1))


def test_a_task_that_never_starts_is_named(cluster: slurm.Slurm, tmp_path: Path) -> None:
    """Task 1 ends before it joins, and `srun` is not told to end the others."""
    script = tmp_path / "job"
    command = shlex.join(runs.command("selftest", "--out", tmp_path / "out"))
    script.write_text(f"#!/bin/bash\nsrun bash -c '((SLURM_PROCID == 1)) || {command}'\n")
    env = f"--export=ALL,SAE_JAX_JOIN_SECONDS=8,HOME={os.environ.get('HOME', '/')}"
    job = cluster.submit("--ntasks=3", "--cpus-per-task=1", env, f"--output={tmp_path}/log", script)
    cluster.wait_for(lambda: cluster.state(job) in ("COMPLETED", "FAILED"), seconds=120)
    said = (tmp_path / "log").read_text()
    assert cluster.state(job) == "FAILED", said
    assert said.count("process 1 of 3 has not come within 8 s (process 2 on ") == 2, said
