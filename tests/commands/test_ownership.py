"""Two commands in one folder: the second is refused by name; an owner that was stopped and wakes writes nothing."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from sae_jax import UserError, fit, harvest, load, open_activations, storage, write_activations
from sae_jax.activations.verify import verify
from sae_jax.commands import main as cli
from sae_jax.pages import site
from sae_jax.scaling import table
from sae_jax.storage import HeldError, Lease, LostError, lease, sealed
from sae_jax.training import checkpoint, loop, on_disk, preemption
from sae_jax.training.checkpoint import Checkpoints
from sae_jax.training.members import MemberSet
from tests import runs

pytestmark = pytest.mark.usefixtures("in_process", "one_device")


def train(data: Path, run: Path, *flags: str) -> int:
    return cli.main(runs.train_command(data, run, *flags)[3:])


def sweep(data: Path, out: Path, *flags: str) -> int:
    words = ("--train.checkpoint-every=10", "--sweep.tokens", "640", "1280", "--sweep.per-pass=1")
    grid = ("--sweep.grid", "sae.n_latents=32 64", "--sweep.held-out=128")
    argv = runs.command("sweep", "--data", data, "--out", out, *runs.SETTINGS[1:], *words, *grid, *flags)
    return cli.main(argv[3:])


def content(folder: Path) -> dict[str, bytes]:
    """All that counts: a save that has not been ended is none, whatever a library's thread still writes of it."""
    ended = [path for path in folder.glob("checkpoints/*") if on_disk.is_complete(path)]
    paths = [path for path in folder.rglob("*") if "checkpoints" not in path.parts or {*ended} & {*path.parents}]
    return {str(path): path.read_bytes() for path in paths if path.is_file()}


