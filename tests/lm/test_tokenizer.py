import json
import random
import shutil
import sys

import pytest
import tokenizers
from tokenizers import normalizers, pre_tokenizers

from sae_jax.lm import tokenizer
from sae_jax.lm.model import BUNDLED
from sae_jax.lm.tokenizer import Tokenizer, read_tokenizer
from sae_jax.types import UserError

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
        assert max(map(len, parts[:-1]), default=0) <= 120


def test_a_text_without_spaces_is_one_part(monkeypatch, vocabulary):
    monkeypatch.setattr(MODULE, "PART", 40)
    assert [*vocabulary.parts("x" * 1000)] == ["x" * 1000]
    assert [*vocabulary.parts("")] == [""]


def test_what_comes_after_a_stretch_without_spaces_is_cut_again(monkeypatch, vocabulary):
    monkeypatch.setattr(MODULE, "PART", 40)
    monkeypatch.setattr(MODULE, "AROUND", 20)
    text = "a word " * 20 + "x" * 1000 + " and more" * 20
    parts = [*vocabulary.parts(text)]
    assert len(parts) > 5
    assert [i for ids in vocabulary.encode(parts) for i in ids] == vocabulary.encode([text])[0]


@pytest.fixture
def folder(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, tmp_path)
    return tmp_path


def rewrite(folder, change, name="tokenizer.json"):
    """Put what `change` makes of a JSON file in its place."""
    content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    change(content)
    (folder / name).write_text(json.dumps(content))
    return tokenizer(str(folder))


TWICE = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2,
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {},
}
PADDED = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 5, "pad_type_id": 0}


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}),
        lambda v: v.update(truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 5}),
        lambda v: v.update(padding=PADDED | {"pad_token": "!"}),
        lambda v: v.update(post_processor=TWICE),
        lambda v: v["model"].update(dropout=0.9),
    ],
    ids=["truncation", "a stride that does not fit", "padding", "a template", "dropout of merges"],
)
def test_what_was_saved_for_one_use_changes_no_ids(folder, vocabulary, change):
    texts = ["def return self import\n" * 10, "x"]
    loaded = rewrite(folder, change)
    assert loaded.encode(texts) == vocabulary.encode(texts)
    assert loaded.digest == vocabulary.digest


def test_the_characters_of_a_special_token_are_text(vocabulary):
    [ids] = vocabulary.encode(["the marker <|endoftext|> ends a text"])
    assert vocabulary.separator_id not in ids
    assert vocabulary.decode(ids) == "the marker <|endoftext|> ends a text"


def test_a_vocabulary_that_holds_its_special_tokens_does_not_find_them_in_text():
    """As Unigram: its special tokens are pieces, and the likeliest ones."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("a", -1.0), ("<", -2.0), ("s", -2.0), (">", -2.0)]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0))
    loaded = Tokenizer(backend, 1, None)
    assert loaded.encode(["a<s>a", "as", ""]) == [[2, 3, 4, 5, 2], [2, 4], []]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer.json", lambda v: v["added_tokens"][1].update(special=True)),
        ("special_tokens_map.json", lambda v: v.update(pad_token={"content": "<foo>"})),
        ("special_tokens_map.json", lambda v: v.update(additional_special_tokens=["<foo>"])),
        ("tokenizer_config.json", lambda v: v.update(unk_token="<foo>")),
        ("tokenizer_config.json", lambda v: v.update(extra_special_tokens={"image": "<foo>"})),
        (
            "tokenizer_config.json",
            lambda v: v.update(added_tokens_decoder={"9": {"content": "<foo>", "special": True}}),
        ),
        ("config.json", lambda v: v.update(eos_token_id=[0, 2048])),
        ("generation_config.json", lambda v: v.update(pad_token_id=2048)),
    ],
)
def test_every_file_says_which_tokens_are_special(folder, name, change):
    token = {"id": 2048, "content": "<foo>", "special": False, "normalized": False}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    assert rewrite(folder, lambda v: v["added_tokens"].append(token)).special_ids == (0,)
    loaded = rewrite(folder, change, name)
    assert loaded.special_ids == (0, 2048)
    assert (loaded.size, loaded.separator_id) == (2049, 0)


def test_config_says_what_separates_where_the_tokenizer_does_not(folder):
    (folder / "tokenizer_config.json").write_text("{}")
    loaded = rewrite(folder, lambda v: v.update(bos_token_id=17, eos_token_id=None), "config.json")
    assert (loaded.bos_id, loaded.eos_id, loaded.separator_id) == (17, None, 17)
    assert 17 in loaded.special_ids


def test_a_token_that_config_alone_calls_special_is_named(folder, capsys):
    rewrite(folder, lambda v: v.update(pad_token_id=1000, eos_token_id=-1), "config.json")
    assert "token 1000 (" in capsys.readouterr().err


def test_ids_may_have_gaps(folder, vocabulary):
    word = next(token for token, i in vocabulary.vocabulary.items() if i == 1000)
    loaded = rewrite(folder, lambda v: v["model"]["vocab"].update({word: 2060}))
    assert loaded.size == loaded.n_used == 2061
    texts = loaded.tokens(range(loaded.size))
    assert texts[2060] == vocabulary.tokens([1000])[0]
    assert texts[1000] == texts[2055] == ""


def test_a_special_token_beyond_the_vocabulary_needs_no_row(folder):
    token = {"id": 2048, "content": "<pad>", "special": True, "normalized": False}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    loaded = rewrite(folder, lambda v: v["added_tokens"].append(token))
    assert (loaded.size, loaded.n_used) == (2049, 2048)
    loaded = rewrite(folder, lambda v: v["added_tokens"][1].update(special=False))
    assert loaded.n_used == 2049


TEXT = "the cat in the hat, catalog inthe thehat"


def trained(model, trainer, decoder, pre_tokenizer=None):
    """A tokenizer of a few words."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre_tokenizer or pre_tokenizers.Whitespace(), decoder
    backend.train_from_iterator([TEXT] * 50, trainer(vocab_size=80, special_tokens=["<s>"], show_progress=False))
    return Tokenizer(backend, 0, None)


