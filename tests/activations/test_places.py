"""Where shards begin in a text: a resumed harvest does not tokenise again what comes before, and has the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_jax import lm
from sae_jax.activations import text
from sae_jax.activations.fields import Fields
from sae_jax.activations.harvest import HarvestConfig, harvest
from sae_jax.activations.places import START, Place, Places
from sae_jax.activations.text import Mark, named_documents
from sae_jax.activations.tokens import TokenText
from sae_jax.types import UserError
from tests.activations.test_tokens import Bytes, write_jsonl


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text") / "documents.jsonl"


@settings(max_examples=30)
@given(
    texts=st.lists(st.text(min_size=1, max_size=9), min_size=20, max_size=150),
    context=st.integers(2, 12),
    every=st.integers(1, 4),
    first=st.sampled_from([None, 7]),
    seed=st.sampled_from([None, 3]),
    shard=st.integers(1, 30),
)
def test_from_every_place_come_the_same_sequences(jsonl, texts, context, every, first, seed, shard) -> None:
    reference = write_jsonl(jsonl, texts)
    text = TokenText(reference, Bytes(), context, first=first, seed=seed)
    known = InMemory(every)
    whole = list(text.sequences(places=known))
    assert known.noted.keys() == set(range(every, len(whole), every))
    start, seen, read = min(shard * every, (len(whole) - 1) // every * every), Watched(), []
    again = TokenText(reference, seen, context, first=first, seed=seed)
    part = list(again.sequences(start, on_read=lambda _, n_bytes: read.append(n_bytes), places=known))
    for (ids, marks), (its_ids, its_marks) in zip(part, whole[start:], strict=True):
        np.testing.assert_array_equal(ids, its_ids)
        np.testing.assert_array_equal(marks, its_marks)
    n_stream = sum(1 + len(document.encode()) for document in texts)
    assert seen.n_tokens <= n_stream - start * (context - (first is not None)) + 12  # of the part in which it begins
    assert sum(read) == sum(len(document.encode()) for document in texts)


class InMemory(Places):
    """Without a folder, which takes the time of a disk."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.noted: dict[int, Place] = {}

    def before(self, sequence: int) -> tuple[int, Place]:
        number = max((number for number in self.noted if number <= sequence), default=0)
        return number, self.noted.get(number, START)

    def note(self, sequence: int, place: Callable[[], Place]) -> None:
        if sequence and sequence % self.every == 0:
            self.noted[sequence] = place()


class Watched(Bytes):
    """Counts what is tokenised."""

    n_tokens = 0

    def encode(self, texts: list[str]) -> list[list[int]]:
        self.n_tokens += sum(len(text.encode()) for text in texts)
        return super().encode(texts)


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that were tokenised; parts of long ones are cut where words end."""
    seen: list[str] = []
    original = lm.Tokenizer.encode

    def watched(self: Any, texts: list[str]) -> list[list[int]]:
        seen.extend(texts)
        return original(self, texts)

    monkeypatch.setattr(lm.Tokenizer, "encode", watched)
    return seen


def write_text(path: Path) -> HarvestConfig:
    lines = (json.dumps({"text": f"def name_{i}():\n    return {i}\n" * (i % 9 + 1)}) + "\n" for i in range(300))
    path.write_text("".join(lines))
    return HarvestConfig(text=str(path), context=16, batch_tokens=512, hooks=("resid_post.0",))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_resumed_harvest(one_device, tmp_path: Path, tokenised: list[str]) -> None:
    """It neither counts the tokens of a whole text again nor tokenises what its shards were made of."""
    config = write_text(tmp_path / "text.jsonl")
    harvest(config, str(tmp_path / "whole"))
    assert not (tmp_path / "whole" / "places").exists() or not any((tmp_path / "whole" / "places").iterdir())
    answers = iter([False, False, False, False])
    harvest(config, str(tmp_path / "set"), stop=lambda: next(answers, True))
    assert len(list((tmp_path / "set" / "commits").glob("*.json"))) == 3
    tokenised.clear()
    harvest(config, str(tmp_path / "set"))
    assert files_of(tmp_path / "set") == files_of(tmp_path / "whole")
    assert any("name_299()" in text for text in tokenised)
    assert not any("name_199()" in text for text in tokenised)  # the last of four shards was to come


def test_a_worker_begins_where_another_one_has_been(one_device, tmp_path: Path, tokenised: list[str]) -> None:
    config = write_text(tmp_path / "text.jsonl")
    harvest(config, str(tmp_path / "set"), (3, 4))
    tokenised.clear()
    harvest(config, str(tmp_path / "set"), (2, 4))
    assert tokenised
    assert not any("name_99()" in text for text in tokenised)


@pytest.mark.parametrize("damage", ["cut", "edited"])
def test_a_damaged_note_is_left_out(one_device, tmp_path: Path, capsys, damage: str) -> None:
    config = write_text(tmp_path / "text.jsonl")
    harvest(config, str(tmp_path / "whole"))
    answers = iter([False, False, False, False])
    harvest(config, str(tmp_path / "set"), stop=lambda: next(answers, True))
    notes = sorted((tmp_path / "set" / "places").iterdir())
    assert [note.name for note in notes] == ["1.json", "2.json", "3.json", "whole.json"]
    for note in notes:
        text = note.read_text()
        note.write_text(text[:-9] if damage == "cut" else text.replace('": ', '": 1', 1))
    harvest(config, str(tmp_path / "set"))
    assert "without it the text before is tokenised again" in " ".join(capsys.readouterr().err.split())
    assert files_of(tmp_path / "set") == files_of(tmp_path / "whole")


@pytest.fixture
def streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset of the hub of three files, of 100 documents each but one that is empty, with a mark at each 80th."""
    import datasets

    folder = tmp_path / "data"
    folder.mkdir()
    for file in range(3):
        rows = ["" if i == 7 else f"def name_{file}_{i}():\n    return {i}\n" for i in range(100)]
        pq.write_table(pa.table({"text": rows}), folder / f"train-{file}.parquet", row_group_size=30)
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: load(str(folder), split="train", streaming=True))
    monkeypatch.setattr(text, "MARK_EVERY", 80)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return folder


