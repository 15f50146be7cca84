"""The library from Python: the same bits as the commands, and a process that is left as it was found."""

from __future__ import annotations

import json
import logging
import os
import runpy
import signal
import sys
import textwrap
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

import sae_jax
from sae_jax import UsageError, UserError
from sae_jax.commands import main as cli
from sae_jax.commands import runtime
from sae_jax.saes import topk
from sae_jax.scaling import table
from sae_jax.training.settings import TrainConfig, learning_rate
from tests import runs

SETTINGS = {"n_latents": 64, "k": 4, "dtype": "float32", "batch_size": 64, "dead_after_tokens": 1000, "log_every": 1}
SETTINGS |= {"decay": 0.0}


@pytest.fixture(autouse=True)
def _as_users_have_it():
    with jax.numpy_dtype_promotion("standard"):  # optax
        yield


def rows(n: int = 512, d: int = runs.D_MODEL) -> np.ndarray:
    """f32[n, d]: sparse combinations of directions."""
    rng = np.random.default_rng(0)
    code = rng.exponential(size=(n, 32)) * (rng.random((n, 32)) < 0.1)
    return np.float32(code @ rng.standard_normal((32, d)))


def bits(d: sae_jax.Dictionary) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(d.sae)]


def test_a_run_from_python_is_that_of_the_command(small_set: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(runtime, "start_distributed", lambda: None)  # this process has devices already
    words = runs.train_command(small_set, tmp_path / "command", "--train.steps=20")
    assert cli.main(words[words.index("train") :]) == 0
    d = sae_jax.train(small_set, out=tmp_path / "python", steps=20, lr=3.2e-3, **SETTINGS)
    runs.assert_same_run(tmp_path / "python", tmp_path / "command")
    of_command, of_python = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("command", "python")
    )
    assert of_command == of_python
    assert bits(d) == bits(sae_jax.load(tmp_path / "command"))
    assert d.record.steps == 20
    assert d.record.data is not None
    assert d.record.data.path == str(small_set)


