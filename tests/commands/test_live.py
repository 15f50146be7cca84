"""`sae-jax train RECIPE --data live`: one command from text to a run, which is then measured and shown as any other."""

from __future__ import annotations

import json
import random
import shutil
import threading
from pathlib import Path

import pytest
import yaml

import sae_jax
from sae_jax.activations.segments import BESIDE_BYTES, GIB
from sae_jax.activations.spec import array_specs
from sae_jax.commands import main as cli
from tests import runs

HARVEST = {"model": "bundled", "hooks": ["resid_post.1"], "context": 16, "batch_tokens": 512, "heldout": "heldout"}
SAE = {"variant": "topk", "n_latents": 64, "k": 4, "dtype": "float32"}
TRAIN = {"steps": 100, "batch_size": 64, "lr": 1e-2, "checkpoint_every": 30, "log_every": 1, "dead_after_tokens": 300}
SHARD_BYTES = 64 * 16 * 128 * 2
ONE_SHARD = f"--live.memory-gib={4 * SHARD_BYTES / GIB}"  # each segment


def write_recipe(folder: Path) -> Path:
    """A recipe and its text, of four shards."""
    lines = [f"def name_{j}(self):\n    return self.value[{j}] + {j % 7} * self.other_{j % 11}\n" for j in range(400)]
    (folder / "text.py").write_text("".join(lines))
    harvest = {**HARVEST, "text": str(folder / "text.py"), "tokens": 4096}
    recipe = {"harvest": harvest, "site": "resid_post.1", "sae": SAE, "train": TRAIN}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("live"))


@pytest.fixture(scope="module")
def run(in_process, one_device, recipe: Path) -> Path:
    path = recipe.parent / "run"
    assert cli.main(["train", str(recipe), "--data=live", ONE_SHARD, "--out", str(path)]) == 0
    return path


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that a refused command says, after those of its progress."""
    capsys.readouterr()
    assert cli.main([*map(str, words)]) == 2
    *progress, said = capsys.readouterr().err.strip().splitlines()
    assert all(line.startswith("first sequences: ") for line in progress)
    return said


def test_it_is_measured_and_shown_as_any_other_run(run: Path, tmp_path: Path, capsys) -> None:
    notes = json.loads((run / "live" / "segments.json").read_text())
    assert len(notes["n_rows"]) == 4
    assert cli.main(["evaluate", str(run), "--tokens=512"]) == 0
    result = json.loads((run / "evaluation.json").read_text())
    assert result["text"] == "heldout"
    assert result["ce_clean"] < result["ce_sae"]
    assert cli.main(["dashboard", str(run), "--out", str(tmp_path / "site"), "--tokens=512"]) == 0
    assert (tmp_path / "site" / "index.html").exists()
    assert "warning" not in capsys.readouterr().err
    record = sae_jax.load(run).record
    assert (record.encodes[0].model, record.encodes[0].hook) == ("bundled", "resid_post.1")
    assert record.data is not None
    assert record.data.text == str(run.parent / "text.py")


def test_its_first_shard_is_that_of_a_harvest(run: Path, recipe: Path, tmp_path: Path) -> None:
    assert cli.main(["harvest", str(recipe), "--out", str(tmp_path / "set")]) == 0
    for name in ("dataset.json", "commits/0.json"):  # which has a digest of every chunk
        assert (run / "set" / name).read_bytes() == (tmp_path / "set" / name).read_bytes()


def test_the_same_command_resumes(run: Path, recipe: Path, capsys) -> None:
    words = ["train", str(recipe), "--data=live", "--out", str(run)]
    assert cli.main([*words, ONE_SHARD, "--train.steps=120", "--train.decay=0.2"]) == 2  # a share of the run
    assert "it cannot be 120" in capsys.readouterr().err
    assert cli.main([*words, ONE_SHARD]) == 0
    assert "step 100 of 100" in capsys.readouterr().err
    said = refused(capsys, *words)
    assert (
        f"{run} was started with 1 of 4 shards in a segment, and live.memory_gib and live.disk_gib now put 4 in" in said
    )
    said = refused(capsys, *words, ONE_SHARD, "--harvest.tokens=4000")
    assert f"{run} was started on other rows than" in said


@pytest.mark.long
def test_members_share_the_rows(recipe: Path, run: Path, in_process, one_device, tmp_path: Path) -> None:
    words = [
        "train",
        str(recipe),
        "--data=live",
        ONE_SHARD,
        "--out",
        str(tmp_path / "run"),
        "--members",
        "a",
        "b --sae.k=8",
    ]
    assert cli.main(words) == 0
    ours, theirs = (runs.rows_of(path) for path in (tmp_path / "run" / "members" / "a", run))
    assert ours == theirs


def test_mistakes_get_one_line(run: Path, recipe: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "nothing says what language model to run" in refused(capsys, "train", "--data=live", "--out=r")
    live = ("train", recipe, "--data=live", "--out=r")
    said = refused(capsys, *live, "--live.memory-gib=1e-6")
    assert "live.memory_gib=1e-06 has no room for 2 segments of one shard, 256 KiB each; use 0.000977 or more" in said
    assert "live data are for `sae-jax train`" in refused(capsys, "sweep", recipe, "--data=live", "--out=s")
    (tmp_path / "live").mkdir()
    assert "is a word and the name of what is here, too; write ./live" in refused(capsys, *live)
    assert not (tmp_path / "r").exists()


def test_without_its_first_shard_it_says_what_it_lacks(run: Path, tmp_path: Path, capsys) -> None:
    shutil.move(run / "set", tmp_path / "set")
    try:
        assert cli.main(["evaluate", str(run), "--tokens=512"]) == 1
        said = capsys.readouterr().err.strip()
        assert f"the activation set {run / 'set'}, which the dictionary was trained on, is not there" in said
        assert "\n" not in said
    finally:
        shutil.move(tmp_path / "set", run / "set")


class Watch:
    """The most bytes that files of a run's segments and set took together, seen from the side."""

    def __init__(self, run: Path) -> None:
        self._folders, self._over, self.peak = (run / "live", run / "set"), threading.Event(), 0
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._over.wait(0.01):
            self.peak = max(self.peak, sum(map(_allocated, self._folders)))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


