import json
import random
import shutil
import sys

import pytest
import tokenizers
from tokenizers import normalizers, pre_tokenizers

from sae_jax.lm import tokenizer
from sae_jax.lm.model import BUNDLED
from sae_jax.lm.tokenizer import Tokenizer

MODULE = sys.modules[Tokenizer.__module__]  # the package has a function of this name


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


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def cut_before_words(backend: tokenizers.Tokenizer) -> None:
    """As Llama 3: punctuation takes the ends of lines after it along."""
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def with_first_space(backend: tokenizers.Tokenizer) -> None:
    """A text begins with a space if it has none: only before another space it may be cut."""
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def across_spaces(backend: tokenizers.Tokenizer) -> None:
    """As Llama 2 and Gemma: what is merged is not kept inside words."""
    backend.normalizer = normalizers.Prepend("_")
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@pytest.mark.parametrize(
    ("change", "in_parts"),
    [(lambda backend: None, True), (cut_before_words, True), (with_first_space, None), (across_spaces, False)],
)
def test_the_parts_of_a_long_text_have_the_tokens_of_the_whole(monkeypatch, change, in_parts):
    backend = tokenizers.Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    change(backend)
    cut = Tokenizer(backend, 0, 0)
    monkeypatch.setattr(MODULE, "PART", 40)
    monkeypatch.setattr(MODULE, "AROUND", 20)
    lines = ["def f(x): return x", "", "", "  # 1234567 words.", "\t(a, b);", "é → 日本。", "   ", "end.\r", "don't"]
    rng = random.Random(0)
    for _ in range(50):
        text = rng.choice(["\n", "  ", "\n\n"]).join(rng.choices(lines, k=40))
        parts = [*cut.parts(text)]
        assert "".join(parts) == text
        assert [i for ids in cut.encode(parts) for i in ids] == cut.encode([text])[0]
        assert in_parts in (None, len(parts) > 3)
        assert max(map(len, parts[:-1]), default=0) <= 80


def test_a_text_without_spaces_is_one_part(monkeypatch, vocabulary):
    monkeypatch.setattr(MODULE, "PART", 40)
    assert [*vocabulary.parts("x" * 1000)] == ["x" * 1000]
    assert [*vocabulary.parts("")] == [""]
