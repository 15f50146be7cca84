"""Real training runs in processes of their own: started, watched, killed, compared."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from sae_jax import config as configs
from sae_jax import lm, storage, write_activations
from sae_jax.lm import weights
from sae_jax.record import DataRecord, Normalisation, Record, RunRecord, SourceRecord
from sae_jax.saes import base
from sae_jax.saes.base import SaeConfig
from sae_jax.training import logs
from sae_jax.training.checkpoint import Checkpoints, read_record
from sae_jax.training.settings import TrainConfig
from sae_jax.training.state import TrainState, abstract
from sae_jax.types import Sites, Widths

ROOT = Path(__file__).parent.parent
LAUNCHER = str(ROOT / "launch/local.sh")
UNOPTIMISED = "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
STEPS = 200
SECONDS = 240  # for any one process; then it is killed, since jax.distributed swallows SIGTERM
D_MODEL = 8
SITES, WIDTHS = Sites.one("acts"), Widths.one(D_MODEL)

SETTINGS = (
    "--sae.n-latents=64",
    "--sae.k=4",
    "--sae.dtype=float32",
    "--train.batch-size=64",
    "--train.dead-after-tokens=1000",  # small, so that AuxK acts
    "--train.log-every=1",
    "--train.lr=3.2e-3",  # whatever the number of steps
    "--train.decay=0",  # so that a run may be prolonged
)


def write_set(path: Path, outlier: int | None = None) -> Path:
    """A set of 1024 rows, sparse combinations of 32 directions; the square of row `outlier` overflows."""
    rng = np.random.default_rng(0)
    code_BA = rng.exponential(size=(1024, 32)) * (rng.random((1024, 32)) < 0.1)
    rows_BD = code_BA @ rng.normal(size=(32, D_MODEL)) + 1
    if outlier is not None:
        rows_BD[outlier] = 1e20
    write_activations(path, rows_BD.astype(np.float32), dtype="float32")
    return path


def write_tuned(folder: Path) -> Path:
    """The bundled language model with noise on what layer 1 reads into its neurons, and the same tokenizer."""
    model = lm.load("bundled")
    up = np.array(model.params["layers"]["up.w"])
    up[1] += 0.1 * np.random.default_rng(0).standard_normal(up[1].shape)
    weights.save(folder, model.spec, {**model.params, "layers": {**model.params["layers"], "up.w": up}})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(lm.locate("bundled") / name, folder)
    return folder


def record_of(sae: SaeConfig, train: TrainConfig, path: str = "set") -> RunRecord:
    """RUN/config.json of a run on one source of the small set's width."""
    source = (SourceRecord("acts", D_MODEL),)
    dictionary = Record(
        variant=sae.variant,
        sae=configs.to_dict(sae),
        encodes=source,
        reconstructs=source,
        normalisation=Normalisation(sae.input_norm, is_folded=False),
        data=DataRecord("hash", path),
        steps=0,
        tokens=0,
        weights="live",
        metrics={},
        program="test",
    )
    return RunRecord(dictionary, configs.to_dict(train), mesh={}, engine={})


