"""`sae-jax import` and `sae-jax export`: what they write, what they say, what they refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import sae_jax
from sae_jax.commands import main as cli
from tests.interchange import samples


def test_in_and_out_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = samples.saelens_topk_rescaled(tmp_path / "theirs")
    assert cli.main(["import", str(theirs.path), "--out", str(tmp_path / "ours")]) == 0
    said = capsys.readouterr().err
    assert "topk, 24 latents, d=8, from saelens" in said
    assert "norms of decoder rows were folded into the encoder" in said
    assert cli.main(["export", str(tmp_path / "ours"), "--format=saelens", "--out", str(tmp_path / "back")]) == 0
    assert cli.main(["import", str(tmp_path / "back"), "--out", str(tmp_path / "again")]) == 0
    x = samples.rows()
    np.testing.assert_array_equal(sae_jax.load(tmp_path / "again")(x), sae_jax.load(tmp_path / "ours")(x))


def test_refusals_are_one_line_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = samples.saelens_topk(tmp_path / "theirs")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for words in (
        ["import", str(theirs.path), "--out", str(taken)],
        ["import", str(theirs.path), "--out", str(tmp_path / "out"), "--format=sealens"],
        ["import", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")],
        ["export", str(tmp_path / "nowhere"), "--format=saelens", "--out", str(tmp_path / "out")],
        ["export", str(theirs.path), "--format=saelens", "--out", str(tmp_path / "out")],
    ):
        assert cli.main(words) in (1, 2)
        assert capsys.readouterr().err.count("\n") == 1
        now = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert {path for path in now if not path.name.endswith(".owner")} == before.keys()