def test_arrays_in_memory_and_nothing_on_the_disk(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    d = sae_jax.train(rows(), steps=30, lr=1e-2, **SETTINGS)
    again = sae_jax.train(rows(), steps=30, lr=1e-2, out="run", **SETTINGS)
    assert bits(d) == bits(again)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    x = rows()
    assert ((x - d(x)) ** 2).sum() < 0.6 * ((x - x.mean(0)) ** 2).sum()


def test_a_run_keeps_the_rate_that_it_chose_when_it_is_prolonged(tmp_path: Path) -> None:
    settings = {name: value for name, value in SETTINGS.items() if name != "dead_after_tokens"}
    for steps in (8, 20):
        sae_jax.train(rows(), steps=steps, out=tmp_path, **settings)
        train = json.loads((tmp_path / "config.json").read_text())["train"]
        assert train["steps"] == steps
        assert train["dead_after_tokens"] == -(-8 * 64 // 10)
        assert train["lr"] == learning_rate(TrainConfig(steps=8), topk.Config(n_latents=64))


@pytest.mark.long
def test_what_will_spoil_a_run_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    settings = {name: value for name, value in SETTINGS.items() if name != "k"}
    sae_jax.train(rows(), steps=4, **SETTINGS)
    assert "source acts" not in (said := capsys.readouterr().err)
    assert "lower" not in said
    few = rows()
    few[:40], few[40:90], few[100] = 0, few[99], 1000 * few[100]
    sae_jax.train(few, variant="relu", l1_coefficient=0.0, steps=10, **settings)
    said = capsys.readouterr().err
    for what in (
        "11% of its rows are zero",
        "10% of its rows are one and the same",
        "1.0% of its rows hold 100% of the",
    ):
        assert said.count(f"source acts: {what}") == 1
    assert (
        said.count("latents are active in a row of 8, so little is sparse; raise sae.l1_coefficient, or leave it out")
        == 1
    )
    sae_jax.train(rows(), steps=10, **{**SETTINGS, "dead_after_tokens": 1, "k": 1, "lr": 1.0})
    assert "of its latents are dead; lower train.lr, or sae.n_latents" in capsys.readouterr().err


@pytest.mark.long
def test_members_and_sweeps(tmp_path: Path) -> None:
    both = {"k8": {"k": 8}, "g": {"variant": "gated", "l1_coefficient": 0.1}}
    settings = {**SETTINGS, "steps": 8, "lr": 1e-2}
    trained = sae_jax.train_members(rows(), both, **settings)
    assert [(name, d.record.variant, d.config.n_active) for name, d in trained.items()] == [
        ("k8", "topk", 8),
        ("g", "gated", None),
    ]
    points = sae_jax.sweep(rows(), out=tmp_path / "s", grid={"n_latents": [32, 64], "seed": [0]}, **settings)
    assert [(p.name, p.steps) for p in points] == [("n32-seed0", 8), ("n64-seed0", 8)]
    assert points == table.read(tmp_path / "s")


def test_several_sources_side_by_side() -> None:
    two = {"a": rows(), "b": rows(d=5)}
    with pytest.raises(UsageError, match=r"the rows in memory has a, b; choose one with --site"):
        sae_jax.train(two, steps=4, **SETTINGS)
    settings = {name: value for name, value in SETTINGS.items() if name != "k"}
    d = sae_jax.train(two, variant="crosscoder", site=("a", "b"), steps=4, **settings)
    assert d.record.sites.x == ("a", "b")
    assert d.w_dec.shape == (64, runs.D_MODEL + 5)


@pytest.mark.parametrize(
    ("data", "settings", "error", "message"),
    [
        (rows(), {"kk": 3}, UsageError, "topk has no setting 'kk'; did you mean k"),
        (rows(), {"k": 300}, UsageError, "train: sae.k=300 must be between"),
        (rows(), {"k": "many"}, UsageError, "train: sae.k='many': Expected `int`"),
        (rows(), {"variant": "nothing"}, UsageError, "sae.variant='nothing' does not exist"),
        (rows()[:, 0], {}, UsageError, r"give real numbers \[\.\.\., d_model\]"),
        (np.full((64, 8), np.nan, np.float32), {}, UserError, "row 0 of acts is not finite"),
        (np.ma.masked_array(rows()), {}, UsageError, "masked array"),
        ("nowhere", {}, UserError, "not an activation set"),
        (rows(), {"lr": 1e18, "steps": 8}, UserError, r"loss is .* at step \d; lower lr, or give out="),
    ],
    ids=str,
)
def test_mistakes_raise_one_line_and_never_exit(data, settings, error, message) -> None:
    with pytest.raises(error, match=message) as caught:
        sae_jax.train(data, **{**SETTINGS, "steps": 4, **settings})
    assert "\n" not in str(caught.value)


def snapshot() -> dict[str, object]:
    """What belongs to the process and not to a library."""
    loggers = {
        name: (logger.level, tuple(logger.handlers), logger.disabled, logger.propagate)
        for name, logger in [("", logging.getLogger()), *logging.Logger.manager.loggerDict.items()]
        if isinstance(logger, logging.Logger)
    }
    return {
        "signals": {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)},
        "environment": dict(os.environ),
        "loggers": loggers,
        "warnings": list(warnings.filters),
        "hooks": (sys.excepthook, sys.unraisablehook),
        "jax": {name: getattr(jax.config, name) for name in ("jax_platforms", "jax_enable_x64", "jax_debug_nans")},
        "mesh": jax.sharding.get_abstract_mesh(),
    }


def test_the_process_is_left_as_it_was_found(tmp_path: Path) -> None:
    sae_jax.train(rows(), steps=2, **SETTINGS)  # libraries that are imported on first use set up their own loggers
    before = snapshot()
    d = sae_jax.train(rows(), steps=4, out=tmp_path / "run", **SETTINGS)
    d.save(tmp_path / "d")
    sae_jax.load(tmp_path / "d")
    with pytest.raises(UsageError):
        sae_jax.train(rows(), k=0)
    after = snapshot()
    after["loggers"] = {name: after["loggers"][name] for name in before["loggers"]}  # type: ignore[index, union-attr]
    for what in before:
        assert after[what] == before[what], what


NEW_VARIANT = """
    from dataclasses import dataclass
    from typing import Literal
    from sae_jax.saes import topk

    @dataclass(frozen=True)
    class Config(topk.Config):
        '''TopK whose rows are counted twice: a variant of one file.'''
        variant: Literal["doubled"] = "doubled"
        factor: float = 2.0
        '''what k is multiplied by'''
"""

NEW_SOURCE = """
    import numpy as np
    from sae_jax.activations.source import Batches, RowSource, place_rows
    from sae_jax.record import DataRecord, SourceRecord

    class Noise(RowSource):
        '''Rows that nobody stores.'''
        name, sources, n_rows = "noise", ("noise",), 10**9
        data = DataRecord("noise")
        def describe(self, source): return SourceRecord("noise", 8)
        def mean_square(self, source): return 8.0
        def sample(self, source): return np.float32(np.random.default_rng(0).standard_normal((256, 8)))
        def open(self, sites, batch_size, seed, mesh): return NoiseBatches(sites, batch_size, seed)

    class NoiseBatches(Batches):
        def __init__(self, sites, batch_size, seed): self.args = sites, batch_size, seed
        def batches(self, start_step=0):
            while True:
                rng = np.random.default_rng((self.args[2], start_step))
                yield start_step, {"noise": np.float32(rng.standard_normal((self.args[1], 8)))}
                start_step += 1
        def row_ids(self, step): return np.arange(self.args[1])
        def place(self, rows, mesh): return place_rows(rows, self.args[0], mesh)
"""


def test_a_variant_and_a_row_source_are_one_new_file_each(tmp_path: Path, monkeypatch) -> None:
    from sae_jax import saes

    (tmp_path / "doubled.py").write_text(textwrap.dedent(NEW_VARIANT))
    (tmp_path / "noise.py").write_text(textwrap.dedent(NEW_SOURCE))
    monkeypatch.setattr(saes, "__path__", [*saes.__path__, str(tmp_path)])
    source = runpy.run_path(str(tmp_path / "noise.py"))["Noise"]()
    d = sae_jax.train(source, variant="doubled", factor=3.0, steps=3, **SETTINGS)
    assert (d.record.variant, d.config.factor, d.record.encodes[0].name) == ("doubled", 3.0, "noise")
    d.save(tmp_path / "d")
    assert bits(sae_jax.load(tmp_path / "d")) == bits(d)


OF_SOMEONE_ELSE = """
    import sys, jax, numpy as np
    if sys.argv[1] == "initialised":
        jax.distributed.initialize("127.0.0.1:" + sys.argv[2], 1, 0)
    else:  # JAX has devices, so that nobody may initialise it any more
        jax.numpy.ones(3).block_until_ready()
    import sae_jax
    rows = np.random.default_rng(0).standard_normal((256, 8))
    d = sae_jax.train(rows, n_latents=32, k=4, steps=4, batch_size=64, out=sys.argv[3])
    assert d.record.steps == 4
    assert (jax._src.distributed.global_state.client is not None) == (sys.argv[1] == "initialised")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["initialised", "in use"])
def test_in_a_process_that_belongs_to_someone_else(tmp_path: Path, how: str) -> None:
    """As under Ray or in a notebook: `jax.distributed` was initialised by them, or must not be."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(OF_SOMEONE_ELSE))
    runs.complete([sys.executable, str(script), how, port, str(tmp_path / "run")])
