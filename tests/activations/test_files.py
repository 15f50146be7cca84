"""Tables, packed files and long files: the same documents whatever they lie in, and one line for what is wrong."""

from __future__ import annotations

import csv
import functools
import gzip
import hashlib
import io
import json
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_jax import lm
from sae_jax.activations import blocks, formats
from sae_jax.activations.fields import TEXT_FIELD, Fields
from sae_jax.activations.harvest import HarvestConfig, harvest
from sae_jax.activations.spec import SetSpec, SourceSpec
from sae_jax.activations.store import open_activations
from sae_jax.activations.text import documents, named_documents, scan
from sae_jax.activations.tokens import sequences
from sae_jax.types import UsageError, UserError

TEXTS = ['one, "quoted"', "two\nlines\n", "three\ttabs é 語", "x" * 200_000]


def table(delimiter: str) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerows([["id", "text"], *([str(i), text] for i, text in enumerate(TEXTS))])
    return out.getvalue().encode()


def parquet(texts: list, **settings) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts, "body": ["b"] * len(texts)}), out, **settings)
    return out.getvalue()


def zst(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return out.getvalue().to_pybytes()


LINES = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()
CONTENTS = {
    ".jsonl": LINES,
    ".json": json.dumps([{"text": text} for text in TEXTS]).encode(),
    ".csv": table(","),
    ".tsv": table("\t"),
    ".parquet": parquet(TEXTS, row_group_size=3),
}

# The time of day would be part of the names of tests.
gz = functools.partial(gzip.compress, mtime=0)

PACKINGS = {"": bytes, ".gz": gz, ".zst": zst, ".GZ": gz}


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def refused(path: Path, message: str, fields: Fields = TEXT_FIELD) -> None:
    for read in (scan, lambda *each: list(documents(*each))):
        with pytest.raises(UserError, match=message) as caught:
            read(str(path), fields)
        assert "\n" not in str(caught.value)
        assert path.name in str(caught.value)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("suffix", CONTENTS)
def test_the_documents_are_the_same_whatever_they_lie_in(tmp_path, suffix, packing):
    path = put(tmp_path / f"a{suffix}{packing}", PACKINGS[packing](CONTENTS[suffix]))
    assert list(documents(str(path))) == list(documents(str(tmp_path))) == TEXTS
    sha = hashlib.sha256()
    for text in TEXTS:
        sha.update(len(text.encode()).to_bytes(8, "little") + text.encode())
    positions: list[int] = []
    scanned = scan(str(path), progress=positions.append)
    assert (scanned.digest, scanned.n_documents) == (sha.hexdigest(), 4)
    assert positions == sorted(positions)
    assert positions[-1] == path.stat().st_size


@pytest.mark.parametrize("name", ["a.md", "a.txt", "a", "a.md.gz", "a.txt.zst", "a.gz", "a.zst", "a.PY.ZST"])
def test_plain_text_is_one_document_packed_or_not(tmp_path, name):
    packing = Path(name).suffix.lower()
    put(tmp_path / name, PACKINGS[packing if packing in PACKINGS else ""]("# é\r\nhead\r".encode()))
    assert list(documents(str(tmp_path / name))) == ["# é\nhead\n"]


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_packed_files_may_be_joined_and_must_be_whole(tmp_path, packing):
    first, second = (PACKINGS[packing](each) for each in (LINES[: len(LINES) // 2], LINES[len(LINES) // 2 :]))
    path = put(tmp_path / f"a.jsonl{packing}", first + second)
    assert list(documents(str(path))) == TEXTS
    for data in (first + second[:-1], first + second[:20], first + b"and more", first[:9], second[:100] + first[50:]):
        refused(put(path, data), "is damaged or cut short")
    refused(put(path, b""), "not packed as")


def test_a_zst_file_may_begin_with_what_is_to_be_skipped(tmp_path):
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"abcd"
    assert list(documents(str(put(tmp_path / "a.txt.zst", skipped + zst(b"text") + skipped)))) == ["text"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", gz(b"text"), r"gz under a name that does not end in \.gz"),
        ("a.txt", zst(b"text"), r"zst under a name that does not end in \.zst"),
        ("a.json", gz(LINES), r"gz under a name that does not end in \.gz"),
        ("a.txt.gz", gz(LINES), r"JSON objects under a name"),
        ("a.txt.gz", gz(CONTENTS[".parquet"]), r"parquet under a name"),
        ("a.tar.gz", gz(b"text"), r"\.tar is not a format"),
        ("a.txt.gz.gz", gz(gz(b"text")), r"\.gz is not a format"),
        ("a.txt", "text".encode("utf-16"), r"not UTF-8 \(byte 0\)"),
        ("a.txt.gz", gz(b"x" * 3_000_000 + b"\xe9 "), r"not UTF-8 \(byte 3000000\)"),
        ("a.jsonl", b'{"text": "%s"}\n' % (b"a" * 987) * 1400 + b"\xe9", r"not UTF-8 \(byte 1400000\)"),
        ("a.txt", b"\xef\xbb\xbfabc\xe9", r"not UTF-8 \(byte 6\)"),
        ("a.txt.zst", zst(b"x" * 3_000_000 + b"\0"), r"zero bytes"),
        ("a.csv", b"a,b\n1,2\n", r'a\.csv has no column "text"; it has a, b; choose one with harvest\.text_column'),
        ("a.csv", b"text,text\n1,2\n", 'two columns "text"'),
        ("a.csv", b"id,text\n1,2\n1,2,3\n", r"a\.csv:3 has 3 fields, and the header 2"),
        ("a.csv", b'id,text\n1,"two\nlines"\n1\n', r"a\.csv:4 has 1 fields"),
        ("a.csv", b'id,text\n1,"open\n2,3\n', r"a\.csv:3 is not CSV: unexpected end of data"),
        ("a.csv", b'id,text\n1,"in"side\n', r"a\.csv:2 is not CSV"),
        ("a.csv", b"id,text\n", "is empty"),
        ("a.tsv", b"id,text\n1,2\n", "it has id,text; choose"),
        ("a.parquet", b"", "damaged or cut short"),
        ("a.parquet", CONTENTS[".parquet"][:-1], "damaged or cut short"),
        ("a.parquet", CONTENTS[".parquet"][:40] + b"\xff" * 400 + CONTENTS[".parquet"][440:], "damaged or cut short"),
        ("a.parquet.gz", gz(CONTENTS[".parquet"])[:-9], "damaged or cut short"),
        ("a.parquet", parquet([1, 2]), r'has no string in column "text"; it has body; choose one with'),
        ("a.parquet", parquet([["a"]]), r'has no string in column "text"; it has body; choose one with'),
        ("a.parquet", parquet([None, ""]), "is empty"),
    ],
)
def test_what_is_damaged_is_refused_by_name_and_place(tmp_path, name, data, message):
    refused(put(tmp_path / name, data), message)


def test_a_missing_column_of_parquet_is_refused_and_says_which_there_are(tmp_path):
    path = put(tmp_path / "a.parquet", parquet(TEXTS))
    refused(path, r'a\.parquet has no column "content"; it has text, body; choose one with', Fields("content"))
    assert list(documents(str(path), Fields("body"))) == ["b"] * 4


def test_text_of_parquet_that_is_not_utf8_is_refused(tmp_path):
    buffers = pa.array([b"fine", b"caf\xe9"], pa.binary()).buffers()
    data = pa.StringArray.from_buffers(2, buffers[1], buffers[2])
    pq.write_table(pa.table({"text": data}), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "is not UTF-8")


def test_other_kinds_of_strings_in_parquet_are_text(tmp_path):
    for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"text": pa.array(["a", None, "b"]).cast(kind)}), tmp_path / "a.parquet")
        assert list(documents(str(tmp_path / "a.parquet"))) == ["a", "b"]


