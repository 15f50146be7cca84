"""What a harvest leaves out, and what it does when the text is shorter than the set."""

import inspect
import json
import re
import shutil
import sys
import threading

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sae_jax import lm
from sae_jax import mesh as meshes
from sae_jax.activations import forward as forward_module
from sae_jax.activations.commits import committed_shards
from sae_jax.activations.forward import Forward, read_hooks
from sae_jax.activations.harvest import HarvestConfig, harvest
from sae_jax.activations.sinks import keep
from sae_jax.activations.store import open_activations
from sae_jax.evaluation.text import held_out
from sae_jax.storage import Files
from sae_jax.types import Sites, UsageError, UserError

harvest_module = sys.modules["sae_jax.activations.harvest"]


def test_special_tokens_and_large_norms_are_left_out():
    ids = np.array([[0, 5, 6, 7], [8, 0, 9, 5]])
    norms = np.ones((2, 4, 2))
    norms[0, 1, 1] = 50  # far out at one site only: the row is dropped at all of them
    norms[0, 0] = 1000  # a special token does not move the median
    kept = keep(ids != 0, norms, 10.0)
    np.testing.assert_array_equal(kept, [[False, False, True, True], [True, False, True, True]])
    np.testing.assert_array_equal(keep(ids != 0, norms, None), ids != 0)


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


def test_a_document_a_sequence(tmp_path, capsys):
    """Its rows are those that the model has of the document alone, and nothing is made of padding."""
    texts = ["import os", "def f(x):\n    return x\n" * 9, "x", "print(1)"]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["", *texts]))
    settings = {"sequence": "document", "heldout": "heldout", "dtype": "float32", "max_norm_multiple": None}
    spec = harvest(small(str(path), **settings), str(tmp_path / "set"))
    assert spec.sequence == "document"
    model, tokenizer = lm.load("bundled"), lm.tokenizer("bundled")
    whole = [[tokenizer.separator_id, *ids] for ids in tokenizer.encode(texts)]
    n_cut, n = len(whole[1]) - 16, sum(map(len, whole))
    assert (
        f"1 of 4 documents are longer than harvest.context=16 tokens, and cut: {n_cut} of {n} tokens are left out"
        in (" ".join(capsys.readouterr().err.split()))
    )
    activations = open_activations(tmp_path / "set")
    ids_ST = activations.read_sequences(np.arange(4))
    found = {}
    for chunk in range(activations.n_chunks):
        index = activations.read_index(chunk)
        places = zip(index["seq"].tolist(), index["pos"].tolist(), strict=True)
        found |= dict(zip(places, activations.read_chunk("resid_post.0", chunk), strict=True))
    assert found.keys() == {(s, t) for s, ids in enumerate(whole) for t in range(1, min(len(ids), 16))}
    for s, ids in enumerate(whole):
        assert ids_ST[s].tolist() == (ids + [tokenizer.separator_id] * 16)[:16]
        acts, _ = read_hooks(model, np.array([ids]), (lm.parse_hook("resid_post.0", model.spec),), "float32")
        for t in range(1, min(len(ids), 16)):
            np.testing.assert_allclose(found[s, t], acts["resid_post.0"][0, t], atol=1e-4)
    # Held-out text comes in the same way, and nothing of padding counts there.
    text = held_out(activations, Sites(("resid_post.0",), ("resid_post.0",)), 16 * 8)
    assert (text.sequences[:, 0] == tokenizer.separator_id).all()
    np.testing.assert_array_equal(text.text, ~np.isin(text.sequences, tokenizer.special_ids))
    with pytest.raises(UsageError, match="is already a set in which"):
        harvest(small(str(path), **settings | {"sequence": "packed"}), str(tmp_path / "set"))


