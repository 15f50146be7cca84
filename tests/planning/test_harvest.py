"""Plans of harvests: work and memory against the same counted by hand, and what fits with which settings."""

import json

import jax
import numpy as np
import pytest

from sae_jax import lm, planning
from sae_jax import mesh as meshes
from sae_jax.activations.forward import batch_sequences
from sae_jax.activations.harvest import harvest
from sae_jax.activations.settings import HarvestConfig
from sae_jax.commands import main as cli
from sae_jax.planning import compile, hlo, targets
from sae_jax.planning.forward import block_flop
from sae_jax.planning.harvest import passes_of
from sae_jax.types import UsageError

LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
GPT2 = {"model_type": "gpt2", "n_layer": 3, "n_embd": 12, "n_head": 3, "n_positions": 32, "vocab_size": 50}
NEOX = {
    "model_type": "gpt_neox",
    "num_hidden_layers": 3,
    "hidden_size": 12,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "vocab_size": 50,
    "rotary_pct": 0.5,
}
GEMMA2 = {
    "model_type": "gemma2",
    "num_hidden_layers": 3,
    "hidden_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "vocab_size": 50,
    "sliding_window": 4,
    "query_pre_attn_scalar": 6,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
}


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(compile, "is_installed", lambda target: False)


@pytest.fixture
def model(tmp_path):
    """Writes a folder with nothing but a config.json."""

    def write(config: dict) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return write


def multiplications(spec: lm.Spec, n_tokens: int, point: str) -> float:
    """Those of the products of one block on one sequence, up to a point, each matrix product by itself."""
    d, m, heads, kv, width = spec.d_model, spec.d_mlp, spec.n_heads, spec.n_kv, spec.d_head
    to_z = [(n_tokens, d, heads * width), *[(n_tokens, d, kv * width)] * 2]
    to_z += [(n_tokens, width, n_tokens)] * heads + [(n_tokens, n_tokens, width)] * heads  # q k', weights v
    to_out = [(n_tokens, heads * width, d)]
    to_act, down = [(n_tokens, d, m)] * (2 if spec.gated else 1), [(n_tokens, m, d)]
    parts = {
        "resid_pre": [],
        "attn_in": [],
        "attn_z": to_z,
        "attn_out": to_z + to_out,
        "mlp_in": [] if spec.parallel else to_z + to_out,
        "mlp_act": to_act if spec.parallel else to_z + to_out + to_act,
        "mlp_out": to_act + down if spec.parallel else to_z + to_out + to_act + down,
        "resid_post": to_z + to_out + to_act + down,
    }
    return float(np.sum([np.prod(np.array(sizes, np.float64)) for sizes in parts[point]]))


@pytest.mark.parametrize("config", [GPT2, NEOX, GEMMA2], ids=lambda config: config["model_type"])
@pytest.mark.parametrize(
    "point", ["resid_pre", "attn_in", "attn_z", "attn_out", "mlp_in", "mlp_act", "mlp_out", "resid_post"]
)
def test_work_is_that_of_the_products_up_to_the_last_hook(model, config, point):
    """Shared keys and values, gated and parallel MLPs; a window saves nothing, and what is behind a hook is free."""
    path, context = model(config), 16
    spec = lm.read_spec(path)
    assert block_flop(spec, context, [point]) == 2 * multiplications(spec, context, point) / context
    settings = HarvestConfig(model=(path,), hooks=(f"{point}.2", "resid_post.0"), context=context, batch_tokens=64)
    forward = passes_of(settings, 1)[""]
    whole = multiplications(spec, context, "resid_post")
    assert forward.token_flop == 2 * (2 * whole + multiplications(spec, context, point)) / context


