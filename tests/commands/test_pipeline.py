"""The main job through its commands, small: text, set, run, evaluation, page; and what bad input gets."""

import hashlib
import inspect
import json
import re
import shutil

import jax
import numpy as np
import pytest
import yaml

import sae_jax
from sae_jax import uses
from sae_jax.commands import main as cli
from sae_jax.evaluation import batches, metrics
from sae_jax.storage.digests import SEAL
from tests import runs

pytestmark = pytest.mark.usefixtures("in_process", "one_device")

RECIPE = {
    "harvest": {
        "model": "bundled",
        "hooks": ["resid_post.1", "mlp_out.1"],
        "context": 16,
        "tokens": 4096,
        "batch_tokens": 512,
        "heldout": "heldout",
    },
    "site": "resid_post.1",
    "sae": {"variant": "topk", "n_latents": 64, "k": 4, "dtype": "float32"},
    "train": {
        "steps": 60,
        "batch_size": 64,
        "lr": 1e-2,
        "checkpoint_every": 25,
        "log_every": 20,
        "dead_after_tokens": 300,
    },
}


@pytest.fixture(scope="module")
def work(in_process, one_device, tmp_path_factory):
    """A recipe, a text, the set and the run made of them."""
    work = tmp_path_factory.mktemp("pipeline")
    text = work / "text"
    text.mkdir()
    for i in range(6):
        body = "\n".join(f"def name_{i}_{j}(self):\n    return self.value + {j}" for j in range(80))
        (text / f"{i}.py").write_text(body)
    recipe = {**RECIPE, "harvest": {**RECIPE["harvest"], "text": str(text)}}
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run(work, "harvest", "--out", work / "set")
    run(work, "train", "--data", work / "set", "--out", work / "run")
    return work


def run(work, command, *arguments, code=0):
    argv = [command, *([str(work / "recipe.yaml")] if command in ("harvest", "train") else []), *map(str, arguments)]
    assert cli.main(argv) == code, argv


def refused(capsys, work, command, *arguments, code=2):
    """The one line that a refused command says."""
    capsys.readouterr()
    run(work, command, *arguments, code=code)
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert "Traceback" not in said
    return said


def tree_digest(root):
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*")) if p.is_file()}


def test_set_holds_what_was_asked(work):
    activations = sae_jax.open_activations(work / "set")
    assert activations.sources == ("resid_post.1", "mlp_out.1")
    index = activations.read_index(0)
    # No separators; and every row's token is the one its sequence has there.
    assert (index["token"] != 0).all()
    sequences = activations.read_sequences(index["seq"])
    np.testing.assert_array_equal(sequences[np.arange(len(sequences)), index["pos"]], index["token"])


def test_rows_are_the_models_activations(work):
    from sae_jax import lm

    activations = sae_jax.open_activations(work / "set")
    index, rows = activations.read_index(0), activations.read_chunk("mlp_out.1", 0)
    ids = activations.read_sequences(index["seq"][:4])
    acts = lm.run(lm.load("bundled"), ids, capture=[(1, "mlp_out")], logits=False).acts[(1, "mlp_out")]
    want = np.asarray(acts)[np.arange(4), index["pos"][:4]]
    np.testing.assert_allclose(np.float32(rows[:4]), want, rtol=2e-2, atol=2e-2)  # stored in bfloat16


def test_harvest_again_changes_nothing(work):
    before = tree_digest(work / "set")
    run(work, "harvest", "--out", work / "set")
    assert tree_digest(work / "set") == before


def test_shards_of_two_workers_are_those_of_one(work, tmp_path):
    run(work, "harvest", "--out", tmp_path / "set", "--shard", "1/2")
    with pytest.raises(sae_jax.UserError, match="shards are committed"):
        sae_jax.open_activations(tmp_path / "set")
    run(work, "harvest", "--out", tmp_path / "set", "--shard", "0/2")
    whole, parts = tree_digest(work / "set"), tree_digest(tmp_path / "set")
    assert list(whole.values()) == list(parts.values())


def test_run_loads_and_reconstructs(work):
    sae, averaged = sae_jax.load(work / "run"), sae_jax.load(work / "run", ema=True)
    rows = sae_jax.open_activations(work / "set").read_chunk("resid_post.1", 0).astype(np.float32)
    fvu = [((rows - np.asarray(s(rows))) ** 2).sum() / ((rows - rows.mean(0)) ** 2).sum() for s in (sae, averaged)]
    assert max(fvu) < 0.9
    assert not np.array_equal(sae.w_enc, averaged.w_enc)


