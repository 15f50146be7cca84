"""Dictionaries of a language model that is split over devices, as one too large for any of them: the same numbers."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import sae_jax
from sae_jax import lm
from sae_jax.evaluation.text import open_set, unseen_rows
from sae_jax.sweeps.grid import SweepConfig
from sae_jax.types import Sites, UsageError

SITE = "mlp_act.2"  # whose numbers are split, too


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on live data of a model that is split over two devices."""
    folder = tmp_path_factory.mktemp("split")
    lines = (f"def name_{i}(self):\n    return self.value[{i}] + {i % 7} * self.other_{i % 11}\n" for i in range(100))
    (folder / "text.py").write_text("".join(lines))
    rows = sae_jax.live(
        text=str(folder / "text.py"), context=16, batch_tokens=512, hooks=(SITE,), heldout="heldout", split=2
    )
    settings = {"n_latents": 64, "k": 4, "dtype": "float32", "batch_size": 64, "lr": 1e-2, "decay": 0.0, "steps": 20}
    with jax.numpy_dtype_promotion("standard"):
        sae_jax.train(rows, out=folder / "run", site=SITE, **settings)
    return folder / "run"


def test_metrics(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sae_jax.evaluate(run, tokens=512, batch_tokens=256)[str(run)]
    taken = []
    load = lm.load
    monkeypatch.setattr(lm, "load", lambda *args, **settings: taken.append(load(*args, **settings)) or taken[-1])
    of_split = sae_jax.evaluate(run, tokens=512, batch_tokens=256, split=4)[str(run)]
    (model,) = taken
    up = model.params["layers"]["up.w"]
    assert {shard.data.size for shard in up.addressable_shards} == {up.size // 4}
    assert of_split.keys() == whole.keys()
    for name, value in whole.items():
        if isinstance(value, float):
            assert of_split[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_pages(run: Path, tmp_path: Path) -> None:
    whole, of_split = (
        scores(sae_jax.dashboard(run, tmp_path / str(split), tokens=512, split=split)) for split in (1, 2)
    )
    assert np.any(whole)
    np.testing.assert_allclose(of_split, whole, rtol=2e-3)


def scores(page: Path) -> np.ndarray:
    """Of every latent: how much it does to the logits."""
    script = (page.parent / "data" / "index.js").read_text()
    column = json.loads(script[script.index("(") + 1 : script.rindex(")")])["score"]
    return np.frombuffer(base64.b64decode(column), "<f4")


@pytest.mark.parametrize("split", [0, 9])
def test_more_devices_than_there_are(run: Path, split: int) -> None:
    with pytest.raises(UsageError, match=f"split={split}: this process has 8 devices"):
        sae_jax.evaluate(run, split=split)


def test_held_out_rows_of_a_sweep(run: Path) -> None:
    activations = open_set(sae_jax.load(run).record)
    sites = Sites.one(SITE)
    whole, of_split = (unseen_rows(activations, sites, 256, split)[SITE] for split in (1, 4))
    assert whole.shape == of_split.shape
    np.testing.assert_allclose(of_split, whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match=r"sweep.split=0 must be at least 1"):
        SweepConfig(split=0)