@pytest.mark.parametrize("point", ["resid_pre", "attn_z", "mlp_act", "resid_post"])
@pytest.mark.parametrize("config", [NEOX, GEMMA2], ids=lambda config: config["model_type"])
def test_the_compiled_pass_does_that_work(model, config, point):
    """Of the program of this CPU, without what the compiler dropped behind the hook."""
    settings = HarvestConfig(model=(model(config),), hooks=(f"{point}.1",), context=16, batch_tokens=64)
    forward = passes_of(settings, 1)[""]
    mesh = meshes.lm_mesh(1, jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = hlo.analyse(forward.lower(mesh).compile().as_text())
    assert program.matmul_flop == forward.flop == forward.token_flop * 64
    assert program.other_flop > 64 * 12  # the norm alone


def seventy_billion(path: str, **changes) -> planning.HarvestJob:
    settings = {"hooks": ("resid_post.39",), "context": 1024, "batch_tokens": 8192, "precision": "bfloat16"}
    return planning.HarvestJob("h100:8", HarvestConfig(model=(path,), **{**settings, **changes}))


def test_seventy_billion_parameters_from_a_config_alone(model, no_compiler):
    path = model(LLAMA_70B)
    content = planning.plan_harvest(seventy_billion(path))
    layer = 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672) + 2 * 8192
    parameters = 80 * layer + 2 * 128256 * 8192 + 8192
    assert content["device"]["model_bytes"] == 2 * parameters  # whole on each device
    assert content["run"]["token_flop"] == 40 * (2 * (layer - 2 * 8192) + 4 * 1024 * 8192)
    assert not content["fits"]
    assert content["cure"] == ["--harvest.split=2"]  # 65.7 GiB on each, of 67.3

    split = planning.plan_harvest(seventy_billion(path, split=4))
    assert split["fits"]
    assert split["device"]["model_bytes"] == pytest.approx(2 * parameters / 4, rel=1e-4)  # norms are whole on each
    assert split["device"]["flop"] == content["device"]["flop"]
    assert "tokens" not in split["run"]


def test_each_cure_fits_and_the_least_of_them_is_named(model, no_compiler):
    path = model({**LLAMA_70B, "max_position_embeddings": 2**19})
    # The wide arrays of the MLP and the stream: 76 KiB a token over four devices, of which there are two copies.
    large = planning.plan_harvest(seventy_billion(path, split=4, context=8192, batch_tokens=2**20))
    assert large["cure"] == ["--harvest.batch_tokens=524288"]
    whole = planning.plan_harvest(
        seventy_billion(path, split=8, precision="float32", context=2**19, batch_tokens=2**19)
    )
    for content, changes in (
        (large, {"split": 4, "context": 8192, "batch_tokens": 524288}),
        (whole, {"split": 8, "context": 2**19, "batch_tokens": 2**19, "precision": "bfloat16"}),
    ):
        assert not content["fits"]
        assert planning.plan_harvest(seventy_billion(path, **changes))["fits"]
    assert whole["cure"] == ["--harvest.precision=bfloat16"]
    none = planning.plan_harvest(planning.HarvestJob("rtx4090:1", seventy_billion(path).harvest))
    assert (none["fits"], none["cure"]) == (False, None)


def test_time_is_work_over_rate_and_never_below_the_floor(no_compiler):
    settings = HarvestConfig(hooks=("resid_post.1", "mlp_act.0"), context=64, tokens=64 * 999 + 5, batch_tokens=8192)
    content = planning.plan_harvest(planning.HarvestJob("h200:1", settings, mfu=0.25))
    chip, run, device = targets.parse("h200:1").chip, content["run"], content["device"]
    spec = lm.read_spec("bundled")
    d, m = spec.d_model, spec.d_mlp
    layer_bytes = 4 * (4 * d * d + 2 * d * m + 9 * d + m)  # with the biases and norms of GPT-2
    moved = 2 * layer_bytes + 8192 * (2 * (d + m) + 4 * 2)
    assert device["read_bytes"] + device["result_bytes"] == moved
    compute = 8192 * run["token_flop"] / (132 * 128 * 2 * 1.98e9)  # float32: multiply-adds of plain cores
    floor = compute + moved / chip.bandwidth
    assert run["floor_tokens_per_second"] == pytest.approx(8192 / floor)
    assert run["tokens_per_second"] == pytest.approx(8192 / max(compute / 0.25, floor))
    assert run["tokens"] == 64 * 999
    assert run["hours"] == pytest.approx(run["tokens"] / run["tokens_per_second"] / 3600)
    bound_by_memory = planning.plan_harvest(planning.HarvestJob("h200:1", settings, mfu=1.0))["run"]
    assert bound_by_memory["tokens_per_second"] == run["floor_tokens_per_second"]
    assert targets.parse("v5e:2x2").rate("float32") == targets.parse("v5e:2x2").rate("bfloat16") / 6