def test_metrics_have_the_stable_names(work):
    rows = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 20, 40, 60]
    for name in ("step", "tokens", "fvu", "l0", "dead_fraction", "tokens_per_second"):
        assert np.isfinite([row[name] for row in rows]).all(), name
    config = json.loads((work / "run" / "config.json").read_text())
    assert config["dictionary"]["variant"] == "topk"
    assert config["train"]["dead_after_tokens"] == 300


def test_evaluate_on_text_and_on_rows(work, tmp_path):
    run(work, "evaluate", work / "run", "--tokens", 256)
    result = json.loads((work / "run" / "evaluation.json").read_text())
    assert result["text"] == "heldout"
    assert result["ce_clean"] < result["ce_sae"]
    assert result["ce_clean"] < min(result["ce_zero"], result["ce_mean"])
    assert result["fvu"] > 0
    rows = np.asarray(sae_jax.open_activations(work / "set").read_chunk("resid_post.1", 0), np.float32)
    sae_jax.write_activations(tmp_path / "own", {"resid_post.1": rows})
    run(work, "evaluate", work / "run", "--data", tmp_path / "own")
    result = json.loads((work / "run" / "evaluation.json").read_text())
    assert result["text"] is None
    assert "ce_clean" not in result
    for flag in ("--heldout=heldout", "--model=bundled"):  # they would change nothing
        run(work, "evaluate", work / "run", "--data", tmp_path / "own", flag, code=2)


def stored_evaluation(folder):
    """What the file says, without its digest."""
    stored = json.loads((folder / "evaluation.json").read_text())
    return {name: value for name, value in stored.items() if name != SEAL}


def test_dictionaries_of_one_set_share_a_pass_and_have_the_numbers_of_one_alone(work, tmp_path, capsys, monkeypatch):
    others = [tmp_path / name for name in ("run", "dictionary")]
    shutil.copytree(work / "run", others[0])
    sae_jax.load(work / "run").save(others[1])
    passes, run_model = [], batches._run
    monkeypatch.setattr(batches, "_run", lambda *arguments: passes.append(1) or run_model(*arguments))
    run(work, "evaluate", *others, "--tokens", 256, "--batch-tokens", 64, "--json")
    assert len(passes) == 4
    shown = json.loads(capsys.readouterr().out)
    assert list(shown) == list(map(str, others))
    assert shown[str(others[0])] == stored_evaluation(others[0])
    run(work, "evaluate", work / "run", "--tokens", 256, "--batch-tokens", 64)
    assert shown[str(others[1])] == stored_evaluation(work / "run")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["metric", str(work / "run"), "meaning"]
    assert not set("│┃━") & set("".join(lines))
    (fvu,) = (line for line in lines if line.startswith("FVU"))
    assert f"{shown[str(others[1])]['fvu']:.4f}" in fvu


def test_shares_of_several_workers_are_merged_by_the_last(work, tmp_path, capsys):
    shutil.copytree(work / "run", tmp_path / "run")
    path, flags = tmp_path / "run" / "evaluation.json", ["--tokens", 320, "--batch-tokens", 64]
    path.unlink(missing_ok=True)
    for i in (2, 0):
        run(work, "evaluate", tmp_path / "run", *flags, "--shard", f"{i}/3")
        assert not path.exists()
    assert "to come: 1/3" in capsys.readouterr().err
    run(work, "evaluate", tmp_path / "run", "--tokens", 256, "--batch-tokens", 64, "--shard", "1/3")
    assert "another n_tokens" in capsys.readouterr().err
    assert not path.exists()
    run(work, "evaluate", tmp_path / "run", *flags, "--shard", "1/3")
    merged = json.loads(path.read_text())
    run(work, "evaluate", tmp_path / "run", *flags)
    whole = json.loads(path.read_text())
    assert merged.keys() == whole.keys()
    for name, value in whole.items():
        if name != "sites" and value is not None and not isinstance(value, str):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), merged[name], value)
    (tmp_path / "run" / "evaluation" / "shard-0-of-3.npz").write_bytes(b"PK damaged")
    run(work, "evaluate", tmp_path / "run", *flags, "--shard", "1/3", code=1)
    assert "shard-0-of-3.npz is damaged; delete it" in capsys.readouterr().err


