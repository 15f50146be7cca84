"""Labelled examples for probes: from the properties of held-out text, or from files of prompts and their labels.

    ""            of the held-out text: what can be read off the strings of its tokens, whatever the tokenizer
    sae-probes    the sets that the pip package of that name brings (Kantamneni et al. 2025, arXiv 2502.16681)
    any other     a folder of .csv files with the columns `prompt` and `target`, packed (.gz, .zst) or not

A file whose `target` has two values is a binary task, one with up to MAX_CLASSES a task of several classes. A column
`spurious` of two values, beside a `target` of two, makes a crossed task: what a probe should not go by.

Of held-out text an example is a token, or a passage of PASSAGE tokens, and a fifth of the sequences is for testing. Of
files it is a prompt, and a fifth of each class is. Probes see equally many examples of each class.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from sae_jax.activations import formats
from sae_jax.activations.blocks import kind as kind_of_file
from sae_jax.evaluation import examples
from sae_jax.evaluation.examples import Examples
from sae_jax.evaluation.study import Case
from sae_jax.progress import say_once
from sae_jax.storage import digests
from sae_jax.types import UsageError

Kind = Literal["binary", "classes", "crossed"]
_OF_KIND = {"binary": "two classes", "classes": "three or more classes", "crossed": "two classes and spurious labels"}

SAE_PROBES = "sae-probes"
TEST_SHARE = 5  # one of so many sequences or prompts
MIN_TRAIN, MIN_TEST = 20, 8  # of each class
MAX_CLASSES = 10
PASSAGE = 32  # tokens
TOKENS_OF_SEQUENCE = 24  # that are examples


class Split(NamedTuple):
    """Examples by number, equally many of each class, and their classes."""

    train: np.ndarray  # i64[n]
    train_label: np.ndarray  # i64[n]
    test: np.ndarray  # i64[m]
    test_label: np.ndarray  # i64[m]


@dataclass(frozen=True)
class Task:
    """Examples of several classes."""

    name: str
    kind: Kind
    examples: Examples
    label: np.ndarray  # i64[N]: the class; -1: the example is not used. Crossed: 2 * target + spurious
    is_test: np.ndarray  # bool[N]
    classes: tuple[str, ...]

    def split(self, n_train: int, n_test: int, seed: int) -> Split:
        """At most so many examples, in an order of chance."""
        rng = np.random.default_rng(seed)
        label_N = np.where(self.examples.n_rows > 0, self.label, -1)
        train, test = (
            _balanced(np.where(self.is_test == is_test, label_N, -1), len(self.classes), n, rng)
            for is_test, n in ((False, n_train), (True, n_test))
        )
        return Split(train, self.label[train], test, self.label[test])

    def lacks(self) -> str | None:
        """Which class has too few examples, in words; None: each has enough."""
        label_N = np.where(self.examples.n_rows > 0, self.label, -1)
        return _too_few(label_N, self.is_test, self.classes)


def tasks(
    case: Case, source: str, kinds: Sequence[Kind], n_sequences: int, n_train: int, n_test: int
) -> tuple[int, Iterator[Task]]:
    """How many tasks there are, and the tasks: of files one at a time, as prompts are many.

    Args:
        case: the dictionary in its model, and the held-out text.
        source: see above.
        kinds: of tasks that are asked for. A crossed task of files is a binary one, too.
        n_sequences: of the held-out text.
        n_train: examples of a task, at most.
        n_test: the same.

    Raises UsageError, before anything is run, for files without the columns, or with too few of a class.
    """
    examples.check(case.subject)
    if not source:
        made = of_text(case, kinds, n_sequences)
        return len(made), iter(made)
    paths = _paths(source)
    files, left_out = [], []
    for path in paths:
        try:
            files.append(_read(path, n_train, n_test, case.seed))
        except UsageError:
            if source != SAE_PROBES:
                raise
            left_out.append(_name(path))
    if left_out:
        say_once(
            f"tasks={source}: {len(left_out)} of {len(paths)} sets are left out, as they have more than {MAX_CLASSES} "
            f"classes (numbers, mostly) or too few examples of one: {', '.join(left_out)}"
        )
    suited = [each for each in files if each.kinds & {*kinds}]
    if not suited:
        say_once(f"tasks={source}: no file is a task of {' or '.join(_OF_KIND[kind] for kind in kinds)}")
    return len(suited), (each.task(case, kinds) for each in suited)


def of_text(case: Case, kinds: Collection[Kind], n_sequences: int) -> list[Task]:
    """The tasks that the held-out text gives. Those with too few examples of a class are left out, and named."""
    ids_ST, text_ST = case.text.sequences[:n_sequences], case.text.text[:n_sequences]
    n, width = ids_ST.shape
    numbers, inverse = np.unique(ids_ST, return_inverse=True)
    text = TextProperties(case.subject.tokenizer.tokens(numbers), inverse.reshape(ids_ST.shape), text_ST)
    rng = np.random.default_rng(case.seed)
    place_SP = np.argsort(np.where(text_ST[:, : width - 1], rng.random((n, width - 1)), 2))[:, :TOKENS_OF_SEQUENCE]
    token_ST = np.full((n, width), -1)
    np.put_along_axis(token_ST, place_SP, np.arange(place_SP.size).reshape(place_SP.shape), axis=1)
    size = min(PASSAGE, width)
    n_passages = width // size
    passage_ST = np.arange(width)[None] // size + n_passages * np.arange(n)[:, None]
    passage_ST[:, n_passages * size :] = -1  # what is left of a sequence
    made = examples.of_sequences(case, ids_ST, text_ST, [token_ST, passage_ST], "probing: held-out text")
    is_test_S = np.arange(n) % TEST_SHARE == TEST_SHARE - 1

    of_tokens = {name: np.take_along_axis(each, place_SP, 1).ravel() for name, each in text.of_tokens().items()}
    of_passages = {name: each.ravel() for name, each in text.of_passages(n_passages, size).items()}
    kind_of_token = np.take_along_axis(text.kinds(), place_SP, 1).ravel()
    pools = [
        (of_tokens, made[0], np.repeat(is_test_S, place_SP.shape[1])),
        (of_passages, made[1], np.repeat(is_test_S, n_passages)),
    ]
    found = []
    for labels, pool, is_test in pools:
        binary = [Task(name, "binary", pool, label, is_test, ("no", "yes")) for name, label in labels.items()]
        crossed = [
            Task(f"{a} / {b}", "crossed", pool, _crossed(labels[a], labels[b]), is_test, CELLS)
            for a, b in CROSSED
            if a in labels and b in labels
        ]
        found += [*(binary if "binary" in kinds else ()), *(crossed if "crossed" in kinds else ())]
    if "classes" in kinds:
        found.append(_with_enough(Task("kind of token", "classes", made[0], kind_of_token, pools[0][2], KINDS)))
    enough = [task for task in found if len(task.classes) > 1 and task.lacks() is None]
    if left_out := [task.name for task in found if task not in enough]:
        say_once(f"probing: the held-out text has too few examples for: {'; '.join(left_out)}")
    return enough


def _paths(source: str) -> list[Path]:
    """The files of a source. UsageError if there are none."""
    if source == SAE_PROBES:
        paths = _of_sae_probes()
    else:
        folder = Path(source)
        if not folder.is_dir():
            raise UsageError(f"tasks={source} is no folder; give one of .csv files, {SAE_PROBES}, or nothing")
        paths = sorted(path for path in folder.iterdir() if path.is_file() and kind_of_file(path) in formats.TABLES)
        if not paths:
            raise UsageError(f"tasks={source}: no .csv file is in the folder; give some with columns prompt and target")
    return paths


def digest(source: str) -> str | None:
    """Of the files that tasks come from: what was measured on others does not count. None of the held-out text.

    Raises UsageError for a folder that is not there.
    """
    if not source:
        return None
    parts = [f"{path.name} {digests.of_file(path).xxh3_64}" for path in _paths(source)]
    return digests.of_bytes("\n".join(parts).encode())


CELLS = ("neither", "the second", "the first", "both")  # of a crossed task
CROSSED = (
    ("token begins a word", "token is capitalised"),
    ("token begins a word", "token is long"),
    ("token begins a word", "token is in the first quarter"),
    ("token is long", "token is in the first quarter"),
    ("token is in brackets", "token is punctuation"),
    ("token is in the first quarter", "token is punctuation"),
    ("next token begins a word", "token is punctuation"),
    ("passage has a capital letter", "passage has many characters"),
)
KINDS = ("word", "rest of a word", "capitalised", "number", "punctuation", "white space")


class TextProperties:
    """What the strings of tokens say of each position.

    A word token is one of letters alone. It begins a word if white space is its first character, or the token before
    it does not end in a letter or digit.
    """

    def __init__(self, strings: Sequence[str], number_ST: np.ndarray, text_ST: np.ndarray) -> None:
        """Args:
        strings: what tokens add to a text.
        number_ST: which of these stands at each position.
        text_ST: bool, where sequences hold text; other positions count as a line break.
        """
        strings = [*strings, "\n"]
        self._id_ST = np.where(text_ST, number_ST, len(strings) - 1)

        def each(property_of) -> np.ndarray:
            return np.array([property_of(string) for string in strings])[self._id_ST]

        self.n_characters = each(len)
        self.stripped = each(lambda s: len(s.strip()))
        self.is_word = each(lambda s: s.strip().isalpha())
        self.is_space = each(lambda s: not s.strip())
        self.is_punctuation = each(lambda s: bool(s.strip()) and not any(c.isalnum() for c in s))
        self.has_digit = each(lambda s: any(c.isdigit() for c in s))
        self.has_capital = each(lambda s: any(c.isupper() for c in s))
        self.is_capitalised = each(lambda s: s.strip()[:1].isupper())
        self.is_vowel = each(lambda s: s.strip()[:1].lower() in {*"aeiou"})
        self.has_line_break = each(lambda s: "\n" in s)
        self.has_question = each(lambda s: "?" in s)
        self.n_quotes = each(lambda s: s.count('"') + s.count("“") + s.count("”"))
        self.n_open = each(lambda s: sum(s.count(c) for c in "([{"))
        self.n_closed = each(lambda s: sum(s.count(c) for c in ")]}"))
        ends_in_word = each(lambda s: s[-1:].isalnum())
        self.begins_word = self.is_word & (each(lambda s: s[:1].isspace()) | ~_before(ends_in_word, False))

    def of_tokens(self) -> dict[str, np.ndarray]:
        """{task: i64[S, T]}: 1 where it is true, 0 where not, -1 where it has no sense. The last position has none."""
        anywhere, word = np.ones_like(self.is_word), self.is_word
        width = self._id_ST.shape[1]
        depth = np.cumsum(self.n_open - self.n_closed, axis=1)
        order = np.argsort(self._id_ST, axis=1, kind="stable")  # the same tokens stand together, the first one first
        ordered = np.take_along_axis(self._id_ST, order, 1)
        seen = np.zeros_like(word)
        np.put_along_axis(seen, order, np.pad(ordered[:, 1:] == ordered[:, :-1], ((0, 0), (1, 0))), axis=1)
        longest = np.median(self.stripped[word]) if word.any() else 0
        labels = {
            "next token begins a word": (_after(self.begins_word), anywhere),
            "next token is punctuation": (_after(self.is_punctuation), anywhere),
            "next token is white space": (_after(self.is_space), anywhere),
            "next token has a digit": (_after(self.has_digit), anywhere),
            "next token is capitalised": (_after(self.is_capitalised), _after(word)),
            "token is a word or a part of one": (word, anywhere),
            "token is punctuation": (self.is_punctuation, anywhere),
            "token is white space": (self.is_space, anywhere),
            "token has a digit": (self.has_digit, anywhere),
            "token begins a word": (self.begins_word, word),
            "token is capitalised": (self.is_capitalised, word),
            "token begins with a vowel": (self.is_vowel, word),
            "token is long": (self.stripped > longest, word),
            "token ends a line": (_after(self.has_line_break), ~self.is_space),
            "token begins a line": (_before(self.has_line_break, True), ~self.is_space),
            "token is in quotation marks": (np.cumsum(self.n_quotes, axis=1) % 2 == 1, ~self.is_space),
            "token is in brackets": (depth > 0, ~self.is_space),
            "token was in the sequence before": (seen, anywhere),
            "token is in the first quarter": (np.broadcast_to(np.arange(width) < width // 4, word.shape), anywhere),
        }
        return {name: np.where(has_sense, is_true, -1) for name, (is_true, has_sense) in labels.items()}

    def of_passages(self, n: int, size: int) -> dict[str, np.ndarray]:
        """{task: i64[S, n]} of the n passages of `size` tokens that a sequence is cut into."""

        def total(each_ST) -> np.ndarray:
            return each_ST[:, : n * size].reshape(len(each_ST), n, size).sum(-1)

        n_characters = total(self.n_characters)
        labels = {
            "passage has a question mark": total(self.has_question) > 0,
            "passage has a quotation mark": total(self.n_quotes) > 0,
            "passage has a digit": total(self.has_digit) > 0,
            "passage has a capital letter": total(self.has_capital) > 0,
            "passage has a bracket": total(self.n_open + self.n_closed) > 0,
            "passage has a line break": total(self.has_line_break) > 0,
            "passage has many characters": n_characters > np.median(n_characters),
        }
        return {name: label.astype(np.int64) for name, label in labels.items()}

    def kinds(self) -> np.ndarray:
        """i64[S, T]: which of KINDS each token is; -1: none."""
        masks = (
            self.begins_word & ~self.is_capitalised,
            self.is_word & ~self.begins_word & ~self.is_capitalised,
            self.is_word & self.is_capitalised,
            self.has_digit & ~self.is_word,
            self.is_punctuation,
            self.is_space,
        )
        return np.select(masks, range(len(KINDS)), -1)


@dataclass(frozen=True)
class _File:
    """The prompts of a file that are used."""

    name: str
    kinds: frozenset[Kind]
    prompts: tuple[str, ...]
    label: np.ndarray
    is_test: np.ndarray
    classes: tuple[str, ...]
    targets: tuple[str, ...]  # the classes, and of a crossed task those of the target

    def task(self, case: Case, kinds: Collection[Kind]) -> Task:
        """Run the prompts through the model."""
        made = examples.of_texts(case, self.prompts, self.name)
        if "crossed" in self.kinds and "crossed" not in kinds:
            return Task(self.name, "binary", made, self.label // 2, self.is_test, self.targets)
        kind: Kind = next(kind for kind in ("crossed", "classes", "binary") if kind in self.kinds)
        return Task(self.name, kind, made, self.label, self.is_test, self.classes)


def _read(path: Path, n_train: int, n_test: int, seed: int) -> _File:
    """The task in a file. Raises UsageError if it holds none."""
    prompts, targets, spurious = _columns(path)
    levels = [sorted({*column}) for column in (targets, spurious) if column is not None]
    limits = [MAX_CLASSES] if spurious is None else [2, 2]
    for what, values, most in zip(("target", "spurious"), levels, limits, strict=False):
        if not 2 <= len(values) <= most:
            needed = f"2 to {most}" if most > 2 else "2"
            raise UsageError(f"{path}: {what} has {len(values)} classes, and needs {needed}; leave the file out")
    label, classes = np.array([levels[0].index(target) for target in targets]), tuple(levels[0])
    kinds: tuple[Kind, ...] = ("binary",) if len(classes) == 2 else ("classes",)
    if spurious is not None:
        label = 2 * label + np.array([levels[1].index(value) for value in spurious])
        classes, kinds = tuple(f"{a} and {b}" for a, b in itertools.product(*levels)), ("binary", "crossed")
    rng = np.random.default_rng(seed)
    is_test = np.zeros(len(label), bool)
    for i in range(len(classes)):
        is_test[rng.permutation(np.flatnonzero(label == i))[TEST_SHARE - 1 :: TEST_SHARE]] = True
    if lacking := _too_few(label, is_test, classes):
        raise UsageError(f"{path}: {lacking}")
    parts = ((False, n_train), (True, n_test))
    chosen = [_balanced(np.where(is_test == part, label, -1), len(classes), n, rng) for part, n in parts]
    used = np.concatenate(chosen)
    used_prompts = tuple(prompts[i] for i in used)
    return _File(_name(path), frozenset(kinds), used_prompts, label[used], is_test[used], classes, tuple(levels[0]))


def _columns(path: Path) -> tuple[Sequence[str], Sequence[str], Sequence[str] | None]:
    """Prompts, targets and, if there is such a column, spurious labels of a file."""
    rows = formats.rows_of_table(path)
    _, header = next(rows, ("", []))
    for column in ("prompt", "target"):
        if header.count(column) != 1:
            has = ", ".join(header) or "nothing"
            raise UsageError(f"{path} has no column {column}, or two; it has {has}: name one prompt and one target")
    columns: dict[str, list[str]] = {name: [] for name in ("prompt", "target", "spurious") if name in header}
    for place, row in rows:
        for name, values in columns.items():
            values.append(row[header.index(name)])
            if not values[-1]:
                raise UsageError(f"{place}: {name} is empty; leave the row out")
    return columns["prompt"], columns["target"], columns.get("spurious")


def _name(path: Path) -> str:
    """Of a task, from that of its file."""
    return path.name.removesuffix(".zst").removesuffix(".gz").rpartition(".")[0]


def _of_sae_probes() -> list[Path]:
    spec = importlib.util.find_spec("sae_probes")  # without importing it, which imports torch
    if spec is None or spec.origin is None:
        raise UsageError(
            f"tasks={SAE_PROBES}: the package is not installed; pip install --no-deps sae-probes, or give a folder"
        )
    folder = Path(spec.origin).parent / "data" / "cleaned_data"
    paths = sorted(folder.glob("*.csv.zst"), key=lambda path: (int(path.name.partition("_")[0]), path.name))
    if not paths:
        raise UsageError(f"tasks={SAE_PROBES}: {folder} holds no set; install version 0.4 of the package")
    return paths


def _crossed(target_N: np.ndarray, spurious_N: np.ndarray) -> np.ndarray:
    return np.where((target_N >= 0) & (spurious_N >= 0), 2 * target_N + spurious_N, -1)


def _with_enough(task: Task) -> Task:
    """The same task without the classes that have too few examples."""
    label_N = np.where(task.examples.n_rows > 0, task.label, -1)
    kept = [
        i
        for i in range(len(task.classes))
        if not _too_few(np.where(label_N == i, 0, -1), task.is_test, (task.classes[i],))
    ]
    label = np.select([task.label == i for i in kept], range(len(kept)), -1) if kept else np.full_like(task.label, -1)
    return Task(task.name, task.kind, task.examples, label, task.is_test, tuple(task.classes[i] for i in kept))


def _too_few(label_N: np.ndarray, is_test_N: np.ndarray, classes: Sequence[str]) -> str | None:
    for is_test, least, purpose in ((False, MIN_TRAIN, "train on"), (True, MIN_TEST, "test on")):
        counts = np.bincount(label_N[(is_test_N == is_test) & (label_N >= 0)], minlength=len(classes))
        if counts.min() < least:
            i = int(counts.argmin())
            return f"{counts[i]} examples of {classes[i]} to {purpose}; {least} are needed of each class"
    return None


def _balanced(label_N: np.ndarray, n_classes: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """i64: at most n examples, equally many of each class, by number, in an order of chance."""
    members = [rng.permutation(np.flatnonzero(label_N == i)) for i in range(n_classes)]
    size = min(n // n_classes, *map(len, members))
    return rng.permutation(np.concatenate([each[:size] for each in members]))


def _after(each_ST: np.ndarray) -> np.ndarray:
    """What the next position has; at the last one False."""
    return np.pad(each_ST[:, 1:], ((0, 0), (0, 1)))


def _before(each_ST: np.ndarray, first: bool) -> np.ndarray:
    """What the position before has; at the first one `first`."""
    return np.pad(each_ST[:, :-1], ((0, 0), (1, 0)), constant_values=first)
