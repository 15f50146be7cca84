"""Weights in files of torch and of llama.cpp: the same parameters, or a refusal in one line."""

import fnmatch
import io
import json
import pickle
import shutil
import struct
import sys
import zipfile

import gguf
import huggingface_hub
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sae_jax.lm import UnsupportedError, gguf_file, load, locate, tokenizer
from sae_jax.lm.block import frequencies
from sae_jax.lm.chat import first_template, read_template
from sae_jax.lm.spec import Rotary
from sae_jax.lm.weights import save
from sae_jax.types import UsageError, UserError
from tests.lm.tiny import SPEC
from tests.lm.variants import CONFIGS, write_folder

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "float64": "DoubleStorage"}


class Pickled:
    """Writes the pickle of a dict of tensors as torch does: globals by name, storages by persistent id."""

    def __init__(self):
        self.stream = io.BytesIO()
        self.stream.write(b"\x80\x02}(")

    def text(self, value):
        data = value.encode()
        self.stream.write(b"X" + struct.pack("<I", len(data)) + data)

    def numbers(self, values):
        self.stream.write(b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t")

    def name(self, module, name):
        self.stream.write(f"c{module}\n{name}\n".encode())

    def tensor(self, key, number, array, first=0):
        self.text(key)
        self.name("torch._utils", "_rebuild_tensor_v2")
        self.stream.write(b"((")
        self.text("storage")
        self.name("torch", STORAGES[array.dtype.name])
        self.text(str(number))
        self.text("cpu")
        self.stream.write(b"J" + struct.pack("<i", first + array.size) + b"tQ" + b"J" + struct.pack("<i", first))
        self.numbers(array.shape)
        self.numbers([stride // array.itemsize for stride in array.strides])
        self.stream.write(b"\x89")
        self.name("collections", "OrderedDict")
        self.stream.write(b")RtR")

    def end(self):
        self.stream.write(b"u.")
        return self.stream.getvalue()


def write_torch(path, tensors, pickled=None, packed=zipfile.ZIP_STORED):
    arrays = {key: np.ascontiguousarray(array) for key, array in tensors.items()}
    if pickled is None:
        pickled = Pickled()
        for number, (key, array) in enumerate(arrays.items()):
            pickled.tensor(key, number, array)
    with zipfile.ZipFile(path, "w", packed) as archive:
        archive.writestr("model/data.pkl", pickled.end())
        archive.writestr("model/byteorder", b"little")
        for number, array in enumerate(arrays.values()):
            archive.writestr(f"model/data/{number}", array.tobytes())


@pytest.fixture
def folder(model, tmp_path):
    """A GPT-2 as torch saves it."""
    save(tmp_path, SPEC, model.params)
    write_torch(tmp_path / "pytorch_model.bin", load_file(tmp_path / "model.safetensors"))
    (tmp_path / "model.safetensors").unlink()
    return tmp_path


def test_torchs_file_has_the_same_parameters(folder, model):
    loaded = load(str(folder))
    assert loaded.spec == model.spec
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)


def test_torchs_files_in_parts_are_read_through_their_index(folder, model):
    tensors = dict(tensors_of(model, folder))
    names = sorted(tensors)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, held in parts.items():
        write_torch(folder / file, {name: tensors[name] for name in held})
    (folder / "pytorch_model.bin").unlink()
    weight_map = {name: file for file, held in parts.items() for name in held}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    jax.tree.map(np.testing.assert_array_equal, load(str(folder)).params, model.params)


def tensors_of(model, folder):
    save(folder / "again", SPEC, model.params)
    return load_file(folder / "again" / "model.safetensors")


@pytest.mark.parametrize("has_both", [False, True])
def test_a_repository_of_torchs_files_alone_is_fetched(folder, model, tmp_path, monkeypatch, has_both):
    """Where there are safetensors, the same weights are not fetched a second time."""
    if has_both:
        save_file(tensors_of(model, folder), folder / "model.safetensors")
    snapshot = tmp_path / "cache" / "snapshot"
    snapshot.mkdir(parents=True)

    def fetch(repo, *, revision, allow_patterns):
        for path in folder.iterdir():
            if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, snapshot)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    jax.tree.map(np.testing.assert_array_equal, load("owner/name").params, model.params)
    assert (snapshot / "pytorch_model.bin").exists() != has_both


@pytest.mark.parametrize("n", [1, 2])
def test_a_repository_of_gguf_alone(tmp_path, monkeypatch, n):
    """A single file is fetched; of several quantisations the user has to choose one."""
    names = ["model-Q4_0.gguf", "model-Q8_0.gguf"][:n]
    (tmp_path / "snapshot").mkdir()

    def fetch(repo, *, revision, allow_patterns):
        for name in names:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / "snapshot" / name).write_bytes(b"GGUF")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo, *, revision: ["README.md", *names])
    if n == 1:
        assert [path.name for path in locate("owner/name").iterdir()] == names
        return
    with pytest.raises(
        UserError, match=r"has 2 \.gguf files .*\(hf download owner/name model-Q4_0.gguf\) and give its"
    ):
        locate("owner/name")
    assert not any((tmp_path / "snapshot").iterdir())


