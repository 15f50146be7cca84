"""Models that transformers runs in torch: their rows and their losses with other rows put in, and what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sae_jax import lm
from sae_jax import mesh as meshes
from sae_jax.activations.harvest import harvest
from sae_jax.activations.sequences import model_at
from sae_jax.activations.settings import HarvestConfig
from sae_jax.activations.store import open_activations
from sae_jax.evaluation.batches import Candidate
from sae_jax.evaluation.evaluate import Settings, evaluate
from sae_jax.evaluation.text import held_out
from sae_jax.lm.model import BUNDLED
from sae_jax.types import Sites, UsageError, UserError, Widths
from tests.evaluation.test_model_loss import Scaled
from tests.golden.make_families import peer
from tests.lm.variants import CONFIGS, ids_of

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")

CONTEXT, FACTOR = 16, 0.5
REPLACED = ("resid_pre", "attn_z", "mlp_act")  # together: each of them is the input of a module
# Families that sae_jax does not compute: [B, T, D], and a tuple that begins with it; a module of a block is given, too.
OTHERS = {
    "opt": (
        {"num_hidden_layers": 2, "ffn_dim": 64, "num_attention_heads": 4, "word_embed_proj_dim": 32, "hidden_size": 32},
        ("model.decoder.layers.0", "model.decoder.layers.1.self_attn"),
    ),
    "bloom": ({"n_layer": 2, "n_head": 4, "hidden_size": 32}, ("transformer.h.0", "transformer.h.1.mlp")),
    "mixtral": (
        {
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "hidden_size": 32,
            "num_local_experts": 4,
        },
        ("model.layers.0.mlp", "model.layers.1.input_layernorm"),
    ),
}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The folder of a model of one of OTHERS, with the tokenizer of the bundled model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(name):
        folder, settings = tmp_path_factory.getbasetemp() / name, OTHERS[name][0]
        if not folder.exists():
            torch.manual_seed(0)
            of_tokens = {"vocab_size": 2048, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
            config = AutoConfig.for_model(name, **settings, **of_tokens)
            model = AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():  # as they are, losses hardly depend on what is put in
                parameter.data *= 5 if parameter.ndim > 1 else 1
            model.save_pretrained(folder)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(BUNDLED / file, folder)
        return folder

    return make


def settings(model, hooks, **changes):
    of_text = {"text": "stdlib", "heldout": "heldout", "context": CONTEXT, "tokens": 24 * CONTEXT, "dtype": "float32"}
    return HarvestConfig(**{"model": (str(model),), "hooks": hooks, "backend": "torch", **of_text, **changes})


def rows_of(path, source):
    activations = open_activations(path)
    return np.concatenate([activations.read_chunk(source, chunk) for chunk in range(activations.n_chunks)])


def tokens_of(path):
    activations = open_activations(path)
    return np.concatenate([activations.read_index(chunk)["token"] for chunk in range(activations.n_chunks)])


def relative_error(found, true):
    true = np.asarray(true, np.float64)
    return float(np.abs(np.asarray(found, np.float64).reshape(true.shape) - true).max() / np.abs(true).max())


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama3", "qwen3-biased", "gemma2-tight", "gemma3"])
def test_every_point_of_every_family_is_the_same_place(name, tmp_path):
    peer(CONFIGS[name], tmp_path)
    ids = ids_of(CONFIGS[name])
    ours, theirs = lm.load(str(tmp_path)), lm.load_torch(str(tmp_path))
    hooks = [lm.Hook(1, point) for point in lm.points(ours.spec) if point != "resid_mid"]
    out = jax.jit(lambda model, ids_BT: lm.run(model, ids_BT, capture=hooks))(ours, jnp.asarray(ids, jnp.int32))
    acts, logits = theirs.run(ids, [str(hook) for hook in hooks])
    assert theirs.spec.n_context == ours.spec.n_context
    assert relative_error(logits, out.logits) < 5e-6
    for hook in hooks:
        assert relative_error(acts[str(hook)], out.acts[hook]) < 5e-6, hook
    values = {hook: jnp.flip(out.acts[hook].reshape(*ids.shape, -1), 0) for hook in hooks if hook.point in REPLACED}
    keep = jnp.asarray(np.random.default_rng(0).random(ids.shape) < 0.5)
    changes = {hook: lm.intervene.replace(value) for hook, value in values.items()}
    edits = lm.intervene.edits(changes, keep)
    want = jax.jit(lambda model, ids_BT: lm.run(model, ids_BT, edits=edits).logits)(ours, jnp.asarray(ids, jnp.int32))
    found = theirs.run_with(ids, keep, {str(hook): value for hook, value in values.items()})
    assert relative_error(found, want) < 5e-6


def test_both_back_ends_store_the_same_rows(tmp_path):
    hooks = ("resid_post.1", "attn_z.2", "mlp_out.0")
    harvest(settings("bundled", hooks, backend="jax"), str(tmp_path / "jax"))
    harvest(settings("bundled", (*hooks, "transformer.h.1")), str(tmp_path / "torch"))
    np.testing.assert_array_equal(tokens_of(tmp_path / "jax"), tokens_of(tmp_path / "torch"))
    for hook in hooks:
        assert relative_error(rows_of(tmp_path / "torch", hook), rows_of(tmp_path / "jax", hook)) < 5e-6
    same = [rows_of(tmp_path / "torch", name) for name in ("resid_post.1", "transformer.h.1")]
    np.testing.assert_array_equal(*same)


@pytest.mark.parametrize("name", OTHERS)
def test_rows_are_the_outputs_of_modules(other, name, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, hooks = other(name), OTHERS[name][1]
    harvest(settings(folder, hooks, batch_tokens=CONTEXT, max_norm_multiple=None), str(tmp_path / "set"))
    activations = open_activations(tmp_path / "set")
    theirs, captured = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), {}
    for hook in hooks:

        def take(_, __, out, hook=hook):
            captured[hook] = (out[0] if isinstance(out, tuple) else out).numpy().copy()

        theirs.get_submodule(hook).register_forward_hook(take)
    n_seen, true = 0, {hook: {} for hook in hooks}
    for seq in range(sum(commit.n_sequences for commit in activations.commits.values())):
        with torch.no_grad():
            theirs(torch.tensor(activations.read_sequences(np.array([seq])), dtype=torch.long))
        for hook in hooks:
            true[hook][seq] = captured[hook][0]
    for chunk in range(activations.n_chunks):
        index = activations.read_index(chunk)
        for hook in hooks:
            want = np.stack([true[hook][s][p] for s, p in zip(index["seq"], index["pos"], strict=True)])
            np.testing.assert_array_equal(activations.read_chunk(hook, chunk), want)
        n_seen += len(index["seq"])
    assert n_seen > 300


def measured(path, hooks):
    """Metrics of a dictionary that halves the rows of these sources."""
    activations, sites = open_activations(path), Sites(hooks, hooks)
    widths = tuple(activations.source(hook).d for hook in hooks)
    candidate = Candidate(
        Scaled(jnp.float32(FACTOR), jnp.zeros(4)),
        sites,
        Widths(widths, widths),
        activations,  # type: ignore[arg-type]
    )
    return evaluate({"": candidate}, Settings(n_tokens=8 * CONTEXT, batch_tokens=4 * CONTEXT))[""].to_json()


@pytest.mark.parametrize("name", OTHERS)
def test_loss_recovered_is_that_of_a_splice_in_float64(other, name, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, hooks = other(name), OTHERS[name][1]
    harvest(settings(folder, hooks, max_norm_multiple=None), str(tmp_path / "set"))
    activations = open_activations(tmp_path / "set")
    text = held_out(activations, Sites(hooks, hooks), 8 * CONTEXT)
    eager = {"experts_implementation": "eager"} if name == "mixtral" else {}  # the fast one has no float64
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **eager).eval()
    ids, keep = torch.tensor(text.sequences, dtype=torch.long), torch.tensor(text.text)

    def loss(change):
        """Mean over predictions of text from text, with `change(x, hook)` in the place of x at the rows of a set."""
        handles = []
        for hook in hooks:

            def put(_, __, out, hook=hook):
                x = out[0] if isinstance(out, tuple) else out
                new = torch.where(keep[..., None], change(x, hook), x)
                return (new, *out[1:]) if isinstance(out, tuple) else new

            handles.append(theirs.get_submodule(hook).register_forward_hook(put))
        with torch.no_grad():
            log_p = torch.log_softmax(theirs(ids).logits, -1)
        for handle in handles:
            handle.remove()
        nll = -log_p[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        return float(nll[keep[:, 1:] & keep[:, :-1]].mean())

    mean, acts = {hook: torch.tensor(rows_of(tmp_path / "set", hook).mean(0, dtype=np.float64)) for hook in hooks}, {}
    clean = loss(lambda x, hook: acts.setdefault(hook, x))
    half = loss(lambda _, hook: FACTOR * acts[hook])  # of the model as it is, also at the second hook
    by_mean = loss(lambda x, hook: mean[hook].expand_as(x))
    got = measured(tmp_path / "set", hooks)
    assert abs(by_mean - clean) > 1e-3
    assert got["ce_clean"] == pytest.approx(clean, abs=2e-5)
    assert got["ce_sae"] == pytest.approx(half, abs=2e-5)
    assert got["loss_recovered"] == pytest.approx((by_mean - half) / (by_mean - clean), abs=5e-3)


def test_both_back_ends_measure_the_same(tmp_path):
    hooks = ("mlp_act.2", "resid_pre.1", "attn_z.3")  # inputs of modules, replaced together
    results = []
    for backend in ("jax", "torch"):
        harvest(settings("bundled", hooks, backend=backend), str(tmp_path / backend))
        results.append(measured(tmp_path / backend, hooks))
    for metric in ("ce_clean", "ce_sae", "ce_zero", "ce_mean", "kl", "loss_recovered", "fvu"):
        assert results[1][metric] == pytest.approx(results[0][metric], rel=1e-4), metric


def test_bfloat16(other, tmp_path):
    hook = "model.decoder.layers.0"
    harvest(settings(other("opt"), (hook,), precision="bfloat16", dtype="bfloat16"), str(tmp_path / "set"))
    harvest(settings(other("opt"), (hook,)), str(tmp_path / "float32"))
    assert relative_error(rows_of(tmp_path / "set", hook), rows_of(tmp_path / "float32", hook)) < 0.05
    assert np.isfinite(measured(tmp_path / "set", (hook,))["loss_recovered"])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("opt", {"hooks": ("model.decoder.layers.7",)}, r"no module 'model.decoder.layers.7'; near .* model.decoder.l"),
        (
            "opt",
            {"hooks": ("resid_post.1",)},
            r"'resid_post.1' .* \(opt\); name a module, such as model.decoder.layers.1 ",
        ),
        ("opt", {"hooks": ("resid_post.2",)}, r"'resid_post.2' .* \(opt\); it has no layer 2"),
        ("opt", {"hooks": ("model.decoder.layers.1.fc2",)}, r"gives torch.float32\[32, 32\] .* floats\[2, 16, width\]"),
        ("opt", {"hooks": ("model.decoder.layers.1.fc2",), "context": 2}, r"gives torch.float32\[6, 32\]"),
        ("opt", {"hooks": ("model.decoder",)}, r"'model.decoder' of .* gives BaseModelOutput"),
        (
            "opt",
            {"hooks": ("model.decoder.layers.1",), "context": 4096, "tokens": 0},
            "4096 exceeds the model's 2048 positions",
        ),
        ("bundled", {"hooks": ("resid_mid.1",)}, r"'resid_mid.1' .* \(gpt2\); .* transformer.h.1 for"),
        ("bundled", {"hooks": ("attn_raw.1",)}, r"'attn_raw.1' .* \(gpt2\)"),
        ("bundled", {"hooks": ("transformer.wpe",)}, r"gives torch.float32\[1, 16, 128\] for 2 sequences"),
        ("bundled", {"hooks": ("lm_head", "lm_head")}, "names a hook twice"),
    ],
)
def test_hooks_that_are_refused(other, name, changes, message, tmp_path):
    model = name if name == "bundled" else other(name)
    with pytest.raises(UsageError, match=message):
        harvest(settings(model, **{"hooks": (), **changes}), str(tmp_path / "set"))
    assert not (tmp_path / "set" / "dataset.json").exists()


def test_a_module_runs_once_in_a_pass():
    model = lm.load_torch("bundled")
    model._module.transformer.h[1] = model._module.transformer.h[0]
    model._modules["spare"] = torch.nn.Linear(2, 2)
    for hook, n in (("transformer.h.0", 2), ("spare", 0)):
        with pytest.raises(UsageError, match=f"'{hook}': its module runs {n} times"):
            model.widths([hook], 4)


def test_tokens_that_are_too_many_or_too_large_are_refused():
    model = lm.load_torch("bundled")
    with pytest.raises(UserError, match=r"token id 2048 is outside 0 to 2047"):
        model.run(np.array([[2048]]), [])
    with pytest.raises(UserError, match=r"bundled fails on 1 sequences of 5000 tokens \(.*\); use shorter ones"):
        model.run(np.zeros((1, 5000), int), [])


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def lose_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.decoder.layers.0.fc1.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def bring_code(folder):
    (folder / "model.py").write_text("raise SystemExit('this ran')\n")
    auto_map = {"AutoConfig": "model.Config", "AutoModelForCausalLM": "model.Model"}
    change_config(folder, model_type="of_its_own", auto_map=auto_map)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_tensor, "has no tensor 'model.decoder.layers.0.fc1.weight', without which"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), "cannot load"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no .*safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: change_config(folder, model_type="never_heard_of"), "cannot load .*never_heard_of"),
        (lambda folder: change_config(folder, ffn_dim=65), "cannot load"),
        (bring_code, "cannot load"),
    ],
)
def test_a_damaged_model_is_refused_in_one_line(other, damage, message, tmp_path):
    folder = shutil.copytree(other("opt"), tmp_path / "model")
    damage(folder)
    with pytest.raises(UserError, match=message) as refused:
        lm.load_torch(str(folder))
    assert "\n" not in str(refused.value)


def test_a_gguf_file_is_for_the_other_back_end(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=r"is a \.gguf file, which harvest.backend=torch does not read"):
        lm.load_torch(str(tmp_path / "model.gguf"))


def test_a_set_knows_its_back_end_and_its_model(other, tmp_path):
    folder, hook = shutil.copytree(other("opt"), tmp_path / "model"), "model.decoder.layers.1"
    harvest(settings(folder, (hook,)), str(tmp_path / "set"))
    activations = open_activations(tmp_path / "set")
    assert activations.spec.backend == "torch"
    with pytest.raises(UsageError, match=r"backend=torch, through which there are no gradients"):
        model_at(activations, hook, meshes.make_mesh(meshes.MeshConfig(), jax.devices()[:1]), later=False)
    change_config(folder, activation_function="gelu")
    with pytest.raises(UserError, match="are not those that"):
        held_out(activations, Sites.one(hook), CONTEXT)
