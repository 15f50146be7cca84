"""Values from files and flags: typed alike, refused alike, and back again."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_jax import config, recipe
from sae_jax.training.expand import expand_members
from sae_jax.training.run import TrainJob
from sae_jax.training.settings import TrainConfig
from sae_jax.types import UsageError

YAML = """\
site: resid_post.2
sae: {variant: topk, n_latents: 256, k: 8}
train:
  steps: 7
  lr: 4e-4
  log: tensorboard
harvest:
  hooks: [resid_post.1, resid_post.2]
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "recipe.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def parse(*argv: str) -> TrainJob:
    return recipe.parse(TrainJob, [*argv, "--data=set", "--out=run"], "sae-jax train")


def test_file_then_flags(write):
    command = parse(write(YAML), "--sae.k=16", "--train.log", "wandb", "tensorboard")
    assert (command.sae.k, command.sae.n_latents, command.train.steps) == (16, 256, 7)
    assert command.train.lr == 4e-4  # YAML 1.1 calls this a string
    assert command.train.log == ("wandb", "tensorboard")
    assert command.site == ("resid_post.2",)


def test_later_files_win(write):
    assert parse(write(YAML), write("train: {steps: 9}", "b.yaml")).train.steps == 9


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        (YAML.replace("k: 8", "kk: 8"), [], r"recipe.yaml: unknown key 'sae.kk'; did you mean sae.k\?"),
        (YAML.replace("hooks", "hookz"), [], r"recipe.yaml: unknown key 'harvest.hookz'"),  # another command's part
        (YAML.replace("steps: 7", "steps: thirty"), [], r"recipe.yaml: .*train.steps.*thirty"),
        (YAML, ["--train.stepz=4"], r"flag --train.stepz: unknown key .*did you mean train.steps"),
        (YAML, ["--lr=1e-3"], r"flag --lr: unknown key 'lr'; did you mean train.lr\?"),
        (YAML, ["--train.steps=x"], "train.steps"),
        (YAML, ["--sae.k=300"], "sae.k=300 must be between 1 and sae.n_latents=256"),
        (YAML, ["--sae.variant=nothing"], "sae.variant='nothing' does not exist; there are: .*topk"),
        (YAML + "site: other\n", [], "stands twice"),
        ("- a\n- b\n", [], "holds list"),
        ("a: [1,\n", [], "not valid YAML"),
        ("a: 2024-13-45\n", [], "recipe.yaml: not valid YAML"),
        ("sae: 5\n", [], "recipe.yaml: sae is 5; give it `key: value` pairs"),
        ("sae: [1, 2]\n", [], r"recipe.yaml: sae is \[1, 2\]"),
        ("train:\n", [], "recipe.yaml: train is None"),
        ("sae: {variant: [topk]}\n", [], "recipe.yaml: sae.variant is"),
        ("sae: &a {b: *a}\n", [], "recipe.yaml: nested too deep, or an alias"),
        (YAML, ["--train.lr=nan"], "train.lr=nan must be above 0 and finite"),
        (YAML, ["--train.lr=inf"], "train.lr=inf"),
        (YAML, ["--train.clip=nan"], "train.clip=nan"),
        (YAML, ["--sae.aux-coefficient=nan"], "sae.aux_coefficient=nan"),
        (YAML.replace("hooks:", "max_norm_multiple: .nan\n  hooks:"), [], "harvest.max_norm_multiple=nan"),
        (YAML, ["--sae.n-latents=2147483648"], "sae.n_latents=2147483648 must be at least 1 and below 2"),
        (YAML, ["--harvest.tokens=5"], "unknown key 'harvest.tokens'"),  # train does not harvest
    ],
)
def test_mistakes_get_one_line(write, text, flags, message):
    with pytest.raises(UsageError, match=message) as caught:
        parse(write(text), *flags)
    assert "\n" not in str(caught.value)


MEMBERS = (
    YAML
    + """\
members:
- {name: narrow, sae: {k: 2}}
- {name: b.2, train: {lr: 5e-4, seed: 1, log: wandb}}
"""
)


def parse_members(*argv: str) -> dict[str, TrainJob]:
    return expand_members(parse(*argv))


