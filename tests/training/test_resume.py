"""Runs that are killed, preempted, damaged or moved go on as if nothing had happened."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from sae_jax import mesh as meshes
from sae_jax.activations.loader import Loader
from sae_jax.activations.source import Batches, sampler
from sae_jax.activations.store import open_activations
from sae_jax.activations.stored import StoredRows
from sae_jax.artifact import load
from sae_jax.commands import main, runtime
from sae_jax.progress import console
from sae_jax.saes import topk
from sae_jax.storage import Lease
from sae_jax.training import logs, loop, on_disk
from sae_jax.training.checkpoint import Checkpoints, check_resumable, read_record
from sae_jax.training.groups import Member
from sae_jax.training.members import is_save_due
from sae_jax.training.settings import MAY_CHANGE, TrainConfig
from sae_jax.types import UsageError, UserError
from tests import runs

RARELY = "--train.checkpoint-every=100"


@pytest.fixture
def copied(uninterrupted: Path, tmp_path: Path) -> Path:
    """The uninterrupted run once more, to damage."""
    run = tmp_path / "copied"
    shutil.copytree(uninterrupted, run)
    assert runs.checkpoints(run) == [150, 200]
    return run


# A save takes longer than a step here: with checkpoint_every=2 there is one under way at every moment.
@pytest.mark.slow
@pytest.mark.parametrize("every", [10, pytest.param(2, marks=pytest.mark.long)])
def test_killed_at_any_moment(small_set: Path, uninterrupted: Path, tmp_path: Path, every: int) -> None:
    run, rng = tmp_path / "run", random.Random()
    words = runs.train_command(small_set, run, f"--train.checkpoint-every={every}")
    killed_at = []
    for _ in range(2):
        process = runs.start(words)
        runs.wait_for(lambda: len(runs.attempts(run)) > len(killed_at), process)
        until = runs.attempts(run)[-1]["start_step"] + every + rng.randint(1, 15)
        runs.wait_for(lambda until=until: runs.step_of(run) >= until, process)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        runs.finish(process)
        killed_at.append(runs.step_of(run))
    runs.complete([*words, RARELY])
    attempts = runs.attempts(run)
    assert [attempt["outcome"] for attempt in attempts] == ["running"] * 2 + ["finished"]
    for step, after in zip(killed_at, attempts[1:], strict=True):
        assert 0 < after["start_step"] <= step <= after["start_step"] + every
    runs.assert_same_run(run, uninterrupted)
    assert [path.name for path in (run / "checkpoints").iterdir() if not path.name.isdigit()] == []


@pytest.mark.slow
def test_sigterm(small_set: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """In the middle of steps and saves, and before the first step of an attempt: saved where it stops, exit code 0."""
    run = tmp_path / "run"
    words = runs.train_command(small_set, run, "--train.checkpoint-every=1")
    process = runs.start(words)
    runs.wait_for(lambda: runs.step_of(run) >= 10, process)
    process.send_signal(signal.SIGTERM)
    code, said = runs.finish(process)
    stopped = runs.attempts(run)[-1]
    assert (code, stopped["outcome"]) == (0, "preempted"), said
    assert 10 <= stopped["end_step"] == runs.step_of(run) == runs.checkpoints(run)[-1] < runs.STEPS
    assert f"stopped by SIGTERM at step {stopped['end_step']}" in said

    process = runs.start(words)
    runs.wait_for(lambda: len(runs.attempts(run)) == 2, process)
    process.send_signal(signal.SIGTERM)
    code, said = runs.finish(process)
    again = runs.attempts(run)[-1]
    assert (code, again["outcome"], again["start_step"]) == (0, "preempted", stopped["end_step"]), said
    assert runs.checkpoints(run)[-1] == again["end_step"] < runs.STEPS

    runs.complete([*words, RARELY])
    runs.assert_same_run(run, uninterrupted)


@pytest.mark.long
def test_other_meshes(small_set: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """(1, 8), then (2, 4), then one device: the same batches, and metrics equal to rounding."""
    run = tmp_path / "run"
    for steps, n_devices, data in ((20, 8, 1), (40, 8, 2), (60, 1, 1)):
        flags = (f"--train.steps={steps}", f"--mesh.data={data}", RARELY)
        runs.complete(runs.train_command(small_set, run, *flags), n_devices)
    assert [(a["start_step"], a["mesh"]["data"], a["mesh"]["latent"]) for a in runs.attempts(run)] == [
        (0, 1, 8),
        (20, 2, 4),
        (40, 1, 1),
    ]
    runs.assert_metrics_close(runs.rows_of(run), runs.rows_of(uninterrupted)[:60])


ODD = (
    "1.0% of its rows hold 100% of the variance, so FVU is theirs; leave them out (harvest.max_norm_multiple) if they "
    "are attention sinks"
)


@pytest.mark.long
def test_row_that_overflows(tmp_path: Path) -> None:
    """One line, exit code 1, what is needed to replay the step, and checkpoints as they were; again on resume."""
    data = runs.write_set(tmp_path / "set", outlier=600)
    with Loader(open_activations(data), ("acts",), 64, 0) as loader:
        bad = next(step for step in range(16) if np.abs(loader.batch(step)["acts"]).max() > 1e19)
        rows = loader.row_ids(bad).tolist()
    assert bad > 4
    run = tmp_path / "run"
    words = runs.train_command(data, run, "--train.checkpoint-every=4", "--sae.input-norm=none")
    for attempt in range(2):
        code, said = runs.finish(runs.start(words))
        assert code == 1
        assert f"sae-jax: loss is inf, gradient norm 0.0 at step {bad + 1}; " in said
        lines = said.splitlines()
        odd = [line for line in lines if line == "source acts: " + ODD]
        assert len(odd) == (attempt == 0)  # where the run begins
        assert runs.one_line("\n".join(line for line in lines if line not in odd))
        failure = json.loads((run / "failure-0.json").read_text())
        assert (failure["step"], failure["row_ids"]) == (bad + 1, rows)
        assert failure["last_checkpoint"] == runs.checkpoints(run)[-1] == bad // 2 * 2
        assert int(runs.state_of(run).step) == failure["last_checkpoint"]
        assert runs.attempts(run)[attempt]["outcome"] == "failed"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(where)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


@pytest.mark.slow
@pytest.mark.long
def test_full_disk(small_set: Path, uninterrupted: Path, tmp_path: Path, small_disk: Path) -> None:
    """One line, exit code 1; with space again the run goes on."""
    run = small_disk / "run"
    words = runs.train_command(small_set, run, "--train.checkpoint-every=10")
    ballast = small_disk / "ballast"
    process = runs.start(words)
    runs.wait_for(lambda: runs.step_of(run) >= 30, process)
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    code, said = runs.finish(process)
    assert code == 1
    assert runs.one_line(said)
    assert said.splitlines()[-1].startswith("sae-jax: ")
    assert "space" in said
    ballast.unlink()
    runs.complete([*words, RARELY])
    assert runs.attempts(run)[-1]["start_step"] > 0
    runs.assert_same_run(run, uninterrupted)


@pytest.mark.slow
def test_damaged_newest_checkpoint(small_set: Path, copied: Path, uninterrupted: Path) -> None:
    """The run goes on from the one before, says so, and keeps what it could not read."""
    data = next((copied / "checkpoints/200/optimiser/ocdbt.process_0/d").iterdir())
    os.truncate(data, data.stat().st_size // 2)
    said = runs.complete(runs.train_command(small_set, copied, RARELY))
    assert "checkpoints/200 cannot be read: " in said
    assert runs.attempts(copied)[-1]["start_step"] == 150
    assert (copied / "checkpoints/damaged-200").is_dir()
    runs.assert_same_run(copied, uninterrupted)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _of_another_type(folder: Path) -> None:
    path = folder / "_CHECKPOINT_METADATA"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_timestamp_nsecs": 1.0}))


def _halve(pattern: str):
    def damage(folder: Path) -> None:
        for path in folder.glob(pattern):
            os.truncate(path, path.stat().st_size // 2)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        _empty,
        lambda folder: shutil.rmtree(folder / "optimiser"),
        _of_another_type,
        _halve("sae/_METADATA"),
        _halve("run/manifest.ocdbt"),
        _halve("sae/ocdbt.process_0/d/*"),
    ],
    ids=["empty", "a part missing", "another type", "tree cut", "manifest cut", "arrays cut"],
)
def test_reads_the_newest_that_can_be_read(copied: Path, damage) -> None:
    damage(copied / "checkpoints/200")
    assert np.isfinite(load(copied).w_enc).all()
    assert runs.checkpoints(copied) == [150, 200]  # who only reads changes nothing
    with Checkpoints(copied) as checkpoints:
        assert int(checkpoints.restore({"": runs.target_of(copied)})[""].step) == 150
        assert checkpoints.latest == 150
    assert runs.checkpoints(copied) == [150]


def test_any_flipped_bit_of_a_checkpoint_is_refused_by_name(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In arrays, metadata, manifests and the lists of digests; the checkpoint before is taken, with one line."""
    said: list[str] = []
    monkeypatch.setattr(console, "print", lambda line, **kwargs: said.append(line))
    newest, rng = copied / "checkpoints/200", random.Random(0)
    files = [path for path in sorted(newest.rglob("*")) if path.is_file()]
    parts = [path.name for path in newest.iterdir() if path.is_dir()]
    assert len(files) > 30
    assert on_disk.problem_of(newest, parts) == ""
    for path in files:
        kept = path.read_bytes()
        for bit in rng.sample(range(8 * len(kept)), 3):
            changed = bytearray(kept)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            assert str(path.relative_to(newest)) in on_disk.problem_of(newest, parts)
        path.write_bytes(kept)
    arrays = max((path for path in files if "sae" in path.parts), key=lambda path: path.stat().st_size)
    arrays.write_bytes(arrays.read_bytes()[:-1] + b"\x00")
    before = load(copied)
    assert before.record.steps == 150
    (line,) = said
    assert re.search(r"checkpoints/200 cannot be read: sae/ocdbt.*digest differs; taking step 150 instead", line)


