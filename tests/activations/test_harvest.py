"""What a harvest leaves out, and what it does when the text is shorter than the set."""

import inspect
import json
import re
import shutil

import numpy as np
import pytest

from sae_jax import lm
from sae_jax.activations import harvest as module
from sae_jax.activations.commits import committed_shards
from sae_jax.activations.harvest import HarvestConfig, harvest
from sae_jax.activations.shards import keep
from sae_jax.activations.store import open_activations
from sae_jax.storage import Files
from sae_jax.types import UsageError, UserError


def test_special_tokens_and_large_norms_are_left_out():
    ids = np.array([[0, 5, 6, 7], [8, 0, 9, 5]])
    norms = np.ones((2, 4, 2))
    norms[0, 1, 1] = 50  # far out at one site only: the row is dropped at all of them
    norms[0, 0] = 1000  # a special token does not move the median
    kept = keep(ids, norms, np.array([0]), 10.0)
    np.testing.assert_array_equal(kept, [[False, False, True, True], [True, False, True, True]])
    np.testing.assert_array_equal(keep(ids, norms, np.array([0]), None), ids != 0)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("import os\nprint(os.getcwd())\n" * 60)
    return str(tmp_path / "text.txt")


def small(text, **settings):
    return HarvestConfig(**{"text": text, "context": 16, "batch_tokens": 64, "hooks": ("resid_post.0",), **settings})


def test_all_of_a_text(text, tmp_path):
    spec = harvest(small(text), str(tmp_path / "set"))
    activations = open_activations(tmp_path / "set")
    index = [activations.read_index(i) for i in range(activations.n_chunks)]
    places = {(s, p) for part in index for s, p in zip(part["seq"], part["pos"], strict=True)}
    n_sequences = sum(c.n_sequences for c in activations.commits.values())
    # Every position once, but the separator at the head of the document.
    assert len(places) == activations.n_rows == n_sequences * 16 - 1
    assert spec.context == 16


def test_a_text_that_ends_early_leaves_empty_shards_not_missing_ones(tmp_path):
    (tmp_path / "indented.txt").write_text("        " * 800)  # many bytes a token
    harvest(small(str(tmp_path / "indented.txt"), tokens=16 * 400), str(tmp_path / "set"))
    activations = open_activations(tmp_path / "set")
    assert 0 < activations.n_rows < 16 * 400
    assert min(commit.n_rows for commit in activations.commits.values()) == 0


def test_the_set_does_not_depend_on_the_batch(text, tmp_path, monkeypatch):
    """How many sequences run at once is this machine's affair; the rows are the same to rounding."""
    harvest(small(text), str(tmp_path / "a"))
    harvest(small(text, batch_tokens=256), str(tmp_path / "b"))
    a, b = (open_activations(tmp_path / name) for name in "ab")
    for chunk in range(a.n_chunks):
        np.testing.assert_array_equal(a.read_index(chunk)["token"], b.read_index(chunk)["token"])
        rows = [np.float32(s.read_chunk("resid_post.0", chunk)) for s in (a, b)]
        np.testing.assert_allclose(*rows, rtol=1e-2, atol=1e-2)


def test_references_are_good_from_any_folder(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.txt").write_text("def other():\n    return 1\n" * 40)
    spec = harvest(small("text.txt", heldout="other.txt"), str(tmp_path / "set"))
    assert (spec.text, spec.heldout, spec.tokenizer) == (text, str(tmp_path / "other.txt"), "bundled")


def test_a_harvest_that_is_to_stop_ends_after_the_shard_it_is_at(text, tmp_path):
    answers = iter([False, False])  # before all, before the first shard
    spec = harvest(small(text), str(tmp_path / "set"), stop=lambda: next(answers, True))
    assert committed_shards(Files(tmp_path / "set")) == {0}
    assert spec.n_shards > 1
    harvest(small(text), str(tmp_path / "set"))
    assert len(committed_shards(Files(tmp_path / "set"))) == spec.n_shards
    assert list((tmp_path / "set").rglob("*owner*")) == []


@pytest.mark.parametrize("heldout", ["text.txt", "missing.txt"])
def test_held_out_text_is_checked_before_the_work(text, tmp_path, monkeypatch, heldout):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=heldout):
        harvest(small(text, heldout=heldout), str(tmp_path / "set"))
    assert not (tmp_path / "set").exists()


def test_a_dataset_that_cannot_be_read_leaves_no_set(tmp_path, monkeypatch):
    def fail(*words, **settings):
        raise OSError("no network")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(UserError, match=r"'hf:owner/data' cannot be read: no network"):
        harvest(HarvestConfig(text="hf:owner/data", tokens=1024), str(tmp_path / "set"))
    assert not (tmp_path / "set").exists()


