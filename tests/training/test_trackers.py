"""What follows metrics.jsonl: each step once, whatever was killed, and no run that stops because a tracker does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto import event_pb2

from sae_jax.storage import Lease
from sae_jax.training import trackers
from sae_jax.types import UsageError
from tests import runs

MEMBERS = ("--members", "a --sae.k=2", "b")
EVERY = ("--train.checkpoint-every=50",)


def events(folder: Path) -> Iterator[Any]:
    """What TensorBoard finds in a folder, in order."""
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            yield event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size


def history(folder: Path) -> list[dict[str, Any]]:
    """The history that `wandb sync` finds in the offline files of a member, in the order in which it sends them."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        data, at, parts = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            left = 32768 - at % 32768
            if left < 7:
                at += left
                continue
            _, size, kind = struct.unpack_from("<IHB", data, at)
            at += 7 + size
            if at > len(data):
                break
            parts = data[at - size : at] if kind in (1, 2) else parts + data[at - size : at]
            if kind in (1, 4):
                record = wandb_internal_pb2.Record.FromString(parts)
                if record.WhichOneof("record_type") == "history":
                    items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                    found.append(items)
    return found


def descendants(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [below for child in map(int, found) for below in (child, *descendants(child))]


@pytest.mark.slow
@pytest.mark.parametrize("with_all", [False, True], ids=["the run", "and its trackers"])
def test_killed_members_are_one_run_each_with_every_step_once(small_set: Path, tmp_path: Path, with_all: bool) -> None:
    if "LAUNCH_TOOLS" not in os.environ:  # `make test-launch` has it
        pytest.importorskip("wandb")
    run = tmp_path / "run"
    words = runs.train_command(small_set, run, *MEMBERS, *EVERY, "--train.log", "wandb", "tensorboard")
    env = {**runs.environment(), "WANDB_MODE": "offline"}
    killed = subprocess.Popen(words, env=env, cwd=runs.ROOT, stderr=subprocess.PIPE, text=True)
    runs.wait_for(lambda: runs.step_of(run / "members/a") >= 60, killed)
    for pid in [killed.pid, *(descendants(killed.pid) if with_all else [])]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    killed.communicate()
    logged = runs.step_of(run / "members/a")
    if not with_all:  # what came to the trackers of a killed run is brought to its end
        deadline = time.monotonic() + 30
        while max(row["_step"] for row in history(run / "members/a")) < logged - 1 and time.monotonic() < deadline:
            time.sleep(0.1)
    resumed = subprocess.run(words, env=env, cwd=runs.ROOT, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    attempt = runs.attempts(run)[-1]
    assert 0 < attempt["start_step"] < logged, "it was killed between two saves"

    ids = set()
    for name in ("a", "b"):
        folder = run / "members" / name
        (run_id,) = {path.stem for path in folder.glob("wandb/offline-run-*/run-*.wandb")}
        ids.add(run_id)
        rows = history(folder)
        assert [row["_step"] for row in rows] == list(range(1, runs.STEPS + 1))
        for row, own in zip(rows, runs.rows_of(folder), strict=True):
            assert row["fvu"] == pytest.approx(own["fvu"]), "repeated steps are the same steps"
        with_density = [row for row in rows if "log10_density/values" in row or "log10_density" in row]
        assert len(with_density) >= runs.STEPS // 25 - 2, "one a save"

        # Its own reader drops what stands before the mark of a later attempt.
        steps: list[int] = []
        for event in events(folder / "tensorboard"):
            if event.HasField("session_log"):
                steps = [step for step in steps if step < event.step]
            steps += [event.step for value in event.summary.value if value.tag == "fvu"]
        assert steps == list(range(1, runs.STEPS + 1)), "none twice, none missing"
    assert len(ids) == 2


@pytest.mark.slow
def test_a_run_computes_the_same_with_a_tracker(small_set: Path, uninterrupted: Path, tmp_path: Path) -> None:
    runs.complete(
        runs.train_command(small_set, tmp_path / "run", "--train.checkpoint-every=100", "--train.log=tensorboard")
    )
    runs.assert_same_run(tmp_path / "run", uninterrupted)


FAKE = {
    "fails": ("raise OSError('no space left')", "pass", "pass", "wandb: no space left; the run goes on without it"),
    "dies": ("pass", "import os; os.kill(os.getpid(), 9)", "pass", "wandb: its process ended with -9; the run goes"),
    "hangs": ("pass", "pass", "import time; time.sleep(1000)", "wandb: has not ended within 2 s; the run goes"),
}


@pytest.mark.parametrize("how", FAKE)
def test_a_tracker_that_fails_is_said_once_and_left_out(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    init, log, finish, expected = FAKE[how]
    (tmp_path / "wandb.py").write_text(f"""
class Settings:
    def __init__(self, **settings): pass
class Run:
    offline, url, starting_step = False, "http://there", 0
    def log(self, values, step): {log}
    def finish(self, exit_code): {finish}
def init(**settings):
    {init}
    return Run()
""")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(trackers, "SECONDS_TO_END", 2.0)
    folder = tmp_path / "run"
    member = _member(folder)
    began = time.monotonic()
    with trackers.Trackers(["wandb"]) as tracked:
        tracked.open(member, Lease(None, ""), 0, [], 0)
        for step in range(1, 100):
            tracked.row(member, {"step": step, "loss": 1.0})
    assert time.monotonic() - began < 20
    said = [line for line in capsys.readouterr().err.splitlines() if "http" not in line]
    assert len(said) == 1, said
    assert said[0].startswith(expected)


def test_what_cannot_be_followed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs the package wandb: pip install 'sae_jax\[wandb\]'"):
        trackers.check(["wandb"], tmp_path)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="writes to a disk, not to s3://b/run"):
        trackers.check(["tensorboard"], "s3://b/run")
    with pytest.raises(UsageError, match="follows a run on the disk; give --out"):
        trackers.check(["tensorboard"], "")
    trackers.check([], "")


def test_runs_with_the_old_setting_resume(small_set: Path, tmp_path: Path) -> None:
    from sae_jax.training.settings import as_now

    assert as_now({"steps": 1, "tensorboard": True}) == {"steps": 1, "log": ["tensorboard"]}
    assert as_now({"steps": 1, "tensorboard": False}) == {"steps": 1, "log": []}


def _member(folder: Path) -> Any:
    from sae_jax.saes.topk import Config
    from sae_jax.training.groups import Member
    from sae_jax.training.settings import TrainConfig

    sae, train = Config(variant="topk", n_latents=64, k=4), TrainConfig()
    folder.mkdir()
    return Member("", sae, train, folder, runs.record_of(sae, train))
