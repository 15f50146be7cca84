"""A sweep through its command: one table, whoever trains what, whenever it is killed; and what bad input gets."""

from __future__ import annotations

import json
import random
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from sae_jax import load
from sae_jax.activations.store import open_activations
from sae_jax.commands import main as cli
from sae_jax.evaluation.evaluate import on_rows
from sae_jax.evaluation.text import unseen_rows
from sae_jax.scaling import table
from sae_jax.storage import Lease
from tests import runs

pytestmark = pytest.mark.usefixtures("in_process")

RECIPE = {
    "sae": {"variant": "topk", "dtype": "float32"},
    "train": {"batch_size": 64, "lr": 1e-2, "log_every": 20, "checkpoint_every": 20, "dead_after_tokens": 300},
    "sweep": {
        "grid": {"sae": {"n_latents": [32, 64], "k": [4]}},
        # 6 * 2 * 8 * n FLOP a token: the second is 40 steps of the narrow ones, 20 of the wide; the third 80 and 40.
        "compute": [100.0, 40 * 64 * 96 * 32.0, 80 * 64 * 96 * 32.0],
        "tokens": [640],
        "held_out": 512,
    },
}
STEPS = {32: (10, 40, 80), 64: (10, 20, 40)}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A set and a recipe; its sweep, by one process, in `whole`."""
    work = tmp_path_factory.mktemp("sweep")
    runs.write_set(work / "set")
    write(work / "recipe.yaml", RECIPE)
    code, said = runs.finish(start(work, "whole"))
    assert code == 3  # of the first budget
    assert "left out: sweep.compute=100: buys 0.0163 to 0.0326 tokens" in said
    return work


def write(path: Path, recipe: dict) -> Path:
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def start(work: Path, out: str, *flags: str, n: int = 1) -> subprocess.Popen[str]:
    """The sweep of the recipe, by n processes. They only compare with each other: they compile little."""
    words = runs.command("sweep", work / "recipe.yaml", "--data", work / "set", "--out", work / out, *flags)
    return runs.start(words if n == 1 else runs.local(n, words), optimised=False)


def sweep(work: Path, recipe: Path, out: str, *flags: str) -> int:
    return cli.main(["sweep", str(recipe), "--data", str(work / "set"), "--out", str(work / out), *flags])


def found(out: Path) -> list[dict]:
    """The table without what the clock says."""
    rows = [point.to_json() for point in table.read(out)]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_the_table_has_every_member_at_every_mark(work: Path) -> None:
    points = table.read(work / "whole")
    assert {n: tuple(p.steps for p in points if p.n_latents == n) for n in STEPS} == STEPS
    for point in points:
        assert point.tokens == 64 * (point.steps or 0)
        assert point.flops == point.tokens * 6 * 2 * 8 * point.n_latents
        assert (point.l0 or 0) <= (point.k or 0)
        assert point.budget in (None, point.flops)
    at = {(p.n_latents, p.budget): p.fvu for p in points}
    assert all(at[n, RECIPE["sweep"]["compute"][-1]] < at[n, None] for n in STEPS)


def test_a_point_is_what_the_saved_dictionary_does(work: Path) -> None:
    rows = unseen_rows(open_activations(str(work / "set")), runs.SITES, 512)["acts"]
    name = "n64-k4"
    (point,) = [p for p in table.read(work / "whole") if p.name == name and p.steps == STEPS[64][-1]]
    want = on_rows(load(work / "whole" / "passes" / "0of1-0" / "members" / name), rows)
    assert (point.fvu, point.l0) == (pytest.approx(want["fvu"], rel=1e-4), pytest.approx(want["l0"], rel=1e-6))
    assert point.decoder_cosine == pytest.approx(want["decoder_cosine"], rel=1e-4)
    # Of all rows, and in `evaluate` of 64.
    assert point.decoder_projection == pytest.approx(want["decoder_projection"], rel=0.2)


def test_killed_at_any_moment_it_goes_on(work: Path) -> None:
    rng, times = random.Random(), 0
    for _ in range(2):
        process = start(work, "killed")
        began = time.monotonic()
        while process.poll() is None and time.monotonic() - began < runs.SECONDS:
            # Not before there is anything to lose.
            if list((work / "killed" / "points").glob("*.json")):
                time.sleep(rng.uniform(0, 2))
                runs.kill(process)
                times += 1
                break
            time.sleep(0.05)
        runs.finish(process)
    code, said = runs.finish(start(work, "killed"))
    assert code == 3, said
    assert times
    assert found(work / "killed") == found(work / "whole")


def test_a_worker_that_died_at_the_end_of_a_pass_leaves_no_lease(work: Path) -> None:
    """Nobody has to succeed it, as the pass is done."""
    (path,) = (work / "whole" / "passes").glob("*/config.json")
    left = path.with_name("owner.0.json")
    left.write_text(json.dumps({**Lease(left, "a pass")._me, "pid": 2**22 + 1}))  # no process has such a number
    assert sweep(work, work / "recipe.yaml", "whole") == 3
    assert not left.exists()


@pytest.mark.long
def test_shares_and_claims_give_the_same_table(work: Path) -> None:
    for i in range(2):
        code, said = runs.finish(start(work, "shared", f"--shard={i}/2"))
        assert code == 3, said
    assert found(work / "shared") == found(work / "whole")
    for process in [start(work, "claimed", "--claim", "--sweep.per-pass=1") for _ in range(2)]:
        code, said = runs.finish(process)
        assert code == 3, said
    assert found(work / "claimed") == found(work / "whole")


@pytest.mark.long
def test_two_processes_write_one_table(work: Path) -> None:
    """Each has half of every batch and of every dictionary: to rounding what one has."""
    code, said = runs.finish(start(work, "two", "--sweep.grid", "sae.n_latents=32", "sae.k=4", n=2))
    assert code == 3, said  # of the first budget
    one, two = (table.read(work / out) for out in ("whole", "two"))
    one = [p for p in one if p.n_latents == 32]
    assert [p.key for p in two] == [p.key for p in one]
    np.testing.assert_allclose([p.fvu for p in two], [p.fvu for p in one], rtol=1e-3)


@pytest.mark.long
def test_members_over_the_devices(work: Path) -> None:
    """Eight devices, two slices of four: to rounding what one device finds; and seeds that share a program."""
    grid = {"sae": {"n_latents": 32, "k": 4}, "train": {"seed": [0, 1]}}
    settings = {"mesh": {"member": 2}, "sweep": {"grid": grid, "tokens": 640, "held_out": 512}}
    path = write(work / "seeds.yaml", {**RECIPE, **settings})
    assert sweep(work, path, "sliced") == 0
    (alone,) = [p for p in table.read(work / "whole") if (p.n_latents, p.steps) == (32, 10)]
    sliced = {p.seed: p for p in table.read(work / "sliced")}
    assert sliced[0].fvu == pytest.approx(alone.fvu, rel=1e-3)
    assert sliced[1].fvu != sliced[0].fvu


@pytest.mark.long
def test_until_it_converges(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"tolerance": 0.02, "window": 640, "max_tokens": 64 * 150, "held_out": 512}
    recipe = {**RECIPE, "sae": {**RECIPE["sae"], "n_latents": 32, "k": 4}, "sweep": settings}
    path = write(work / "until.yaml", recipe)
    assert sweep(work, path, "until") == 0
    points = table.read(work / "until")
    assert [p.tokens for p in points] == [640 * (i + 1) for i in range(len(points))]
    assert [p.converged for p in points] == [False] * (len(points) - 1) + [True]
    changes = [abs(a.fvu / b.fvu - 1) for a, b in zip(points[1:], points, strict=False)]
    assert changes[-1] < 0.02 <= min(changes[:-1])
    before = found(work / "until")
    capsys.readouterr()
    assert sweep(work, path, "until") == 0
    assert found(work / "until") == before
    assert "pass" not in capsys.readouterr().err  # nothing is trained again


def test_what_cannot_be_trained_is_named_and_the_rest_goes_on(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {**RECIPE, "sweep": {"grid": {"sae": {"n_latents": [32], "k": [4, 64]}}, "tokens": 64, "held_out": 64}}
    path = write(work / "invalid.yaml", recipe)
    assert sweep(work, path, "invalid") == 3
    assert [p.name for p in table.read(work / "invalid")] == ["n32-k4"]
    said = capsys.readouterr().err
    assert "left out: member n32-k64: sae.k=64 must be between 1 and sae.n_latents=32" in said
    assert "Traceback" not in said


def test_a_member_that_diverges_is_named_and_the_rest_goes_on(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At a rate of 1e30 the first update already spoils what the first mark measures, before any loss shows it."""
    settings = {"grid": {"sae.n_latents": 32, "sae.k": 4, "train.lr": [1e-2, 1e30]}, "tokens": [64, 640]}
    path = write(work / "diverges.yaml", {**RECIPE, "sweep": {**settings, "held_out": 512}})
    assert sweep(work, path, "diverges") == 3
    said = capsys.readouterr().err
    assert "1 of 2 members failed: n32-k4-lr1e30: " in said
    assert "Traceback" not in said
    found = {(point.lr, point.tokens) for point in table.read(work / "diverges")}
    assert found == {(1e-2, 64), (1e-2, 640)}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--sweep.grid", "sae.kk=4"], "member kk4: unknown key 'sae.kk'"),
        (["--sweep.grid", "train.batch_size=128 256"], "members share one pass"),
        (["--train.decay=0.1"], "train.decay=0.1: what is measured on the way"),
        (["--sweep.lr-from=none.json"], "no learning-rate rule in it"),
        (["--shard=4/4"], "--shard='4/4' must be i/n"),
        (["--sweep.tokens", "1280"], "was started with members.n32-k4.marks="),
    ],
)
def test_what_is_refused(work: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str) -> None:
    assert sweep(work, work / "recipe.yaml", "whole", *flags) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1]
    assert json.loads((work / "whole" / "sweep.json").read_text())


