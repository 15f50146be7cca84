"""Damaged and hostile files end in one line that names the file: no traceback, abort, hang or unbounded work."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import sae_jax
from sae_jax import config, lm, progress, storage
from sae_jax.activations.formats import documents_of
from sae_jax.activations.store import open_activations
from sae_jax.activations.verify import verify
from sae_jax.commands import failures
from sae_jax.evaluation import shards
from sae_jax.lm import trial
from sae_jax.lm.tokenizer import read_tokenizer
from sae_jax.planning import targets
from sae_jax.saes import topk
from sae_jax.scaling import advise, table
from sae_jax.storage import digests, guarded
from sae_jax.sweeps import grid, points
from sae_jax.training import checkpoint, logs
from sae_jax.training.settings import TrainConfig
from sae_jax.types import UsageError, UserError
from tests import runs

DEEP = "[" * 100_000
POINT = {"n_latents": 64, "k": 4, "lr": 1e-3, "seed": 0, "tokens": 640, "flops": 1e6, "fvu": 0.5}


def put(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def refused(path: Path, read: Callable[[], Any]) -> None:
    with pytest.raises((UserError, UsageError)) as caught:
        read()
    said = str(caught.value)
    assert path.name in said
    assert "\n" not in said
    assert len(said) < 600


@pytest.mark.parametrize(
    "content",
    [
        DEEP,
        '{"a":' * 100_000,
        '{"a": ' + "[" * 100 + "]" * 100 + "}",
        '{"a": NaN}',
        '{"a": 1e400}',
        '{"a": ' + "9" * 5000 + "}",
        '{"a": [-' + "9" * 310 + "]}",
        b'{"a": "\xff"}',
        b"\xef\xbb\xbf{}",
        "",
        "[1]",
        "5",
        '{"a": 1} x',
    ],
    ids=lambda content: repr(content[:12]),
)
def test_json(tmp_path: Path, content: str | bytes) -> None:
    path = put(tmp_path / "x.json", content)
    refused(path, lambda: storage.read_json(path))


def test_json_is_not_read_beyond_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "x.json", "{}")
    os.truncate(path, 1 << 40)  # sparse: a terabyte in no blocks
    refused(path, lambda: storage.read_json(path))


def test_a_small_file_is_read_in_little_memory(tmp_path: Path) -> None:
    path = put(tmp_path / "x.json", '{"a": 1}')
    tracemalloc.start()
    try:
        storage.read_json(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_only_regular_files_are_read(tmp_path: Path, make: Callable) -> None:
    path = tmp_path / "x.json"
    make(path)
    refused(path, lambda: storage.read_json(path))
    refused(path, lambda: storage.read_bytes(path))
    refused(path, lambda: config.read_yaml(path))
    refused(path, lambda: digests.of_file(path))


@pytest.mark.parametrize(
    "content",
    [
        "sae: {k: !!int ''}",
        "sae: {k: !!float ''}",
        "sae: {k: !!bool x}",
        "sae: {k: !!timestamp x}",
        "sae: !!map [1]",
        "sae: !!set [1]",
        "sae: !!omap [1]",
        "sae: !!pairs 5",
        "sae: !!binary x",
        "a: 2001-13-41",
        "a: " + "[" * 1000 + "]" * 1000,
        "a: &a [*a]",
        "k: 010",
        "k: 1:30",
        "a: &a {b: *a}",
        "? [a]\n: b",
        "a: !!python/object:os.system x",
        "x" * 2_000_000,
        "a: &0 [x, x]\n" + "".join(f"b{i}: &{i + 1} [{', '.join([f'*{i}'] * 9)}]\n" for i in range(20)),
        "a: 1\na: 2",
        "a: 0x" + "f" * 5000,
        "a: 18446744073709551616",
        'a: "\\ud800"',
        b"\xff",
        "",
    ],
    ids=lambda content: repr(content[:28]),
)
def test_yaml(tmp_path: Path, content: str | bytes) -> None:
    path = put(tmp_path / "recipe.yaml", content)
    refused(path, lambda: list(config.flatten(config.read_yaml(path))))


@pytest.fixture(scope="module")
def a_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "set"
    sae_jax.write_activations(path, np.random.default_rng(0).standard_normal((256, 8)), dtype="float32")
    return path


def changed(content: dict, keys: tuple, value: Any) -> dict:
    content = copy.deepcopy(content)
    part = content
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    return content


def resealed(content: dict) -> dict:
    return digests.sealed({key: value for key, value in content.items() if key != digests.SEAL})


def respecified(content: dict) -> dict:
    text = json.dumps(content["spec"], sort_keys=True, separators=(",", ":"))
    return {**content, **dict.fromkeys(("sha256", "sha256_with_places"), hashlib.sha256(text.encode()).hexdigest())}


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("spec",), "x"),
        (("spec",), 5),
        (("spec", "chunk_rows"), 8.0),
        (("spec", "sources", 0, "d"), 8.0),
        (("spec", "sources", 0, "d"), 1 << 40),
        (("spec", "sources"), []),
        (("spec", "sources"), 5),
        (("spec", "shard_rows"), 10**18),
        (("spec", "shard_rows"), 10**400),
        (("spec", "n_shards"), 2**62),
        (("spec", "unknown"), 1),
        (("format",), "2"),
        (("format",), None),
    ],
    ids=str,
)
def test_dataset(a_set: Path, tmp_path: Path, keys: tuple, value: Any) -> None:
    shutil.copytree(a_set, tmp_path / "set")
    content = json.loads((a_set / "dataset.json").read_text())
    path = put(tmp_path / "set/dataset.json", respecified(changed(content, keys, value)))
    refused(path, lambda: open_activations(tmp_path / "set"))
    put(path, DEEP)
    refused(path, lambda: open_activations(tmp_path / "set"))


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("n_rows",), 1e300),
        (("n_rows",), -1),
        (("n_rows",), "8"),
        (("xxh3_64", "acts/acts", 0), "f" * 17),
        (("xxh3_64", "acts/acts", 0), "-1"),
        (("xxh3_64", "acts/acts"), []),
        (("xxh3_64",), {}),
        (("moments", "acts", "sum", 0), 10**400),
        (("moments", "acts", "sum", 0), None),
        (("moments", "acts", "sum", 0), -1e308),
        (("moments", "acts", "m2", 0), 1e308),
        (("moments", "acts", "m2", 0), -1.0),
        (("moments", "acts", "m2"), [1.0]),
        (("chunk_n_rows",), [[1]]),
        (("shard",), 10**30),
    ],
    ids=str,
)
def test_commit(a_set: Path, tmp_path: Path, keys: tuple, value: Any) -> None:
    shutil.copytree(a_set, tmp_path / "set")
    content = json.loads((a_set / "commits/0.json").read_text())
    path = put(tmp_path / "set/commits/0.json", resealed(changed(content, keys, value)))
    refused(path, lambda: open_activations(tmp_path / "set"))
    assert any("commits/0.json" in line for line in verify(tmp_path / "set").damage)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *(
            ("config.json", change)
            for change in (
                {"n_head": 0},
                {"n_head": "4"},
                {"n_head": -1},
                {"n_layer": "x"},
                {"n_layer": 10**12},
                {"n_embd": "x"},
                {"n_embd": 8.0},
                {"n_embd": "%"},
                {"model_type": []},
                {"vocab_size": None},
                {"layer_norm_epsilon": "x"},
                {"tie_word_embeddings": 5},
                DEEP,
            )
        ),
        *(
            ("model.safetensors.index.json", content)
            for content in (
                "[1]",
                '{"weight_map": null}',
                '{"weight_map": ["a"]}',
                '{"weight_map": {"x": 5}}',
                '{"weight_map": {"x": 5, "y": "a"}}',
                '{"weight_map": {"x": "../x.safetensors"}}',
                '{"weight_map": {"x": "a\\u0000b"}}',
                "{}",
            )
        ),
        *(
            ("model.safetensors", content)
            for content in (
                b"",
                b"\xff" * 8,
                b"\x08" + b"\0" * 7 + b"{}      ",
                b"\x80\xf0\xfa\x02" + b"\0" * 4,
                b"x" * 99,
            )
        ),
    ],
    ids=str,
)
def test_model(tmp_path: Path, name: str, change: Any) -> None:
    folder = tmp_path / "lm"
    shutil.copytree(lm.locate("bundled"), folder)
    if isinstance(change, dict):
        change = {**json.loads((folder / name).read_text()), **change}
    put(folder / name, change)
    refused(folder, lambda: lm.load(str(folder)))


def test_layers_that_a_model_claims_and_has_not_take_no_memory(tmp_path: Path) -> None:
    folder = tmp_path / "lm"
    shutil.copytree(lm.locate("bundled"), folder)
    config_json = folder / "config.json"
    config_json.write_text(json.dumps({**json.loads(config_json.read_text()), "n_layer": 1_000_000}))
    lm_weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    tracemalloc.start()
    try:
        refused(folder, lambda: lm.load(str(folder)))
        assert tracemalloc.get_traced_memory()[1] < 10 * lm_weights
    finally:
        tracemalloc.stop()


DOUBLES = {"type": "Replace", "pattern": {"String": "x"}, "content": "xx"}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokenizer.json", lambda v: v["model"].update(continuing_subword_prefix="x"), "tokenizer.json cannot be used"),
        ("tokenizer.json", lambda v: v["model"].update(merges=[["a", "none"]]), "tokenizer.json cannot be used"),
        ("tokenizer.json", lambda v: v.pop("model"), "no tokenizer that can be read"),
        ("tokenizer.json", lambda v: v.update(added_tokens=[5]), "no tokenizer that can be read"),
        (
            "tokenizer.json",
            lambda v: v.update(decoder={"type": "Strip", "content": "a", "start": 10**6, "stop": 10**6}),
            "tokenizer.json cannot be used",
        ),
        (
            "tokenizer.json",
            lambda v: v.update(normalizer={"type": "Sequence", "normalizers": [DOUBLES] * 64}),
            "tokenizer.json keeps the tokenizer busy",
        ),
        ("tokenizer_config.json", lambda v: [], "tokenizer_config.json"),
    ],
)
def test_tokenizer(tmp_path: Path, name: str, change: Callable, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some end the process that reads them with SIGABRT, or would never be done: another one reads them first."""
    monkeypatch.setattr(trial, "PROCESSOR_SECONDS", 0)
    folder = tmp_path / "lm"
    shutil.copytree(lm.locate("bundled"), folder)
    content = json.loads((folder / name).read_text())
    result = change(content)
    put(folder / name, result if isinstance(result, list) else content)
    with pytest.raises(UserError, match=message) as caught:
        read_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_a_text_that_the_library_panics_at(tmp_path: Path) -> None:
    """Backtracking without end: the regular expressions of the library give up, and the trial cannot know this text."""
    folder = tmp_path / "lm"
    shutil.copytree(lm.locate("bundled"), folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(z+z+)+y"}, "behavior": "Isolated", "invert": False}
    put(folder / "tokenizer.json", {**content, "pre_tokenizer": split})
    tokenizer = read_tokenizer(folder)
    with pytest.raises(UserError, match="cannot encode this text"):
        tokenizer.encode(["z" * 40])


@pytest.mark.parametrize("value", [5, [1], {"a": 1}, None])
def test_a_special_token_of_another_kind_is_none(tmp_path: Path, value: Any) -> None:
    folder = tmp_path / "lm"
    shutil.copytree(lm.locate("bundled"), folder)
    put(folder / "tokenizer_config.json", {"bos_token": value, "added_tokens_decoder": value})
    assert lm.tokenizer(str(folder)).bos_id is not None  # config.json says


@pytest.mark.parametrize(
    "line", [b"\xff\n", b"5\n", b"{}\n", DEEP.encode(), b'{"step": ' + b"9" * 5000 + b"}\n", b'{"step": "x"}\n']
)
def test_log(tmp_path: Path, line: bytes) -> None:
    """A bad line is passed over, and what follows it is kept."""
    put(tmp_path / "metrics.jsonl", line.rstrip(b"\n") + b'\n{"step": 2}\n')
    assert logs.read_metrics(tmp_path) == [{"step": 2}]


@pytest.mark.parametrize(
    "content", [{"points": 5}, {"points": ["x"]}, {"points": [5]}, {"points": [None]}, {"points": [{}]}]
)
def test_points(tmp_path: Path, content: dict) -> None:
    path = put(tmp_path / "points/a.json", digests.sealed(content))
    refused(path, lambda: points.read(tmp_path, "a"))
    put(path, '{"a":' * 100_000)
    refused(path, lambda: points.read(tmp_path, "a"))


@pytest.mark.parametrize(
    "line",
    [
        '{"a":' * 100_000,
        {**POINT, "config": {"sites": [1]}},
        {**POINT, "tokens": "9" * 9},
        {**POINT, "seed": 2**70},
        "NaN",
        b"\xff",
    ],
)
def test_table(tmp_path: Path, line: Any) -> None:
    path = put(tmp_path / "results.jsonl", line)
    refused(path, lambda: table.read(tmp_path))


@pytest.mark.parametrize(
    "content", [DEEP, "{}", digests.sealed({}), digests.sealed({"laws": 5}), digests.sealed({"k": "x"})]
)
def test_fit(tmp_path: Path, content: Any) -> None:
    path = put(tmp_path / "fit.json", content)
    refused(path, lambda: advise.advise(1e12, str(path)))


@pytest.mark.parametrize("content", [DEEP, {"kind": "set of members", "schema": 1, "members": [[1]]}, {"kind": 5}, "5"])
def test_run(tmp_path: Path, content: Any) -> None:
    path = put(tmp_path / "config.json", content)
    refused(path, lambda: (checkpoint.members(tmp_path), checkpoint.read_record(tmp_path)))


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("train", "ema"), "x"),
        (("train", "batch_size"), 0),
        (("train", "unknown"), 1),
        (("dictionary", "encodes"), []),
        (("dictionary", "encodes", 0, "width"), 0),
        (("dictionary", "encodes", 0, "width"), 1 << 40),
    ],
    ids=str,
)
def test_record(tmp_path: Path, keys: tuple, value: Any) -> None:
    record = runs.record_of(topk.Config(n_latents=64, k=4), TrainConfig())
    content = changed(record.to_json(), keys, value)
    path = put(tmp_path / "config.json", resealed({**content, "dictionary": resealed(content["dictionary"])}))
    refused(path, lambda: checkpoint.read_record(tmp_path))


