"""What a text is, by the name and the content of its files."""

import itertools
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_jax.activations import formats
from sae_jax.activations.fields import Fields
from sae_jax.activations.formats import IN_FOLDERS
from sae_jax.activations.harvest import HarvestConfig, harvest
from sae_jax.activations.text import documents, is_there, resolve, scan
from sae_jax.types import UsageError, UserError

LINES = '{"id": 1, "text": "one"}\n{"id": 2, "text": "two"}\n'
ARRAY = json.dumps([{"text": "one"}, {"text": "two"}], indent=1)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.jsonlines", "a.JSONL", "a.Json"])
def test_json_lines_are_known_by_any_of_their_names(tmp_path, name):
    (tmp_path / name).write_text(LINES)
    assert list(documents(str(tmp_path / name))) == list(documents(str(tmp_path))) == ["one", "two"]


def test_an_array_of_objects_is_read_record_by_record(tmp_path):
    (tmp_path / "a.json").write_text(ARRAY)
    assert list(documents(str(tmp_path / "a.json"))) == ["one", "two"]
    (tmp_path / "a.json").write_text('[{"text": "one"}, 3]')
    with pytest.raises(UserError, match=r"a\.json, record 1, is not a JSON object"):
        list(documents(str(tmp_path / "a.json")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", LINES, "JSON objects under a name"),
        ("a.txt", ARRAY, "JSON objects under a name"),
        ("a", LINES, "JSON objects under a name"),
        ("a.json", '{"text": "one"', "neither JSON Lines nor an array"),
        ("a.json", "[1, 2]", "neither JSON Lines nor an array"),
        ("a.json", "[" * 100_000, "neither JSON Lines nor an array"),
        ("a.json", '{\n"text": "one"\n}', r"a\.json:1 is not a JSON object"),
        ("a.jsonl", ARRAY, r"a\.jsonl:1 is not a JSON object"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl:1 is not a JSON object"),
        ("a.txt", "h\0e\0l\0l\0o\0", "zero bytes"),
        *((f"a.{suffix}", "text", rf"\.{suffix} is not a format") for suffix in ("xz", "zip", "xlsx", "arrow", "pdf")),
        ("a.jsonl.GZ", LINES, r"not packed as \.gz files are"),
        ("a.zst", LINES, r"not packed as \.zst files are"),
        ("a.parquet", LINES, "damaged or cut short"),
        ("a.json", ARRAY[:-1], "not a whole JSON array"),
        ("a.txt", "PAR1 and so on", r"parquet under a name that does not end in \.parquet"),
    ],
)
def test_what_is_not_known_is_refused_and_never_taken_as_plain_text(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        list(documents(str(tmp_path / name)))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_text_may_begin_like_json(tmp_path):
    for content in ("[Chapter 1]", '{"quoted"} he said', "{}", '{"a": 1} and {"b": 2}'):
        (tmp_path / "a.txt").write_text(content)
        assert list(documents(str(tmp_path / "a.txt"))) == [content]


@given(st.text("ab \n", max_size=90), st.lists(st.integers(1, 9), min_size=1), st.integers(10, 40), st.integers(2, 10))
@settings(max_examples=200)
def test_a_long_text_is_cut_where_it_says_itself_and_not_where_its_blocks_end(text, sizes, whole, part):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "WHOLE", whole)
        patch.setattr(formats, "PART", part)
        characters = iter(text)
        blocks = []
        for size in itertools.cycle(sizes):
            if not (block := "".join(itertools.islice(characters, size))):
                break
            blocks.append(block)
        got, in_one = (list(formats._of_plain_text(each)) for each in (blocks, [text]))
    assert "".join(got) == text
    assert got == in_one
    assert len(got) == 1 if len(text) <= whole else max(map(len, got)) <= part
    for document in got[:-1] if len(got) > 1 else []:
        later = document[part // 2 :]
        ends = [end for end in ("\n\n", "\n", " ") if end in later]
        assert document.endswith(ends[0]) if ends else len(document) == part


def test_plain_text_under_another_name_is_said_to_be_taken_for_it(tmp_path, capsys):
    (tmp_path / "a.rst").write_text("# head")
    assert list(documents(str(tmp_path / "a.rst"))) == ["# head"]
    assert "a.rst is read as plain text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", b"one"), ("a.jsonl", b'{"text": "one"}\n'), ("a.json", b'[{"text": "one"}]')]
)
def test_a_byte_order_mark_is_no_text(tmp_path, name, content):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert list(documents(str(tmp_path / name))) == list(documents(str(tmp_path))) == ["one"]


def test_files_that_are_left_out_are_counted_and_named(tmp_path, capsys):
    contents = {"a.txt": b"import os\n" * 50, "b.txt": b"\xe9", "c.csv": b"x,y", "d.TXT": b"x\0"}
    contents |= {"e.json": b'{"name": "settings"}', "f.xz": b"\xfd7zXZ", "g.txt": LINES.encode()}
    folder = tmp_path / "text"
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    left_out = {
        "not UTF-8": ["b.txt", "d.TXT"],
        'JSON without records that have a string "text"': ["e.json"],
        "JSON objects under a name that does not end in .json or .jsonl": ["g.txt"],
        'which has no column "text"; it has x, y; choose one with harvest.text_column': ["c.csv"],
        f"not named {', '.join(IN_FOLDERS)} (or these with .gz or .zst)": ["f.xz"],
    }
    found = scan(str(folder)).left_out
    assert {why: [path.name for path in paths] for why, paths in found.items()} == left_out
    in_glob = scan(f"{folder}/*").left_out
    assert [path.name for path in in_glob[".xz is not a format that is read"]] == ["f.xz"]
    harvest(HarvestConfig(text=str(folder), context=16, hooks=("resid_pre.0",)), str(tmp_path / "set"))
    said = capsys.readouterr().err
    assert f"2 of 7 files are left out, not UTF-8: {folder}/b.txt, {folder}/d.TXT\n" in said
    assert f"it has x, y; choose one with harvest.text_column: {folder}/c.csv\n" in said


