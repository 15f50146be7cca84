import itertools
import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_jax.activations import text as texts
from sae_jax.activations.fields import Fields
from sae_jax.activations.text import documents, scan, stdlib_files
from sae_jax.activations.tokens import TokenText, sequences
from sae_jax.lm import tokenizer
from sae_jax.types import UsageError, UserError


class Bytes:
    """A token for each byte, and one before each document."""

    separator_id = 256
    special_ids = (256,)

    def parts(self, text):
        return [text[i : i + 3] for i in range(0, len(text), 3)]

    def encode(self, texts):
        return [list(text.encode()) for text in texts]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    return tmp_path_factory.mktemp("text") / "documents.jsonl"


@settings(max_examples=40)
@given(
    texts=st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=150),
    context=st.integers(1, 20),
    start=st.integers(0, 30),
    length=st.integers(0, 30),
)
def test_sequences_are_the_joined_documents_cut_up(jsonl, texts, context, start, length):
    reference = write_jsonl(jsonl, texts)
    stream = [i for text in texts for i in (256, *text.encode())]
    whole = len(stream) // context
    expected = np.array(stream[: whole * context], np.int32).reshape(whole, context)
    if not whole:
        with pytest.raises(UserError, match=f"has {len(stream)} tokens"):
            list(sequences(reference, Bytes(), context))
        return
    got = list(sequences(reference, Bytes(), context))
    assert {row.dtype for row in got} == {np.dtype(np.int32)}
    np.testing.assert_array_equal(np.stack(got), expected)
    part = list(sequences(reference, Bytes(), context, start, start + length))
    np.testing.assert_array_equal(np.array(part, np.int32).reshape(-1, context), expected[start : start + length])
    np.testing.assert_array_equal(list(sequences(reference, Bytes(), context, start)), got[start:])


@settings(max_examples=40)
@given(
    texts=st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=150),
    context=st.integers(2, 20),
    start=st.integers(0, 30),
    length=st.integers(1, 30),
    first=st.sampled_from([None, 7]),
)
def test_each_document_is_one_sequence(jsonl, texts, context, start, length, first):
    text = TokenText(write_jsonl(jsonl, texts), Bytes(), context, first=first, kind="document")
    whole = [[256 if first is None else first, *text.encode()] for text in texts]
    padded = [(ids + [256] * context)[:context] for ids in whole]
    marks = [([False] + [True] * (len(ids) - 1) + [False] * context)[:context] for ids in whole]
    lengths, n_read = [], 0

    def on_read(file, n_bytes):
        nonlocal n_read
        n_read += n_bytes

    got = list(text.sequences(start, start + length, on_read, lengths.append))
    here = slice(start, start + length)
    np.testing.assert_array_equal(
        np.array([ids for ids, _ in got]).reshape(-1, context), np.reshape(padded[here], (-1, context))
    )
    assert [mark.tolist() for _, mark in got] == marks[here]
    assert lengths == [len(ids) for ids in whole[here]]
    assert n_read == sum(len(text.encode()) for text in texts[: start + length])


def test_what_comes_before_a_document_is_not_tokenised(tmp_path):
    """So that a harvest of a document a sequence resumes at once."""
    seen = []

    class Watched(Bytes):
        def encode(self, texts):
            seen.extend(texts)
            return super().encode(texts)

    text = TokenText(write_jsonl(tmp_path / "a.jsonl", ["a", "b", "c"]), Watched(), 4, kind="document")
    assert [ids.tolist() for ids, _ in text.sequences(2)] == [[256, ord("c"), 256, 256]]
    assert seen == ["c"]