def test_a_run_from_before_a_setting_has_its_default(tmp_path: Path) -> None:
    content = runs.record_of(topk.Config(n_latents=64, k=4), TrainConfig(ema=0.5)).to_json()
    del content["train"]["log_every"]
    put(tmp_path / "config.json", resealed(content))
    train = checkpoint.read_record(tmp_path).train
    assert (train["ema"], train["log_every"]) == (0.5, TrainConfig().log_every)


LAW = {
    **{"form": "growth", "coefficient": 1.0, "exponent": 0.25, "interval": {}, "range": {"x": [1e9, 1e12]}},
    **{"r2": 1.0, "rmse_log": 0.0, "n_points": 4, "largest_out": None, "carried": None, "warnings": []},
    **{"chance": None, "noise_growth": 1.0, "outliers": []},
}
FIT = {
    **{"variant": "topk", "k": 4, "d_model": 8, "widest": 512, "joint": None, "lr": None, "warnings": []},
    "compute": {**LAW, "form": "decay", "best_latents": LAW},
    "flops_per_token": {"per_latent": 96.0, "per_active": 0.0},
    "lr_of_points": {"coefficient": 1e-3, "exponent": 0.0},
    "draws": {"compute": [], "best_latents": []},
}


def test_a_fit_in_which_nothing_is_wrong_gives_advice(tmp_path: Path) -> None:
    path = put(tmp_path / "fit.json", digests.sealed(FIT))
    assert advise.advise(1e12, str(path)).latents == 1024