def test_other_rows_are_another_sweep(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also for the passes that have not begun, whose rows nobody has seen yet."""
    runs.write_set(tmp_path / "set", outlier=5)
    before = (work / "whole" / "results.jsonl").read_bytes()
    assert sweep(work, work / "recipe.yaml", "whole", "--data", str(tmp_path / "set")) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"whole was started on other rows than {tmp_path / 'set'}; give another --out" in said
    assert (work / "whole" / "results.jsonl").read_bytes() == before


def test_a_dry_run_writes_nothing(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(work, work / "recipe.yaml", "dry", "--dry-run", "--target=h200:1") == 1
    assert not (work / "dry").exists()
    shown = capsys.readouterr().out
    assert "n64-k4" in shown
    assert "pass 0of1-0: 2 members" in shown


def test_members_of_a_sweep_are_measured_by_its_folder(work, capsys):
    cli.main(["evaluate", str(work / "whole"), "--tokens", "512", "--json"])
    documents = json.loads(capsys.readouterr().out)
    assert {Path(name).name for name in documents} == {p.name for p in table.read(work / "whole")}
    for name, document in documents.items():
        assert json.loads((Path(name) / "evaluation.json").read_text())["fvu"] == document["fvu"]
    assert cli.main(["fit", str(work / "whole"), "--metric", "fvu"]) == 2
    assert "metric 'fvu' was measured of 2 members, and a trend needs 4" in capsys.readouterr().err