def test_files_directories_and_globs_give_their_documents_in_order_of_path(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.py").write_text("print()", encoding="utf-8")
    (tmp_path / "b.txt").write_text("two\nlines", encoding="utf-8")
    (tmp_path / "image.png").write_bytes(b"\xff\xfe")
    write_jsonl(tmp_path / "a.jsonl", ["first", "", "second é"])
    assert list(documents(str(tmp_path))) == ["first", "second é", "two\nlines", "print()"]
    assert list(documents(str(tmp_path / "*.txt"))) == ["two\nlines"]
    assert list(documents(str(tmp_path / "**" / "*.py"))) == ["print()"]
    assert list(documents(str(tmp_path / "b.txt"))) == ["two\nlines"]


def test_the_digest_changes_with_the_text_and_with_its_boundaries(tmp_path):
    path = tmp_path / "a.jsonl"
    digests = {scan(write_jsonl(path, texts)).digest for texts in (["ab", "c"], ["a", "bc"], ["ab", "d"], ["abc"])}
    assert len(digests) == 4
    assert scan(str(path)) == scan(str(path))
    assert scan("hf:owner/data@abc:test").digest == "hf:owner/data@abc:test"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "\xff"}', r"not UTF-8 \(byte 10\)"),
        (b'{"text": "a"}\nnonsense\n', r"a\.jsonl:2 is not a JSON object"),
        (b'{"body": "a"}\n', r'a\.jsonl:1 .*string "text"'),
        (b'{"text": 3}\n', r'a\.jsonl:1 .*string "text"'),
        (b'{"text": "a"}\n{"text": "b\\ud800"}\n', r"a\.jsonl:2 has \\ud800, half of a surrogate pair"),
        (b'{"text": ""}\n', r"is empty"),
        (b"", r"is empty"),
    ],
)
def test_a_damaged_text_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(documents(str(path)))
    assert "\n" not in str(caught.value)
    assert "a.jsonl" in str(caught.value)


@pytest.mark.parametrize("reference", ["/no/such/file", "nothing/*.txt", "hf:@rev", ""])
def test_a_text_that_does_not_exist_is_refused(reference):
    with pytest.raises(UsageError, match=r"hf:dataset\[@revision\]\[:split\]"):
        next(documents(reference))


def test_a_directory_without_text_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"needs files in \.txt, \.md, \.py, \.json, \.jsonl"):
        next(documents(str(tmp_path)))


@pytest.mark.parametrize(("context", "start", "stop"), [(0, 0, None), (4, -1, None), (4, 3, 2)])
def test_a_range_that_is_none_is_refused(context, start, stop):
    with pytest.raises(UsageError):
        next(sequences("heldout", Bytes(), context, start, stop))


def test_the_standard_library_is_split_by_name_once_and_for_all():
    train, held_out = (dict(stdlib_files(held_out=flag)) for flag in (False, True))
    assert list(train) == sorted(train)
    assert {Path(name).name for name in train}.isdisjoint(Path(name).name for name in held_out)
    assert len(train) > 10 * len(held_out) > 0
    root = Path(sysconfig.get_paths()["stdlib"])
    assert train["argparse.py"] == (root / "argparse.py").read_text(encoding="utf-8")
    assert list(itertools.islice(documents("stdlib"), 3)) == list(train.values())[:3]


def test_the_bundled_held_out_text_follows_the_rule_of_the_running_python():
    names = [json.loads(line)["name"] for line in texts.HELDOUT.read_text(encoding="utf-8").splitlines()]
    assert {Path(name).name for name in names}.isdisjoint(Path(name).name for name, _ in stdlib_files(held_out=False))
    assert len(list(documents("heldout"))) == len(names)


def test_the_bundled_tokenizer_packs_the_held_out_text():
    rows = list(sequences("heldout", tokenizer("bundled"), 128, stop=20))
    assert np.stack(rows).shape == (20, 128)
    assert rows[0][0] == tokenizer("bundled").separator_id


def test_a_dataset_out_of_reach_is_one_line(monkeypatch):
    import datasets

    def fail(*_, **__):
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"'hf:owner/data' cannot be read: no network; check") as caught:
        next(documents("hf:owner/data"))
    assert "\n" not in str(caught.value)


