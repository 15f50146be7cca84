import json
import shutil

import pytest

from sae_jax.lm import tokenizer
from sae_jax.lm.model import BUNDLED


@pytest.fixture(scope="module")
def vocabulary():
    return tokenizer("bundled")


def test_text_survives_a_round_trip(vocabulary):
    texts = ["def f(x):\n    return x\n", "é → 日本", ""]
    assert [vocabulary.decode(ids) for ids in vocabulary.encode(texts)] == texts


def test_each_token_has_its_own_text(vocabulary):
    [ids] = vocabulary.encode(["import os\n"])
    assert "".join(vocabulary.tokens(ids)) == "import os\n"
    assert vocabulary.tokens([vocabulary.separator_id]) == ["<|endoftext|>"]


def test_special_tokens_are_known_and_never_added(vocabulary):
    assert vocabulary.separator_id == vocabulary.bos_id == vocabulary.eos_id == 0
    assert vocabulary.special_ids == (0,)
    assert vocabulary.size == 2048
    assert 0 not in vocabulary.encode(["x"])[0]


def test_special_tokens_spelled_as_objects_are_read(tmp_path):
    shutil.copy(BUNDLED / "tokenizer.json", tmp_path)
    stated = {"eos_token": {"content": "<|endoftext|>", "special": True}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(stated))
    loaded = tokenizer(str(tmp_path))
    assert (loaded.bos_id, loaded.eos_id, loaded.separator_id) == (None, 0, 0)


def test_a_folder_without_tokenizer_json_is_read_through_transformers(tmp_path, vocabulary):
    stored = json.loads((BUNDLED / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(stored["vocab"]), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in stored["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    loaded = tokenizer(str(tmp_path))
    assert loaded.encode(["def f(x):"]) == vocabulary.encode(["def f(x):"])
    assert loaded.separator_id == 0


def test_the_parts_of_a_character_join_to_its_bytes(vocabulary):
    text = "é → 語 def"
    parts = vocabulary.tokens(vocabulary.encode([text])[0])
    assert b"".join(part.encode("utf-8", "surrogateescape") for part in parts) == text.encode()
    assert "\ufffd" not in "".join(vocabulary.tokens(range(vocabulary.size)))