def test_from_every_mark_come_the_same_documents(streamed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MARK_EVERY", 1)
    marks: list[Mark] = []
    whole = [document for _, document in named_documents("hf:owner/data@abc", on_mark=marks.append)]
    assert [mark.n_documents for mark in marks] == list(range(1, 298))
    for mark in [*marks[:9], *marks[28:31], *marks[97:101], marks[150], *marks[-3:]]:
        mark = msgspec.json.decode(msgspec.json.encode(mark), type=Mark)
        rest = [document for _, document in named_documents("hf:owner/data@abc", mark=mark)]
        assert rest == whole[mark.n_documents :]
    for changes in ({"seed": 0}, {"reference": "hf:owner/data"}):
        list(named_documents(**{"reference": "hf:owner/data@abc", "on_mark": marks.append, **changes}))
    assert len(marks) == 297


@pytest.mark.parametrize(("name", "first_read"), [("hf:owner/data@abc", 162), ("hf:owner/data", 0)])
def test_a_stream_is_read_on(one_device, streamed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name, first_read):
    """From the file that it had reached, where its revision is named; its bytes are those of a single harvest."""
    config = HarvestConfig(text=name, context=16, batch_tokens=512, hooks=("resid_post.0",), tokens=3200)
    harvest(config, str(tmp_path / "whole"))
    answers = iter([False, False, False, False])
    harvest(config, str(tmp_path / "set"), stop=lambda: next(answers, True))
    read: list[int] = []
    original = Fields.document

    def watched(self: Fields, record: Any, place: str) -> str:
        read.append(int(place.split()[-1].strip(",")))
        return original(self, record, place)

    monkeypatch.setattr(Fields, "document", watched)
    harvest(config, str(tmp_path / "set"))
    assert files_of(tmp_path / "set") == files_of(tmp_path / "whole")
    assert read[:2] == [0, first_read]  # the first row shows whether it can be read at all


def test_a_stream_that_has_changed_is_refused(one_device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the hub only the name of a text is known: what has been made would be of one text, and the rest of another."""
    import datasets

    rows = [{"text": f"def name_{i}():\n    return {i}\n"} for i in range(300)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter(rows))
    config = HarvestConfig(text="hf:owner/data", context=16, batch_tokens=512, hooks=("resid_post.0",), tokens=3200)
    answers = iter([False, False, False])
    harvest(config, str(tmp_path / "set"), stop=lambda: next(answers, True))
    done = files_of(tmp_path / "set" / "commits")
    rows[0:0] = [{"text": "another one"}]
    with pytest.raises(UserError, match="'hf:owner/data' is another one than when this set was begun: its document"):
        harvest(config, str(tmp_path / "set"))
    del rows[0]
    rows[60:] = []
    with pytest.raises(UserError, match="has changed or is not there"):
        harvest(config, str(tmp_path / "set"))
    assert files_of(tmp_path / "set" / "commits") == done
