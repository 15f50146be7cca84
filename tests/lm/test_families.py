"""Every family and setting against transformers' torch models, by golden numbers (tests/golden/make_families.py)."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sae_jax import mesh as meshes
from sae_jax.lm import Hook, generate, load, points, run
from sae_jax.lm.family import families, family
from sae_jax.lm.weights import read_spec, save
from tests.golden.make_families import N_NEW
from tests.lm.tiny import jit_run
from tests.lm.variants import CONFIGS, OLDER, ids_of, write_folder

# Its text is generated, too: windows, groups and rotations meet the cache there.
GENERATED = ("neox", "qwen2-windows", "gemma3")


@pytest.fixture(scope="module")
def folder_of(golden, tmp_path_factory):
    root = tmp_path_factory.mktemp("families")

    def folder(name):
        shapes = json.loads(golden[f"{name}/shapes"].tobytes())
        return root / name if (root / name).exists() else write_folder(root / name, CONFIGS[name], shapes)

    return folder


def relative_error(found, true):
    return float(np.abs(np.asarray(found, np.float64) - true).max() / np.abs(true).max())


def test_every_family_has_a_variant():
    assert {config["model_type"] for config in CONFIGS.values()} | {"gemma3"} == {*families()}


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_language_model_of_one_with_vision_is_read(prefix, folder_of, tmp_path, capsys):
    model = load(str(folder_of("gemma3")))
    tensors = load_file(folder_of("gemma3") / "model.safetensors")
    renamed = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}
    renamed["vision_tower.encoder.layers.0.layer_norm1.weight"] = np.ones(4, np.float32)
    save_file(renamed, tmp_path / "model.safetensors")
    text = {key: value for key, value in OLDER["gemma3"].items() if key != "model_type"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    loaded = load(str(tmp_path))
    assert loaded.spec == model.spec
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)
    assert "tensors that are not used: vision_tower" in capsys.readouterr().err


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_streams_are_those_of_torch(name, golden, folder_of):
    model = load(str(folder_of(name)))
    hooks = tuple(Hook(layer, "resid_post") for layer in range(model.spec.n_layers))
    ids_BT = jnp.asarray(ids_of(CONFIGS[name]), jnp.int32)
    found = jit_run(model, ids_BT, capture=hooks[:: max(len(hooks) - 1, 1)])
    assert relative_error(found.logits[:, 3::4], golden[f"{name}/logits"]) < 5e-6
    for hook, stream in found.acts.items():
        assert relative_error(stream[0, 3::4], golden[f"{name}/streams"][hook.layer]) < 5e-6, hook
    if name in GENERATED:
        text = generate(model, ids_BT, N_NEW, jax.random.key(0))[:, ids_BT.shape[1] :]
        np.testing.assert_array_equal(text, golden[f"{name}/text"])


@pytest.mark.parametrize("name", CONFIGS)
def test_one_sequence_lies_on_a_mesh_as_many_do(name, folder_of):
    """Heads come and go as an axis of size 1, where JAX by itself forgets how one sequence is split."""
    mesh = meshes.make_mesh(meshes.MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        model = load(str(folder_of(name)))
        ids_BT = jax.device_put(jnp.zeros((1, 5), jnp.int32), meshes.sharding(mesh, meshes.ROWS))
        capture = tuple(Hook(0, point) for point in points(model.spec))
        out = jax.eval_shape(partial(run, capture=capture), model, ids_BT)
    for array in (out.logits, *out.acts.values()):
        assert array.sharding.spec[0] == meshes.ROWS[0]


@pytest.mark.parametrize("name", OLDER)
def test_a_config_of_before_says_the_same(name, folder_of, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OLDER[name]))
    assert read_spec(tmp_path) == read_spec(folder_of(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read_back(name, folder_of, tmp_path):
    model = load(str(folder_of(name)))
    save(tmp_path, model.spec, model.params)
    again = load(str(tmp_path))
    assert again.spec == model.spec
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_point_has_a_module(name, folder_of):
    spec = read_spec(folder_of(name))
    assert {*points(spec)} <= {*family(spec.family).modules}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, r"rotary positions of kind 'yarn'.*llama3"),
        ("llama", {"num_key_value_heads": 3}, r"num_key_value_heads=3 does not divide num_attention_heads=4"),
        ("llama", {"num_attention_heads": 5, "num_key_value_heads": 5}, r"=5 does not divide hidden_size=32"),
        ("llama", {"head_dim": 7}, r"7 of 7 numbers of a head rotate; they must be pairs"),
        ("llama", {"intermediate_size": 57}, r"down_proj\.weight' in shape \(32, 56\); its config\.json implies"),
        ("llama", {"num_hidden_layers": 4}, r"no tensor 'model\.layers\.3\.mlp\.down_proj\.weight'"),
        ("llama", {"num_hidden_layers": 2}, r"a tensor 'model\.layers\.2\..*which a llama of 2 layers"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, r"config\.json lacks 'factor'"),
        ("llama", {"hidden_act": "swiglu"}, r"activation function 'swiglu' is not implemented"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, r"'chunked_attention', which is not implemented"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types has 2 layers of 3"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, r"Mistral with layer_types"),
        ("mistral", {"sliding_window": 0}, r"window of layers 0=0 must be above 0"),
        ("gemma", {"use_bidirectional_attention": True}, r"use_bidirectional_attention=true is not implemented"),
        ("gemma3", {"attn_logit_softcapping": 30.0}, r"attn_logit_softcapping=30\.0 is not implemented"),
        ("neox", {"rotary_pct": 1.5}, r"12 of 8 numbers of a head rotate"),
        ("qwen3", {"model_type": "qwen3_moe"}, r"'qwen3_moe', which is not supported.*write_activations"),
    ],
)
def test_a_config_that_is_not_implemented_or_contradicts_its_tensors_is_refused(
    name, change, message, golden, tmp_path
):
    shapes = json.loads(golden[f"{name}/shapes"].tobytes())
    write_folder(tmp_path, CONFIGS[name] | change, shapes)
    with pytest.raises(Exception, match=message) as caught:
        load(str(tmp_path))
    assert type(caught.value).__name__ in ("UserError", "UnsupportedError")
    assert "\n" not in str(caught.value)
    is_torchs = any(word in message for word in ("implemented", "supported", "yarn", "Mistral with"))
    assert ("harvest.backend=torch runs any" in str(caught.value)) == is_torchs
