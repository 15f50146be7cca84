import json
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sae_jax import mesh as meshes
from sae_jax.lm import Spec, load, tokenizer, weights
from sae_jax.lm.params import parameters, shardings
from sae_jax.types import UsageError, UserError
from tests.lm.tiny import SPEC


@pytest.fixture
def folder(model, tmp_path):
    weights.save(tmp_path, SPEC, model.params)
    return tmp_path


def rewrite(folder, change):
    """Put `change` of the tensors in the place of the tensors."""
    path = folder / "model.safetensors"
    save_file({name: np.ascontiguousarray(a) for name, a in change(load_file(path)).items()}, path)


def assert_same(loaded, model):
    assert loaded.spec == model.spec
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)


def test_what_is_saved_is_loaded(folder, model):
    loaded = load(str(folder))
    assert_same(loaded, model)
    assert (loaded.reference, loaded.path) == (str(folder), str(folder))
    weights.save(folder, SPEC, model.params, dtype=jnp.bfloat16)
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), model)
    assert_same(load(str(folder), jnp.bfloat16), half)


def test_the_digest_is_that_of_the_weights_and_the_config(folder):
    before = load(str(folder)).digest
    assert len(before) == 64
    assert load(str(folder)).digest == before
    rewrite(folder, lambda tensors: tensors | {"transformer.ln_f.bias": tensors["transformer.ln_f.bias"] + 1})
    changed = load(str(folder)).digest
    assert changed != before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "5"}))
    assert load(str(folder)).digest == changed
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 1e-2}))
    assert load(str(folder)).digest != changed


def test_base_checkpoints_have_no_prefix_and_carry_mask_buffers(folder, model):
    def as_on_the_hub(tensors):
        named = {name.removeprefix("transformer."): a for name, a in tensors.items()}
        mask = np.tril(np.ones((1, 1, 12, 12), np.float32))
        return named | {f"h.{i}.attn.bias": mask for i in range(4)} | {"h.0.attn.masked_bias": np.float32([-1e4])}

    rewrite(folder, as_on_the_hub)
    assert_same(load(str(folder)), model)