def environment(n_devices: int = 1, optimised: bool = True) -> dict[str, str]:
    """Of a process that shall see this checkout and that many CPU devices. They compile a program once between them.

    Args:
        n_devices: of this process.
        optimised: compile as users have it, which takes four times as long.
    """
    ours = ("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE")  # conftest.py
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(ours) or not name.startswith(("JAX_", "SLURM_"))
    }
    patience = "--xla_cpu_collective_call_terminate_timeout_seconds=100"
    flags = f"--xla_force_host_platform_device_count={n_devices} {patience} {'' if optimised else UNOPTIMISED}"
    return {**kept, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def command(*words: str | Path) -> list[str]:
    """`sae-jax words...` of this checkout."""
    return [sys.executable, "-m", "sae_jax.commands.main", *map(str, words)]


def train_command(data: Path, run: Path, *flags: str) -> list[str]:
    """`sae-jax train` with the settings that these tests share."""
    return command("train", "--data", data, "--out", run, *SETTINGS, f"--train.steps={STEPS}", *flags)


def start(words: Sequence[str], n_devices: int = 1, optimised: bool = True) -> subprocess.Popen[str]:
    """A process that runs on; end it with `finish`. Each of several processes compiles: those do not optimise."""
    env = environment(n_devices, optimised=optimised and n_devices == 1 and words[0] != LAUNCHER)
    return subprocess.Popen(words, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def children(process: subprocess.Popen[str]) -> list[int]:
    """The processes that it has started, oldest first."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9 to the process and to those that it has started."""
    for pid in [process.pid, *children(process)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def stop(process: subprocess.Popen[str]) -> None:
    """SIGSTOP, once it has taken effect."""
    process.send_signal(signal.SIGSTOP)
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, what it said), killing it if it does not end."""
    try:
        said = process.communicate(timeout=SECONDS)[1]
    except subprocess.TimeoutExpired:
        kill(process)
        raise AssertionError(f"still running after {SECONDS} s: {process.communicate()[1]}") from None
    return process.returncode, said


def local(n: int, words: Sequence[str]) -> list[str]:
    """The same command as n processes that work as one."""
    return [LAUNCHER, str(n), *words]


def complete(words: Sequence[str], n_devices: int = 1) -> str:
    """Run to the end, which must be a good one; what it said."""
    code, said = finish(start(words, n_devices))
    assert code == 0, said
    return said


def one_line(said: str) -> bool:
    """Whether a command said one thing beside its progress, which a slow machine shows and a fast one does not."""
    return len([line for line in said.splitlines() if not line.startswith("train: ")]) == 1


def step_of(run: Path) -> int:
    """The last step in the log of a run."""
    rows = logs.read_metrics(run)
    return rows[-1]["step"] if rows else 0


def wait_for(condition, process: subprocess.Popen[str]) -> None:
    """Return once `condition()` holds; fail if the process ends or time is up before."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            kill(process)
            raise AssertionError(f"ended or hung before its time: {process.communicate()[1]}")
        time.sleep(0.005)


def attempts(run: Path) -> list[dict]:
    """RUN/attempts.jsonl."""
    return storage.read_lines(run / "attempts.jsonl")


def checkpoints(run: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


def rows_of(run: Path) -> list[dict]:
    """The log of a run without wall-clock fields."""
    return [{k: v for k, v in row.items() if k not in logs.WALL_CLOCK} for row in logs.read_metrics(run)]


def target_of(run: Path) -> TrainState:
    """What the state of a run is read into: everything on one device."""
    record = read_record(run)
    sae_config = configs.from_dict(base.config_class(record.dictionary.variant), record.dictionary.sae)
    train_config = configs.from_dict(TrainConfig, record.train)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return abstract(sae_config, train_config, record.dictionary.widths, here)


def state_of(run: Path) -> TrainState:
    """The newest state of a run."""
    with Checkpoints(run, writes=False) as saved:
        return saved.restore({"": target_of(run)})[""]


def bits(state: TrainState) -> dict[str, bytes]:
    """Every leaf of a state, byte for byte."""
    return {
        jax.tree_util.keystr(p): np.asarray(leaf).tobytes() for p, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def assert_same_run(run: Path, reference: Path) -> None:
    """Same bits in every array of the state, same log, wall-clock fields apart."""
    assert checkpoints(run)[-1] == checkpoints(reference)[-1]
    ours, theirs = bits(state_of(run)), bits(state_of(reference))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert json.dumps(rows_of(run)) == json.dumps(rows_of(reference))


def assert_metrics_close(rows: list[dict], reference: list[dict]) -> None:
    """The same steps, and metrics that differ by no more than the order of sums may change them."""
    assert [row["step"] for row in rows] == [row["step"] for row in reference]
    for row, expected in zip(rows, reference, strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-6)
