"""A sample of experiments/faults/fuzz.py: damaged files, whatever is wrong with them, end in one line."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests import runs

FAULTS = runs.ROOT / "experiments" / "faults"
# Inputs, as many as a reader takes in a fifth of a second or so.
READERS = {
    **{"recipe": 3, "words": 10, "set": 20, "sums": 40, "weights": 30, "split weights": 30, "table": 40},
    **{"JSON Lines": 50, "JSON": 50, "folder of texts": 40},
}


@pytest.mark.parametrize("name", READERS)
def test_whatever_stands_in_a_file_ends_in_one_line(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FAULTS))
    fuzz, things = importlib.import_module("fuzz"), importlib.import_module("things")
    made = tmp_path_factory.getbasetemp() / "things"
    things.made(made, [name])
    trials = fuzz.Trials(name, made, tmp_path)
    for number in range(READERS[name]):
        file, data = trials.damaged(0, number)
        assert trials.finding(file, data) is None, f"input {number} of {name}, {file}"
    assert trials.n_refused > READERS[name] // 10