def test_csv_leaves_the_process_as_it_was(tmp_path):
    limit = csv.field_size_limit()
    list(documents(str(put(tmp_path / "a.csv", CONTENTS[".csv"]))))
    assert csv.field_size_limit() == limit


def test_of_several_files_a_table_without_the_column_is_left_out_and_a_damaged_one_refused(tmp_path):
    put(tmp_path / "a.csv", CONTENTS[".csv"])
    put(tmp_path / "b.csv", b"x,y\n1,2\n")
    scanned = scan(str(tmp_path))
    assert [Path(name).name for name in scanned.files] == ["a.csv"]
    assert {reason: [path.name for path in paths] for reason, paths in scanned.left_out.items()} == {
        'which has no column "text"; it has x, y; choose one with harvest.text_column': ["b.csv"]
    }
    put(tmp_path / "c.csv", CONTENTS[".csv"][:24])
    with pytest.raises(UserError, match=r"c\.csv:\d+ is not CSV"):
        scan(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": ""}\n{"text": null}\n{"text": "b"}\n'),
        ("a.csv", b'text,id\na,1\n\n"",2\n,3\nb,4\n'),
        ("a.parquet", parquet(["a", "", None, "b"])),
    ],
)
def test_empty_documents_are_left_out_and_counted(tmp_path, name, data):
    scanned = scan(str(put(tmp_path / name, data)))
    assert (scanned.n_documents, scanned.n_empty) == (2, 2)
    assert list(documents(str(tmp_path / name))) == ["a", "b"]


