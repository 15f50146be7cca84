"""Runs at a URL are those on a disk, whatever is killed, damaged or moved: the same bits, and the same log."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from sae_jax import mesh as meshes
from sae_jax import storage
from sae_jax.activations.source import sampler
from sae_jax.activations.store import open_activations
from sae_jax.activations.stored import StoredRows
from sae_jax.artifact import load
from sae_jax.commands import main, runtime
from sae_jax.progress import console
from sae_jax.saes import topk
from sae_jax.storage import Files, Url
from sae_jax.training import at_url, checkpoint, loop, state
from sae_jax.training.checkpoint import Checkpoints
from sae_jax.training.groups import Member, initial_states
from sae_jax.training.settings import TrainConfig
from sae_jax.training.state import TrainState
from sae_jax.types import PartialError, UserError
from tests import runs, s3

SAE = topk.Config(n_latents=64, k=4, dtype="float32")
TRAIN = TrainConfig(
    steps=12, batch_size=64, dead_after_tokens=300, checkpoint_every=4, log_every=1, lr=1e-3, decay=0, ema=0.9
)
RARELY = "--train.checkpoint-every=100"


def train(data: Path, run: storage.AnyPath, mesh: meshes.MeshConfig | None = None, **changed) -> None:
    """A run in this process."""
    config, source = dataclasses.replace(TRAIN, **changed), StoredRows(open_activations(data))
    on = meshes.make_mesh(mesh or meshes.MeshConfig(), jax.devices() if mesh else jax.devices()[:1])
    member = Member("", SAE, config, run, runs.record_of(SAE, config))
    # optax does not pass under strict promotion.
    with jax.numpy_dtype_promotion("standard"), source.open(runs.SITES, config.batch_size, 0, on) as batches:
        loop.train(run, [member], on, batches, sampler(source, runs.SITES, runs.WIDTHS))


def attempts(run: storage.AnyPath) -> list[dict]:
    return storage.read_lines(run / "attempts.jsonl")


def states(data: Path, **changed) -> dict[str, TrainState]:
    """The state of a run that has not begun, on all devices, with numbers of its own in every array."""
    config, source = dataclasses.replace(TRAIN, **changed), StoredRows(open_activations(data))
    mesh = meshes.make_mesh(meshes.MeshConfig(data=2))
    member = Member("", SAE, config, None, runs.record_of(SAE, config))
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        (new,) = initial_states([member], sampler(source, runs.SITES, runs.WIDTHS), mesh).values()
    rng = np.random.default_rng(0)

    def filled(leaf: jax.Array) -> jax.Array:
        values = rng.integers(1, 100, leaf.shape).astype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda part: values[part])

    return {"": jax.tree.map(filled, new)}


def target(place, **changed) -> dict[str, TrainState]:
    return {"": state.abstract(SAE, dataclasses.replace(TRAIN, **changed), runs.WIDTHS, place)}


HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture
def saved(small_set: Path, tmp_path: Path) -> tuple[Url, TrainState]:
    """A run in memory with the checkpoints of steps 4 and 8, and the state that both hold."""
    run, held = Url(f"memory://{tmp_path.name}/run"), states(small_set)
    with Checkpoints(run) as checkpoints:
        for step in (2, 4, 8):
            checkpoints.save(step, held)
            checkpoints.wait()
    return run, held[""]


def test_a_run_is_that_on_a_path(small_set: Path, tmp_path: Path, bucket: str, door: s3.Door) -> None:
    """Resumed, too: arrays, log, attempts and what loads; and a save takes a bounded number of requests."""
    for run in (tmp_path / "run", Url(bucket) / "run"):
        train(small_set, run, steps=6)
        train(small_set, run)
    runs.assert_same_run(Url(bucket) / "run", tmp_path / "run")
    assert attempts(Url(bucket) / "run") == attempts(tmp_path / "run")
    assert [each["start_step"] for each in attempts(Url(bucket) / "run")] == [0, 6]
    for ema in (False, True):
        ours, theirs = load(f"{bucket}/run", ema=ema), load(tmp_path / "run", ema=ema)
        assert ours.record == theirs.record
        np.testing.assert_array_equal(ours.w_enc, theirs.w_enc)
    keys = Files(f"{bucket}/run").keys("")
    assert {key.partition("/")[0] for key in keys} == {"attempts.jsonl", "checkpoints", "config.json", "metrics.jsonl"}
    assert {key.split("/")[1] for key in keys if key.startswith("checkpoints/")} == {"10", "12", "lists"}
    assert checkpoint.problem(Url(bucket) / "run") == ""
    n_arrays = len(jax.tree.leaves(runs.state_of(tmp_path / "run")))
    n_saves = 6  # after 2, 4, 6, 8, 10 and 12 steps
    writes = [path for method, path in door.requests if method == "PUT" and "checkpoints" in path]
    assert len(writes) == n_saves * (n_arrays + 1)


@pytest.mark.slow
@pytest.mark.parametrize("at", [70, *(pytest.param(at, marks=pytest.mark.long) for at in (30, 120))])
def test_killed_before_any_request(small_set: Path, uninterrupted: Path, bucket: str, door: s3.Door, at: int) -> None:
    run = Url(bucket) / "run"
    words = runs.train_command(small_set, run, "--train.checkpoint-every=20")
    started = []
    with door.kills(at, lambda: started[0]):
        started.append(runs.start(words))
        code, _ = runs.finish(started[0])
    assert code == -9
    runs.complete([*words, RARELY])
    runs.assert_same_run(run, uninterrupted)
    assert attempts(run)[-1]["outcome"] == "finished"
    left = {key.partition("/")[0] for key in Files(run / "checkpoints").keys("")}
    assert len(left) == 3  # the lists and the last two
    assert left > {"lists", "200"}


@pytest.mark.slow
@pytest.mark.long
def test_requests_that_fail(small_set: Path, uninterrupted: Path, bucket: str, door: s3.Door) -> None:
    door.fails = 0.05
    run = Url(bucket) / "run"
    runs.complete(runs.train_command(small_set, run, "--train.checkpoint-every=50"))
    door.fails = 0.0
    runs.assert_same_run(run, uninterrupted)


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_then_one(small_set: Path, uninterrupted: Path, bucket: str, door: s3.Door) -> None:
    """Each writes its own part; the other number of them reads all."""
    run = Url(bucket) / "run"
    runs.complete(runs.local(2, runs.train_command(small_set, run, RARELY, "--train.steps=10")))
    lists = [key.rpartition("/")[2] for key in Files(run / "checkpoints/lists/10").keys("")]
    assert sorted(lists) == ["digests-0-of-2.json", "digests-1-of-2.json"]
    runs.complete(runs.train_command(small_set, run, RARELY, "--train.steps=20"))
    assert [(each["start_step"], each["n_processes"]) for each in attempts(run)] == [(0, 2), (10, 1)]
    runs.assert_metrics_close(runs.rows_of(run), runs.rows_of(uninterrupted)[:20])


@pytest.mark.long
def test_sigterm_and_the_command_line(
    small_set: Path, bucket: str, door: s3.Door, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "start_distributed", lambda: None)  # this process has devices already
    monkeypatch.setattr(loop, "is_preempted", lambda: True)
    words = runs.train_command(small_set, Url(bucket) / "run", "--train.steps=3")[3:]
    for stopped_at in (1, 2):
        with jax.numpy_dtype_promotion("standard"):
            assert main.main(words) == 0
        assert f"stopped by SIGTERM at step {stopped_at}; " in capsys.readouterr().err
        assert checkpoint.latest_step(Url(bucket) / "run") == stopped_at
    assert main.main([*words, "--sae.k=5"]) == 2
    assert f"{bucket}/run was started with sae.k=4, not 5" in capsys.readouterr().err


def test_any_mesh_reads_any_other(small_set: Path, saved: tuple[Url, TrainState], monkeypatch) -> None:
    """Of pieces that are cut small, too: every bit of every array."""
    run, held = saved
    monkeypatch.setattr(at_url, "PIECE_BYTES", 100)  # three rows of a matrix
    with Checkpoints(run) as checkpoints:
        checkpoints.save(10, {"": held})
    assert len(Files(run / "checkpoints/10/sae/w_enc").keys("")) == 24  # of eight shards of 8 rows
    expected = runs.bits(held)
    for config in (meshes.MeshConfig(data=1), meshes.MeshConfig(data=2), meshes.MeshConfig(data=8)):
        mesh = meshes.make_mesh(config)
        with Checkpoints(run, writes=False) as checkpoints:
            found = checkpoints.restore(target(mesh))[""]
        assert runs.bits(found) == expected
        wanted = target(mesh)[""]
        assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, found, wanted))


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_states_in_fewer_bytes(small_set: Path, tmp_path: Path, precision: str) -> None:
    fewer = {"moments": precision, "ema_dtype": precision, "weights": "bfloat16"}
    run, held = Url(f"memory://{tmp_path.name}/run"), states(small_set, **fewer)
    with Checkpoints(run) as checkpoints:
        checkpoints.save(4, held)
    with Checkpoints(run, writes=False) as checkpoints:
        assert runs.bits(checkpoints.restore(target(HERE, **fewer))[""]) == runs.bits(held[""])


def test_what_is_saved_is_the_state_at_that_moment(small_set: Path, tmp_path: Path) -> None:
    """Its buffers may be given to the next step, which writes into them while the save goes on."""
    run, held = Url(f"memory://{tmp_path.name}/run"), states(small_set)[""]
    expected = runs.bits(held)
    step = jax.jit(lambda s: jax.tree.map(lambda leaf: leaf + leaf.dtype.type(1), s), donate_argnums=0)
    with Checkpoints(run) as checkpoints:
        checkpoints.save(4, {"": held})
        for _ in range(5):
            held = step(held)
        jax.block_until_ready(held)
    with Checkpoints(run, writes=False) as checkpoints:
        assert runs.bits(checkpoints.restore(target(HERE))[""]) == expected


def keys_of(run: Url, step: int) -> list[str]:
    files = Files(run / "checkpoints")
    return sorted([*files.keys(f"{step}/"), *files.keys(f"lists/{step}/")])


def test_any_change_of_an_object_is_refused_by_name(saved: tuple[Url, TrainState], monkeypatch) -> None:
    """Flipped, cut or gone. The checkpoint before is taken; the damaged one counts no more, until it is saved anew."""
    run, held = saved
    said: list[str] = []
    monkeypatch.setattr(console, "print", lambda line, **kwargs: said.append(line))
    files, rng = Files(run / "checkpoints"), np.random.default_rng(0)
    assert len(keys_of(run, 8)) > 20
    for key in keys_of(run, 8):
        kept = files.read(key)
        assert kept is not None
        bit = int(rng.integers(8 * len(kept)))
        flipped = bytearray(kept)
        flipped[bit // 8] ^= 1 << bit % 8
        for changed in (bytes(flipped), kept[:-2]):
            files.write(key, changed)
            assert checkpoint.store_of(run).problem(8).startswith(key.partition("/")[2].removeprefix("8/")), key
        files.delete(key)
        is_list = key.startswith("lists/")
        assert ("not complete" if is_list else "is missing") in checkpoint.store_of(run).problem(8)
        files.write(key, kept)
    assert checkpoint.problem(run) == ""
    files.delete("8/sae/w_enc/0-8_0-8")
    with Checkpoints(run, writes=False) as checkpoints:  # who only reads changes nothing
        assert runs.bits(checkpoints.restore(target(HERE))[""]) == runs.bits(held)
    assert checkpoint.latest_step(run) == 8
    with Checkpoints(run) as checkpoints:
        checkpoints.restore(target(HERE))
        assert checkpoints.latest == checkpoint.latest_step(run) == 4
        assert len(keys_of(run, 8)) > 20  # it is kept as it is
        checkpoints.save(8, {"": held})
    assert checkpoint.latest_step(run) == 8
    assert checkpoint.problem(run) == ""
    line = f"{run}/checkpoints/8 cannot be read: sae/w_enc/0-8_0-8 is missing; taking step 4 instead"
    assert said == [line] * 2


def test_nothing_is_set_aside_when_no_checkpoint_can_be_read(saved: tuple[Url, TrainState]) -> None:
    run, _ = saved
    for step in (4, 8):
        Files(run / "checkpoints").write(f"{step}/run/step/all", b"\0\0\0\0")
    with pytest.raises(UserError, match=r"no checkpoint can be read .*--out"), Checkpoints(run) as checkpoints:
        checkpoints.restore(target(HERE))
    assert checkpoint.latest_step(run) == 8


def test_a_bucket_that_does_not_answer_is_no_damage(saved: tuple[Url, TrainState], monkeypatch) -> None:
    """An older checkpoint would be no cure: the command ends, and nothing is set aside."""
    run, _ = saved

    def unreachable(self, keys, n_at_once=0):
        raise UserError(f"cannot read {self.name(next(iter(keys)))}: no answer")
        yield

    monkeypatch.setattr(Files, "read_many", unreachable)
    with pytest.raises(UserError, match=r"cannot read .*lists/8/.*: no answer"), Checkpoints(run) as checkpoints:
        checkpoints.restore(target(HERE))
    assert checkpoint.latest_step(run) == 8


@pytest.mark.parametrize("gone", ["a list", "lists", "pieces"])
def test_remains_of_a_cut_save_or_removal(saved: tuple[Url, TrainState], gone: str) -> None:
    """They do not count, readers leave them, and the next that trains removes them."""
    run, held = saved
    files = Files(run / "checkpoints")
    if gone == "a list":  # of two processes one was cut off
        files.write("lists/8/digests-0-of-2.json", files.read("lists/8/digests-0-of-1.json") or b"")
        files.delete("lists/8/digests-0-of-1.json")
    elif gone == "lists":
        files.delete_many(files.keys("lists/8/"))
    else:
        files.delete_many(files.keys("8/") + files.keys("lists/8/"))
        files.write("8/sae/w_enc/0-8_0-8", b"")
    assert checkpoint.latest_step(run) == 4
    with Checkpoints(run, writes=False) as checkpoints:
        checkpoints.restore(target(HERE))
    assert files.keys("8/")
    with Checkpoints(run) as checkpoints:
        assert keys_of(run, 8) == []
        assert runs.bits(checkpoints.restore(target(HERE))[""]) == runs.bits(held)


def test_a_removal_takes_away_first_what_makes_a_checkpoint_count(saved: tuple[Url, TrainState], monkeypatch) -> None:
    """Cut off after any number of objects, the oldest checkpoint is whole or does not count."""
    run, held = saved
    n, delete = 0, Files.delete_many  # objects that go before it is cut off

    def until(self, keys) -> None:
        nonlocal n
        for key in keys:
            if n == 0:
                raise KeyboardInterrupt
            n -= 1
            delete(self, [key])
            for step in checkpoint.store_of(run).steps():
                assert checkpoint.store_of(run).problem(step) == ""

    monkeypatch.setattr(Files, "delete_many", until)
    for n_gone in (0, 1, 2, 10):
        n = n_gone
        with pytest.raises(KeyboardInterrupt):
            checkpoint.remove(run)
        monkeypatch.setattr(Files, "delete_many", delete)
        with Checkpoints(run) as checkpoints:
            checkpoints.save(4, {"": held})
            checkpoints.wait()
            checkpoints.save(8, {"": held})
        monkeypatch.setattr(Files, "delete_many", until)
    monkeypatch.setattr(Files, "delete_many", delete)
    checkpoint.remove(run)
    assert not checkpoint.has_remains(run)


def test_a_save_without_the_lease_does_not_count(saved: tuple[Url, TrainState]) -> None:
    run, held = saved
    lease = storage.Lease(run / "owner", run)

    def lose_it_in_a_save() -> None:
        with lease, Checkpoints(run, lease=lease) as checkpoints:
            Files(run).delete_many(Files(run).keys("owner."))
            checkpoints.save(10, {"": held})
            checkpoints.wait()

    with pytest.raises(storage.LostError):
        lose_it_in_a_save()
    assert checkpoint.latest_step(run) == 8


@pytest.mark.long
def test_members_of_which_one_fails(small_set: Path, tmp_path: Path) -> None:
    """As on a disk: the others go on to their ends, the checkpoints of the set go, and what shows the rows stays."""
    on = meshes.make_mesh(meshes.MeshConfig(), jax.devices()[:1])
    source = StoredRows(open_activations(small_set))
    for run in (tmp_path / "run", Url(f"memory://{tmp_path.name}/run")):
        members = []
        for name, changed in {"plain": {}, "wild": {"lr": 1e18}, "short": {"steps": 4}}.items():
            config = dataclasses.replace(TRAIN, **{"steps": 6, "checkpoint_every": 2, **changed})
            members.append(Member(name, SAE, config, run / "members" / name, runs.record_of(SAE, config)))
        for _ in range(2):
            with (
                pytest.raises(PartialError, match=r"1 of 3 members failed: wild: "),
                jax.numpy_dtype_promotion("standard"),
                source.open(runs.SITES, 64, 0, on) as batches,
            ):
                loop.train(run, members, on, batches, sampler(source, runs.SITES, runs.WIDTHS))
    ours, theirs = run, tmp_path / "run"
    for name in ("plain", "short"):
        runs.assert_same_run(ours / "members" / name, theirs / "members" / name)
    failure = "members/wild/failure-0.json"
    assert storage.read_json(ours / failure) == storage.read_json(theirs / failure)
    assert load(ours / "members/wild").record.steps == load(theirs / "members/wild").record.steps == 1
    assert attempts(ours) == attempts(theirs)
    assert not (ours / "checkpoints").exists()
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}


def test_tensorboard_is_refused(small_set: Path, bucket: str, door: s3.Door, capsys, monkeypatch) -> None:
    monkeypatch.setattr(runtime, "start_distributed", lambda: None)
    words = runs.train_command(small_set, Url(bucket) / "run", "--train.tensorboard")[3:]
    assert main.main(words) == 2
    assert "train.tensorboard" in capsys.readouterr().err
    assert Files(f"{bucket}/run").keys("") == []


@pytest.mark.long
def test_lists_are_small_and_plain(saved: tuple[Url, TrainState]) -> None:
    """Anyone can read an array without this library: bytes in C order, shape and dtype in the list."""
    run, held = saved
    files = Files(run / "checkpoints")
    listed = json.loads(files.read("lists/8/digests-0-of-1.json") or b"")
    array = listed["arrays"]["sae/w_enc"]
    pieces = [files.read(f"8/sae/w_enc/{8 * i}-{8 * i + 8}_0-8") or b"" for i in range(8)]
    values = np.frombuffer(b"".join(pieces), array["dtype"]).reshape(array["shape"])
    np.testing.assert_array_equal(values, held.sae.w_enc)
