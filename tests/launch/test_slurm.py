"""launch/slurm_*.sbatch on a real Slurm of one node: stopped by it, back in its queue, and done in the end."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests import runs
from tests.launch import slurm

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(slurm.WHY_NOT), reason=f"no Slurm here: {slurm.WHY_NOT}")]

ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "PREEMPTED", "NODE_FAIL")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Slurm]:
    started = slurm.Slurm(tmp_path_factory.mktemp("slurm"))
    yield started
    started.close()


def test_training_outlives_its_time_limit_and_a_preemption(
    cluster: slurm.Slurm, small_set: Path, tmp_path: Path
) -> None:
    run, recipe, log = tmp_path / "run", tmp_path / "recipe.yaml", tmp_path / "log"
    settings = {"batch_size": 64, "dead_after_tokens": 1000, "log_every": 1, "checkpoint_every": 1000, "decay": 0}

    def write_recipe(steps: int) -> None:
        sae = {"variant": "topk", "n_latents": 64, "k": 4, "dtype": "float32"}
        recipe.write_text(yaml.safe_dump({"sae": sae, "train": {**settings, "steps": steps}}))

    def reaches_steps_of_attempt(n: int) -> None:
        cluster.wait_for(lambda: len(runs.attempts(run)) >= n)
        cluster.wait_for(lambda: runs.step_of(run) >= runs.attempts(run)[-1]["start_step"] + 3)

    write_recipe(100_000)
    resources = ("--ntasks-per-node=2", "--cpus-per-task=1", "--time=10", f"--output={log}")
    script = runs.ROOT / "launch/slurm_train.sbatch"
    job = cluster.submit(*resources, script, recipe, "--data", small_set, "--out", run)

    reaches_steps_of_attempt(1)
    cluster.ask("scontrol", "update", f"JobId={job}", "EndTime=now+100seconds")  # heard of twice a minute
    cluster.wait_for(lambda: cluster.state(job) == "PENDING")
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    reaches_steps_of_attempt(2)
    urgent = cluster.submit("--partition=urgent", "--exclusive", f"--output={tmp_path}/urgent", "--wrap=true")
    cluster.wait_for(lambda: cluster.state(job) == "PENDING")
    enough = runs.attempts(run)[-1]["end_step"] + 20
    write_recipe(enough)
    cluster.wait_for(lambda: cluster.state(job) in ENDED)

    said = log.read_text()
    assert (cluster.state(job), cluster.state(urgent)) == ("COMPLETED", "COMPLETED"), said
    found = runs.attempts(run)
    assert [(a["outcome"], a["n_processes"]) for a in found] == [("preempted", 2), ("preempted", 2), ("finished", 2)]
    assert [a["start_step"] for a in found] == [0, found[0]["end_step"], found[1]["end_step"]]
    assert said.count("stopped by SIGTERM at step") == 2, "none was killed, and one process speaks for both"
    assert [row["step"] for row in runs.rows_of(run)] == list(range(1, enough + 1))
    assert runs.checkpoints(run)[-1] == enough


def test_harvest_array_outlives_the_time_limit_of_a_task(cluster: slurm.Slurm, tmp_path: Path) -> None:
    text, path = tmp_path / "text.txt", tmp_path / "set"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i * i}\n\n\n" for i in range(300)))
    flags = (f"--harvest.text={text}", "--harvest.context=32", "--harvest.tokens=2048")
    script = runs.ROOT / "launch/slurm_array.sbatch"
    job = cluster.submit("--array=0-1", f"--output={tmp_path}/%a.log", script, "harvest", "--out", path, *flags)

    def works() -> bool:
        return subprocess.run(["pgrep", "-f", f"sae-jax harvest --out {path} .*--shard 1/2"]).returncode == 0

    cluster.wait_for(works)
    cluster.ask("scancel", "--batch", "--signal=USR1", f"{job}_1")  # what comes a minute before the time limit
    cluster.wait_for(lambda: cluster.state(f"{job}_1") == "PENDING")
    assert not works()
    cluster.wait_for(lambda: all(cluster.state(f"{job}_{task}") in ENDED for task in (0, 1)))

    said = "".join((tmp_path / f"{task}.log").read_text() for task in (0, 1))
    assert [cluster.state(f"{job}_{task}") for task in (0, 1)] == ["COMPLETED", "COMPLETED"], said
    assert "DUE TO JOB REQUEUE" in said
    assert "4 shards" in runs.complete(runs.command("verify", path))