def test_a_new_evaluator_is_one_new_file(work, tmp_path, capsys, monkeypatch):
    (tmp_path / "largest.py").write_text(NEW_EVALUATOR)
    monkeypatch.setattr(metrics, "__path__", [*metrics.__path__, str(tmp_path)])
    run(work, "evaluate", work / "run", "--tokens", 256)
    assert re.search(r"^mean of rows +\d+\.\d{4} +made up$", capsys.readouterr().out, re.M)
    assert json.loads((work / "run" / "evaluation.json").read_text())["mean_of_rows"] > 0


NEW_EVALUATOR = """
from sae_jax.evaluation import base
from sae_jax.evaluation.base import Description, Metric


class Evaluator(base.Evaluator):
    ORDER = 5
    METRICS = {"mean_of_rows": Description("mean of rows", "made up")}

    def measure(self, batch):
        return {"rows": batch.keep.sum(), "sum": (batch.keep[:, None] * abs(batch.x)).mean(-1).sum()}

    def metrics(self, sums):
        yield Metric("mean_of_rows", float(sums["sum"] / sums["rows"]))
"""


def test_dashboard_is_written(work, tmp_path):
    run(work, "dashboard", work / "run", "--out", tmp_path / "site", "--tokens", 2000)
    assert (tmp_path / "site" / "index.html").exists()


def test_what_a_dashboard_shows_as_files_of_another_program_and_a_report_of_its_run(work, tmp_path, capsys):
    run(work, "dashboard", work / "run", "--out", tmp_path / "batches", "--format=saedashboard", "--tokens", 2000)
    features = json.loads((tmp_path / "batches" / "batch-0.json").read_text())["features"]
    assert [feature["feature_index"] for feature in features] == list(range(64))
    assert max(len(feature["activations"]) for feature in features) > 20
    flags = ["dashboard", work / "run", "--out", tmp_path / "batches", "--tokens", 2000]
    assert "exists and is not a dashboard" in refused(capsys, work, *flags)
    assert (tmp_path / "batches" / "batch-0.json").exists()
    run(work, "report", work / "run", "--out", tmp_path / "report.html")
    assert "FVU" in (tmp_path / "report.html").read_text()


def test_a_few_latents_in_one_labelled_page(work, tmp_path, capsys):
    (tmp_path / "labels.csv").write_text("latent,label\n2,names </script>\n")
    flags = ["--tokens=2000", "--patterns=2", "--labels", tmp_path / "labels.csv"]
    out = tmp_path / "page.html"
    run(work, "dashboard", work / "run", "--out", out, "--single-file", "--latents", 2, 5, 9, *flags)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".csv"] == ["page.html"]
    page = out.read_text()
    data = dict(re.findall(r"^saeDashboard\.(\w+)\((.*)\);$", page, re.M))
    assert json.loads(f"[{data['labels']}]") == [[[2, "names </script>"]]]
    _, records = json.loads(f"[{data['latents']}]")
    assert len(records) == 3
    assert sum("patterns" in record for record in records) == min(2, sum(record["count"] > 0 for record in records))
    with_patterns = [record for record in records if record.get("patterns")]
    assert with_patterns
    for record in with_patterns:
        strongest = {token for token, _ in record["tokens"]}
        assert all(ids[-1] in strongest | {-1} for ids, _ in record["patterns"])
    head = re.search(r'<span class="about">(.*?)</span>', page)
    assert head is not None
    assert re.fullmatch(r"bundled · layer \d · resid_post · [\d,]+ latents · k\s=\s\d+ · topk", head[1])
    capsys.readouterr()
    for wrong, message in (
        (["--single-file"], "a single file is of some latents of one dictionary; name them"),
        (["--latents", 99999], "latent 99999 does not exist; choose from 0 to"),
        (["--labels", tmp_path / "labels.txt"], "the name ends in .txt, not in .csv or .jsonl"),
        (["--patterns=-1"], "patterns=-1 must be at least 0"),
    ):
        assert cli.main(["dashboard", str(work / "run"), "--out", str(tmp_path / "x"), *map(str, wrong)]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "x").exists()