def test_a_checkpoint_without_its_digests_is_refused(copied: Path) -> None:
    (copied / "checkpoints/200/digests-0-of-1.json").unlink()
    assert load(copied).record.steps == 150


def test_descriptors_and_threads_do_not_grow_with_saves(copied: Path) -> None:
    """Of this process: a save used to leave a thread and three descriptors behind."""
    state = runs.state_of(copied)
    counts = []
    with Checkpoints(copied) as checkpoints:
        for step in range(300, 312):
            checkpoints.save(step, {"": state})
            checkpoints.wait()
            counts.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
    assert counts[-1] <= counts[4]
    assert runs.checkpoints(copied) == [310, 311]
    assert [path.name for path in (copied / "checkpoints").iterdir() if not path.name.isdigit()] == []


def test_the_time_of_day_may_jump_while_a_save_is_under_way(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a computer wakes up, or asks others for the time: Orbax takes it for a save that takes too long."""
    state, now = runs.state_of(copied), time.time()
    days = itertools.count()
    with Checkpoints(copied) as checkpoints:
        monkeypatch.setattr(time, "time", lambda: now + 24 * 3600 * next(days))
        checkpoints.save(300, {"": state})
        checkpoints.wait()
    assert runs.checkpoints(copied) == [200, 300]


@pytest.mark.parametrize("damage", [_empty, _of_another_type, _halve("run/manifest.ocdbt")], ids=range(3))
def test_nothing_is_set_aside_when_no_checkpoint_can_be_read(copied: Path, damage) -> None:
    for step in (150, 200):
        damage(copied / f"checkpoints/{step}")
    with (
        pytest.raises(UserError, match=r"no checkpoint can be read .*--out"),
        Checkpoints(copied) as checkpoints,
    ):
        checkpoints.restore({"": runs.target_of(copied)})
    assert runs.checkpoints(copied) == [150, 200]


def test_an_error_that_was_raised_again_by_who_handled_it_is_told_in_the_end() -> None:
    """Orbax leaves such circles when a save fails on the disk, and training went around in one for ever."""
    first, second = OSError("the disk is gone"), ValueError("a save failed")
    first.__context__, second.__context__ = second, first
    assert on_disk.reason(second) == "the disk is gone"
    first.__context__ = UserError("cannot write to run: the disk is gone; see to the disk")
    assert on_disk.reason(second) == "the disk is gone"


def test_remains_of_a_cut_save(copied: Path) -> None:
    """They go when training resumes. A reader leaves them: they may be a save that is under way."""
    remains = copied / "checkpoints/250.orbax-checkpoint-tmp-7"
    shutil.copytree(copied / "checkpoints/200", remains)
    load(copied)
    assert remains.exists()
    with Checkpoints(copied) as checkpoints:
        assert int(checkpoints.restore({"": runs.target_of(copied)})[""].step) == 200
        checkpoints.save(250, {"": runs.state_of(copied)})
    assert not remains.exists()
    assert runs.checkpoints(copied) == [200, 250]


@pytest.mark.parametrize("gone", ["digests-0-of-1.json", "_CHECKPOINT_METADATA", "optimiser/_METADATA"])
@pytest.mark.parametrize("is_cut", [False, True], ids=["newest whole", "newest cut"])
def test_remains_of_a_cut_removal(copied: Path, gone: str, is_cut: bool) -> None:
    """The oldest checkpoint goes once the newest is there: killed between, nothing is damaged, and nobody says so."""
    folder = copied / "checkpoints"
    shutil.copytree(folder / "150", folder / "100")
    (folder / "100" / gone).unlink()
    if is_cut:
        (folder / ".saving-200").touch()
        (folder / "200/digests-0-of-1.json").unlink()
    with Checkpoints(copied) as checkpoints:
        assert int(checkpoints.restore({"": runs.target_of(copied)})[""].step) == (150 if is_cut else 200)
    assert sorted(path.name for path in folder.iterdir()) == (["150"] if is_cut else ["150", "200"])


def test_an_old_checkpoint_is_not_removed_for_a_cut_save(copied: Path) -> None:
    """Of three, the newest is cut and the next is damaged: the oldest is whole, and is what remains."""
    folder = copied / "checkpoints"
    shutil.copytree(folder / "200", folder / "250")
    (folder / ".saving-250").touch()
    (folder / "250/digests-0-of-1.json").unlink()
    _halve("run/manifest.ocdbt")(folder / "200")
    with Checkpoints(copied) as checkpoints:
        assert int(checkpoints.restore({"": runs.target_of(copied)})[""].step) == 150
    assert sorted(path.name for path in folder.iterdir()) == ["150", "damaged-200"]


def test_a_save_that_others_have_not_ended_stays_marked(copied: Path) -> None:
    """Process 0 may begin the next save while another process still lists its files: a kill then damages nothing."""
    folder = copied / "checkpoints"
    (folder / "200/digests-0-of-1.json").rename(folder / "200/digests-0-of-2.json")
    (folder / ".saving-200").touch()
    checkpoints = on_disk.OnDisk(folder)
    checkpoints.mark(250)
    assert {path.name for path in folder.glob(".saving-*")} == {".saving-200", ".saving-250"}
    (folder / "200/digests-1-of-2.json").write_bytes((folder / "200/digests-0-of-2.json").read_bytes())
    checkpoints.mark()
    assert [path.name for path in folder.glob(".saving-*")] == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("sae.k", 5), ("train.seed", 1), ("train.lr", 1e-3), ("train.moments", "int8"), ("sae.n_latents", 128)],
)
def test_forbidden_change(copied: Path, small_set: Path, key: str, value, capsys, monkeypatch) -> None:
    monkeypatch.setattr(runtime, "start_distributed", lambda: None)  # this process has devices already
    words = runs.train_command(small_set, copied, f"--{key.replace('_', '-')}={value}")
    assert main.main(words[words.index("train") :]) == 2
    said = capsys.readouterr().err
    assert f"{copied} was started with {key}=" in said
    assert runs.one_line(said)


def test_allowed_changes(copied: Path) -> None:
    record = read_record(copied)
    dictionary, data = record.dictionary, record.dictionary.data
    assert data is not None
    changed = {section: dict(getattr(record, section)) for section in ("train", "mesh", "engine")}
    for key in MAY_CHANGE:
        section, _, name = key.partition(".")
        if section in changed:
            changed[section][name] = 7
    moved = dataclasses.replace(dictionary, data=dataclasses.replace(data, path="elsewhere"))
    check_resumable(copied, dataclasses.replace(record, **changed, dictionary=moved, allow_partial=True))
    other = dataclasses.replace(dictionary, data=dataclasses.replace(data, content="other"))
    with pytest.raises(UsageError, match="on other rows than"):
        check_resumable(copied, dataclasses.replace(record, dictionary=other))


def test_a_run_whose_rate_falls_towards_its_last_step_keeps_that_step(copied: Path) -> None:
    record = read_record(copied)
    record = dataclasses.replace(record, train={**record.train, "decay": 0.2})
    (copied / "config.json").write_text(json.dumps(record.to_json()))
    check_resumable(copied, record)
    with pytest.raises(
        UsageError, match=r"train.steps=\d+, of which train.decay=0.2 are shares, so it cannot be 7; keep it"
    ):
        check_resumable(copied, dataclasses.replace(record, train={**record.train, "steps": 7}))


@pytest.mark.parametrize("every", [1, 2, 3, 10, 1000])
def test_marks(every: int) -> None:
    """Two marks apart is at most one interval: the older of two saves is on the disk before the younger begins."""
    config, train = topk.Config(), TrainConfig(steps=10**6, checkpoint_every=every)
    member = Member("", config, train, Path(), runs.record_of(config, train))
    marks = [step for step in range(1, 5 * every + 1) if is_save_due(step, [member])]
    assert all(step in marks for step in range(every, 5 * every + 1, every))
    assert all(later - earlier <= max(every, 2) for earlier, later in zip(marks, marks[2:], strict=False))


class Poisoned(Batches):
    """Batches of the small set, but for a NaN in one of them."""

    def __init__(self, batches: Batches, bad_step: int) -> None:
        self._batches, self._bad_step = batches, bad_step

    def row_ids(self, step: int) -> np.ndarray:
        return self._batches.row_ids(step)

    def place(self, rows, mesh):
        return self._batches.place(rows, mesh)

    def batches(self, start_step: int = 0) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        for step, rows in self._batches.batches(start_step):
            if step == self._bad_step:
                rows["acts"][3, 4] = np.nan
            yield step, rows


def test_nan(small_set: Path, tmp_path: Path) -> None:
    """Found although the next step was queued by then, on a mesh; the checkpoint of the very step is not written."""
    config = TrainConfig(steps=20, batch_size=64, checkpoint_every=4, log_every=1)
    sae_config = topk.Config(n_latents=64, k=4)
    source = StoredRows(open_activations(small_set))
    mesh = meshes.make_mesh(meshes.MeshConfig(data=2))
    members = [Member("", sae_config, config, tmp_path, runs.record_of(sae_config, config))]
    stopped = pytest.raises(UserError, match=r"loss is nan.* at step 8")
    # optax does not pass under strict promotion.
    with jax.numpy_dtype_promotion("standard"), source.open(runs.SITES, 64, 0, mesh) as batches, stopped:
        loop.train(tmp_path, members, mesh, Poisoned(batches, 7), sampler(source, runs.SITES, runs.WIDTHS))
    failure = json.loads((tmp_path / "failure-0.json").read_text())
    assert (failure["step"], failure["last_checkpoint"]) == (8, 6)
    assert runs.checkpoints(tmp_path) == [4, 6]
    assert [row["step"] for row in logs.read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.long
def test_state_in_fewer_bytes(small_set: Path, tmp_path: Path) -> None:
    """Interrupted, the same bits; on another mesh, the same metrics; its averages load."""
    sae_config = topk.Config(n_latents=64, k=4, dtype="float32", aux_coefficient=0.0)
    source = StoredRows(open_activations(small_set))
    sample = sampler(source, runs.SITES, runs.WIDTHS)

    def train(run: Path, steps: int, data: int = 1) -> None:
        run.mkdir(exist_ok=True)
        mesh = meshes.make_mesh(meshes.MeshConfig(data=data))
        config = TrainConfig(steps=steps, lr=4e-3, decay=0.0, batch_size=64, log_every=1, dead_after_tokens=10**7)
        config = dataclasses.replace(config, moments="int8", ema_dtype="bfloat16")
        member = Member("", sae_config, config, run, runs.record_of(sae_config, config))
        with source.open(runs.SITES, 64, 0, mesh) as batches:
            loop.train(run, [member], mesh, batches, sample)

    whole, halted, moved = tmp_path / "whole", tmp_path / "halted", tmp_path / "moved"
    train(whole, 8)
    train(halted, 4)
    shutil.copytree(halted, moved)
    train(halted, 8)
    runs.assert_same_run(halted, whole)
    train(moved, 8, data=2)
    runs.assert_metrics_close(runs.rows_of(moved), runs.rows_of(whole))
    average, live = load(whole, ema=True), load(whole)
    assert average.w_enc.dtype == live.w_enc.dtype
    np.testing.assert_allclose(average.w_enc, live.w_enc, rtol=2.0**-7, atol=8 * 4e-3)  # eight steps of this rate


def test_log_reads_as_if_the_run_had_never_stopped(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step}) for step in (1, 10, 20, 25, 30)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4']))

    def steps_from(start: int) -> list[int]:
        with logs.Metrics(tmp_path, Lease(None, ""), start, lambda step: step == 1 or step % 10 == 0):
            return [row["step"] for row in logs.read_metrics(tmp_path)]

    assert steps_from(30) == [1, 10, 20, 25, 30]
    assert steps_from(25) == [1, 10, 20]  # 25 was logged because the run was to end there
    assert steps_from(10) == [1, 10]


@pytest.mark.parametrize("content", ["{}", "[1]", "5", '{"sae": 5}', "{", '{"kind": "dictionary", "schema": 1}'])
def test_a_folder_without_the_record_of_a_run_is_not_a_run(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json: (not a run record|.* it is damaged)"):
        read_record(tmp_path)


@pytest.mark.slow
def test_a_run_that_began_with_a_dictionary_resumes_without_it(
    small_set: Path, uninterrupted: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(runtime, "start_distributed", lambda: None)  # this process has devices already
    shutil.copytree(uninterrupted, tmp_path / "start")
    init = f"--init-from={tmp_path / 'start'}"
    assert main.main(_words(small_set, tmp_path / "whole", "--train.steps=12", init)) == 0
    assert main.main(_words(small_set, tmp_path / "halted", "--train.steps=6", init)) == 0
    shutil.rmtree(tmp_path / "start")
    assert main.main(_words(small_set, tmp_path / "halted", "--train.steps=12", init)) == 0
    runs.assert_same_run(tmp_path / "halted", tmp_path / "whole")
    assert main.main(_words(small_set, tmp_path / "halted", "--train.steps=12")) == 2  # another run


def _words(data: Path, out: Path, *flags: str) -> list[str]:
    words = runs.train_command(data, out, *flags)
    return words[words.index("train") :]