def said_last(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.long
def test_a_second_train_is_refused_and_a_stopped_one_that_wakes_writes_nothing(
    small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    flags = ("--train.checkpoint-every=10", "--train.steps=1000000")
    first = runs.start(runs.train_command(small_set, run, *flags))
    runs.wait_for(lambda: runs.step_of(run) >= 20, first)
    assert train(small_set, run, *flags, "--train.lr=0.01") == 1
    said = said_last(capsys)
    assert f"{run} is in use: process {first.pid} on host" in said
    assert "wait until it has ended, stop it, or write elsewhere" in said

    runs.stop(first)
    monkeypatch.setattr(lease, "SECONDS", 0.5)
    steps = (checkpoint.latest_step(run) or 0) + 20
    assert train(small_set, run, "--train.checkpoint-every=10", f"--train.steps={steps}") == 0
    before = content(run)
    first.send_signal(signal.SIGCONT)
    code, said = runs.finish(first)
    assert code == 4
    assert "sae-jax: " in said.splitlines()[-1]
    assert "took over, or deleted it, while this process was stopped" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert content(run) == before
    assert load(run).record.steps == steps


@pytest.mark.parametrize("moment", ["check_settings", "Checkpoints", "MemberSet", "write_records", "_Log"])
def test_a_process_that_wakes_before_its_first_step_changes_nothing(
    small_set: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Neither the record nor the log of a run that another has taken over, nor the save that it has under way."""
    run, act, before = tmp_path / "run", getattr(loop, moment), {}

    def after_a_sleep(*args, **kwargs):
        for path in run.glob("owner.*.json"):
            path.unlink()
        shutil.copytree(uninterrupted, run, dirs_exist_ok=True)
        shutil.copytree(run / "checkpoints/200", run / "checkpoints/300.orbax-checkpoint-tmp")
        shutil.copytree(run / "checkpoints/200", run / "checkpoints/250")
        (run / "checkpoints/250/digests-0-of-1.json").unlink()
        (run / "checkpoints/.saving-250").touch()
        before.update({path: path.read_bytes() for path in run.rglob("*") if path.is_file()})
        return act(*args, **kwargs)

    monkeypatch.setattr(loop, moment, after_a_sleep)
    words = runs.train_command(small_set, run, "--train.lr=0.5")
    assert cli.main(words[3:]) != 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_second_write_of_a_set_is_refused(tmp_path: Path) -> None:
    def blocks():
        with pytest.raises(HeldError, match=r"set is in use: process .* writes it"):
            write_activations(tmp_path / "set", np.ones((8, 4), np.float32))
        yield np.eye(8, dtype=np.float32)

    assert write_activations(tmp_path / "set", blocks(), dtype="float32").n_rows == 8
    assert sorted(path.name for path in (tmp_path / "set").glob("*owner*")) == []


def test_a_set_that_another_has_begun_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may only be stopped; a harvest in the same folder is no exception."""
    monkeypatch.setattr("sae_jax.activations.ingest.BUFFER_BYTES", 1000)
    monkeypatch.setattr("sae_jax.activations.spec.SHARD_BYTES", 4096)

    def blocks():
        for number in range(500):
            if number in (0, 499):
                with pytest.raises(HeldError, match=r"set is in use: process .* writes it"):
                    harvest(tmp_path / "set", tokens=128, context=64)
            yield np.ones((10, 3), np.float32)
        with pytest.raises(UserError, match=r"a set that process \d+ on host .* is writing; wait for it, or delete it"):
            write_activations(tmp_path / "set", np.ones((8, 4), np.float32))

    assert write_activations(tmp_path / "set", blocks(), dtype="float32").n_rows == 5000


def test_an_owner_of_a_set_that_has_lost_it_commits_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_jax.activations.ingest.BUFFER_BYTES", 1000)
    monkeypatch.setattr("sae_jax.activations.spec.SHARD_BYTES", 4096)
    made = tmp_path / "set"

    def blocks():
        for path in made.glob("owner.*.json"):
            path.unlink()
        with monkeypatch.context() as whole:
            whole.undo()
            write_activations(made, np.ones((8, 3), np.float32))  # the other, which ends before this one wakes
        yield from [np.zeros((10, 3), np.float32)] * 500

    with pytest.raises(LostError, match="nothing more is written"):
        write_activations(made, blocks(), dtype="float32")
    assert (open_activations(made).read_chunk("acts", 0) == 1).all()
    assert verify(made).damage == ()


def test_a_second_harvest_of_the_same_share_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Lease(tmp_path / "set" / "owner-1-of-4", "SET"):
        assert cli.main(["harvest", "--out", str(tmp_path / "set"), "--shard=1/4"]) == 1
    assert "set is in use: process" in said_last(capsys)
    assert not (tmp_path / "set").exists()


def test_a_second_page_is_refused(tmp_path: Path, uninterrupted: Path) -> None:
    with (
        storage.lease_of_folder(tmp_path / "page"),
        pytest.raises(HeldError, match=r"page is in use: process .* writes it"),
    ):
        site.write_site(load(uninterrupted), "title", tmp_path / "page")
    assert list(tmp_path.iterdir()) == []


def test_a_second_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.jsonl").write_text("{}\n")
    with Lease(tmp_path / "fit.owner", "FIT"):
        assert cli.main(["fit", str(tmp_path)]) == 1
    assert f"the fit of {tmp_path} is in use: process" in said_last(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


def test_a_fit_that_wakes_in_another_s_place_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*words: object) -> None:
        (tmp_path / "fit.owner.0.json").unlink()

    monkeypatch.setattr("sae_jax.scaling.table.read", lambda folder: [])
    monkeypatch.setattr("sae_jax.scaling.laws.study", stopped)
    with pytest.raises(LostError, match="nothing more is written"):
        fit(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_workers_of_a_sweep_go_by_passes_of_others(
    small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With nothing left that this worker can finish, that is what the exit code says."""
    out = tmp_path / "sweep"
    with Lease(out / "passes" / "0of1-0" / "owner", "0of1-0"), Lease(out / "passes" / "0of1-1" / "owner", "0of1-1"):
        assert sweep(small_set, out, "--claim") == 3
        assert "other workers are at all passes that are left, 2; " in said_last(capsys)
        assert sweep(small_set, out) == 1
        assert "passes/0of1-0 is in use: process" in (said := said_last(capsys))
        assert "or give each worker its --shard=i/n, or all of them --claim" in said
    with Lease(out / "passes" / "0of1-0" / "owner", "0of1-0"):
        assert sweep(small_set, out, "--claim") == 0
    assert len(table.read(out)) == 2
    assert sweep(small_set, out, "--claim") == 0
    assert len(table.read(out)) == 4


@pytest.mark.long
def test_a_sweep_is_not_done_without_the_weights_of_its_last_points(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends between a member's last point and its last checkpoint."""
    save = Checkpoints.save

    def ends(self: Checkpoints, step: int, states: dict) -> None:
        if step == 20:
            raise KeyboardInterrupt
        save(self, step, states)

    out = tmp_path / "sweep"
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", ends)
        assert sweep(small_set, out) == 130
    (points,) = (json.loads(path.read_text())["points"] for path in (out / "points").glob("*.json"))
    assert [point["steps"] for point in points] == [10, 20]
    assert sweep(small_set, out) == 0
    assert [checkpoint.latest_step(member) for member in out.glob("passes/*/members/*")] == [20, 20]
    after = {path: path.read_bytes() for path in (out / "points").glob("*.json")}
    again = json.loads(after[out / "points" / f"{points[0]['name']}.json"])["points"]
    assert [point["fvu"] for point in again] == [point["fvu"] for point in points]

    # Nor with weights that are damaged.
    capsys.readouterr()
    assert sweep(small_set, out) == 0
    assert "pass" not in capsys.readouterr().err
    member, file = out / "passes" / "0of1-1" / "members" / "n32", out / "points" / "n32.json"
    largest = max((member / "checkpoints" / "20").rglob("*/d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    assert sweep(small_set, out) == 0
    assert "checkpoints/20 cannot be read: " in (said := capsys.readouterr().err)
    assert said.count("pass ") == 1
    assert checkpoint.problem(member) == ""
    fvus = [[p["fvu"] for p in json.loads(data)["points"]] for data in (after[file], file.read_bytes())]
    assert fvus[0] == fvus[1]


def test_a_pass_that_was_cut_at_its_end_leaves_nothing_behind(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its members had all they need; the checkpoints that they shared would have stayed for ever."""

    def ends(self: MemberSet) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "sweep"
    with monkeypatch.context() as patched:
        patched.setattr(MemberSet, "end", ends)
        assert sweep(small_set, out) == 130
    (cut,) = out.glob("passes/*/checkpoints")
    assert sweep(small_set, out) == 0
    assert sorted(path.name for path in cut.parent.iterdir()) == ["attempts.jsonl", "config.json", "members"]
    assert [*out.glob("passes/*/checkpoints")] == []


def test_what_a_sweep_is_of_must_be_known(small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep" / "points").mkdir(parents=True)
    (tmp_path / "sweep" / "points" / "n32.json").write_text("{}")
    assert sweep(small_set, tmp_path / "sweep") == 1
    assert "has points but no sweep.json" in said_last(capsys)
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({**sealed({"data": "x"}), "data": "y"}))
    assert sweep(small_set, tmp_path / "sweep") == 1
    assert "sweep.json: not what was written, its digest differs" in said_last(capsys)


def test_a_run_without_its_settings_is_refused(
    small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "checkpoints" / "10").mkdir(parents=True)
    assert train(small_set, tmp_path / "run") == 1
    assert f"{tmp_path / 'run'} has checkpoints but no config.json" in said_last(capsys)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]


def test_sigterm_between_two_passes_is_heard(
    small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """JAX agrees on a stop at the number after the last one it was asked about, as is done here."""
    asked = []

    def reached(number: int) -> bool:
        asked.append(number)
        first_is_done = list(out.glob("passes/*/members/*/checkpoints/20"))
        stop.extend([number + 1] * bool(first_is_done and not stop))
        return number in stop

    out, stop = tmp_path / "sweep", []
    monkeypatch.setattr(preemption.multihost_utils, "reached_preemption_sync_point", reached)
    assert sweep(small_set, out) == 0
    said = capsys.readouterr().err
    assert "stopped by SIGTERM" in said
    assert asked == list(range(asked[0], asked[0] + len(asked)))
    assert len(list((out / "points").glob("*.json"))) == 1
    assert sweep(small_set, out) == 0
    assert len(table.read(out)) == 4