def test_latents_are_collected_found_and_steered(work, tmp_path, capsys):
    run(work, "collect", work / "run", "--out", tmp_path / "store", "--tokens", 500, "--shard", "0/2")
    assert "the shares of other workers are missing" in capsys.readouterr().err
    run(work, "collect", work / "run", "--out", tmp_path / "store", "--tokens", 500)
    assert re.search(
        r"store: [\d,]+ activations of \d+ latents on \d+ rows; \d+ latents never fire", capsys.readouterr().err
    )
    run(work, "dashboard", work / "run", "--out", tmp_path / "site", "--tokens=500", "--store", tmp_path / "store")
    assert "encode" not in capsys.readouterr().err, "the store is complete"
    run(work, "find", work / "run", "--text", "def name_1_2(self):", "--n", 2, "--json")
    rows = json.loads(capsys.readouterr().out)
    assert "".join(row["token"] for row in rows[1:]) == "def name_1_2(self):"
    assert all(len(row["latents"]) <= 2 for row in rows)
    latent = rows[2]["latents"][0][0]
    run(
        work,
        "steer",
        work / "run",
        "--latent",
        latent,
        "--scale",
        0,
        8,
        "--prompt",
        "def name",
        "--tokens",
        4,
        "--json",
    )
    found = json.loads(capsys.readouterr().out)
    assert found["largest"][str(latent)] > 0
    assert [text["scale"] for text in found["written"]] == [None, 0, 8]
    run(work, "attribute", work / "run", "--prompt", "def name", "--token", "(", "--n", 3, "--json")
    (attribution,) = json.loads(capsys.readouterr().out)
    assert (attribution["text"], "".join(attribution["prompt"][1:])) == ("(", "def name")
    run(work, "attribute", work / "run", "--prompt", "def name", "--n", 3)
    shown = capsys.readouterr()
    assert re.search(r"has probability [\d.e-]+. What speaks for it, in nats:", shown.err)
    rows = [line.split()[0] for line in shown.out.splitlines()]
    assert rows == ["latent", *(row for row in rows if row.isdecimal()), "others", "error"]
    for name, word in (("positive", "return"), ("negative", "def")):
        (tmp_path / name).write_text("\n".join(f"    {word} value_{i}" for i in range(8)))
    run(work, "find", work / "run", "--positive", tmp_path / "positive", "--negative", tmp_path / "negative", "--json")
    assert max(latent["auc"] for latent in json.loads(capsys.readouterr().out)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["find"], "give --text, or both --positive and --negative"),
        (["find", "--positive=x"], "give --text, or both --positive and --negative"),
        (["find", "--text=x", "--n=0"], "--n=0 must be at least 1"),
        (["find", "--text="], "text is empty; give it a value"),
        (["steer", "--latent=99", "--prompt=x"], "latent 99 does not exist; choose 0 to 63"),
        (["steer", "--latent=1", "--scale=inf", "--prompt=x"], "--scale=inf must be finite"),
        (["steer", "--latent=1", "--norm=nan", "--prompt=x"], "--norm=nan must be finite"),
        (["steer", "--latent=1", "--norm=1", "--scale=1", "--prompt=x"], "leave out --scale and --how"),
        (["steer", "--latent=1", "--norm=1", "--how=add", "--prompt=x"], "leave out --scale and --how"),
        (["steer", "--latent=1", "--prompt=x", "--chat"], "has no chat template"),
        (["steer", "--latent=1", "--prompt=x", "--tokens=99999"], "do not fit the model's context"),
        (["attribute", "--prompt=x", "--n=0"], "--n=0 must be at least 1"),
        (["attribute", "--prompt=x", "--token= class self"], "' class self' is 2 tokens (' class' ' self'); give one"),
        (["attribute", "--prompt=x", "--latent=run:1"], "of dictionaries at several places; name two or more"),
        (["attribute", "--prompt=x", "--latent=other:1"], "--latent=other:1: use NAME:ID, with NAME one of"),
        (["attribute", "--prompt=x", "--latent=run:-1"], "--latent=run:-1: use NAME:ID"),
        (["attribute", "--prompt=x", "--latent=run"], "--latent=run: use NAME:ID"),
        (
            ["attribute", "elsewhere", "--prompt=x"],
            "2 dictionaries: name one, or the latent of one with --latent NAME:ID",
        ),
        (["attribute", "--prompt=x", "--latent=run:1", "--token=x"], "leave out --token and --data"),
        (["collect", "--out=x", "--tokens=0"], "--tokens=0 must be at least 1"),
    ],
)
def test_what_cannot_be_found_or_steered_is_refused(work, capsys, arguments, message):
    command, *flags = arguments
    assert message in refused(capsys, work, command, work / "run", *flags)