def test_files_without_a_document_are_no_part_of_the_text(tmp_path):
    for name in ("a.txt", "b.jsonl", "c.txt"):
        put(tmp_path / name, b"text" if name == "c.txt" else b"")
    scanned = scan(str(tmp_path))
    assert [Path(name).name for name in scanned.files] == ["c.txt"]
    assert scanned.n_empty == 1


@pytest.mark.parametrize("name", ["a.txt", "a.txt.zst"])
def test_a_long_file_is_cut_into_documents_and_never_whole_in_memory(tmp_path, name):
    n_words = 2**22

    class Words:
        separator_id = 0
        special_ids = (0,)

        def parts(self, text):
            return [text]

        def encode(self, texts):
            return [np.ones(text.count("w"), np.int32) for text in texts]

    with blocks_written(tmp_path / name) as stream:
        for _ in range(n_words // 2**14):
            stream.write(b"a word " * (2**14 - 1) + b"a word\n")
    tracemalloc.start()
    try:
        scanned = scan(str(tmp_path / name))
        n_sequences = sum(1 for _ in sequences(str(tmp_path / name), Words(), 1024, files=scanned.files))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # 28 MiB. No line ends in the second half of most documents, which end after a space then.
    assert scanned.n_documents > 7 * n_words / formats.PART
    assert scanned.n_bytes == 7 * n_words + scanned.n_documents
    assert n_sequences == (n_words + scanned.n_documents) // 1024
    assert peak < 10 * 2**20


def test_a_long_file_is_shuffled(tmp_path, monkeypatch):
    put(tmp_path / "a.txt", "".join(f"{i:06}\n" for i in range(2000)).encode())
    whole = [text for _, text in named_documents(str(tmp_path / "a.txt"), seed=1)]
    assert len(whole) == 1  # it is short
    monkeypatch.setattr(formats, "WHOLE", 1000)
    monkeypatch.setattr(formats, "PART", 70)
    there, shuffled = ([text for _, text in named_documents(str(tmp_path / "a.txt"), seed=seed)] for seed in (None, 1))
    assert "".join(there) == whole[0]
    assert there[1] == "".join(f"{i:06}\n" for i in range(10, 20))
    assert sorted(shuffled) == there != shuffled


def blocks_written(path: Path):
    return pa.output_stream(str(path), compression="zstd" if path.suffix == ".zst" else None)


def test_a_document_in_blocks_has_the_tokens_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    module = sys.modules["sae_jax.lm.tokenizer"]  # sae_jax.lm has a function of that name
    monkeypatch.setattr(module, "PART", 200)
    monkeypatch.setattr(module, "AROUND", 40)
    tokenizer = lm.tokenizer("bundled")
    # Long runs without a place to cut, and characters that lie across the ends of blocks.
    text = "".join(f"def f{i}(x): é語 {'x' * (i % 17) ** 3}\r\n\r\n  return" for i in range(200))
    put(tmp_path / "a.txt", text.encode())
    (ids,) = tokenizer.encode([text.replace("\r\n", "\n")])
    ids = [tokenizer.separator_id, *ids]
    got = np.concatenate(list(sequences(str(tmp_path / "a.txt"), tokenizer, 7)))
    np.testing.assert_array_equal(got, ids[: len(ids) // 7 * 7])


RECORDS = [{"title": "A", "text": "one", "year": 1}, {"title": None, "text": "two", "year": 2}]
TEMPLATE = Fields(template="# {title}\n{text} {{{text}}}")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_template_makes_one_text_of_several_fields(tmp_path, name):
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist([*RECORDS, {"title": "", "text": None}]), tmp_path / name)
    elif name == "a.jsonl":
        put(tmp_path / name, "\n".join(map(json.dumps, [*RECORDS, {"title": "", "text": None}])).encode())
    else:
        put(tmp_path / name, b"title,year,text\nA,1,one\n,2,two\n,3,\n")
    assert list(documents(str(tmp_path / name), TEMPLATE)) == ["# A\none {one}", "# \ntwo {two}"]
    assert scan(str(tmp_path / name), TEMPLATE).n_empty == 1
    assert scan(str(tmp_path / name), TEMPLATE).digest != scan(str(tmp_path / name)).digest
    there = "has no column .*; it has title, (year, )?text; choose one with harvest.text_template"
    if name == "a.jsonl":
        there = r'a\.jsonl:1 has no string "body"; it has title, text; choose one with harvest.text_template'
    refused(tmp_path / name, there, Fields(template="{title} {body}"))


def test_a_field_of_a_template_that_is_no_text_is_refused(tmp_path):
    path = put(tmp_path / "a.jsonl", json.dumps(RECORDS[0]).encode())
    refused(path, r'no string "year" \(it holds int\)', Fields(template="{text} {year}"))


@pytest.mark.parametrize(
    "template",
    ["", "no field", "{}", "{text", "text}", "{text!r}", "{text:>9}", "{text.upper}", "{text[0]}", "{{text}}"],
)
def test_a_template_has_names_of_fields_alone(tmp_path, template):
    """What reaches into a field is the name of one that is not there."""
    path = put(tmp_path / "a.jsonl", b'{"text": "a"}')
    with pytest.raises(UserError, match=r"harvest\.text_template") as caught:
        list(documents(str(path), Fields(template=template)))
    assert "\n" not in str(caught.value)


def test_the_template_is_part_of_the_set(tmp_path):
    lines = "".join(json.dumps({"title": f"import m{i}", "text": "print(m)"}) + "\n" for i in range(60))
    settings = {"context": 16, "batch_tokens": 64, "hooks": ("resid_pre.0",)}
    settings["text"] = str(put(tmp_path / "a.jsonl", lines.encode()))
    spec = harvest(HarvestConfig(text_template=r"{title}\n{text}", **settings), str(tmp_path / "set"))
    assert spec.text_template == "{title}\n{text}"
    assert spec.fields == Fields(template="{title}\n{text}")
    assert open_activations(tmp_path / "set").spec == spec
    with pytest.raises(UsageError, match="is already a set in which"):
        harvest(HarvestConfig(text_template="{text}", **settings), str(tmp_path / "set"))
    with pytest.raises(UsageError, match="both say what the text is; leave out one"):
        HarvestConfig(text_template="{text}", text_column="title", **settings)
    with pytest.raises(UsageError, match="names no field"):
        HarvestConfig(text_template="text", **settings)


def test_sets_without_a_template_have_the_digest_they_had():
    source = SourceSpec("resid_post.2", 64, "bfloat16", "bundled", "ab", "resid_post.2")
    text = {"tokenizer": "bundled", "tokenizer_digest": "cd", "text": "stdlib", "text_digest": "ef"}
    spec = SetSpec((source,), 4, 64, 8, **text, context=16, sequences_per_shard=4)
    assert spec.sha256 == "1c3c6257cbea123cf9e182f9b1132f8a6d4f2ed315ccae648ebf4616470812a0"
    assert "text_template" not in spec.to_json()
    assert SetSpec.from_json(spec.to_json().encode()) == spec


def test_files_that_are_damaged_are_skipped_if_asked(tmp_path, capsys):
    """Wherever the damage lies; the set is that of the other files."""
    folder, whole = tmp_path / "text", tmp_path / "whole"
    folder.mkdir()
    whole.mkdir()
    lines = b'{"text": "import os, sys"}\n' * 50
    for name in ("a.jsonl", "e.jsonl.gz"):
        for each in (folder, whole):
            put(each / name, gz(lines) if name.endswith(".gz") else lines)
    damaged = {
        "b.jsonl": lines + b'{"text": 3}\n',
        "c.jsonl.gz": gz(lines)[:-4],
        "d.parquet": CONTENTS[".parquet"][:-1],
        "f.csv": b'id,text\n1,"open\n',
    }
    for name, data in damaged.items():
        put(folder / name, data)
    settings = {"context": 16, "batch_tokens": 64, "hooks": ("resid_pre.0",), "text": str(folder)}
    with pytest.raises(UserError, match=r"b\.jsonl:51 has no string"):
        harvest(HarvestConfig(**settings), str(tmp_path / "set"))
    assert not (tmp_path / "set").exists()
    spec = harvest(HarvestConfig(**settings, skip_unreadable=True), str(tmp_path / "set"))
    said = capsys.readouterr().err
    assert f"2 of 6 files are left out, damaged or cut short: {folder}/c.jsonl.gz, {folder}/d.parquet\n" in said
    assert f"1 of 6 files are left out, which is not CSV: unexpected end of data: {folder}/f.csv\n" in said
    assert "1 of 6 files are left out, which has no string" in said
    other = harvest(HarvestConfig(**{**settings, "text": str(whole)}), str(tmp_path / "set"))
    assert other.sha256 == spec.sha256
    put(folder / "b.jsonl", lines)
    with pytest.raises(UsageError, match="is already a set in which"):
        harvest(HarvestConfig(**settings, skip_unreadable=True), str(tmp_path / "set"))


def test_a_single_file_that_is_damaged_is_refused_all_the_same(tmp_path):
    path = put(tmp_path / "c.jsonl.gz", gz(LINES)[:-4])
    with pytest.raises(UserError, match="damaged or cut short"):
        scan(str(path), skip_unreadable=True)
    with pytest.raises(UserError, match=r"no file that can be read \(1 damaged or cut short\)"):
        scan(str(tmp_path), skip_unreadable=True)
