"""`sae-jax plan` where there is no compiler for the target, and what bad input gets."""

import json
from pathlib import Path

import jax
import pytest

from sae_jax import lm, recipe, runs
from sae_jax.commands import main as cli
from sae_jax.planning import compile
from sae_jax.training.run import TrainJob
from sae_jax.types import UsageError

RECIPE = str(Path(__file__).parents[2] / "configs" / "gpt2_small_topk_32k.yaml")


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    monkeypatch.setattr(compile, "is_installed", lambda target: False)


def test_without_a_compiler_it_is_an_estimate_that_says_so(capsys):
    assert cli.main(["plan", RECIPE, "--target=v5p:2x2x2"]) == 0
    said = capsys.readouterr().out
    assert "ESTIMATE" in said
    assert "pip install 'sae_jax[plan]'" in said


@pytest.mark.parametrize(("target", "fits"), [("h200:8", True), ("v6e:2x4", False)])
def test_json_says_what_fits(capsys, target, fits):
    """Four arrays of 2 x 16M x 1024 numbers over 8 devices are 64 GiB on each."""
    wide = ["--sae.n_latents=16777216", "--d-model=1024"]
    assert cli.main(["plan", RECIPE, f"--target={target}", "--json", *wide]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["fits"] == fits
    assert content["source"] == "estimate"
    assert content["n_devices"] == 8
    device, run = content["device"], content["run"]
    assert device["headroom_bytes"] == device["usable_bytes"] - device["peak_bytes"]
    assert (device["headroom_bytes"] >= 0) == fits
    assert device["state_bytes"] == pytest.approx(4 * 4 * 2 * 2**24 * 1024 / 8, rel=0.01)
    assert run["tokens"] == 61_035 * 131_072
    assert run["disk_bytes"] == 500_000_000 * 1024 * 2


@pytest.mark.parametrize(
    ("flags", "cure"),
    [
        (["--target=v5p:8x8"], "3 numbers of chips"),
        (["--target=v7:2x2"], "there are v4"),
        (["--target=h200:8", "--mesh.data=3"], "product is 8"),
        (["--target=h200:8", "--sae.n_latents=1001"], "use 1000 or 1008"),
        (["--target=h200:8", "--d-model=0"], "--d-model"),
        (["--target=h200:8", "--mfu=30"], "at most 1"),
        (["--target=h200:8", "--timeout=0"], "above 0"),
        (["--target=h200:8", "--mesh.member=2"], "use mesh.member=1"),
    ],
)
def test_bad_input_is_one_line(capsys, flags, cure):
    assert cli.main(["plan", RECIPE, *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert cure in said
    assert "\n" not in said


def planned(capsys, *flags: str) -> dict:
    assert cli.main(["plan", *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_members_add_up(capsys):
    """Two dictionaries from one pass, beside each other or on halves of the machine."""
    members = ["--members", "a", "b --train.lr=1e-3"]
    one, two = (planned(capsys, RECIPE, "--target=h200:8", *flags) for flags in ([], members))
    halves = planned(capsys, RECIPE, "--target=h200:8", "--mesh.member=2", *members)
    for content in (two, halves):
        assert content["n_members"] == 2
        assert content["device"]["state_bytes"] == pytest.approx(2 * one["device"]["state_bytes"], rel=1e-3)
        assert content["run"]["hours"] == pytest.approx(2 * one["run"]["hours"], rel=0.01)
    assert halves["device"]["flop"] == 2 * one["device"]["flop"]  # of one step, on half the devices


def test_what_is_trained_through_the_language_model_counts_it(capsys):
    flags = ["--sae.variant=end_to_end", "--sae.n-latents=256", "--sae.k=8", "--train.batch-size=512"]
    content = planned(capsys, "--target=h200:4", "--site=resid_post.1", *flags)
    device = content["device"]
    assert device["model_bytes"] == 4 * sum(x.size for x in jax.tree.leaves(lm.load("bundled").params))
    assert device["peak_bytes"] > device["state_bytes"] + device["model_bytes"] + device["model_activation_bytes"]
    assert device["flop"] > 512 // 4 * 2 * device["model_bytes"] / 4 / 2  # the blocks run once and more
    assert cli.main(["plan", "--target=h200:4", "--site=resid_post.1", *flags]) == 0
    assert "the peak is the sum of language model, its activations, state" in capsys.readouterr().out
    assert cli.main(["plan", "--target=h200:4", "--site=resid_post.1", *flags, "--d-model=9"]) == 2
    assert "resid_post.1 of bundled is 128 wide" in capsys.readouterr().err


def test_a_recipe_that_does_not_say_its_width_is_told(capsys, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sae: {k: 4}\n")
    assert cli.main(["plan", str(recipe), "--target=h200:8"]) == 2
    assert "give --d-model" in capsys.readouterr().err


def test_a_set_of_another_width_is_refused(small_set, tmp_path):
    """The width in a recipe is what its plan was made for."""
    words = [f"--data={small_set}", f"--out={tmp_path / 'run'}", "--sae.n-latents=64", "--sae.k=4", "--d-model=9"]
    with pytest.raises(UsageError, match=r"d_model=9, but acts .* is 8 wide"):
        runs.run_train(recipe.parse(TrainJob, words, "sae-jax train"))


@pytest.mark.parametrize(
    ("message", "n_bytes"),
    [
        ("total memory required for HLO temporaries (106.32G) exceeds available HBM (95.74G).", 106.32 * 2**30),
        ("total memory required for HLO temporaries (1.03T) exceeds available HBM (95.74G).", 1.03 * 2**40),
        ("Ran out of memory in memory space hbm. Used 33.20G of 31.25G hbm.", 33.2 * 2**30),
        ("Ran out of memory on HBM.", None),
    ],
)
def test_a_refusal_says_how_much_it_would_have_taken(message, n_bytes):
    assert compile._refusal(message)["peak_bytes"] == (n_bytes and int(n_bytes))