@pytest.mark.parametrize(
    "change",
    [
        {"widest": "x"},
        {"variant": "../x"},
        {"d_model": "[x]"},
        {"d_model": 0},
        {"k": 2.5},
        {"widest": 0},
        {"warnings": [5], "compute": None},
        {"flops_per_token": {"per_latent": 0, "per_active": 0}},
        {"lr": None, "lr_of_points": {"coefficient": 1e308, "exponent": 300}},
        {"compute": {**FIT["compute"], "range": {"x": [1]}}},
        {"compute": {**FIT["compute"], "exponent": -500.0}},
    ],
    ids=str,
)
def test_advice(tmp_path: Path, change: dict) -> None:
    path = put(tmp_path / "fit.json", digests.sealed({**FIT, **change}))
    refused(path, lambda: advise.advise(1e12, str(path)))


def sums_file(save: Callable = np.savez, **arrays: Any) -> bytes:
    """As evaluation/shards.py writes one, but for `arrays`."""
    data = io.BytesIO()
    save(data, **{"about": np.array("{}"), "fvu/n": np.ones(3), **arrays})
    return data.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04",
        sums_file()[:-30],
        sums_file(save=np.savez_compressed),
        sums_file(about=np.array("[1]")),
        sums_file(about=np.array("{")),
        sums_file(x=np.array([None])),
        sums_file(x=np.array(["2020-01-01"], "M8[s]")),
        sums_file().replace(b"(3,), ", b"(9**9,"),
        sums_file().replace(b"(3,), ", b"(-1,),"),
        sums_file().replace(b"<f8", b"<f4"),
    ],
    ids=lambda data: f"{len(data)} bytes",
)
def test_sums(tmp_path: Path, data: bytes) -> None:
    path = put(tmp_path / "evaluation/shard-0-of-1.npz", data)
    refused(path, lambda: shards.merge(tmp_path, 1, {}))


