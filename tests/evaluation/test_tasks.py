"""What is read off the strings of tokens and out of files, by hand."""

import csv
import dataclasses
import itertools

import numpy as np
import pyarrow
import pytest

from sae_jax import UsageError
from sae_jax.evaluation import tasks
from sae_jax.evaluation.tasks import TextProperties
from sae_jax.types import UserError
from tests.evaluation import cases

pytestmark = pytest.mark.usefixtures("one_device")

SIZES = {"n_sequences": 40, "n_train": 200, "n_test": 60}


def properties(*strings):
    """Of one sequence of these tokens, the last of which is followed by nothing."""
    return TextProperties(strings, np.arange(len(strings))[None], np.ones((1, len(strings)), bool))


def labels(found, name):
    return found.of_tokens()[name][0].tolist()


def test_properties_of_tokens():
    text = properties("if", " total", "[", "22", "] ==", ' "', "Area", "is", '"', ":\n", "    ", "Un", "known")
    assert labels(text, "token begins a word") == [1, 1, -1, -1, -1, -1, 1, 0, -1, -1, -1, 1, 0]
    assert labels(text, "token is capitalised") == [0, 0, -1, -1, -1, -1, 1, 0, -1, -1, -1, 1, 0]
    assert labels(text, "token begins with a vowel") == [1, 0, -1, -1, -1, -1, 1, 1, -1, -1, -1, 1, 0]
    assert labels(text, "token is long") == [0, 1, -1, -1, -1, -1, 1, 0, -1, -1, -1, 0, 1]
    assert labels(text, "token is punctuation") == [0, 0, 1, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0]
    assert labels(text, "token is white space") == [0] * 10 + [1, 0, 0]
    assert labels(text, "token has a digit") == [0, 0, 0, 1] + [0] * 9
    assert labels(text, "next token has a digit") == [0, 0, 1] + [0] * 10
    assert labels(text, "token is in brackets") == [0, 0, 1, 1, 0, 0, 0, 0, 0, 0, -1, 0, 0]
    assert labels(text, "token is in quotation marks") == [0, 0, 0, 0, 0, 1, 1, 1, 0, 0, -1, 0, 0]
    assert labels(text, "token ends a line") == [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, -1, 0, 0]
    assert labels(text, "token begins a line") == [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, -1, 0, 0]
    assert labels(text, "next token is capitalised") == [0, -1, -1, -1, -1, 1, 0, -1, -1, -1, 1, 0, -1]
    assert labels(text, "token is in the first quarter") == [1, 1, 1] + [0] * 10
    assert text.kinds()[0].tolist() == [0, 0, 4, 3, 4, 4, 2, 1, 4, 4, 5, 2, 1]
    passages = {name: label[0].tolist() for name, label in text.of_passages(2, 6).items()}
    assert passages["passage has a digit"] == [1, 0]
    assert passages["passage has a quotation mark"] == [1, 1]
    assert passages["passage has a line break"] == [0, 1]
    assert passages["passage has a bracket"] == [1, 0]


def test_what_was_seen_before_and_what_is_no_text():
    numbers = np.array([[0, 1, 2, 1, 1, 0], [2, 2, 0, 1, 0, 2]])
    text = TextProperties(["<s>", " on", "Off"], numbers, numbers > 0)
    assert text.of_tokens()["token was in the sequence before"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 0, 0, 1, 1]]
    assert text.begins_word.tolist() == [[0, 1, 0, 1, 1, 0], [1, 0, 0, 1, 0, 1]], "a sequence ends a word"


@pytest.fixture(scope="module")
def case():
    return cases.case()


def test_tasks_of_held_out_text_are_balanced_and_tested_on_other_sequences(case):
    n, made = tasks.tasks(case, "", ("binary", "classes", "crossed"), **SIZES)
    made = list(made)
    assert len(made) == n >= 15
    assert {task.kind for task in made} == {"binary", "classes", "crossed"}
    assert len({task.name for task in made}) == n
    for task in made:
        train, train_label, test, test_label = task.split(200, 60, 0)
        for label, limit in ((train_label, 200), (test_label, 60)):
            counts = np.bincount(label, minlength=len(task.classes))
            assert counts.min() == counts.max() > 0
            assert len(label) <= limit
        assert not task.is_test[train].any()
        assert task.is_test[test].all()
        assert (task.examples.n_rows[np.concatenate([train, test])] > 0).all()
    again = next(tasks.tasks(case, "", ("binary",), **SIZES)[1])
    assert np.array_equal(again.split(200, 60, 0).train, made[0].split(200, 60, 0).train)


