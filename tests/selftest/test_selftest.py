"""The self-test finds nothing on a machine that is in order, and names each fault that is planted."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sae_jax import mesh as meshes
from sae_jax.activations.store import ActivationSet
from sae_jax.commands import main as cli
from sae_jax.ops import sparse, spmd, topk, tuning
from sae_jax.ops.tuning import EngineConfig
from sae_jax.planning import analytic, targets
from sae_jax.saes.topk import Config
from sae_jax.selftest import MismatchError, Where, engine, killed, saves, step_time, stored
from sae_jax.selftest import run as selftest
from sae_jax.selftest.collectives import collectives
from sae_jax.training.checkpoint import Checkpoints
from sae_jax.training.settings import TrainConfig
from sae_jax.types import Widths
from tests import runs

Try = Callable[[Callable], dict]


def roll(real: Callable) -> Callable:
    """What `real` returns, but each device has its neighbour's."""
    return lambda x, *axis: jax.lax.ppermute(real(x, *axis), meshes.LATENT[0], [(i, (i + 1) % 4) for i in range(4)])


@pytest.fixture
def attempt(tmp_path: Path) -> Iterator[Try]:
    """Runs a part on 2 x 4 devices."""
    config = meshes.MeshConfig(data=2)
    mesh = meshes.make_mesh(config)
    with jax.set_mesh(mesh), tuning.using(EngineConfig().on("cpu")), jax.numpy_dtype_promotion("standard"):
        yield lambda part: part(Where(mesh, config, EngineConfig(), tmp_path))


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    monkeypatch.setattr(stored, "ROWS", 1 << 12)
    monkeypatch.setattr(engine, "TRAINED", (8, 64))
    monkeypatch.setitem(step_time.OF_DEVICE, "cpu", (64, 8))


def test_exchanges_are_in_order(attempt):
    assert attempt(collectives)["devices"] == 8


@pytest.mark.parametrize(
    ("name", "fault", "named"),
    [
        ("gather", roll, "gather of float32 over data"),
        ("swap", roll, "swap over latent"),
        ("reduce_scatter", roll, "reduce-scatter over latent"),
        ("total", lambda real: lambda x, axis=meshes.AXES: x, "sum of float32 over latent"),
        ("largest", lambda real: lambda x: x, "largest over all"),
        ("index", lambda real: lambda axis: real(axis) ^ 1, "place along latent"),
    ],
)
def test_an_exchange_that_returns_another_part_is_named(attempt, monkeypatch, name, fault, named):
    monkeypatch.setattr(spmd, name, fault(getattr(spmd, name)))
    with pytest.raises(MismatchError, match=named):
        attempt(collectives)


def test_a_winner_that_is_dropped_is_named(attempt, monkeypatch):
    assert attempt(engine.selection)["rows"] == 64
    real = topk.n_winners
    monkeypatch.setattr(topk, "n_winners", lambda *args: jnp.minimum(real(*args), 4))
    with pytest.raises(MismatchError, match=r"row \d+ with float32 products has \d latents") as error:
        attempt(engine.selection)
    assert error.value.expected.startswith("8 latents, of which")


@pytest.mark.parametrize("name", ["scatter_rows", pytest.param("add_up", marks=pytest.mark.long)])
def test_a_gradient_that_is_scaled_is_named(attempt, monkeypatch, name):
    assert attempt(engine.gradients)["rows"] == 64
    real = getattr(sparse, name)
    monkeypatch.setattr(sparse, name, lambda *args: 1.001 * real(*args))
    with pytest.raises(MismatchError, match="gradient of"):
        attempt(engine.gradients)


def test_a_byte_that_storage_changes_is_named(attempt, monkeypatch, tmp_path):
    assert attempt(stored.stored)["bytes"] == 2 * stored.ROWS * stored.WIDTH
    (tmp_path / "set-0").rename(tmp_path / "first")
    real = ActivationSet.read_chunk

    def flipped(self, source: str, chunk: int):
        rows = real(self, source, chunk)
        rows.view("uint8")[-1, -1] ^= 1
        return rows

    monkeypatch.setattr(ActivationSet, "read_chunk", flipped)
    with pytest.raises(MismatchError, match=r"chunk 0, row \d+, column 255 is"):
        attempt(stored.stored)


def test_a_file_that_storage_changes_is_named(attempt, monkeypatch, tmp_path, capsys):
    def damage(path: str) -> None:
        (file,) = (Path(path) / "acts").rglob("c/0/0")
        data = bytearray(file.read_bytes())
        data[100] ^= 1
        file.write_bytes(data)

    monkeypatch.setattr(stored, "_forget", damage)
    monkeypatch.setattr(selftest, "PARTS", {"storage": selftest.PARTS["storage"]})
    monkeypatch.setattr("sae_jax.commands.runtime.start_distributed", lambda: None)
    assert cli.main(["selftest", f"--out={tmp_path}", "--mesh.data=2"]) == 1
    said = capsys.readouterr()
    assert "storage           failed" in said.out
    assert "is not what was written" in said.out
    assert "1 of 1 parts failed: storage" in said.err
    (part,) = json.loads((tmp_path / "selftest.json").read_text())["parts"]
    assert (part["outcome"], part["expected"]) == ("failed", "no error")
    assert [path.name for path in tmp_path.iterdir()] == ["selftest.json"]


