"""Logs that something has damaged: it is said, and what follows the damage is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae_jax import storage
from sae_jax.storage import Lease
from sae_jax.training import logs


def test_a_bad_line_of_the_log_is_said_and_what_follows_it_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ['{"step": 1, "loss": 4.0}', "\x00", '{"loss": 3.0}', "[2]", '{"step": true}', '{"step": 3, "loss": 2.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with logs.Metrics(tmp_path, Lease(None, ""), 3, lambda step: True) as metrics:
        said = capsys.readouterr().err
        metrics.write({"step": 4, "loss": 1.0})
    for what in ("line 2: not a JSON object", "line 4: not a JSON object", "2 lines have no step"):
        assert what in said
    assert [(row["step"], row["loss"]) for row in logs.read_metrics(tmp_path)] == [(1, 4.0), (3, 2.0), (4, 1.0)]
    assert capsys.readouterr().err == ""


def test_attempts_keep_their_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "attempts.jsonl"
    for _ in range(3):
        logs.Attempts(tmp_path, Lease(None, ""), 0).record(5, "preempted")
    kept = path.read_text().splitlines()
    path.write_text("\n".join([kept[0], kept[1][:9], kept[2]]) + "\n")
    logs.Attempts(tmp_path, Lease(None, ""), 5)
    assert [row["attempt"] for row in storage.read_lines(path)] == [0, 2, 3]
    assert "line 2: not a JSON object" in capsys.readouterr().err
