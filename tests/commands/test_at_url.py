"""What commands write at s3:// is what they write on a disk: harvest, train, sweep, evaluate, pages, dictionaries."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

import sae_jax
from sae_jax import config, storage
from sae_jax.activations.store import open_activations
from sae_jax.commands import main as cli
from sae_jax.scaling import table
from sae_jax.storage import folder
from tests import runs
from tests.commands.test_sweep import RECIPE, found, write

pytestmark = [pytest.mark.usefixtures("in_process", "one_device"), pytest.mark.slow]

TEXT = "".join(f"def f{i}(x):\n    return x + {i * i}\n\n\n" for i in range(120))
HARVEST = ("--harvest.context=32", "--harvest.tokens=2048", "--harvest.hooks", "resid_post.1")
SEAL = re.compile(rb'"xxh3_64_of_all_else":"\w+"')
TRAIN = ("--sae.n-latents=64", "--sae.k=4", "--sae.dtype=float32", "--train.batch-size=64", "--train.steps=8")


def files(folder) -> dict[str, bytes]:
    """All files under a path or a URL."""
    here = storage.Files(folder)
    keys = sorted(here.keys(""))
    return dict(zip(keys, here.read_many(keys), strict=True))


@pytest.fixture
def both(bucket: str, tmp_path: Path) -> list[str]:
    """A folder on a disk and one at a URL, in which the same is done."""
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "heldout.txt").write_text(TEXT.replace("def f", "def held"))
    return [str(tmp_path / "here"), bucket]


def commands(root: str, text: Path) -> None:
    """From text to pages, all of it under `root`."""
    for words in (
        [
            "harvest",
            "--out",
            f"{root}/set",
            f"--harvest.text={text}",
            f"--harvest.heldout={text.with_name('heldout.txt')}",
            *HARVEST,
        ],
        ["train", "--data", f"{root}/set", "--out", f"{root}/run", *TRAIN],
        ["evaluate", f"{root}/run", "--tokens=256"],
        ["collect", f"{root}/run", "--out", f"{root}/store", "--tokens=512"],
        ["dashboard", f"{root}/run", "--out", f"{root}/site", "--tokens=512", "--store", f"{root}/store"],
        ["report", f"{root}/run"],
    ):
        assert cli.main(words) == 0, words


def test_from_text_to_pages(both: list[str], tmp_path: Path) -> None:
    for root in both:
        commands(root, tmp_path / "text.txt")
    here, there = (files(f"{root}/site") for root in both)
    assert here.keys() == there.keys()
    for name, content in here.items():
        other = there[name].replace(f"{both[1]}/".encode(), b"")  # pages name no folders of a disk
        assert SEAL.sub(b"", content) == SEAL.sub(b"", other), name  # the record's, in which they are
    one, two = (sae_jax.load(f"{root}/run") for root in both)
    np.testing.assert_array_equal(one.w_dec, two.w_dec)
    assert one.record.metrics == two.record.metrics
    numbers = [storage.read_json(f"{root}/run/evaluation.json") for root in both]
    assert numbers[0]["fvu"] == numbers[1]["fvu"]
    np.testing.assert_array_equal(*(open_activations(f"{root}/set").read_chunk("resid_post.1", 0) for root in both))
    assert storage.read_bytes(f"{both[1]}/run/report.html")
    assert not any(".unfinished" in name for name in files(both[1]))


def test_a_dictionary_is_saved_and_loaded_and_nothing_else_is_overwritten(bucket: str) -> None:
    rows = np.random.default_rng(0).standard_normal((512, 8)).astype(np.float32)
    d = sae_jax.train(rows, n_latents=16, k=2, steps=2, batch_size=64)
    d.save(f"{bucket}/d")
    again = sae_jax.load(f"{bucket}/d")
    np.testing.assert_array_equal(again.w_enc, d.w_enc)
    assert again.record == d.record
    before = files(bucket)
    for act in (lambda: d.save(f"{bucket}/d"), lambda: d.save(bucket)):
        with pytest.raises(sae_jax.UsageError, match="exists and is not empty"):
            act()
    assert files(bucket) == before
    storage.write_bytes(f"{bucket}/d/dictionary.safetensors", before["d/dictionary.safetensors"][:-5])
    with pytest.raises(sae_jax.UserError, match=f"{bucket}/d/"):
        sae_jax.load(f"{bucket}/d")


def test_a_recipe_may_lie_there(bucket: str) -> None:
    storage.write_text(f"{bucket}/recipe.yaml", "sae: {k: 4}")
    assert config.read_yaml(f"{bucket}/recipe.yaml") == {"sae": {"k": 4}}
    with pytest.raises(sae_jax.UsageError, match=f"^{bucket}/other.yaml: No such file .*; give the path of a recipe"):
        config.read_yaml(f"{bucket}/other.yaml")
    with pytest.raises(sae_jax.UserError, match=r"recipe.yaml: 11 bytes, more than the 10 "):
        storage.read_limited(f"{bucket}/recipe.yaml", 10)


def test_what_s3_does_not_take_as_one_object_is_refused_before_it_is_sent(bucket: str, door, monkeypatch) -> None:
    monkeypatch.setattr(folder, "S3_BYTES", 1000)
    rows = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    d = sae_jax.train(rows, n_latents=16, k=2, steps=2, batch_size=64)  # 1.1 kB of arrays
    with pytest.raises(sae_jax.UsageError, match=r"1.12 kB are more than the 1 kB that S3 takes .*aws s3 cp"):
        d.save(f"{bucket}/d")
    with pytest.raises(sae_jax.UsageError, match="f/large: "), storage.new_folder(f"{bucket}/f") as building:
        (building / "large").write_bytes(b"x" * 1001)
    assert not [path for method, path in door.requests if method == "PUT" and "owner" not in path]
    with storage.new_folder(f"{bucket}/f") as building:
        (building / "small").write_bytes(b"x" * 1000)


def test_a_folder_on_its_way_to_a_url_is_not_there_and_is_made_again(bucket: str) -> None:
    """As a process leaves it that is killed before the last request."""
    for name in (".unfinished", "0", "other"):
        storage.write_bytes(f"{bucket}/f/{name}", b"old")
    assert not storage.is_whole(f"{bucket}/f")
    with storage.new_folder(f"{bucket}/f") as building:
        (building / "0").write_bytes(b"new")
    assert storage.is_whole(f"{bucket}/f")
    assert files(f"{bucket}/f") == {"0": b"new"}
    storage.remove_folder(f"{bucket}/f")
    assert files(bucket) == {}


def test_sweep_with_two_workers_killed_and_failing(bucket: str, door, tmp_path: Path) -> None:
    runs.write_set(tmp_path / "set")
    write(tmp_path / "recipe.yaml", RECIPE)

    def start(out: str, *flags: str) -> subprocess.Popen[str]:
        words = runs.command("sweep", tmp_path / "recipe.yaml", "--data", tmp_path / "set", "--out", out, *flags)
        return runs.start(words, optimised=False)

    assert runs.finish(start(str(tmp_path / "whole")))[0] == 3  # of the first budget, which buys nothing
    door.fails = 0.05
    workers: list[subprocess.Popen[str]] = []
    with door.kills(60, lambda: workers[0]):
        workers += [start(f"{bucket}/sweep", "--claim", "--sweep.per-pass=1") for _ in range(2)]
        codes = [runs.finish(worker)[0] for worker in workers]
    assert codes[0] == -signal.SIGKILL
    code, said = runs.finish(start(f"{bucket}/sweep", "--claim", "--sweep.per-pass=1"))
    assert code == 3, said
    assert found(storage.path(f"{bucket}/sweep")) == found(tmp_path / "whole")
    assert len(table.read(f"{bucket}/sweep")) == 6
    assert json.loads(storage.read_bytes(f"{bucket}/sweep/sweep.json") or b"")
