"""Ctrl-C and SIGTERM at any moment of any command, and readers that leave: one line and no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests import runs

COMMAND = """
import importlib, signal, sys, types
from sae_jax.commands import main, signals

def run(argv):
    {body}

def find(name):
    {importing}
    return types.SimpleNamespace(run=run)

main.importlib.import_module = find
sys.argv[1:] = ["harvest"]
sys.exit(main.main())
"""
FALLING = """
    try:
        signal.raise_signal(signal.{first})
    finally:
        signal.raise_signal(signal.{second})"""


def ends(body: str = "pass", importing: str = "pass") -> tuple[int, list[str]]:
    code, said = runs.finish(runs.start([sys.executable, "-c", COMMAND.format(body=body, importing=importing)]))
    return code, said.splitlines()


@pytest.mark.parametrize("where", ["body", "importing"])
@pytest.mark.parametrize(
    ("name", "code", "said"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "stopped by SIGTERM")]
)
def test_the_first_ends_a_command_in_one_line(where: str, name: str, code: int, said: str) -> None:
    line = f"sae-jax: {said}; the same command resumes from what is on disk"
    assert ends(**{where: f"signal.raise_signal(signal.{name})"}) == (code, [line])


@pytest.mark.parametrize(("first", "second"), [("SIGINT", "SIGINT"), ("SIGTERM", "SIGINT"), ("SIGTERM", "SIGTERM")])
def test_the_second_ends_it_at_once(first: str, second: str) -> None:
    code = 128 + getattr(signal, second)
    assert ends(FALLING.format(first=first, second=second)) == (code, ["sae-jax: ended at once"])


def test_a_command_that_asks_for_sigterm_is_not_interrupted() -> None:
    body = "assert not signals.defer_sigterm(); signal.raise_signal(signal.SIGTERM); assert signals.defer_sigterm()"
    assert ends(body) == (0, [])


def test_output_that_nobody_reads_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen(
        runs.command("verify", "--help"),
        env=runs.environment(),
        cwd=runs.ROOT,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert runs.finish(process) == (141, "")