def test_the_way_out_of_a_gguf_file_is_not_into_torch(tmp_path, golden, monkeypatch):
    _, path = gguf_of(tmp_path, golden, "llama", "llama")
    config = gguf_file.config(path) | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    monkeypatch.setattr(gguf_file, "config", lambda path: config)
    with pytest.raises(UnsupportedError, match=r"'yarn' are not .* safetensors and not from \.gguf: get the model as"):
        load(str(path))


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


def test_nothing_in_torchs_file_is_run(folder, capsys):
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps({"a": Evil()}, protocol=2))
    with pytest.raises(UserError, match=r"pytorch_model\.bin: it wants \S+\.print, which is no tensor"):
        load(str(folder))
    assert "this must not run" not in capsys.readouterr().out


def cut_storage(path, tensors):
    pickled = Pickled()
    for number, (key, array) in enumerate(tensors.items()):
        pickled.tensor(key, number, array, first=7)  # beyond what is there
    write_torch(path, tensors, pickled)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path, tensors: path.write_bytes(path.read_bytes()[:-100]), "damaged or older than torch 1.6"),
        (lambda path, tensors: path.write_bytes(b"\x80\x02}q\x00."), "damaged or older than torch 1.6"),
        (lambda path, tensors: write_torch(path, tensors, packed=zipfile.ZIP_DEFLATED), "its tensors are packed"),
        (cut_storage, "is cut short"),
    ],
)
def test_a_damaged_file_of_torch_is_refused_in_one_line(folder, model, damage, message):
    damage(folder / "pytorch_model.bin", tensors_of(model, folder))
    with pytest.raises(UserError, match=message) as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


# llama.cpp's names of what these models have.
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LLAMA_NORM = {"post_attention_layernorm": "ffn_norm"}
GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
TOKENS = ["<unk>", "<s>", "</s>", *(chr(97 + i) for i in range(26)), "\u0120", "th", "the", "\u0120the"]
TOKENS += [f"x{i}" for i in range(48 - len(TOKENS))]


def write_gguf(path, config, tensors, architecture, factors=None, template=None):
    """What llama.cpp's converter makes of a checkpoint."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    theta = 1_000_000.0 if architecture == "gemma3" else 10_000.0
    writer.add_rope_freq_base(theta if factors is None else 500_000.0)
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
    if "sliding_window" in config:
        writer.add_sliding_window(config["sliding_window"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["t h", "th e", "\u0120 the"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if template is not None:
        writer.add_chat_template(template)
    names = GGUF_NAMES | (GEMMA_NORMS if architecture == "gemma3" else LLAMA_NORM)
    for key, array in tensors.items():
        module, _, kind = key.rpartition(".")
        layer = module.removeprefix("model.layers.").partition(".")[0] if "layers." in module else ""
        inner = module.removeprefix(f"model.layers.{layer}.") if layer else module
        value = array
        if architecture == "llama" and inner in ("self_attn.q_proj", "self_attn.k_proj"):
            n = config["num_attention_heads" if "q_" in inner else "num_key_value_heads"]
            value = array.reshape(n, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        if architecture == "gemma3" and inner.endswith("norm"):
            value = array + 1
        writer.add_tensor(f"blk.{layer}.{names[inner]}.{kind}" if layer else f"{names[inner]}.{kind}", value)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_of(tmp_path, golden, name, architecture, factors=None, change=None, template=None):
    """(the model from safetensors, the path of the same model in llama.cpp's format)."""
    shapes = json.loads(golden[f"{name}/shapes"].tobytes())
    folder = write_folder(tmp_path / "folder", CONFIGS[name], shapes)
    tensors = load_file(folder / "model.safetensors")
    path = tmp_path / "model.gguf"
    write_gguf(path, CONFIGS[name], (change or (lambda same: same))(tensors), architecture, factors, template)
    return load(str(folder)), path


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("llama", "llama"), ("llama-all-heads", "llama"), ("qwen3", "qwen3"), ("gemma3", "gemma3")],
)
def test_llama_cpps_file_has_the_same_parameters(name, architecture, golden, tmp_path):
    model, path = gguf_of(tmp_path, golden, name, architecture)
    for reference in (path, tmp_path):
        loaded = load(str(reference))
        # The scale of queries is not stored: it is that of the width of a head.
        assert {**vars(loaded.spec), "query_scale": 0} == {**vars(model.spec), "query_scale": 0}
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), loaded.params, model.params)


