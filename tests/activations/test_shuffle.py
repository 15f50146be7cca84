"""Documents in an order by seed: the same on every machine, whatever they lie in, and never all in memory."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_jax.activations import shuffle
from sae_jax.activations.harvest import HarvestConfig, harvest
from sae_jax.activations.shuffle import buffered, permuted
from sae_jax.activations.store import open_activations
from sae_jax.activations.text import named_documents
from sae_jax.types import UsageError


def texts(reference, seed, files=()):
    return [document for _, document in named_documents(reference, files=files, seed=seed)]


@given(st.lists(st.text(max_size=9), max_size=40), st.integers(0, 2**64), st.integers(1, 50), st.integers(0, 90))
@settings(max_examples=60)
def test_every_document_comes_once_and_waits_its_turn(documents, seed, n_documents, n_characters):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "N_DOCUMENTS", n_documents)
        patch.setattr(shuffle, "N_CHARACTERS", n_characters)
        taken = 0

        def stream():
            nonlocal taken
            for number, text in enumerate(documents):
                taken += 1
                yield str(number), text

        got = []
        for pair in buffered(stream(), seed):
            got.append(pair)
            assert taken - len(got) <= n_documents
    assert sorted(got, key=lambda pair: int(pair[0])) == [(str(i), text) for i, text in enumerate(documents)]


def test_the_order_is_that_of_the_seed_once_and_for_all():
    assert permuted(range(10), 0) == [4, 7, 6, 1, 9, 3, 8, 5, 2, 0]
    assert permuted(range(10), 0) != permuted(range(10), 1)
    first = Counter(permuted(range(4), seed)[0] for seed in range(4000))
    assert all(900 < first[each] < 1100 for each in range(4))


def test_files_and_documents_are_shuffled_whatever_they_lie_in(tmp_path):
    several = [[f"{file}{i}" for i in range(30)] for file in "abc"]
    for file, each in zip("abc", several, strict=True):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in each).encode()
        (tmp_path / f"{file}.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "long.txt").write_text("x " * 2**20)
    there = texts(str(tmp_path), None)
    one, other = texts(str(tmp_path), 1), texts(str(tmp_path), 2)
    assert sorted(there) == sorted(one) == sorted(other)
    assert len({tuple(each) for each in (there, one, other)}) == 3
    assert one == texts(str(tmp_path), 1)


def test_a_dataset_is_shuffled_by_its_files_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shuffle, "N_DOCUMENTS", 2)
    folder = tmp_path / "data"
    folder.mkdir()
    for file in range(4):
        table = pa.table({"text": [f"{file} {i}" for i in range(5)]})
        pq.write_table(table, folder / f"train-{file:05}-of-00004.parquet")
    there, one, other = (texts(f"hf:{folder}", seed) for seed in (None, 1, 2))
    assert there == [f"{file} {i}" for file in range(4) for i in range(5)]
    assert sorted(there) == sorted(one) == sorted(other)
    assert [*dict.fromkeys(text[0] for text in one)] != [*dict.fromkeys(text[0] for text in other)]


def test_a_set_of_shuffled_documents(tmp_path, capsys):
    """Resumed and shared out, it is the same set; with another seed, or none, it is another."""
    for name in "abcdefgh":
        (tmp_path / f"{name}.txt").write_text(f"import {name}\n" * 40)
    common = {"text": f"{tmp_path}/*.txt", "context": 16, "batch_tokens": 64, "hooks": ("resid_pre.0",)}
    config = HarvestConfig(**common, shuffle=True, seed=3)
    answers = iter([False, False])
    harvest(config, str(tmp_path / "one"), stop=lambda: next(answers, True))
    spec = harvest(config, str(tmp_path / "one"))
    assert spec.shuffled
    for shard in ((1, 2), (0, 2)):
        harvest(config, str(tmp_path / "two"), shard)
    harvest(HarvestConfig(**common), str(tmp_path / "three"))
    one, two, three = (
        np.concatenate([part.read_sequences(np.arange(8)) for part in [open_activations(tmp_path / name)]])
        for name in ("one", "two", "three")
    )
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, three)
    for other in ({"seed": 4, "shuffle": True}, {"seed": 3}):
        with pytest.raises(UsageError, match="is already a set in which"):
            harvest(HarvestConfig(**common, **other), str(tmp_path / "one"))
    harvest(HarvestConfig(**common, shuffle=True, seed=3, tokens=160), str(tmp_path / "four"))
    assert "of 8 files were read, in an order by seed; harvest.tokens=160 ended before" in capsys.readouterr().err