@pytest.mark.long
def test_a_step_that_a_restore_loses_is_named(attempt, monkeypatch):
    """Of a state that is saved, and of a run that is taken up again."""
    real = Checkpoints.restore
    lose = lambda states: {name: replace(state, step=state.step - 1) for name, state in states.items()}  # noqa: E731
    monkeypatch.setattr(Checkpoints, "restore", lambda self, target: lose(real(self, target)))
    with pytest.raises(MismatchError, match=r"restored step is 5") as error:
        attempt(saves.saves)
    assert error.value.expected == "6"


@pytest.mark.parametrize(
    ("words", "cure"),
    [(["--mesh.member=2"], "leave it out"), (["--mesh.data=3"], "is 8"), (["--out=gs://b/x"], "tries a disk")],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, words, cure):
    monkeypatch.setattr("sae_jax.commands.runtime.start_distributed", lambda: None)
    assert cli.main(["selftest", f"--out={tmp_path / 'x'}", *words]) == 2
    assert cure in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_devices_whose_data_sheet_is_known_have_a_floor():
    target = targets.of_devices("NVIDIA H200", 4)
    assert target
    assert (target.chip, target.n_devices, target.is_tpu) == (targets.CHIPS["h200"], 4, False)
    assert targets.of_devices("TPU v5 lite", 1).chip == targets.CHIPS["v5e"]
    assert targets.of_devices("cpu", 1) is None


@pytest.mark.long
def test_a_step_of_known_devices_stands_beside_its_floor(attempt, monkeypatch):
    monkeypatch.setitem(targets.TPUS, "cpu", "v5e")
    figures = attempt(step_time.step_time)
    sae = Config(n_latents=8 * 64, k=step_time.K)
    mesh = meshes.abstract_mesh(meshes.MeshConfig(data=2), 8)
    step = analytic.step(sae, TrainConfig(batch_size=8 * 8), Widths.one(step_time.D), mesh)
    assert figures["floor_seconds"] == step.flop / 197e12 + 2 * step.state_bytes / 819e9
    assert figures["times_the_floor"] == pytest.approx(figures["step_seconds"] / figures["floor_seconds"], abs=0.01)


ONE_FAULT = """
import sys, jax
from sae_jax.commands import main, runtime
from sae_jax.selftest import engine, run, stored
run.PARTS = {name: run.PARTS[name] for name in ("collectives", "selection", "storage")}
stored.ROWS = 1 << 12
real = engine.dense.encode
engine.dense.encode = lambda x, w, b, k: real(x, w, b, k - jax.process_index())
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_what_one_process_sees_all_processes_say(tmp_path: Path):
    """Two real ones; the second expects one winner less. The first writes the report."""
    script = tmp_path / "script.py"
    script.write_text(ONE_FAULT)
    words = [sys.executable, str(script), "selftest", f"--out={tmp_path}"]
    code, said = runs.finish(runs.start(runs.local(2, words)))
    assert code == 1, said
    parts = {part["name"]: part for part in json.loads((tmp_path / "selftest.json").read_text())["parts"]}
    assert {name: part["outcome"] for name, part in parts.items()} == {
        "collectives": "passed",
        "selection": "failed",
        "storage": "passed",
    }
    assert parts["selection"]["seen"].startswith("process 1: row")
    assert parts["storage"]["figures"]["bytes"] == 2 * 2 * (1 << 12) * stored.WIDTH


@pytest.mark.long
def test_a_run_that_is_not_killed_is_named(monkeypatch, attempt):
    start = killed._start
    monkeypatch.setattr(killed, "_start", lambda where, left_over, folder, dies_at=0: start(where, left_over, folder))
    with pytest.raises(MismatchError, match="ended with exit code 0"):
        attempt(killed.killed)


@pytest.mark.long
@pytest.mark.parametrize(
    ("n_processes", "n_devices", "flags"), [(1, 1, ()), (1, 8, ("--mesh.data=2",)), (2, 2, ("--mesh.data=2",))]
)
def test_a_machine_in_order_passes(tmp_path: Path, n_processes: int, n_devices: int, flags: tuple[str, ...]):
    """All parts, by the command."""
    words = runs.command("selftest", f"--out={tmp_path}", *flags)
    runs.complete(words if n_processes == 1 else runs.local(n_processes, words), n_devices)
    report = json.loads((tmp_path / "selftest.json").read_text())
    assert report["passed"]
    assert (report["n_devices"], report["n_processes"]) == (n_processes * n_devices, n_processes)
    assert [part["name"] for part in report["parts"]] == [*selftest.PARTS]
    assert {part["name"] for part in report["parts"] if part["outcome"] == "left out"} == {"kernels"}