def test_shards_are_read_through_their_index(folder, model):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    save_file({"wte.weight": np.zeros(1, np.float32)}, folder / "unrelated.safetensors")
    weight_map = {name: file for file, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(load(str(folder)), model)
    (folder / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"b\.safetensors"):
        load(str(folder))


def damage_truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_config(**change):
    def damage(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, r"model\.safetensors: cannot be read"),
        (damage_config(model_type="opt"), r"'opt', which is not supported; supported: gemma, "),
        (damage_config(scale_attn_by_inverse_layer_idx=True), r"scale_attn_by_inverse_layer_idx=True"),
        (damage_config(activation_function="swish2"), r"'swish2' is not implemented.*gelu_new"),
        (damage_config(n_layer=5), r"no tensor 'transformer\.h\.4\.mlp\.c_proj\.bias'"),
        (damage_config(vocab_size=24), r"'transformer\.wte\.weight' in shape \(23, 16\)"),
        (damage_config(n_head=3), r"n_head=3 does not divide n_embd=16"),
        (lambda folder: (folder / "config.json").unlink(), r"no config\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: not valid JSON"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'), r"lacks 'n_embd'"),
        (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json: Expected `object`, got `array`"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"no \*\.safetensors"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
            r"index\.json: weight_map: Expected `object`",
        ),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reference", ["/no/such/folder", "./nowhere", "a/b/c", "name@", ""])
def test_a_reference_to_nothing_is_refused(reference):
    with pytest.raises(UsageError, match="use bundled, a folder, or hub-id"):
        load(reference)


def test_a_hub_model_is_fetched_at_its_revision(folder, model, monkeypatch):
    asked = []

    def fetch(repo, *, revision, allow_patterns):
        asked.append((repo, revision))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert_same(load("owner/name@v1.0"), model)
    load("name")
    assert asked == [("owner/name", "v1.0"), ("name", None)]


@pytest.mark.parametrize("error", ["LocalEntryNotFoundError", "HTTPError"])  # the second: the connection was cut
def test_a_hub_model_out_of_reach_is_one_line(monkeypatch, error):
    def fail(*_, **__):
        raise getattr(huggingface_hub.errors, error)("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"'owner/name' .* cannot be fetched \(no network\)") as caught:
        load("owner/name")
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    with pytest.raises(UserError, match=r"no tokenizer; copy the tokenizer\.json"):
        tokenizer(str(folder))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no tokenizer that can be read"):
        tokenizer(str(folder))


def test_a_tokenizer_without_a_separator_is_refused(tmp_path):
    bundled = weights.__file__.removesuffix("lm/weights.py") + "assets/bundled_lm/tokenizer.json"
    shutil.copy(bundled, tmp_path)
    with pytest.raises(UserError, match="no bos_token and no eos_token"):
        tokenizer(str(tmp_path))


def untied(tensors):
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"][::-1]}


def drop_tie(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["tie_word_embeddings"]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("change_config", [lambda folder: None, drop_tie], ids=["tied in words", "tied by default"])
def test_a_head_unlike_the_embedding_is_not_dropped(folder, model, change_config):
    change_config(folder)
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"]})
    assert_same(load(str(folder)), model)
    rewrite(folder, untied)
    with pytest.raises(UserError, match=r"'lm_head\.weight' unlike 'transformer\.wte\.weight'.*tie_word_embeddings"):
        load(str(folder))


def test_a_head_of_its_own_is_used_where_the_config_says_so(folder, model):
    rewrite(folder, untied)
    damage_config(tie_word_embeddings=False)(folder)
    loaded = load(str(folder))
    np.testing.assert_array_equal(loaded.params["unembed"], model.params["embed"][::-1])


def test_tensors_that_are_not_used_are_named_once(folder, model, capsys):
    rewrite(folder, lambda tensors: tensors | {"score.weight": np.ones((2, 16), np.float32)})
    assert_same(load(str(folder)), model)
    assert "tensors that are not used: score.weight\n" in capsys.readouterr().err
    load(str(folder))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "name",
    [
        "transformer.h.4.ln_1.weight",  # another number of layers than the config says
        "h.0.attn.c_attn.lora_A.weight",  # an adapter
        "transformer.h.1.crossattention.bias",  # another kind of block
        "lm_head.bias",
        "transformer.wte.lora_B",
    ],
)
def test_a_tensor_that_makes_another_model_is_not_left_out(folder, name):
    rewrite(folder, lambda tensors: tensors | {name: np.ones(16, np.float32)})
    with pytest.raises(UserError, match=rf"a tensor '{name}', which a gpt2 of 4 layers .* does not use"):
        load(str(folder))


@pytest.mark.parametrize(("dtype", "kind"), [(np.int8, "I8"), (np.uint8, "U8"), (bool, "BOOL"), (np.int64, "I64")])
def test_weights_that_are_no_floats_are_refused(folder, dtype, kind):
    """They stand for others, with scales that are somewhere else."""
    name = "transformer.h.1.mlp.c_fc.weight"
    rewrite(folder, lambda tensors: tensors | {name: tensors[name].astype(dtype)})
    with pytest.raises(UserError, match=rf"'{name}' as {kind}.* as F16, BF16, F32, F64"):
        load(str(folder))


def test_weights_in_eight_bits_are_refused(folder):
    """numpy has no such type."""
    path = folder / "model.safetensors"
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    header["transformer.ln_f.bias"] |= {"dtype": "F8_E4M3", "shape": [64]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + path.read_bytes()[8 + size :])
    with pytest.raises(UserError, match=r"'transformer\.ln_f\.bias' as F8_E4M3"):
        load(str(folder))


def test_weights_in_float64_are_rounded_and_it_is_said(folder, model, capsys):
    rewrite(folder, lambda tensors: {name: array.astype(np.float64) for name, array in tensors.items()})
    assert_same(load(str(folder)), model)
    assert "weights in float64 are rounded to float32\n" in capsys.readouterr().err


def test_weights_that_are_there_twice_are_not_chosen_from(folder, model):
    """A copy under another name is no part of the model; of two parts that have a tensor neither is the right one."""
    shutil.copy(folder / "model.safetensors", folder / "copy.safetensors")
    digest = load(str(folder)).digest
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(("a", "b"), "copy.safetensors")}))
    with pytest.raises(UserError, match=r"index\.json names other files than model\.safetensors, which is there, too"):
        load(str(folder))
    index.unlink()
    (folder / "copy.safetensors").write_bytes(b"")
    assert load(str(folder)).digest == digest
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "copy.safetensors")
    with pytest.raises(UserError, match=r"twice, the second time in copy\.safetensors"):
        load(str(folder))


def test_a_model_of_70_billion_parameters_is_read_once_and_split_evenly():
    """By the plan alone: which part of each tensor each of eight devices reads."""
    spec = Spec(
        **{"family": "llama", "n_layers": 80, "d_model": 8192, "n_heads": 64, "n_kv_heads": 8, "d_head": 128},
        **{"d_mlp": 28_672, "n_vocab": 128_256, "n_context": 8192, "activation": "silu", "norm": "rms_norm"},
        **{"positions": "rotary", "gated": True, "tied": False},
        **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), False),
    )
    infos = parameters(spec)
    mesh = meshes.lm_mesh(8, jax.devices()[:8])
    held, whole = dict.fromkeys(mesh.devices.flat, 0), 0
    for info, where in zip(jax.tree.leaves(infos), jax.tree.leaves(shardings(spec, mesh)), strict=True):
        size = np.prod(info.shape)
        indices = where.addressable_devices_indices_map(info.shape)
        sizes = {str(index): np.prod(weights._size(info.shape, index)) for index in indices.values()}
        assert sum(sizes.values()) == size  # distinct parts, each read for all devices that hold it
        for device, index in indices.items():
            held[device] += sizes[str(index)]
        whole += size
    assert 70e9 < whole < 71e9
    assert max(held.values()) == min(held.values()) < 1.001 * whole / 8