def test_a_held_out_file_is_no_part_of_the_text(text, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(f"import {name}\n" * 500)
    with pytest.raises(UsageError, match=r"b\.txt is part of harvest.text, too; keep it out"):
        harvest(small(str(folder), heldout=str(folder / "b.txt")), str(tmp_path / "set"))
    assert not (tmp_path / "set").exists()


def test_a_short_text_is_cut_small_however_much_was_asked_for(text, tmp_path):
    spec = harvest(small(text, tokens=10**9), str(tmp_path / "set"))
    assert spec.shard_rows < 2000


def test_norm_masks_use_the_shards_own_median(text, tmp_path):
    harvest(small(text, max_norm_multiple=1.05), str(tmp_path / "set"))
    harvest(small(text), str(tmp_path / "all"))
    assert open_activations(tmp_path / "set").n_rows < open_activations(tmp_path / "all").n_rows


def test_two_models_share_rows_and_keep_their_own_activations(text, tuned, tmp_path):
    models, hooks = ("base=bundled", f"tuned={tuned}"), ("resid_post.1", "mlp_out.0")
    spec = harvest(small(text, model=models, hooks=hooks), str(tmp_path / "both"))
    assert [s.name for s in spec.sources] == [f"{m}.{h}" for m in ("base", "tuned") for h in hooks]
    assert spec.source("base.mlp_out.0").model == "bundled"
    assert spec.source("tuned.mlp_out.0").model == str(tuned)
    assert spec.source("tuned.mlp_out.0").model_digest != spec.source("base.mlp_out.0").model_digest
    harvest(small(text, model=(str(tuned),), hooks=hooks), str(tmp_path / "one"))
    both, one = open_activations(tmp_path / "both"), open_activations(tmp_path / "one")

    def rows(activations, name):
        """By token: how a set is cut depends on its sources."""
        index = [activations.read_index(i) for i in range(activations.n_chunks)]
        chunks = [np.float32(activations.read_chunk(name, i)) for i in range(activations.n_chunks)]
        place = [np.concatenate([part[key] for part in index]) for key in ("pos", "seq")]
        return np.concatenate(chunks)[np.lexsort(place)]

    for hook in hooks:
        np.testing.assert_allclose(rows(both, f"tuned.{hook}"), rows(one, hook), rtol=2e-2, atol=2e-2)
    # The change is in layer 1 alone.
    np.testing.assert_array_equal(rows(both, "base.mlp_out.0"), rows(both, "tuned.mlp_out.0"))
    assert np.abs(rows(both, "base.resid_post.1") - rows(both, "tuned.resid_post.1")).max() > 0.1


def test_a_norm_that_one_model_alone_has_masks_the_row_of_both(text, tuned, tmp_path):
    models, settings = ("base=bundled", f"tuned={tuned}"), {"hooks": ("mlp_out.1",), "max_norm_multiple": 1.2}
    n_rows = []
    for number, model in enumerate((models, models[:1], models[1:])):
        reference = model if len(model) > 1 else (model[0].partition("=")[2],)
        harvest(small(text, model=reference, **settings), str(tmp_path / str(number)))
        n_rows.append(open_activations(tmp_path / str(number)).n_rows)
    assert n_rows[0] < min(n_rows[1:])


def test_models_with_another_tokenizer_are_refused(text, tuned, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tuned, other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    a, b = list(vocabulary)[300:302]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"other \(.*\) has another tokenizer than base \(bundled\)"):
        harvest(small(text, model=("base=bundled", f"other={other}")), str(tmp_path / "set"))
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"model": ()},
        {"model": ("bundled", "bundled")},
        {"model": ("a=bundled", "a=bundled")},
        {"model": ("a.b=bundled", "c=bundled")},
        {"hooks": ()},
        {"hooks": ("resid_post.0", "resid_post.0")},
        {"context": 1},
        {"tokens": 3},
        {"dtype": "int8"},
        {"max_norm_multiple": 0.5},
        {"batch_tokens": 4},
        {"context": 4096, "batch_tokens": 8192},
    ],
    ids=str,
)
def test_bad_settings_are_refused(text, tmp_path, settings):
    with pytest.raises(UsageError) as caught:
        harvest(small(text, **settings), str(tmp_path / "set"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "set").exists()


def test_batches_come_back_in_order(text):
    from sae_jax import lm

    model = lm.load("bundled")
    ids = np.random.default_rng(0).integers(1, 2000, (21, 16)).astype(np.int32)
    forward = module.Forward({"": model}, small(text))
    got = np.concatenate([acts["resid_post.0"] for acts, _ in forward(ids)])
    want = lm.run(model, ids, capture=[(0, "resid_post")], logits=False).acts[(0, "resid_post")]
    np.testing.assert_allclose(np.float32(got), want, rtol=2e-2, atol=2e-2)


def test_it_is_said_which_files_were_left_out_and_which_never_reached(tmp_path, capsys):
    """The first file has all the tokens that were asked for."""
    for name, content in (("a", b"x = 1\n" * 500), ("b", b"y = 2\n"), ("c", b"z = 3\n"), ("old", b"caf\xe9")):
        (tmp_path / f"{name}.txt").write_bytes(content)
    harvest(small(f"{tmp_path}/*.txt", tokens=160), str(tmp_path / "set"))
    said = capsys.readouterr().err
    assert f"1 of 4 files are left out, not UTF-8: {tmp_path}/old.txt\n" in said
    assert (
        f"1 of 3 files were read, in order of name; harvest.tokens=160 ended before {tmp_path}/b.txt and 1 more. "
        f"harvest.tokens=0 reads all\n" in said
    )
    harvest(small(f"{tmp_path}/*.txt"), str(tmp_path / "all"))
    assert "files were read" not in capsys.readouterr().err


def test_another_text_column_is_part_of_the_set(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"code": "import os; print(os.getcwd())"}\n' * 60)
    settings = small(str(tmp_path / "text.jsonl"), text_column="code")
    assert harvest(settings, str(tmp_path / "set")).text_column == "code"
    with pytest.raises(UserError, match="it has code; choose one with"):
        harvest(small(str(tmp_path / "text.jsonl")), str(tmp_path / "other"))


def test_help_lists_the_points():
    help_of_hooks = re.search(r'hooks: .*?"""(.*?)"""', inspect.getsource(HarvestConfig), re.DOTALL)
    assert help_of_hooks is not None
    assert re.findall("[a-z]+_[a-z]+(?=[,. ])", " ".join(help_of_hooks[1].split()))[: len(lm.POINTS)] == [*lm.POINTS]


def test_a_harvest_goes_on_where_its_text_and_models_lie_now(tmp_path, tuned, monkeypatch):
    """They are known by their content; the set names the new place from then on, and stays the same set."""
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(tuned, old / "lm")
    (old / "t.txt").write_text("def f(self): return self.x\n" * 300)
    (old / "h.txt").write_text("import os, sys\n" * 100)
    settings = small("t.txt", heldout="h.txt", model=("./lm",))
    monkeypatch.chdir(old)
    harvest(settings, "set", (0, 2))
    before = open_activations("set", allow_partial=True)
    old.rename(new)
    monkeypatch.chdir(new)
    harvest(settings, "set", (1, 2))
    after = open_activations("set")
    assert after.spec.sha256 == before.spec.sha256
    assert (before.spec.text, after.spec.text) == (str(old / "t.txt"), str(new / "t.txt"))
    assert (after.spec.heldout, after.spec.tokenizer) == (str(new / "h.txt"), str(new / "lm"))
    assert after.spec.sources[0].model == str(new / "lm")
    (new / "t.txt").write_text("def g(self): return self.x\n" * 300)
    with pytest.raises(UsageError, match="already a set in which text_digest is"):
        harvest(settings, "set")
    (new / "h.txt").write_text("import re\n" * 100)
    (new / "t.txt").write_text("def f(self): return self.x\n" * 300)
    with pytest.raises(UsageError, match="already a set in which heldout_digest is"):
        harvest(settings, "set")


def test_a_model_that_could_be_two_is_refused_until_it_is_said_which(text, tuned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert lm.resolve("bundled") == "bundled"
    assert lm.resolve("owner/name@main") == "owner/name@main"
    for name in ("bundled", "gpt2", "owner/name"):
        shutil.copytree(tuned, tmp_path / name)
        with pytest.raises(UsageError, match=rf"write \./{name} for the folder"):
            harvest(small(text, model=(name,)), "set")
        assert lm.resolve(f"./{name}") == str(tmp_path / name)
    # What was recorded is the word, whatever is here now.
    assert lm.locate("bundled", recorded=True) == lm.model.BUNDLED


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(text, tuned, tmp_path):
    """Else a row would be taken from another token."""
    other = tmp_path / "other"
    shutil.copytree(tuned, other)
    content = json.loads((other / "tokenizer.json").read_text())
    token = {"id": 2048, "content": "<foo>", "special": False, "normalized": False}
    content["added_tokens"].append(token | dict.fromkeys(("single_word", "lstrip", "rstrip"), False))
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"token id 2048 is outside 0 to 2047; the embedding has 2048 rows"):
        harvest(small(text, model=(str(other),)), str(tmp_path / "set"))
    assert not (tmp_path / "set").exists()
