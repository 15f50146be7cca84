"""Text, models and sets that lie elsewhere than when a run was made of them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import sae_jax
from sae_jax.commands import main as cli
from sae_jax.pages.about import without_folders

pytestmark = pytest.mark.usefixtures("in_process", "one_device")

HARVEST = [
    *("harvest", "--out", "set", "--harvest.text=t.txt", "--harvest.heldout=h.txt", "--harvest.model=./lm"),
    *("--harvest.context=16", "--harvest.hooks", "resid_post.1"),
]
TRAIN = [
    *("train", "--data", "set", "--out", "run", "--sae.n-latents=32", "--sae.k=2", "--train.batch-size=64"),
    *("--train.decay=0", "--train.lr=1e-2", "--train.steps=3", "--train.log-every=1"),
]


def refused(capsys, *words) -> str:
    """The one line that a refused command says."""
    capsys.readouterr()
    assert cli.main([*map(str, words)]) in (1, 2)
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    return said


@pytest.fixture(scope="module")
def made(in_process, tuned, tmp_path_factory):
    """A folder with a model, texts, a set of them whose second half was made after it was moved, and a run."""
    folder = tmp_path_factory.mktemp("moved") / "old"
    shutil.copytree(tuned, folder / "lm")
    (folder / "t.txt").write_text("def f(self): return self.x\n" * 400)
    (folder / "h.txt").write_text("import os, sys\n" * 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main([*HARVEST, "--shard=0/2"]) == 0
        folder = folder.rename(folder.with_name("new"))
        patch.chdir(folder)
        assert cli.main([*HARVEST, "--shard=1/2"]) == 0
        assert cli.main(TRAIN) == 0
    return folder


@pytest.fixture
def moved(made, tmp_path, monkeypatch):
    """The same, with each thing in another place."""
    for name in ("lm", "set", "run"):
        shutil.copytree(made / name, tmp_path / f"{name}2")
    for name in ("t.txt", "h.txt"):
        shutil.copy(made / name, tmp_path / name)
    away = made.rename(made.with_name("away"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    away.rename(made)


def test_what_was_moved_before_the_harvest_went_on_is_found(made, monkeypatch):
    monkeypatch.chdir(made)
    assert cli.main(["evaluate", "run"]) == 0
    result = json.loads(Path("run/evaluation.json").read_text())
    assert result["text"] == str(made / "h.txt")
    assert "ce_sae" in result


def test_a_run_resumes_on_a_set_whose_text_has_moved(moved):
    assert cli.main([*HARVEST[:2], "set2", *HARVEST[3:-4], "--harvest.model=./lm2", *HARVEST[-3:]]) == 0
    assert cli.main([*TRAIN[:2], "set2", "--out", "run2", *TRAIN[5:-2], "--train.steps=5"]) == 0


def test_each_thing_that_is_gone_is_named_with_the_flag_that_finds_it(moved, capsys):
    command = ["evaluate", "run2"]
    assert "the activation set" in (said := refused(capsys, *command))
    assert "--data" in said
    command += ["--data=set2"]
    assert "the model" in (said := refused(capsys, *command))
    assert "--model" in said
    command += ["--model=./lm2"]
    assert "the held-out text" in (said := refused(capsys, *command))
    assert "--heldout" in said
    assert cli.main([*command, "--heldout=h.txt"]) == 0
    said = capsys.readouterr().err
    assert "warning" not in said
    assert json.loads(Path("run2/evaluation.json").read_text())["text"] == str(moved / "h.txt")

    page = ["dashboard", "run2", "--out=page", "--tokens=400"]
    assert "--data" in refused(capsys, *page)
    assert "--model" in refused(capsys, *page, "--data=set2")
    assert cli.main([*page, "--data=set2", "--model=./lm2"]) == 0


def test_other_weights_and_another_text_are_taken_only_if_they_are_named(moved, capsys):
    (moved / "h.txt").write_text("import re\n" * 200)
    command = ["evaluate", "run2", "--data=set2", "--heldout=h.txt", "--model"]
    assert cli.main([*command, "bundled"]) == 0
    said = capsys.readouterr().err
    assert "warning: the weights of bundled are not those" in said
    assert f"warning: {moved / 'h.txt'} is not the held-out text" in said


def test_the_held_out_text_that_changed_in_its_place_is_refused(made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    text = Path("h.txt").read_text()
    try:
        Path("h.txt").write_text(text + "import re\n")
        assert "not the held-out text that" in refused(capsys, "evaluate", "run")
    finally:
        Path("h.txt").write_text(text)


def test_a_tokenizer_that_changed_in_its_place_is_refused(made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    path = Path("lm/tokenizer.json")
    before = path.read_text()
    content = json.loads(before)
    content["model"]["merges"].pop()
    try:
        path.write_text(json.dumps(content))
        assert "the tokenizer of" in refused(capsys, "evaluate", "run")
        assert "the tokenizer of" in refused(capsys, "dashboard", "run", "--out=page")
        assert not Path("page").exists()
    finally:
        path.write_text(before)


@pytest.mark.long
def test_ids_beyond_the_tokenizer_make_no_page(tmp_path, monkeypatch, capsys):
    """Of a tokenizer whose ids have gaps the largest one counts, not how many there are."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(Path(sae_jax.__file__).parent / "assets/bundled_lm", "lm")
    content = json.loads(Path("lm/tokenizer.json").read_text())
    word = next(token for token, i in content["model"]["vocab"].items() if i == 1000)
    content["model"]["vocab"][word] = 2060
    Path("lm/tokenizer.json").write_text(json.dumps(content))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 1000, (100, 32))
    ids[:, 5] = 2060
    sae_jax.write_activations("set", rng.standard_normal((100, 32, 16)), tokens=ids, tokenizer="./lm")
    assert cli.main(TRAIN) == 0
    assert cli.main(["dashboard", "run", "--out=page"]) == 0
    assert cli.main(["dashboard", "run", "--out=other", "--model=bundled"]) == 1
    said = capsys.readouterr().err
    assert "token id 2060 is outside 0 to 2047; bundled is not the tokenizer of" in said
    assert not Path("other").exists()


def test_a_page_names_no_folder_of_its_author(made, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    assert cli.main(["dashboard", "run", "--out", str(tmp_path / "page"), "--tokens=400"]) == 0
    written = "".join(path.read_text() for path in (tmp_path / "page").rglob("*.*"))
    assert str(made.parent) not in written
    assert str(made.parent.parent) not in written
    values = ["/home/x/t.txt", "hf:/home/x/data:train", "base=/home/x/lm, other=/y/z", "https://a.b/c", "1/2", "a / b"]
    shown = ["t.txt", "hf:data:train", "base=lm, other=z", "https://a.b/c", "1/2", "a / b"]
    assert without_folders(values) == shown
