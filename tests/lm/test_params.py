"""The one tree of parameters: what follows from it, and a family that is added as one file."""

import importlib
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sae_jax import lm
from sae_jax.lm import families, weights
from sae_jax.lm.params import abstract, init, parameters
from tests.lm.tiny import SPEC

NEW_FAMILY = """
import dataclasses

from sae_jax.lm.families import gpt2


def renamed(name):
    return name.replace("transformer.h", "model.blocks").replace("transformer", "model")


def read_spec(config):
    return dataclasses.replace(gpt2.FAMILY.read_spec(config), family="renamed_gpt2")


FAMILY = dataclasses.replace(
    gpt2.FAMILY,
    read_spec=read_spec,
    prefixes=("model.",),
    stored={
        name: dataclasses.replace(stored, name=renamed(stored.name)) for name, stored in gpt2.FAMILY.stored.items()
    },
)
"""


def test_initial_parameters_have_the_shapes_and_scales_of_the_tree(model):
    params = init(SPEC, jax.random.key(0))
    jax.tree.map(lambda array, like: np.testing.assert_equal(array.shape, like.shape), params, abstract(SPEC))
    layers = params["layers"]
    assert float(layers["up.w"].std()) == pytest.approx(0.02, rel=0.1)
    assert float(layers["down.w"].std()) == pytest.approx(0.02 / np.sqrt(2 * SPEC.n_layers), rel=0.1)
    assert set(np.unique(layers["norm1.w"])) | set(np.unique(params["norm.w"])) == {1.0}
    assert not np.asarray(layers["q.b"]).any()


def test_every_parameter_is_stored_once(model, tmp_path):
    weights.save(tmp_path, SPEC, model.params)
    n_numbers = sum(tensor.size for tensor in load_file(tmp_path / "model.safetensors").values())
    assert n_numbers == sum(np.prod(info.shape) for info in jax.tree.leaves(parameters(SPEC)))


def test_a_new_family_is_one_new_file(model, tmp_path, monkeypatch):
    (tmp_path / "renamed_gpt2.py").write_text(NEW_FAMILY)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    folder = tmp_path / "model"
    weights.save(folder, SPEC, model.params)
    path, config = folder / "model.safetensors", folder / "config.json"
    renamed = {
        name.replace("transformer.h", "model.blocks").replace("transformer", "model"): tensor
        for name, tensor in load_file(path).items()
    }
    save_file(renamed, path)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "renamed_gpt2"}))
    loaded = lm.load(str(folder))
    assert loaded.spec.family == "renamed_gpt2"
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)