def test_a_file_of_texts_that_is_none_is_refused(work, tmp_path, capsys):
    (tmp_path / "texts").write_bytes(b"\xff\xfe")
    flags = ["--positive", tmp_path / "texts", "--negative", tmp_path / "texts"]
    assert "is no UTF-8 text" in refused(capsys, work, "find", work / "run", *flags, code=1)
    assert "nothing" in refused(capsys, work, "find", work / "run", "--positive=nothing", "--negative=nothing", code=1)


@pytest.mark.slow
def test_the_demo_does_all_of_it(work, tmp_path):
    """On a short held-out text: it measures all of it."""
    recipe = yaml.safe_load((work / "recipe.yaml").read_text())
    recipe["harvest"]["heldout"] = str(tmp_path / "heldout.txt")
    (tmp_path / "heldout.txt").write_text("\n".join(f"def other_{j}(self):\n    return {j}" for j in range(200)))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.main(["demo", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "demo")]) == 0
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert {"fvu", "l0", "loss_recovered", "fvu_pca", "token_purity", "seconds"} <= summary.keys()
    assert all(np.isfinite(value) for value in summary.values())
    assert (tmp_path / "demo" / "training.png").exists()
    assert (tmp_path / "demo" / "dashboard" / "index.html").exists()


@pytest.mark.slow
def test_a_variant_without_k_goes_the_same_way(work, tmp_path, capsys):
    flags = ["--sae.variant=relu", "--sae.l1_coefficient=0.3", "--train.steps=40"]
    run(work, "train", "--data", work / "set", "--out", tmp_path / "run", *flags)
    assert "relu has no k; left out" in capsys.readouterr().err
    config = json.loads((tmp_path / "run" / "config.json").read_text())["dictionary"]["sae"]
    assert (config["l1_coefficient"], config["error"]) == (0.3, "summed")
    run(work, "evaluate", tmp_path / "run", "--tokens", 256)
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert 0 < result["l0"] < 64
    assert result["ce_clean"] < result["ce_sae"]
    run(work, "dashboard", tmp_path / "run", "--out", tmp_path / "site", "--tokens", 500)
    assert (tmp_path / "site" / "index.html").exists()
    sae = sae_jax.load(tmp_path / "run")
    rows = sae_jax.open_activations(work / "set").read_chunk("resid_post.1", 0).astype(np.float32)
    np.testing.assert_allclose(sae.decode(sae.encode(rows)), sae(rows), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.long
def test_a_crosscoder_of_two_models_goes_the_same_way(work, tuned, tmp_path):
    models, sites = ["base=bundled", f"tuned={tuned}"], ["base.resid_post.1", "tuned.resid_post.1"]
    run(work, "harvest", "--out", tmp_path / "set", "--harvest.model", *models, "--harvest.tokens=1024")
    flags = ["--sae.variant=crosscoder", "--train.steps=20", "--site", *sites]
    run(work, "train", "--data", tmp_path / "set", "--out", tmp_path / "run", *flags)
    run(work, "evaluate", tmp_path / "run", "--tokens", 256)
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert list(result["fvu_by_source"]) == sites
    assert min(result["fvu_by_source"].values()) < result["fvu"] < max(result["fvu_by_source"].values())
    run(work, "dashboard", tmp_path / "run", "--out", tmp_path / "site", "--tokens", 500)
    (index,) = re.findall(r"index\((.*)\);", (tmp_path / "site" / "data" / "index.js").read_text())
    assert json.loads(index)["sources"] == sites
    block = (tmp_path / "site" / "data" / "latents-000.js").read_text()
    _, records = json.loads("[" + block[block.index("(") + 1 : block.rindex(")")] + "]")
    for record in records:
        assert sum(source["share"] for source in record["sources"]) == pytest.approx(1, abs=1e-3)
        assert record["sources"][1]["up"] == record["up"]


@pytest.mark.slow
@pytest.mark.long
def test_a_run_through_the_model_goes_the_same_way(work, tmp_path):
    """Taken up again, the same bits; it opens like any other."""
    flags = ["--sae.variant=end_to_end", "--sae.downstream=0.001", "--sae.input_norm=dataset_rms", "--train.steps=4"]
    flags += ["--train.batch_size=128", "--train.checkpoint_every=2", "--train.log_every=1"]
    run(work, "train", "--data", work / "set", "--out", tmp_path / "run", *flags)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    run(work, "train", "--data", work / "set", "--out", tmp_path / "again", *flags)
    assert runs.attempts(tmp_path / "again")[-1]["start_step"] == 3
    runs.assert_same_run(tmp_path / "again", tmp_path / "run")
    run(work, "evaluate", tmp_path / "run", "--tokens", 256)
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert result["l0"] == 4
    assert result["ce_clean"] < result["ce_sae"]
    run(work, "dashboard", tmp_path / "run", "--out", tmp_path / "site", "--tokens", 500)
    assert (tmp_path / "site" / "index.html").exists()


def test_what_cannot_be_trained_through_the_model_is_refused(work, tmp_path, capsys):
    variant = "--sae.variant=end_to_end"
    said = refused(capsys, work, "train", "--data", work / "set", "--out", tmp_path, variant, "--train.batch_size=100")
    assert "train.batch_size=100 must be whole sequences of 16 tokens" in said
    mixed = ["--members", f"kl {variant}", "rows --sae.variant=topk"]
    said = refused(capsys, work, "train", "--data", work / "set", "--out", tmp_path, *mixed)
    assert "members rows and kl" in said
    said = refused(capsys, work, "plan", "--target=h200:1", "--d-model=16", variant)
    assert "d_model=16, but resid_post.2 of bundled is 128 wide" in said
    assert not list(tmp_path.iterdir())


def test_verify_and_damage(work, tmp_path, capsys):
    run(work, "verify", work / "set")
    for name, damage in {
        "deleted": lambda s: next((s / "acts" / "resid_post.1" / "c").glob("1/*")).unlink(),
        "truncated": lambda s: (s / "commits" / "2.json").write_text("{"),
    }.items():
        damaged = tmp_path / name
        shutil.copytree(work / "set", damaged)
        damage(damaged)
        before = tree_digest(damaged)
        for command in (["verify", damaged], ["train", "--data", damaged, "--out", tmp_path / "r"]):
            capsys.readouterr()
            run(work, *command, code=1)
            said = capsys.readouterr().err
            assert ("resid_post.1/c/1" if name == "deleted" else "commits/2.json") in said, said
            assert "Traceback" not in said
        run(work, "evaluate", work / "run", "--data", damaged, code=1)
        assert tree_digest(damaged) == before


def test_flipped_byte_is_found_by_whoever_reads_it(work, tmp_path, capsys):
    damaged = tmp_path / "set"
    shutil.copytree(work / "set", damaged)
    path = next((damaged / "acts" / "resid_post.1" / "c").glob("0/*"))
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(bytes(data))
    for command in (["verify", damaged], ["train", "--data", damaged, "--out", tmp_path / "r", "--train.steps", 200]):
        capsys.readouterr()
        run(work, *command, code=1)
        assert "resid_post.1/c/0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("train", ["--sae.kk=3"], "did you mean sae.k?"),
        ("train", ["--sae.k=65"], "sae.k=65 must be between 1 and sae.n_latents=64"),
        ("train", ["--mesh.latent=3"], "1 are visible"),
        ("train", ["--site=resid_post.7"], "resid_post.1, mlp_out.1"),
        ("train", ["--train.lr=fast"], "train.lr"),
        ("harvest", ["--harvest.hooks", "resid_post.9"], "resid_post.9"),
        ("harvest", ["--harvest.hooks", "resid.1"], "resid_pre"),
        ("harvest", ["--harvest.context=1000"], "harvest.context=1000"),
        ("harvest", ["--harvest.text=/nowhere"], "/nowhere"),
        ("harvest", ["--shard=2/2"], "0 <= i < n"),
        ("harvest", ["--harvest.hooks", "resid_post.0"], "already a set"),
    ],
)
def test_usage_errors_are_one_line(work, tmp_path, capsys, command, arguments, message):
    where = ["--data", work / "set", "--out", tmp_path / "run"] if command == "train" else ["--out", tmp_path / "set"]
    if message == "already a set":
        where = ["--out", work / "set"]
    said = refused(capsys, work, command, *where, *arguments)
    assert message in said
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_resume_with_other_settings_is_refused(work, capsys):
    arguments = ["--data", work / "set", "--out", work / "run", "--sae.k=5"]
    assert "sae.k=4, not 5" in refused(capsys, work, "train", *arguments)