def test_llama_3s_positions_are_read_from_their_factors(golden, tmp_path):
    stretched = Rotary(500_000.0, "llama3", 32.0, 1.0, 4.0, 8192)
    factors = frequencies(Rotary(500_000.0), 8) / frequencies(stretched, 8)
    _, path = gguf_of(tmp_path, golden, "llama", "llama", factors)
    assert load(str(path)).spec.attention[0].rotary == stretched
    _, path = gguf_of(tmp_path / "other", golden, "llama", "llama", factors[::-1] + 3)
    with pytest.raises(UserError, match=r"rope_freqs\.weight of positions that are not Llama 3's"):
        load(str(path))


def test_the_tokenizer_comes_out_of_the_file(golden, tmp_path):
    model, path = gguf_of(tmp_path, golden, "llama", "llama")
    found = tokenizer(str(path), model.spec.n_vocab)
    (ids,) = found.encode(["the the"])
    assert found.tokens(ids) == ["the", " the"]
    assert (found.bos_id, found.eos_id, found.special_ids) == (1, 2, (0, 1, 2))


def test_the_chat_template_comes_out_of_the_file(golden, tmp_path):
    template = "{{ bos_token }}{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    _, path = gguf_of(tmp_path, golden, "llama", "llama", template=template)
    found = read_template(str(path))
    messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "the the"}]
    ids, owners = found.encode(messages, tokenizer(str(path)), by_message=True)
    the, _, space_the = (TOKENS.index(token) for token in ("the", "th", "\u0120the"))
    assert ids == [1, the, 2, the, space_the, 2]
    assert owners == [-1, 0, -1, 1, 1, -1]
    # What lies beside the file comes first, as its tokenizer.json does.
    (tmp_path / "chat_template.jinja").write_text("one")
    assert read_template(str(path)).digest != found.digest
    _, path = gguf_of(tmp_path / "base", golden, "llama", "llama")
    with pytest.raises(UsageError, match=r"has no chat template .* or that of a \.gguf file"):
        first_template([str(path)])


def test_a_tensor_that_the_model_does_not_use_is_refused(golden, tmp_path):
    change = lambda tensors: tensors | {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}  # noqa: E731
    _, path = gguf_of(tmp_path, golden, "llama", "llama", change=change)
    with pytest.raises(UserError, match=r"q_proj\.bias', which a llama of 3 layers .* does not use"):
        load(str(path))


def test_a_damaged_file_of_llama_cpp_is_refused(golden, tmp_path, monkeypatch):
    _, path = gguf_of(tmp_path, golden, "llama", "llama")
    whole = path.read_bytes()
    for data, message in ((whole[:200], "cannot be read"), (b"GGUF" + b"\xff" * 60, "cannot be read")):
        other = tmp_path / f"cut{len(data)}.gguf"
        other.write_bytes(data)
        with pytest.raises(UserError, match=message) as caught:
            load(str(other))
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "b.gguf").write_bytes(whole)
    with pytest.raises(UserError, match=r"needs the gguf package; install sae_jax\[gguf\]"):
        load(str(tmp_path / "b.gguf"))


def test_several_files_of_llama_cpp_are_not_chosen_from(golden, tmp_path):
    _, path = gguf_of(tmp_path, golden, "llama", "llama")
    path.rename(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes((tmp_path / "a.gguf").read_bytes())
    with pytest.raises(UserError, match=r"has 2 \.gguf files; give the path of one"):
        load(str(tmp_path))