def test_members_are_the_command_with_flags_of_their_own(write):
    members = parse_members(write(MEMBERS.replace(", log: wandb", "")), "--sae.k=4", "--train.seed=7")
    assert {name: (m.sae.k, m.train.lr, m.train.seed) for name, m in members.items()} == {
        "narrow": (2, 4e-4, 7),
        "b.2": (4, 5e-4, 1),
    }
    assert {m.train.order for m in members.values()} == {7}
    flags = parse_members(write(MEMBERS), "--members", "a", "b --sae.n-latents=512 --sae.k 300")
    assert {name: (m.sae.n_latents, m.sae.k) for name, m in flags.items()} == {"a": (256, 8), "b": (512, 300)}
    assert list(parse_members(write(YAML))) == [""]


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (("x", "x"), [], r"member b.2: train.log=\['wandb'\], but members share one pass"),
        (("seed: 1", "batch_size: 5"), [], "member b.2: train.batch_size=5, but members share"),
        (("k: 2", "k: 300"), [], "member narrow: sae.k=300 must be between"),
        (("k: 2", "kk: 2"), [], r"member narrow: unknown key 'sae.kk'; did you mean"),
        (("lr: 5e-4", "lr: fast"), [], "member b.2: .*train.lr"),
        (("name: b.2", "name: narrow"), [], "member 'narrow': every member needs a name of its own"),
        (("name: b.2", "name: a/b"), [], "member 'a/b': every member needs a name"),
        (("name: b.2", "name: no"), [], "recipe.yaml: members: name: False is no text; write it in quotes"),
        (("name: b.2", "name: 1.50"), [], "members: name: 1.5 is no text"),
        (("name: b.2, ", ""), [], "member '': every member needs a name"),
        (("sae: {k: 2}", "mesh: {data: 2}"), [], "recipe.yaml: members: mesh: .* there are name, sae and train"),
        (("sae: {k: 2}", "sae: 2"), [], "recipe.yaml: members: sae: 2 is not a section"),
        (("- {name: narrow, sae: {k: 2}}", "- narrow"), [], "recipe.yaml: members is .*; give a list"),
        (("x", "x"), ["--members", "a", "a"], "member 'a': every member"),
        (("x", "x"), ["--members", "a --out=other"], "member a: out=other, but members share"),
        (("x", "x"), ["--members", "a 'b"], "No closing quotation"),
    ],
)
def test_mistakes_in_members_get_one_line(write, change, flags, message):
    with pytest.raises(UsageError, match=message) as caught:
        parse_members(write(MEMBERS.replace(*change)), *flags)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_no_text_is_named(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfes\x00")
    with pytest.raises(UsageError, match=r"recipe\.yaml: not UTF-8 \(byte 0\)"):
        parse(str(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize("out", ["--out=", "--out"])
def test_an_empty_path_is_refused(out):
    with pytest.raises(UsageError, match="out is empty"):
        recipe.parse(TrainJob, ["--data=set", *([out] if out.endswith("=") else [out, ""])], "sae-jax train")


def test_missing_file_is_named():
    with pytest.raises(UsageError, match=r"nowhere\.yaml"):
        parse("nowhere.yaml")


@given(
    st.builds(
        TrainConfig,
        steps=st.integers(1, 10**9),
        batch_size=st.integers(1, 2**20),
        lr=st.none() | st.floats(1e-9, 1.0),
        ema=st.floats(0, 0.999),
        log=st.sampled_from([(), ("wandb",), ("wandb", "tensorboard")]),
    )
)
def test_json_round_trip(value):
    assert config.from_dict(TrainConfig, config.to_dict(value)) == value


def test_flatten_and_known_keys_agree():
    keys = config.known_keys(TrainConfig, "train.")
    assert keys == {f"train.{field.name}" for field in dataclasses.fields(TrainConfig)}


def test_numbers_of_numpy_are_numbers():
    changed = config.replaced(TrainConfig(), {"steps": np.int64(4), "lr": np.float32(0.5)}, "here")
    assert (changed.steps, changed.lr) == (4, 0.5)
    assert type(changed.steps) is int
    with pytest.raises(UsageError, match=r"here: steps=.*Expected `int`"):
        config.replaced(TrainConfig(), {"steps": np.arange(2)}, "here")


@pytest.mark.parametrize(
    "box", ["╭─ Error ─╮\n│ no such --x │\n│ ───── │\n│ help │\n╰─────╯", "- Error -\n-----\nno such --x\n---\nhelp"]
)
def test_a_message_in_a_box_is_its_first_paragraph(box):
    assert config._first_paragraph(box) == "no such --x"