def test_text_is_tokenised_while_the_model_runs(text, tmp_path, monkeypatch):
    second_is_there, started, original = threading.Event(), [], harvest_module.shards_of_text

    def watched(*args):
        for number, shard in enumerate(original(*args)):
            if number == 1:
                second_is_there.set()
            yield shard

    def start(self, ids_BT):
        started.append(second_is_there.wait(60))  # the first batch is under way
        return run(self, ids_BT)

    run = Forward._start
    monkeypatch.setattr(Forward, "_start", start)
    monkeypatch.setattr(harvest_module, "shards_of_text", watched)
    harvest(small(text, max_norm_multiple=None), str(tmp_path / "set"))
    assert started
    assert all(started)


def test_a_set_of_documents_resumes(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"import m{i}\n" * (i % 5 + 1)}) + "\n" for i in range(40)))
    config = small(str(path), sequence="document")
    answers = iter([False, False, False])
    harvest(config, str(tmp_path / "one"), stop=lambda: next(answers, True))
    harvest(config, str(tmp_path / "one"))
    for shard in ((1, 2), (0, 2)):
        harvest(config, str(tmp_path / "two"), shard)
    one, two = (open_activations(tmp_path / name) for name in ("one", "two"))
    assert sum(commit.n_sequences for commit in one.commits.values()) == 40
    for chunk in range(one.n_chunks):
        np.testing.assert_array_equal(one.read_index(chunk)["token"], two.read_index(chunk)["token"])


def test_the_set_does_not_depend_on_the_batch(text, tmp_path, monkeypatch):
    """How many sequences run at once is this machine's affair; the rows are the same to rounding."""
    hooks = ("resid_post.0", "attn_z.1")
    harvest(small(text, hooks=hooks, batch_tokens=256), str(tmp_path / "a"))
    a = open_activations(tmp_path / "a")
    for n_tokens in (16, 64):  # one sequence at once, and four
        harvest(small(text, hooks=hooks, batch_tokens=n_tokens), str(tmp_path / f"{n_tokens}"))
        b = open_activations(tmp_path / f"{n_tokens}")
        for chunk in range(a.n_chunks):
            np.testing.assert_array_equal(a.read_index(chunk)["token"], b.read_index(chunk)["token"])
            for hook in hooks:
                rows = [np.float32(s.read_chunk(hook, chunk)) for s in (a, b)]
                np.testing.assert_allclose(*rows, rtol=1e-2, atol=1e-2)


def test_workers_of_a_set_make_the_bytes_of_one(text, tmp_path):
    """A batch goes on from one shard to the next, and the next of a worker is another one."""
    harvest(small(text), str(tmp_path / "one"))
    for worker in range(3):
        harvest(small(text), str(tmp_path / "three"), shard=(worker, 3))
    one, three = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "one", tmp_path / "three")
    )
    assert one == three


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
        {"dtype": "int4"},
        {"max_norm_multiple": 0.5},
        {"split": 0},
        {"split": 3},
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