def test_the_set_is_as_large_as_planned(tmp_path, no_compiler):
    settings = HarvestConfig(hooks=("resid_post.0",), context=32, tokens=4096, max_norm_multiple=None)
    run = planning.plan_harvest(planning.HarvestJob("h200:1", settings))["run"]
    spec = harvest(settings, str(tmp_path / "set"))
    arrays = [path for path in (tmp_path / "set").glob("*/**/c/**/*") if path.is_file()]
    assert run["n_shards"] == spec.n_shards
    # Rows fill up the last chunk of a shard, and a shard ends with the places of its chunks.
    assert sum(path.stat().st_size for path in arrays) == pytest.approx(run["disk_bytes"], rel=0.01)


@pytest.mark.parametrize(
    ("target", "host", "n"),
    [("h100:4", 4, 1), ("h200:64", 8, 8), ("v5p:4x4x4", 4, 16), ("v4:2x2x2", 8, 2), ("v5e:1x1", 1, 1)],
)
def test_a_worker_has_the_devices_of_a_host(target, host, n, no_compiler):
    """And workers share the shards, of which the busiest has one more."""
    settings = HarvestConfig(hooks=("resid_post.1",), context=128, tokens=128 * 1000, batch_tokens=4096)
    content = planning.plan_harvest(planning.HarvestJob(target, settings))
    run = content["run"]
    assert (targets.parse(content["host"]).n_devices, run["n_workers"]) == (host, n)
    one = planning.plan_harvest(planning.HarvestJob(content["host"], settings))["run"]
    assert run["tokens_per_second"] == pytest.approx(n * one["tokens_per_second"])
    assert run["hours"] == pytest.approx(one["hours"] * -(-run["n_shards"] // n) / run["n_shards"])
    assert content["batch_tokens"] == batch_sequences(settings, host) * 128


def test_models_of_one_set_lie_side_by_side(no_compiler):
    """And run one after the other."""
    one, two = (
        planning.plan_harvest(planning.HarvestJob("h200:1", HarvestConfig(model=models, hooks=("resid_post.1",))))
        for models in (("bundled",), ("base=bundled", "tuned=bundled"))
    )
    for name in ("model_bytes", "result_bytes", "flop"):
        assert two["device"][name] == 2 * one["device"][name]
    assert two["run"]["tokens_per_second"] == pytest.approx(one["run"]["tokens_per_second"] / 2)
    working = one["device"]["peak_bytes"] - one["device"]["model_bytes"] - 2 * one["device"]["result_bytes"]
    assert two["device"]["peak_bytes"] == 2 * (one["device"]["peak_bytes"] - working) + working


@pytest.mark.parametrize(
    ("flags", "cure"),
    [
        (["--harvest.split=3"], "harvest.split=3 does not divide 8 devices"),
        (["--harvest.context=4096"], "exceeds the model's"),
        (["--harvest.hooks=resid_post.9"], "resid_post.9"),
        (["--mfu=0"], "must be above 0"),
        (["--sae.k=4"], "sae.k"),
        (["--harvest.model=/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_one_line(capsys, no_compiler, flags, cure):
    assert cli.main(["plan", "--harvest", "--target=h200:8", "--harvest.batch-tokens=8192", *flags]) in (1, 2)
    said = capsys.readouterr().err.strip()
    assert cure in said
    assert "\n" not in said


def test_the_report_says_what_it_is(capsys, model, no_compiler):
    flags = [f"--harvest.model={model(LLAMA_70B)}", "--harvest.hooks=resid_post.39", "--harvest.context=1024"]
    assert cli.main(["plan", "--target=h100:16", "--harvest", "--harvest.batch-tokens=8192", *flags]) == 0
    said = capsys.readouterr().out
    for words in ("does NOT fit, by an ESTIMATE", "--shard i/2", "fits with --harvest.split=4", "all of the text"):
        assert words in said


def test_what_torch_runs_is_not_planned():
    with pytest.raises(UsageError, match=r"harvest\.backend=torch is not compiled; plan with harvest\.backend=jax"):
        planning.HarvestJob("h100:1", HarvestConfig(backend="torch"))


def test_a_row_of_int8_has_a_scale():
    settings = HarvestConfig(tokens=1280, hooks=("resid_post.1", "mlp_act.1"), dtype="int8")
    spec = passes_of(settings, 1)[""]
    assert spec.row_bytes == sum(spec.widths) + 2 * 4