def test_tasks_with_too_few_of_a_class_are_left_out_and_named(case, capsys):
    ids = case.text.sequences.copy()
    question = [i for i, s in enumerate(case.subject.tokenizer.tokens(range(2048))) if "?" in s]
    ids[np.isin(ids, question)] = ids[0, 1]
    names = {t.name for t in tasks.of_text(with_ids(case, ids), ("binary",), 40)}
    assert "passage has a question mark" not in names
    assert "has too few examples for: " in (said := capsys.readouterr().err)
    assert "passage has a question mark" in said


def with_ids(case, ids):
    return dataclasses.replace(case, text=dataclasses.replace(case.text, sequences=ids))


def write(path, rows, columns=("prompt", "target")):
    path.parent.mkdir(exist_ok=True, parents=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def many(*labels, n=120):
    """Prompts with labels in turn."""
    return [(f"prompt number {i}", *each) for i, each in zip(range(n), itertools.cycle(labels), strict=False)]


def test_a_folder_of_files(case, tmp_path):
    write(tmp_path / "sky.csv", many(("blue",), ("red",)))
    write(tmp_path / "kinds.tsv.csv", many(("a",), ("b",), ("c",), n=150))
    write(tmp_path / "both.csv", many((0, 0), (0, 1), (1, 0), (1, 1), n=200), ("prompt", "target", "spurious"))
    (tmp_path / "readme.txt").write_text("no task")
    made = {task.name: task for task in tasks.tasks(case, str(tmp_path), ("binary",), 40, 50, 20)[1]}
    assert set(made) == {"sky", "both"}
    assert made["sky"].classes == ("blue", "red")
    assert len(made["sky"].examples.n_rows) == 50 + 20, "no more prompts are run than are used"
    assert made["both"].classes == ("0", "1")
    assert np.bincount(made["both"].label).tolist() == [34, 34]
    crossed = {task.name: task for task in tasks.tasks(case, str(tmp_path), ("crossed", "classes"), 40, 60, 20)[1]}
    assert {name: task.kind for name, task in crossed.items()} == {"both": "crossed", "kinds.tsv": "classes"}
    assert np.bincount(crossed["both"].label).tolist() == [15 + 5] * 4


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (many(("yes",)), ("prompt", "target"), r"t.csv: target has 1 classes, and needs 2 to 10"),
        ([], ("prompt", "target"), r"t.csv: target has 0 classes"),
        (many(("yes",), ("no",), n=30), ("prompt", "target"), r"t.csv: .* examples of no to train on; 20 are needed"),
        (many(("yes",)), ("prompt", "label"), r"t.csv has no column target, or two; it has prompt, label"),
        (many((1, 0), (0, 0)), ("prompt", "target", "spurious"), r"t.csv: spurious has 1 classes, and needs 2"),
        ([("", "yes")], ("prompt", "target"), r"t.csv:2: prompt is empty; leave the row out"),
        ([("a", "yes", "b")], ("prompt", "target"), r"t.csv:2 has 3 fields, and the header 2"),
    ],
)
def test_a_file_that_is_no_task_is_refused_by_name(case, tmp_path, rows, columns, message):
    write(tmp_path / "t.csv", rows, columns)
    with pytest.raises(UserError, match=message):
        tasks.tasks(case, str(tmp_path), ("binary",), **SIZES)


def test_a_folder_that_is_not_there_or_has_no_file_is_refused(case, tmp_path):
    with pytest.raises(UsageError, match=r"is no folder; give one of .csv files, sae-probes, or nothing"):
        tasks.tasks(case, str(tmp_path / "none"), ("binary",), **SIZES)
    with pytest.raises(UsageError, match=r"no .csv file is in the folder"):
        tasks.tasks(case, str(tmp_path), ("binary",), **SIZES)


def test_the_sets_of_sae_probes_where_they_are_installed(case, tmp_path, monkeypatch, capsys):
    """A package of the same form, which fails if it is imported."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="the package is not installed; pip install --no-deps sae-probes"):
        tasks.tasks(case, "sae-probes", ("binary",), **SIZES)
    monkeypatch.undo()
    folder = tmp_path / "sae_probes" / "data" / "cleaned_data"
    (tmp_path / "sae_probes").mkdir()
    (tmp_path / "sae_probes" / "__init__.py").write_text("raise ImportError")
    sets = {"10_sky": many(("blue",), ("red",)), "2_year": [(f"p {i}", i) for i in range(99)]}
    for name, rows in sets.items():
        path = write(folder / f"{name}.csv", rows)
        with pyarrow.CompressedOutputStream(str(path) + ".zst", "zstd") as stream:
            stream.write(path.read_bytes())
        path.unlink()
    monkeypatch.syspath_prepend(tmp_path)
    n, made = tasks.tasks(case, "sae-probes", ("binary",), **SIZES)
    assert [task.name for task in made] == ["10_sky"]
    assert n == 1
    assert "1 of 2 sets are left out" in (said := capsys.readouterr().err)
    assert "2_year" in said