def test_what_is_no_file_is_left_out_and_named(tmp_path):
    """A link to a folder may lead back, a pipe would wait for a writer, a broken link is a file that is gone."""
    folder, elsewhere = tmp_path / "text", tmp_path / "elsewhere"
    for path in (folder / "below", elsewhere):
        path.mkdir(parents=True)
        (path / "a.txt").write_text("import os")
    (folder / "link").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    (folder / "gone.txt").symlink_to(tmp_path / "nothing")
    os.mkfifo(folder / "pipe.txt")
    names = {"links to folders": ["link", "loop"], "no regular files": ["gone.txt", "pipe.txt"]}
    found = scan(str(folder))
    assert found.files == (str(folder / "below" / "a.txt"),)
    assert {why: [path.name for path in paths] for why, paths in found.left_out.items()} == names
    (folder / "b.txt").write_text("import os")
    in_glob = scan(f"{folder}/[bl]*")
    assert in_glob.files == (str(folder / "b.txt"),)
    assert [path.name for path in in_glob.left_out["folders"]] == ["below", "link", "loop"]


def test_a_folder_without_a_readable_file_says_why(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xe9")
    with pytest.raises(UserError, match=r"no file that can be read \(1 not UTF-8\)"):
        list(documents(str(tmp_path)))


@pytest.mark.parametrize("word", ["stdlib", "heldout"])
def test_a_word_that_is_a_path_too_is_refused_until_it_is_said_which(tmp_path, monkeypatch, word):
    monkeypatch.chdir(tmp_path)
    assert resolve(word) == word
    (tmp_path / word).mkdir()
    (tmp_path / word / "mine.txt").write_text("my own words")
    with pytest.raises(UsageError, match=rf"{word}.*write \./{word} for the path"):
        resolve(word)
    assert resolve(f"./{word}") == str(tmp_path / word)
    assert list(documents(resolve(f"./{word}"))) == ["my own words"]
    with pytest.raises(UsageError, match=rf"\./{word}"):
        harvest(HarvestConfig(text=word, context=16), "set")
    # What was recorded is a word, whatever is here now.
    assert next(documents(word)) != "my own words"


def test_a_hub_dataset_that_is_a_folder_too_is_refused_until_it_is_said_which(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("hf:owner/data@abc:test") == "hf:owner/data@abc:test"
    (tmp_path / "owner" / "data").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"write hf:\./owner/data for the path"):
        resolve("hf:owner/data:test")
    assert resolve("hf:./owner/data:test") == f"hf:{tmp_path}/owner/data:test"


def test_a_reference_means_the_same_from_another_folder(tmp_path, monkeypatch):
    """Also where the folder that a pattern starts from has brackets in its name."""
    here = tmp_path / "runs[1]"
    here.mkdir()
    (here / "a.txt").write_text("one")
    (here / "b.txt").write_text("two")
    monkeypatch.chdir(here)
    references = [resolve(reference) for reference in ("a.txt", "*.txt", "../runs[[]1]/b.txt")]
    monkeypatch.chdir(tmp_path)
    assert all(os.path.isabs(reference) for reference in references)
    assert [list(documents(reference)) for reference in references] == [["one"], ["one", "two"], ["two"]]
    assert ".." not in references[2]


def test_the_way_back_from_a_link_is_that_of_the_system(tmp_path, monkeypatch):
    """`link/..` is above the folder that the link leads to, and not above the link."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    (tmp_path / "a" / "t.txt").write_text("the one that is meant")
    (tmp_path / "t.txt").write_text("another")
    monkeypatch.chdir(tmp_path)
    assert list(documents(resolve("link/../t.txt"))) == ["the one that is meant"]


def test_a_column_that_is_not_text_is_one_line(tmp_path, monkeypatch):
    """From a local dataset, as from the hub."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for number, values in enumerate(([1, 2], [["a"], ["b"]], [[None], None])):
        folder = tmp_path / str(number)
        folder.mkdir()
        pq.write_table(pa.table({"text": values, "body": ["x", "y"]}), folder / "train.parquet")
        with pytest.raises(UserError, match=r'row 0, has no string "text" \(it holds \w+\); it has body;') as caught:
            next(documents(f"hf:{folder}"))
        assert "\n" not in str(caught.value)
        assert list(itertools.islice(documents(f"hf:{folder}", Fields("body")), 2)) == ["x", "y"]


def test_a_dataset_that_is_here_is_known_by_its_content(tmp_path, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for name, values in (("a", ["x", "y"]), ("b", ["x", "y"]), ("c", ["x", "z"])):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"text": values}), tmp_path / name / "train.parquet")
    digests = [scan(f"hf:{tmp_path}/{name}").digest for name in "abc"]
    assert digests[0] == digests[1] != digests[2]
    assert is_there(f"hf:{tmp_path}/a")
    assert not is_there(f"hf:{tmp_path}/d")