def test_a_run_stays_with_its_rows_wherever_they_lie(work, tmp_path, capsys):
    rng = np.random.default_rng(0)
    sae_jax.write_activations(tmp_path / "a", {"resid_post.1": rng.standard_normal((512, 8))})
    small = ["--out", tmp_path / "run", "--train.decay=0", "--train.steps"]
    run(work, "train", "--data", tmp_path / "a", *small, 4)
    (tmp_path / "a").rename(tmp_path / "b")
    run(work, "train", "--data", tmp_path / "b", *small, 8)
    sae_jax.write_activations(tmp_path / "c", {"resid_post.1": rng.standard_normal((512, 8))})
    said = refused(capsys, work, "train", "--data", tmp_path / "c", *small, 12)
    assert "other rows" in said
    assert "stands at step 8" in refused(capsys, work, "train", "--data", tmp_path / "b", *small, 7)


def test_a_set_that_cannot_be_learned_leaves_no_run_behind(work, tmp_path, capsys):
    sae_jax.write_activations(tmp_path / "set", {"resid_post.1": np.ones((512, 8))})
    said = refused(capsys, work, "train", "--data", tmp_path / "set", "--out", tmp_path / "run")
    assert "variance" in said
    assert not (tmp_path / "run").exists()


def test_the_page_shows_metrics_of_the_weights_it_shows(work, tmp_path):
    def page(*flags):
        run(work, "dashboard", work / "run", "--out", tmp_path / "site", "--tokens", 500, *flags)
        return "".join(path.read_text() for path in (tmp_path / "site").rglob("*.js"))

    run(work, "evaluate", work / "run", "--tokens", 256, "--ema")
    result = json.loads((work / "run" / "evaluation.json").read_text())
    assert (result["step"], result["weights"]) == (60, "average")
    assert "loss recovered" in page("--ema")
    assert "loss recovered" not in page()