def test_a_dataset_streams_the_split_and_revision_it_names(monkeypatch):
    import datasets

    asked = []

    def stream(name, *, revision, split, streaming):
        asked.append((name, revision, split, streaming))
        return iter([{"text": "a"}, {"text": "b"}, {"body": "c"}])

    monkeypatch.setattr(datasets, "load_dataset", stream)
    assert list(itertools.islice(documents("hf:owner/data@abc:validation"), 2)) == ["a", "b"]
    with pytest.raises(UserError, match=r'row 2, has no string "text"; it has body; choose'):
        list(documents("hf:owner/data"))
    assert asked == [("owner/data", "abc", "validation", True), ("owner/data", None, "train", True)]


def test_several_files_are_read_without_those_that_are_not_utf8(tmp_path):
    """They are named; a single file is refused."""
    for name, content in (("a", b"one"), ("b", b"caf\xe9"), ("c", b"three"), ("d", "é".encode()[:1])):
        (tmp_path / f"{name}.txt").write_bytes(content)
    for reference in (str(tmp_path), f"{tmp_path}/*.txt"):
        assert list(documents(reference)) == ["one", "three"]
        scanned = scan(reference)
        assert [Path(name).name for name in scanned.files] == ["a.txt", "c.txt"]
        assert {why: [path.name for path in paths] for why, paths in scanned.left_out.items()} == {
            "not UTF-8": ["b.txt", "d.txt"]
        }
        assert scanned.n_bytes == len("one") + len("three") + 2
    with pytest.raises(UserError, match=r"b\.txt is not UTF-8 \(byte 3\)"):
        next(documents(str(tmp_path / "b.txt")))


def test_the_text_may_be_in_another_field(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "a.jsonl").write_text('{"content": "one", "id": 3}\n', encoding="utf-8")
    assert list(documents(str(tmp_path / "a.jsonl"), Fields("content"))) == ["one"]
    with pytest.raises(UserError, match='no string "text"; it has content; choose one with'):
        list(documents(str(tmp_path / "a.jsonl")))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([{"content": "two"}]))
    assert list(documents("hf:owner/data", Fields("content"))) == ["two"]
    assert scan("hf:owner/data", Fields("content")) != scan("hf:owner/data")


def test_it_is_said_what_has_been_read(tmp_path):
    """As sequences come, not as the tokeniser reads ahead."""
    for name, n in (("a", 10), ("b", 5), ("c", 40)):
        (tmp_path / f"{name}.txt").write_text(name * n)
    read: dict[str, int] = {}

    def on_read(file, n_bytes):
        read[Path(file).name] = read.get(Path(file).name, 0) + n_bytes

    stream = TokenText(str(tmp_path), Bytes(), 8).sequences(on_read=on_read)
    assert [next(stream) is not None and dict(read) for _ in range(3)] == [
        {"a.txt": 9},  # a separator and 7 characters, in parts of 3
        {"a.txt": 10, "b.txt": 5},  # 3 and a separator, 4
        {"a.txt": 10, "b.txt": 5, "c.txt": 6},
    ]
    list(stream)
    assert read == {"a.txt": 10, "b.txt": 5, "c.txt": 40}


@pytest.mark.parametrize("context", [2, 5, 8])
def test_every_sequence_begins_with_the_token_that_is_asked_for(context):
    plain = np.concatenate(list(sequences("heldout", Bytes(), context - 1, stop=6)))
    begun = np.stack(list(sequences("heldout", Bytes(), context, stop=6, first=7)))
    assert set(begun[:, 0]) == {7}
    np.testing.assert_array_equal(begun[:, 1:].ravel(), plain)  # nothing of the text is lost
    marks = [marks_T for _, marks_T in TokenText("heldout", Bytes(), context, first=7).sequences(stop=6)]
    assert not np.stack(marks)[:, 0].any()
    with pytest.raises(UsageError, match="use 2 or more"):
        next(sequences("heldout", Bytes(), 1, first=7))
