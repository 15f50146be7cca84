"""What is shown of long work: on a terminal's pipe, and in a notebook."""

import io
import re
import sys
import types

import pytest

from sae_jax import progress
from sae_jax.commands import show
from sae_jax.progress import Progress
from tests import runs


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, which only the test moves."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def run(clock: list[float], updates: list[tuple[float, int]], **settings) -> None:
    with Progress("train", 1000, "steps", **settings) as shown:
        for at, done in updates:
            clock[0] = at
            shown.update(done, "fvu 0.5")


def test_time_left_does_not_count_compilation(clock, capsys):
    run(clock, [(257.0, 1), (262.0, 101), (267.0, 201), (307.0, 1000)])
    assert capsys.readouterr().err.splitlines() == [
        "train: compiling ...",
        "train: 1/1,000 steps  fvu 0.5  compiling took 4.28 min",
        "train: 101/1,000 steps  fvu 0.5  4.37 min, 45 s left",
        "train: 201/1,000 steps  fvu 0.5  4.45 min, 40 s left",
        "train: 1,000/1,000 steps  fvu 0.5  5.12 min, done",
    ]


def test_fast_work_is_two_lines(clock, capsys):
    run(clock, [(0.1 * i, i) for i in range(1, 1000)] + [(100.0, 1000)])
    assert len(capsys.readouterr().err.splitlines()) < 25


def test_it_says_where_it_resumes(clock, capsys):
    run(clock, [(10.0, 501), (20.0, 601)], start=500)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "train: resumes at 500 of 1,000 steps; compiling ..."
    assert said[-1].endswith("20 s, 39.9 s left")


def test_more_than_was_expected_is_no_negative_time(clock, capsys):
    run(clock, [(10.0, 999), (20.0, 1003)])
    said = capsys.readouterr().err.splitlines()[-1]
    assert "1,003/1,003 steps" in said
    assert said.endswith("done")


def test_silent_ones_show_nothing(clock, capsys):
    run(clock, [(10.0, 500), (20.0, 1000)], silent=True, start=3)
    assert capsys.readouterr() == ("", "")


def test_a_notebook_changes_its_line(clock, capsys, monkeypatch):
    shown: list[str] = []

    class ZMQInteractiveShell: ...

    class Handle:
        def update(self, content, raw):
            assert raw
            shown.append(content["text/plain"])

    def display(content, raw, display_id):
        assert raw
        assert display_id
        return Handle()

    ipython = types.ModuleType("IPython")
    ipython.get_ipython = ZMQInteractiveShell  # type: ignore[attr-defined]
    ipython.display = types.ModuleType("IPython.display")  # type: ignore[attr-defined]
    ipython.display.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython.display)  # type: ignore[attr-defined]
    run(clock, [(10.0, 1), (10.1, 2), (11.0, 101), (20.0, 1000)])
    assert shown[0] == "train: compiling ..."
    assert shown[-1] == "train: 1,000/1,000 steps  fvu 0.5  20 s, done"
    assert len(shown) == 4
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["runs[/old]/s", "set[k=3]", "[bold]x", ":smile:.txt", "[/x]"])
def test_text_of_users_is_never_markup(clock, text, capsys):
    progress.console.print(f"{text}: done")
    with Progress(text, 1, "steps") as shown:
        shown.update(1, text)
    show.print_table([text], [[text]])
    said = capsys.readouterr()
    assert said.err.splitlines()[0] == f"{text}: done"
    assert all(text in line for line in said.err.splitlines())
    assert said.out.split() == [text, text]


def test_text_of_users_is_never_markup_on_a_terminal(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(progress, "console", progress.plain_console(file=file, force_terminal=True, width=120))
    with Progress("runs[/old]", 2, "[/x]") as shown:
        shown.update(2, "[k=3]")
    assert all(text in file.getvalue() for text in ("runs[/old]", "[/x]", "[k=3]"))


def test_there_is_no_other_console():
    ours = (path for path in (runs.ROOT / "sae_jax").rglob("*.py") if path.name != "progress.py")
    assert [
        path for path in ours if re.search(r"(?<!plain_)\bConsole\(|Text\.from_markup|rprint", path.read_text())
    ] == []