def test_batches_go_on_from_array_to_array_and_come_back_in_order(text, monkeypatch):
    mesh = meshes.lm_mesh(1, jax.local_devices())
    model = lm.load("bundled", mesh=mesh)
    ids = np.random.default_rng(0).integers(1, 2000, (21, 16)).astype(np.int32)
    forward = Forward({"": model}, small(text), mesh)
    n_runs = []
    monkeypatch.setattr(forward_module, "read_hooks", lambda *args: n_runs.append(1) or read_hooks(*args))
    forward.look(ids[: forward.batch])  # is the first batch, and not run again
    arrays = np.split(ids, [3, 3, 4, 17])
    blocks = [*forward(arrays)]
    got = np.concatenate([acts["resid_post.0"] for acts, _ in blocks])
    ends = np.cumsum([len(norms) for _, norms in blocks])
    assert {3, 4, 17, 21} <= {*ends}  # a block is of one array
    assert len(n_runs) == -(-len(ids) // forward.batch)
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


@pytest.fixture(scope="module")
def with_sinks(tmp_path_factory):
    """The bundled model with a first position that is a hundred times larger than the others."""
    folder = tmp_path_factory.mktemp("sinks") / "model"
    shutil.copytree(lm.load("bundled").path, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.wpe.weight"][0] = 100
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_sinks_are_found_told_and_left_out_by_default(text, with_sinks, tmp_path, capsys):
    settings = {"model": (str(with_sinks),), "hooks": ("resid_post.0",)}
    spec = harvest(small(text, **settings), str(tmp_path / "set"))
    said = capsys.readouterr().err
    assert spec.max_norm_multiple == 10
    n_sequences = sum(commit.n_sequences for commit in open_activations(tmp_path / "set").commits.values())
    assert re.search(r"first \d+ sequences: .* times the median norm: most often [\d,]+ at position 0; tokens", said)
    assert f"{n_sequences - 1:,} at position 0" in said  # the first of them is the separator
    assert "above 10 medians they are left out\n" in said
    assert 0 not in np.concatenate([index["pos"] for index in indices(tmp_path / "set")])
    harvest(small(text, **settings, max_norm_multiple=None), str(tmp_path / "all"))
    assert "; kept\n" in capsys.readouterr().err
    assert 0 in np.concatenate([index["pos"] for index in indices(tmp_path / "all")])


def test_what_was_decided_on_sinks_holds_for_later_workers(text, with_sinks, tmp_path, monkeypatch):
    config = small(text, model=(str(with_sinks),), hooks=("resid_post.0",))
    harvest(config, str(tmp_path / "set"), (0, 2))
    monkeypatch.setattr("sae_jax.activations.sinks.MULTIPLE", 1e9)  # another machine might round otherwise
    harvest(config, str(tmp_path / "set"), (1, 2))
    assert open_activations(tmp_path / "set").spec.max_norm_multiple == 10


def test_a_model_without_sinks_keeps_every_row(text, tmp_path):
    assert harvest(small(text), str(tmp_path / "set")).max_norm_multiple is None


def test_a_split_model_gives_the_same_rows(text, tmp_path):
    hooks = ("resid_post.1", "mlp_act.0", "attn_z.1")
    for split in (1, 2):
        harvest(small(text, split=split, hooks=hooks, dtype="float32"), str(tmp_path / str(split)))
    whole, split = (open_activations(tmp_path / name) for name in "12")
    for hook in hooks:
        for chunk in range(whole.n_chunks):
            rows = [each.read_chunk(hook, chunk) for each in (whole, split)]
            np.testing.assert_allclose(*rows, atol=1e-4)


def test_precision_is_part_of_what_a_set_is(text, tmp_path):
    spec = harvest(small(text, precision="bfloat16"), str(tmp_path / "set"))
    assert spec.precision == "bfloat16"
    with pytest.raises(UsageError, match="already a set in which precision"):
        harvest(small(text), str(tmp_path / "set"))
    sites = Sites(("resid_post.0",), ("resid_post.0",))
    harvest(small(text, precision="bfloat16", heldout="heldout"), str(tmp_path / "apart"))
    found = held_out(open_activations(tmp_path / "apart"), sites, 64)
    assert found.model.params["embed"].dtype == jax.numpy.bfloat16


def indices(path):
    activations = open_activations(path)
    return [activations.read_index(chunk) for chunk in range(activations.n_chunks)]


def test_sequences_begin_as_the_models_authors_begin_them(text, tuned, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tuned, model)
    content = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(content | {"add_bos_token": True}))
    spec = harvest(small(text, model=(str(model),), heldout="heldout"), str(tmp_path / "set"))
    activations, bos = open_activations(tmp_path / "set"), lm.tokenizer(str(model)).bos_id
    assert spec.first_token == bos
    assert set(activations.read_sequences(np.arange(4))[:, 0]) == {bos}
    assert 0 not in np.concatenate([index["pos"] for index in indices(tmp_path / "set")])
    sites = Sites(("resid_post.0",), ("resid_post.0",))
    assert set(held_out(activations, sites, 64).sequences[:, 0]) == {bos}