def test_shares_that_do_not_fit_together(tmp_path: Path) -> None:
    shards.write(tmp_path, (0, 2), {"fvu": {"n": np.ones(3)}}, {})
    shards.write(tmp_path, (1, 2), {"fvu": {"m": np.ones(3)}}, {})
    refused(tmp_path / "evaluation", lambda: shards.merge(tmp_path, 2, {}))


@pytest.mark.parametrize(
    "read",
    [
        lambda word: config.share(f"0/{word}"),
        lambda word: lm.parse_hook(f"resid_post.{word}", lm.read_spec("bundled")),
        lambda word: targets.parse(f"h200:{word}"),
    ],
)
def test_numbers_that_are_too_long_for_python(read: Callable) -> None:
    with pytest.raises(UsageError):
        read("9" * 5000)


def test_a_grid_or_marks_without_end() -> None:
    grids = {f"train.x{i}": list(range(100)) for i in range(5)}
    with pytest.raises(UsageError, match="10,000,000,000 combinations"):
        grid.cells(grid.SweepConfig(grid=grids))  # type: ignore[arg-type]
    settings = grid.SweepConfig(tolerance=0.1, max_tokens=1e18, window=1)
    with pytest.raises(UsageError, match="raise it"):
        grid.due(settings, 1, 64, 1)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:58017", "another process of this job"),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes", "out of memory"),
        ("INTERNAL: a fault of ours", None),
    ],
)
def test_errors_of_xla_that_are_no_fault_of_ours_are_one_line(said: str, told: str | None) -> None:
    found = failures.one_line(jax.errors.JaxRuntimeError(said))
    assert (found is None) == (told is None)
    if found and told:
        assert found[0].startswith(told)
        assert found[1] == 1


