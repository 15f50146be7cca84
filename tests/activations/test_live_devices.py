"""Live data on several devices: shared with the dictionary, or some for the language model alone."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

import sae_jax
from tests import runs

SETTINGS = {"n_latents": 48, "k": 4, "dtype": "float32", "batch_size": 48, "lr": 1e-2, "dead_after_tokens": 1000}
SETTINGS |= {"log_every": 1, "decay": 0.0, "steps": 60}


@pytest.mark.parametrize(("own", "left"), [pytest.param(0, 8, marks=pytest.mark.long), (2, 6)])
def test_a_model_with_devices_of_its_own(tmp_path: Path, own: int, left: int) -> None:
    lines = (f"def name_{i}(self):\n    return self.value[{i}] + {i % 7} * self.other_{i % 11}\n" for i in range(200))
    (tmp_path / "text.py").write_text("".join(lines))
    rows = sae_jax.live(
        text=str(tmp_path / "text.py"),
        context=16,
        batch_tokens=512,
        hooks=("resid_post.1",),
        devices=own,
        memory_gib=1.3e-3,
    )
    assert rows.devices() == jax.devices()[:left]
    with jax.numpy_dtype_promotion("standard"):
        d = sae_jax.train(rows, out=tmp_path / "run", **SETTINGS)
    assert runs.attempts(tmp_path / "run")[0]["mesh"]["latent"] == left
    assert np.isfinite(d.w_enc).all()
    assert runs.rows_of(tmp_path / "run")[-1]["fvu"] < 0.5