def test_a_partial_set_can_be_trained_on_and_looked_at(work, tmp_path):
    run(work, "harvest", "--out", tmp_path / "set", "--shard", "0/2")
    run(work, "train", "--data", tmp_path / "set", "--out", tmp_path / "run", code=1)
    run(work, "train", "--data", tmp_path / "set", "--out", tmp_path / "run", "--allow-partial", "--train.steps", 5)
    run(work, "evaluate", tmp_path / "run", "--tokens", 256)
    run(work, "dashboard", tmp_path / "run", "--out", tmp_path / "site", "--tokens", 500)


def test_unknown_things_are_named(work, tmp_path, capsys):
    assert "there is no command" in refused(capsys, work, "trane")
    assert "not a run" in refused(capsys, work, "evaluate", tmp_path, code=1)
    assert "dataset.json" in refused(capsys, work, "verify", tmp_path, code=1)


def test_help_lists_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(command in said for command in cli.COMMANDS)


def test_every_setting_of_evaluate_reaches_it(work, monkeypatch):
    """What a flag says and nobody reads would be ignored without a word. Studies of one's own are for Python."""
    given, expected = {}, set(inspect.signature(sae_jax.evaluate).parameters) - {"dictionaries", "studies"}
    monkeypatch.setattr(uses, "evaluate", lambda *names, **settings: given.update(settings) or {})
    run(work, "evaluate", work / "run", "--tasks", "folder", "--seed", 3, "--suite", "probing", "--split", 2)
    assert (given["tasks"], given["seed"], given["suite"], given["split"]) == ("folder", 3, ("probing",), 2)
    assert given.keys() == expected


def test_tasks_that_are_not_there_are_refused_before_anything_runs(work, capsys):
    run(work, "evaluate", work / "run", "--suite", "probing", "--tasks", work / "nowhere", code=2)
    said = capsys.readouterr().err
    assert "is no folder; give one of .csv files" in said
    assert "evaluate:" not in said