def test_a_message_is_one_line_whatever_it_is_about() -> None:
    assert str(UserError("a\nb \x1b[2J \ud800 \u2028 ü 中")) == "a\\nb \\x1b[2J \\ud800 \\u2028 ü 中"
    assert len(str(UserError("x" * 10**6))) < 2000


def test_what_is_said_on_the_way_shows_characters_alone(capsys: pytest.CaptureFixture) -> None:
    progress.console.print("a\x1b[2Jb\n[x]")
    assert capsys.readouterr().err == "a\\x1b[2Jb\n[x]\n"


def test_text(tmp_path: Path) -> None:
    path = put(tmp_path / "t.jsonl", '{"text":' * 100_000)
    refused(path, lambda: list(documents_of(path)))


def test_rows_without_a_width(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        sae_jax.write_activations(tmp_path / "z", np.zeros((5, 0), np.float32))


def test_a_name_that_is_not_utf8_is_refused_where_it_would_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not UTF-8; rename"):
        storage.write_json(tmp_path / "x.json", {"path": os.fsdecode(b"/data/\xff")})
    assert not (tmp_path / "x.json").exists()


def test_the_depth_that_is_allowed_is_read() -> None:
    text = b"[" * guarded.MAX_DEPTH + b"]" * guarded.MAX_DEPTH
    guarded.parse_json(text, "x")
    with pytest.raises(UserError, match="nested"):
        guarded.parse_json(b"[" + text + b"]", "x")
