"""Several processes work as one: launch/local.sh starts them, JAX joins them over the loopback interface."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import sae_jax
from sae_jax import write_activations
from sae_jax.activations.segments import BESIDE_BYTES, GIB
from sae_jax.activations.spec import array_specs
from tests import runs
from tests.commands.test_live import write_recipe

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("steps", [20, pytest.param(30, marks=pytest.mark.long)])
def test_one_two_and_four_processes(small_set: Path, uninterrupted: Path, tmp_path: Path, steps: int) -> None:
    """Each goes on from the checkpoint of the others, sees the same batches and computes the same to rounding."""
    run = tmp_path / "run"

    def words(steps: int) -> list[str]:
        return runs.train_command(small_set, run, "--train.checkpoint-every=100", f"--train.steps={steps}")

    runs.complete(runs.local(2, words(10)))
    runs.complete(words(20))
    if steps == 30:
        runs.complete(runs.local(4, [*words(30), "--mesh.data=2"]))
    found = [(a["start_step"], a["end_step"], a["n_processes"], a["mesh"]["latent"]) for a in runs.attempts(run)]
    assert found == [(0, 10, 2, 2), (10, 20, 1, 1), (20, 30, 4, 2)][: steps // 10]
    runs.assert_metrics_close(runs.rows_of(run), runs.rows_of(uninterrupted)[:steps])
    assert sorted(path.name for path in run.iterdir()) == [
        "attempts.jsonl",
        "checkpoints",
        "config.json",
        "metrics.jsonl",
    ]


@pytest.mark.long
def test_sigterm(small_set: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """To all processes, then to one of them only: all stop and save at the same step, with exit code 0."""
    run = tmp_path / "run"
    words = runs.local(2, runs.train_command(small_set, run, "--train.checkpoint-every=10", "--train.steps=100000"))
    for attempt in range(2):
        process = runs.start(words)
        runs.wait_for(lambda n=attempt: len(runs.attempts(run)) > n, process)
        begun = runs.attempts(run)[-1]["start_step"]
        runs.wait_for(lambda begun=begun: runs.step_of(run) >= begun + 3, process)
        os.kill(process.pid if attempt == 0 else runs.children(process)[1], signal.SIGTERM)
        code, said = runs.finish(process)
        assert code == 0, said
        stopped = runs.attempts(run)[attempt]
        assert stopped["outcome"] == "preempted"
        assert begun + 3 <= stopped["end_step"] == runs.checkpoints(run)[-1]
        assert said.count(f"stopped by SIGTERM at step {stopped['end_step']};") == 1
    assert runs.attempts(run)[1]["start_step"] == runs.attempts(run)[0]["end_step"]
    rows = runs.rows_of(run)
    runs.assert_metrics_close(rows[: runs.STEPS], runs.rows_of(uninterrupted)[: len(rows)])


@pytest.mark.long
def test_one_process_fails(tmp_path: Path) -> None:
    """The chunk that one of them cannot read ends all of them, soon, with its message and its exit code."""
    rows_BD = np.random.default_rng(0).normal(size=(60_000, 8)).astype(np.float32)
    write_activations(tmp_path / "set", rows_BD, dtype="float32")
    with (tmp_path / "set/acts/acts/c/0/0").open("r+b") as shard:
        shard.seek(440_000)  # beyond the sample that all of them read when they begin
        shard.write(b"\xff\xff\xff\xff")
    words = runs.train_command(tmp_path / "set", tmp_path / "run", "--train.batch-size=2048", "--train.log-every=100")
    began = time.monotonic()
    code, said = runs.finish(runs.start(runs.local(2, words)))
    assert code == 1, said
    assert said.count("is not what was written") == 1
    assert "Traceback" not in said
    assert time.monotonic() - began < 90


def test_harvest(tmp_path: Path) -> None:
    """Two processes that know nothing of each other write, byte for byte, what one writes."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i * i}\n\n\n" for i in range(300)))
    flags = (f"--harvest.text={text}", "--harvest.context=32", "--harvest.tokens=2048")
    # Also by the launcher, whose processes are all compiled alike.
    runs.complete(runs.local(1, runs.command("harvest", "--out", tmp_path / "one", *flags)))
    share = " ".join(runs.command("harvest", "--out", tmp_path / "two", *flags))
    runs.complete(runs.local(2, ["bash", "-c", f"{share} --shard $JAX_PROCESS_ID/$JAX_NUM_PROCESSES"]))

    def contents(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    one = contents(tmp_path / "one")
    assert sum(name.startswith("acts/") and "/c/" in name for name in one) == 4
    assert contents(tmp_path / "two") == one


EVALUATE = """
import os, sys
import jax
jax.distributed.initialize(*(f(os.environ[k]) for f, k in (
    (str, "JAX_COORDINATOR_ADDRESS"), (int, "JAX_NUM_PROCESSES"), (int, "JAX_PROCESS_ID"))))
import sae_jax
sae_jax.evaluate(sys.argv[1], tokens=10**9)
"""


@pytest.mark.long
def test_evaluation_by_the_processes_of_a_job(uninterrupted: Path, tmp_path: Path) -> None:
    """Their shares add up to what one process measures."""
    sae_jax.evaluate(uninterrupted, tokens=10**9)
    alone = json.loads((uninterrupted / "evaluation.json").read_text())
    (uninterrupted / "evaluation.json").unlink()
    runs.complete(runs.local(2, [sys.executable, "-c", EVALUATE, str(uninterrupted)]))
    together = json.loads((uninterrupted / "evaluation.json").read_text())
    assert together.keys() == alone.keys()
    for name in ("n_rows", "fvu", "l0", "cosine", "gamma", "l0_histogram"):
        np.testing.assert_allclose(together[name], alone[name], rtol=1e-6)


@pytest.mark.parametrize(
    ("script", "sent", "code"),
    [
        ("exit 0", None, 0),
        ("[ $JAX_PROCESS_ID = 1 ] && exit 7; exit 0", None, 7),
        ("trap 'exit 0' TERM; touch $0.$JAX_PROCESS_ID; while :; do sleep 0.1; done", signal.SIGTERM, 0),
        ("trap 'exit 5' INT; touch $0.$JAX_PROCESS_ID; while :; do sleep 0.1; done", signal.SIGINT, 5),
        ("[ $JAX_PROCESS_ID = 1 ] && exit 9; trap '' TERM; exec sleep 3600", None, 9),
    ],
    ids=["all end well", "one fails", "SIGTERM", "Ctrl-C", "one fails and another hangs"],
)
def test_exit_codes_and_signals_of_the_launcher(tmp_path: Path, script: str, sent: int | None, code: int) -> None:
    process = runs.start(runs.local(3, ["bash", "-c", script, str(tmp_path / "up")]))
    if sent is not None:
        runs.wait_for(lambda: len(list(tmp_path.iterdir())) == 3, process)
        process.send_signal(sent)
    assert runs.finish(process)[0] == code


@pytest.mark.parametrize("words", [[], ["2"], ["0", "true"], ["two", "true"]])
def test_wrong_use_of_the_launcher(words: list[str]) -> None:
    done = subprocess.run([runs.ROOT / "launch/local.sh", *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "usage: launch/local.sh N COMMAND...\n")


@pytest.mark.parametrize("path", sorted((runs.ROOT / "launch").glob("*.s*")), ids=lambda path: path.name)
def test_launch_scripts_parse(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""


MANY_SHARDS = """
import sys
from sae_jax.activations import spec
spec.MIN_SHARDS = 12
from sae_jax.commands.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.long
@pytest.mark.parametrize("is_killed", [False, True])
def test_live_data_of_two_processes(tmp_path: Path, is_killed: bool) -> None:
    """On the disk, which has no room for all of the text: the bits of one process with as many devices, in memory."""
    recipe, shard_bytes = write_recipe(tmp_path), 22 * 16 * 128 * 2

    def words(out: str, budget: str) -> list[str]:
        flags = (budget, "--train.checkpoint-every=100", "--train.steps=60", "--out", str(tmp_path / out))
        return [sys.executable, "-c", MANY_SHARDS, "train", str(recipe), "--data=live", *flags]

    runs.complete(words("one", f"--live.memory-gib={6 * shard_bytes / GIB}"), 2)  # two shards in a segment
    spec = sae_jax.open_activations(tmp_path / "one" / "set", allow_partial=True).spec
    assert spec.n_shards == 12
    first = sum(array.shard_bytes for array in array_specs(spec).values())
    on_disk = f"--live.disk-gib={(BESIDE_BYTES + first + 4 * shard_bytes) / GIB}"  # one of them for each process
    run = tmp_path / "two"
    if is_killed:
        process = runs.start(runs.local(2, words("two", on_disk)))
        runs.wait_for(lambda: runs.step_of(run) >= 50, process)
        runs.kill(process)
        runs.finish(process)
        for folder in (run / "live", run / "live" / "process-1"):
            assert [path.stat().st_size for path in folder.glob("slot-*")] == 4 * [shard_bytes]
    runs.complete(runs.local(2, words("two", on_disk)))
    if is_killed:
        assert runs.attempts(run)[1]["start_step"] >= 10  # training asked for a checkpoint, to have room for the rest
    runs.assert_same_run(run, tmp_path / "one")
    assert [path.name for path in (run / "live").iterdir()] == ["segments.json"]


@pytest.mark.long
def test_members_on_processes_of_their_own(small_set: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """Two processes, each with two devices and one member of two; then each device with a part of both."""
    run = tmp_path / "run"
    members = ("--members", "plain", "fast --train.lr=1e-2", "--train.checkpoint-every=100")
    for steps, mesh in ((10, "--mesh.member=2"), (14, "--mesh.member=1")):
        words = runs.train_command(small_set, run, f"--train.steps={steps}", mesh, *members)
        runs.complete(runs.local(2, words), 2)
    runs.assert_metrics_close(runs.rows_of(run / "members" / "plain"), runs.rows_of(uninterrupted)[:14])
    assert [(a["start_step"], a["mesh"]["member"], a["n_processes"]) for a in runs.attempts(run)] == [
        (0, 2, 2),
        (10, 1, 2),
    ]


STOPPED = """
import os, signal, subprocess, sys, time
import jax
from sae_jax.commands import alive, runtime
alive.SECONDS = 0.2
runtime.start_distributed()
time.sleep(1)  # they know of each other
if jax.process_index() == int(sys.argv[1]):
    subprocess.Popen(["sh", "-c", f"sleep 6; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(6)
"""


@pytest.mark.parametrize("stopped", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_process_that_does_not_answer_is_named(stopped: int) -> None:
    """By the others, while the first, which keeps what they say of themselves, is stopped, too."""
    said = runs.complete(runs.local(2, [sys.executable, "-c", STOPPED, str(stopped)]))
    assert f"process {stopped} on {socket.gethostname()} has not answered for 2 s" in said