def _allocated(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            stat = path.stat()
        except OSError:  # it has gone
            continue
        total += max(stat.st_size, 512 * stat.st_blocks) if path.is_file() else 0
    return total


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [(1, 1), (5, 2)], ids=str)
def test_killed_at_any_moment(tmp_path: Path, kills: tuple[int, int]) -> None:
    """On the disk and in memory: the bits of a run that nobody disturbed, and never more on the disk than was given."""
    recipe, rng = write_recipe(tmp_path), random.Random()
    words = runs.command("train", recipe, "--data=live", "--train.checkpoint-every=10")
    reference = tmp_path / "reference"
    runs.complete([*words, ONE_SHARD, "--out", str(reference)])
    spec = sae_jax.open_activations(reference / "set", allow_partial=True).spec
    first = sum(array.shard_bytes for array in array_specs(spec).values())
    budget = BESIDE_BYTES + first + 4 * SHARD_BYTES
    for name, where, n_kills in zip(
        ("disk", "memory"), (f"--live.disk-gib={budget / GIB}", ONE_SHARD), kills, strict=True
    ):
        run = tmp_path / name
        with Watch(run) as watch:
            for kill in range(n_kills):
                process = runs.start([*words, where, "--out", str(run)])
                runs.wait_for(lambda kill=kill: len(runs.attempts(run)) > kill, process)
                until = min(runs.attempts(run)[-1]["start_step"] + rng.randint(1, 25), TRAIN["steps"] - 2)
                runs.wait_for(lambda until=until: runs.step_of(run) >= until, process)
                process.kill()
                runs.finish(process)
            runs.complete([*words, where, "--out", str(run)])
        runs.assert_same_run(run, reference)
        if name == "disk":
            assert 4 * SHARD_BYTES < watch.peak <= budget
        assert [path.name for path in (run / "live").iterdir()] == ["segments.json"]
