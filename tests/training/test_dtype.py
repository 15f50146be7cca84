"""The type of products: by what the machine has, settled once for a run."""

from __future__ import annotations

import json

import numpy as np
import pytest

import sae_jax
from sae_jax import planning
from sae_jax.ops import tuning
from sae_jax.saes import topk
from sae_jax.training.settings import TrainConfig
from sae_jax.types import Widths

ROWS = np.random.default_rng(0).standard_normal((256, 8)).astype(np.float32)


@pytest.fixture
def cpu(monkeypatch, tmp_path):
    """A function that makes this CPU one with these flags."""
    monkeypatch.setattr(tuning, "CPUINFO", tmp_path / "cpuinfo")
    return lambda flags: tuning.CPUINFO.write_text(f"flags\t\t: fpu avx2 {flags}\n")


@pytest.mark.parametrize(("flags", "dtype"), [("avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), ("", "float32")])
def test_a_cpu_multiplies_in_bfloat16_if_it_has_units_for_it(cpu, flags, dtype):
    cpu(flags)
    assert topk.Config().product_dtype == dtype
    assert topk.Config(dtype="float32").product_dtype == "float32"
    assert topk.Config().on("gpu").dtype == "bfloat16"


@pytest.mark.long
def test_a_run_keeps_the_type_it_began_with_on_another_cpu(cpu, tmp_path):
    def train(steps: int, **settings) -> dict:
        sae_jax.train(ROWS, out=tmp_path / "run", n_latents=32, k=2, batch_size=32, steps=steps, decay=0, **settings)
        return json.loads((tmp_path / "run/config.json").read_text())["dictionary"]["sae"]

    cpu("")
    assert train(2)["dtype"] == "float32"
    cpu("amx_bf16")
    assert train(4)["dtype"] == "float32"
    with pytest.raises(sae_jax.UsageError, match=r"sae\.dtype"):
        train(6, dtype="bfloat16")


def test_what_a_run_returns_says_the_type(cpu, tmp_path):
    cpu("")
    dictionary = sae_jax.train(ROWS, n_latents=32, k=2, batch_size=32, steps=2)
    dictionary.save(tmp_path / "saved")
    assert sae_jax.load(tmp_path / "saved").record.sae["dtype"] == "float32"


def test_a_plan_is_of_its_targets_type(cpu):
    cpu("")
    job = planning.Job("h100:1", {"": (topk.Config(n_latents=1024, k=4), TrainConfig())}, Widths.one(64))
    slow = planning.Job("h100:1", {"": (topk.Config(n_latents=1024, k=4, dtype="float32"), TrainConfig())}, job.widths)
    assert planning.plan(job)["run"]["hours"] < planning.plan(slow)["run"]["hours"]
