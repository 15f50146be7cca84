"""harvest.backend=torch where torch is not, and where it is not asked for."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from sae_jax.activations.harvest import harvest
from sae_jax.activations.settings import HarvestConfig
from sae_jax.activations.spec import SetSpec, SourceSpec
from sae_jax.types import UsageError


def test_without_torch_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UsageError, match=r"harvest.backend=torch needs torch .*; pip install 'sae_jax\[torch\]'"):
        harvest(HarvestConfig(backend="torch", tokens=1024), str(tmp_path / "set"))
    assert not (tmp_path / "set" / "dataset.json").exists()


def test_a_model_lies_whole():
    with pytest.raises(UsageError, match=r"harvest.split=2: harvest.backend=torch"):
        HarvestConfig(backend="torch", split=2)


def test_a_set_records_the_back_end_where_it_is_not_jax():
    spec = SetSpec((SourceSpec("a", 4),), n_shards=1, shard_rows=8, chunk_rows=4)
    assert "backend" not in json.loads(spec.to_json())["spec"]
    of_torch = replace(spec, backend="torch")
    assert SetSpec.from_json(of_torch.to_json().encode()) == of_torch
    assert of_torch.sha256 != spec.sha256
    assert of_torch.first_difference(spec) == "backend is 'torch', not None"


def test_nothing_else_imports_torch():
    program = "import sys, sae_jax.runs, sae_jax.lm; assert not {'torch', 'transformers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", program], check=True)
