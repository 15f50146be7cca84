"""`sae-jax explore` as a process of its own: from the command to an answer, and to its end."""

from __future__ import annotations

import json
import signal
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest

import sae_jax
from sae_jax.commands import main as cli
from tests import runs

TEXT = "def area(width, height):\n    return width"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A small run of the bundled language model."""
    folder = tmp_path_factory.mktemp("explore")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        text = str(runs.ROOT / "sae_jax" / "lm" / "block.py")
        sae_jax.harvest(folder / "set", model="bundled", hooks=["resid_post.1"], text=text, tokens=2048, context=64)
        sae_jax.train(folder / "set", out=folder / "run", n_latents=64, k=4, steps=8, batch_size=64, lr=1e-2)
    return folder / "run"


def ask(address: str, path: str, content: dict | None = None) -> bytes:
    body = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(address + path, body, {"Content-Type": "application/json"} if body else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signal_number", "code", "said"), [(signal.SIGINT, 0, "ended"), (signal.SIGTERM, 143, "stopped by SIGTERM")]
)
def test_it_answers_until_it_is_ended_and_leaves_nothing(run, tmp_path, monkeypatch, signal_number, code, said) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process = runs.start(runs.command("explore", run, "--tokens=512"))
    assert process.stderr is not None
    address = next(line.strip() for line in process.stderr if line.startswith("http://127.0.0.1:"))
    assert b"explore_text.js" in ask(address, "")
    assert b"saeDashboard.index(" in ask(address, "data/index.js")
    assert list(tmp_path.iterdir())
    found = json.loads(ask(address, "api/latents", {"text": TEXT}))
    tokens, latents, values = sae_jax.active(run, TEXT, 4)
    assert found["tokens"] == tokens
    for pairs, of_token, value in zip(found["atTokens"], latents, values, strict=True):
        assert pairs[::2] == of_token[value > 0].tolist()
        np.testing.assert_allclose(pairs[1::2], value[value > 0], rtol=1e-3)
    steered = ask(address, "api/steer", {"prompt": TEXT, "latents": [{"latent": 3, "value": 9}], "n_tokens": 3})
    assert [json.loads(line)["side"] for line in steered.splitlines()] == ["unsteered", "steered"] * 4
    process.send_signal(signal_number)
    ended, last = runs.finish(process)
    assert ended == code
    assert said in last.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--port=70000"], "--port=70000 must be from 0 to 65535"),
        (["--tokens=0"], "--tokens=0 must be at least 1"),
    ],
)
def test_wrong_flags_are_one_line(flags, line, capsys) -> None:
    assert cli.main(["explore", "nowhere", *flags]) == 2
    assert capsys.readouterr().err.splitlines() == [f"sae-jax: {line}"]
