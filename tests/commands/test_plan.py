"""`sae-jax plan` where there is no compiler for the target, and what bad input gets."""

import json
from pathlib import Path

import pytest

from sae_jax import recipe
from sae_jax.commands import main as cli
from sae_jax.commands import train
from sae_jax.planning import compile
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
    ],
)
def test_bad_input_is_one_line(capsys, flags, cure):
    assert cli.main(["plan", RECIPE, *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert cure in said
    assert "\n" not in said


def test_a_recipe_that_does_not_say_its_width_is_told(capsys, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sae: {k: 4}\n")
    assert cli.main(["plan", str(recipe), "--target=h200:8"]) == 2
    assert "give --d-model" in capsys.readouterr().err


def test_a_set_of_another_width_is_refused(small_set, tmp_path):
    """The width in a recipe is what its plan was made for."""
    words = [f"--data={small_set}", f"--out={tmp_path / 'run'}", "--sae.n-latents=64", "--sae.k=4", "--d-model=9"]
    with pytest.raises(UsageError, match=r"d_model=9, but acts .* is 8 wide"):
        train.train({"": recipe.parse(train.Train, words, "sae-jax train")})


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