KINDS = {
    "spaces in front": lambda: trained(
        tokenizers.models.BPE(),
        tokenizers.trainers.BpeTrainer,
        tokenizers.decoders.Metaspace(),
        pre_tokenizer=pre_tokenizers.Metaspace(),
    ),
    "as Llama 2 has them": lambda: trained(
        tokenizers.models.BPE(),
        tokenizers.trainers.BpeTrainer,
        tokenizers.decoders.Sequence(
            [
                tokenizers.decoders.Replace("▁", " "),
                tokenizers.decoders.ByteFallback(),
                tokenizers.decoders.Fuse(),
                tokenizers.decoders.Strip(" ", 1, 0),
            ]
        ),
        pre_tokenizer=pre_tokenizers.Metaspace(),
    ),
    "ends of words": lambda: trained(
        tokenizers.models.BPE(end_of_word_suffix="</w>"),
        lambda **settings: tokenizers.trainers.BpeTrainer(end_of_word_suffix="</w>", **settings),
        tokenizers.decoders.BPEDecoder(),
    ),
    "parts of words": lambda: trained(
        tokenizers.models.WordPiece(unk_token="<s>"),
        tokenizers.trainers.WordPieceTrainer,
        tokenizers.decoders.WordPiece(),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_of_an_id_is_its_part_of_a_longer_text(kind):
    loaded = KINDS[kind]()
    [ids] = loaded.encode([TEXT])
    assert "".join(loaded.tokens(ids)).strip() == loaded.decode(ids).strip()
    texts = loaded.tokens(range(1, loaded.size))
    assert len(set(texts)) == len(texts)


def test_bytes_beside_a_vocabulary_of_pieces_join_to_their_character():
    pieces = {"<s>": 0, "a": 1} | {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(pieces, [], byte_fallback=True))
    backend.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    loaded = Tokenizer(backend, 0, None)
    [ids] = loaded.encode(["aé\na"])
    assert "".join(loaded.tokens(ids)).encode("utf-8", "surrogateescape") == "aé\na".encode()


def test_a_word_that_has_no_token_is_one_line():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    loaded = Tokenizer(backend, 0, None)
    assert loaded.encode(["a a"]) == [[1, 1]]
    for text in ("b", "<s>"):
        with pytest.raises(UserError, match="the tokenizer cannot encode this text") as caught:
            loaded.encode([text])
        assert "\n" not in str(caught.value)


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}],
    "pair": [],
}
MENDS_OFFSETS = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


@pytest.mark.parametrize(
    ("config", "process", "begins"),
    [
        ({}, None, False),
        ({"add_bos_token": True}, None, True),
        ({}, TEMPLATE, True),
        ({}, {"type": "Sequence", "processors": [MENDS_OFFSETS, TEMPLATE]}, True),
        ({"add_bos_token": False}, TEMPLATE, False),
        ({}, MENDS_OFFSETS, False),
        ({}, TEMPLATE | {"single": [{"Sequence": {"id": "A", "type_id": 0}}]}, False),
        ({}, {"type": "TemplateProcessing", "single": 3}, False),
    ],
    ids=["nothing", "stated", "saved", "saved among others", "stated otherwise", "offsets", "text first", "odd"],
)
def test_a_sequence_begins_as_the_authors_begin_it(config, process, begins, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((BUNDLED / name).read_text())
        content |= {"post_processor": process} if name == "tokenizer.json" else config
        (tmp_path / name).write_text(json.dumps(content))
    found = read_tokenizer(tmp_path)
    assert found.first_id == (found.bos_id if begins else None)
