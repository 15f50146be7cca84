"""Real steps compiled for machines that are not there. Needs sae_jax[plan]; `make test-plan` runs these."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from sae_jax import mesh as meshes
from sae_jax import recipe
from sae_jax.commands import main as cli
from sae_jax.commands.plan import PlanHarvest
from sae_jax.ops import tuning
from sae_jax.ops.tuning import EngineConfig
from sae_jax.planning import analytic, compile, hlo, targets
from sae_jax.planning.harvest import passes_of, peak_bytes
from sae_jax.saes import base
from sae_jax.training.settings import TrainConfig
from sae_jax.types import UserError, Widths

CONFIGS = Path(__file__).parents[2] / "configs"
GIB = 2**30

pytestmark = [
    pytest.mark.aot,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not all(compile.is_installed(targets.parse(name)) for name in ("v5e:2x2", "h200:8")),
        reason=f"no compilers; {compile.INSTALL}",
    ),
]
TOYS = ("v5e:2x2", "h200:8")
N, D, K, BATCH = 8192, 256, 16, 512


@cache
def toy(name: str, n_latents: int = N) -> compile.Compiled:
    sae = base.config_class("topk")(n_latents=n_latents, k=K)
    return compile.compile_step(
        targets.parse(name),
        sae,
        TrainConfig(batch_size=BATCH),
        meshes.MeshConfig(),
        EngineConfig(),
        Widths.one(D),
        True,
    )


def plan(capsys, recipe: str, target: str, *flags: str) -> dict:
    assert cli.main(["plan", str(CONFIGS / recipe), f"--target={target}", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("variant", "name"),
    [*((variant, "h200:1") for variant in base.variants() if variant != "end_to_end"), ("topk", "h200:8")],
)
def test_no_loop_of_a_step_waits_for_the_host(variant, name):
    """As each turn of one whose length depends on data does on a GPU."""
    config = base.config_class(variant)
    width = Widths((D, D), (D, D)) if variant == "crosscoder" else Widths.one(D)
    has_k = "k" in config.__dataclass_fields__
    sae = config(n_latents=N, **({"k": K} if has_k else {}))
    parts = (TrainConfig(batch_size=BATCH), meshes.MeshConfig(), EngineConfig(), width, True)
    compiled = compile.compile_step(targets.parse(name), sae, *parts)
    assert not hlo.analyse(compiled.text).open_loops


@pytest.mark.parametrize("name", TOYS)
def test_state_is_given_away_and_is_what_arithmetic_says(name):
    sae = base.config_class("topk")(n_latents=N, k=K)
    mesh = meshes.abstract_mesh(meshes.MeshConfig(), targets.parse(name).n_devices)
    expected = analytic.step(sae, TrainConfig(batch_size=BATCH), Widths.one(D), mesh).state_bytes
    assert toy(name).alias_bytes == pytest.approx(expected, rel=0.02)
    assert toy(name).argument_bytes == pytest.approx(expected, rel=0.05)
    assert toy(name).peak_bytes > expected


def test_the_optimiser_passes_over_the_matrices_as_often_as_it_must():
    """Of the encoder 1 for the norm and 9 of Adam and average; of the decoder 2 for norm and projection, 7 and 4."""
    kernels = hlo.analyse(toy("h200:1", 4 * N).text, quietest=True).kernels
    passes = [
        (kernel.origin, sum(moved.bytes for moved in kernel.moved if moved.elements == 4 * N * D) / (4 * 4 * N * D))
        for kernel in kernels
        if "/optimiser/" in kernel.origin
    ]
    assert sum(n for _, n in passes) <= 1 + 9 + 2 + 7 + 4, passes


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("quietest", [True, False])
def test_traffic_does_not_grow_with_the_dictionary(name, quietest):
    few, many = (hlo.analyse(toy(name, n).text, quietest).collectives for n in (N, 4 * N))
    assert {kind: c.bytes for kind, c in few.items()} == {kind: c.bytes for kind, c in many.items()}


@pytest.mark.parametrize("name", TOYS)
def test_the_quietest_step_encodes_once(name):
    """While no latent is dead there is one product of full size."""
    target = targets.parse(name)
    program = hlo.analyse(toy(name).text, quietest=True)
    assert program.matmul_flop == 2 * BATCH * N * D // target.n_devices


def test_a_torus_scatters_and_gathers():
    """No activations in an all-reduce: it would move every row to every chip."""
    found = hlo.analyse(toy("v5e:2x2").text).collectives
    assert found["reduce-scatter"].bytes >= BATCH * D * 4
    assert found["all-gather"].bytes >= BATCH * D * 2
    assert found["all-reduce"].bytes < BATCH * D


@pytest.mark.parametrize("name", ["v5e:2x4", "h200:8"])
def test_a_slice_of_members_is_compiled_for_its_devices_alone(capsys, name):
    flags = ["--sae.n-latents=8192", "--sae.k=16", "--d-model=256", "--train.batch-size=512"]
    members = ["--mesh.member=2", "--members", "a", "b --train.lr=1e-3"]
    assert cli.main(["plan", f"--target={name}", "--json", *flags, *members]) == 0
    content = json.loads(capsys.readouterr().out)
    device = content["device"]
    assert device["donated_bytes"] == pytest.approx(device["state_bytes"], rel=0.02)
    assert device["quietest"]["compiled_flop"] == 2 * BATCH * N * D // 4


@pytest.mark.parametrize("name", TOYS)
def test_a_step_through_the_language_model(capsys, name):
    flags = ["--sae.variant=end_to_end", "--sae.n-latents=512", "--sae.k=8", "--train.batch-size=16384"]
    assert cli.main(["plan", f"--target={name}", "--json", "--site=resid_post.1", *flags]) == 0
    device = json.loads(capsys.readouterr().out)["device"]
    assert device["compiled_flop"] == pytest.approx(device["flop"], rel=0.1)
    estimate = device["state_bytes"] + device["model_bytes"] + device["model_activation_bytes"]
    assert 0.5 * estimate < device["peak_bytes"] < 1.3 * estimate


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize(("name", "n"), [("v5e:2x2", 4), ("h100:2", 2)])
def test_the_pass_of_a_harvest(capsys, name, n, split):
    """Its products are those that arithmetic counts, and so are the bytes of a copy's sums."""
    flags = ["--harvest.hooks=resid_post.2", "--harvest.batch-tokens=32768", f"--harvest.split={split}"]
    assert cli.main(["plan", "--harvest", f"--target={name}", "--json", *flags]) == 0
    content = json.loads(capsys.readouterr().out)
    device = content["device"]
    assert (content["source"], content["fits"], content["n_devices"]) == ("compiled", True, n)
    assert device["compiled_flop"] == device["flop"]
    assert 0 < device["other_flop"] < device["compiled_flop"]
    assert device["peak_bytes"] < compile_free_peak(flags, n) * 1.1
    sums = {c["kind"]: c["bytes"] for c in device["collectives"]}
    assert (sums != {}) == (split > 1)
    if split > 1:  # two a block, of the stream in float32 at most
        tokens = 32768 * split // n
        assert 0.9 * 2 * 3 * tokens * 128 * 2 < sums["all-reduce"] < 1.1 * (2 * 3 + 1) * tokens * 128 * 4


def compile_free_peak(flags, n_devices: int) -> int:
    """What a plan says without a compiler."""
    settings = recipe.parse(PlanHarvest, ["--target=any", *flags], "test").harvest
    return peak_bytes(passes_of(settings, n_devices))


def test_no_sum_on_a_gpu_is_a_compare_and_swap_loop(monkeypatch, tmp_path):
    """Not even of scalars; it is one with the versions of JAX that `tuning.gpu_flags` names, without what it adds."""

    def compare_and_swap(folder: Path) -> bool:
        monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to={folder} --xla_dump_emitter_re=.*")
        toy.__wrapped__("h200:1")
        kernels = [path.read_text() for path in folder.rglob("*.ptx")]
        assert any("atom." in kernel for kernel in kernels)
        return any("cas.b32" in kernel for kernel in kernels)

    assert not compare_and_swap(tmp_path / "mended")
    if tuning.gpu_flags():
        monkeypatch.setattr(tuning, "gpu_flags", lambda: "")
        assert compare_and_swap(tmp_path / "unmended")


@pytest.mark.parametrize("name", ["rtx4090:1", "a100:2", "v4:2x2x1"])
def test_other_kinds_compile(name):
    """Each architecture of GPUs, and TPUs of two cores a chip."""
    assert toy(name).peak_bytes > 0


def test_a_slice_that_is_not_made_is_told(capsys):
    sizes = ("--sae.n_latents=24576", "--train.batch_size=6144")
    assert cli.main(["plan", str(CONFIGS / "gpt2_small_topk_32k.yaml"), "--target=v5e:1x3", *sizes]) == 2
    assert "v5e:1x3" in capsys.readouterr().err


def test_a_compiler_that_does_not_come_back_is_ended():
    with pytest.raises(UserError, match="raise --timeout"):
        compile.compile_step(
            targets.parse("h200:8"),
            base.config_class("topk")(n_latents=N, k=K),
            TrainConfig(batch_size=BATCH),
            meshes.MeshConfig(),
            EngineConfig(),
            Widths.one(D),
            True,
            timeout=0.5,
        )


HALF = ("--train.moments=bfloat16", "--train.ema_dtype=bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "target", "flags", "fits"),
    [
        ("openai_16m.yaml", "v5p:4x4x8", (), True),
        ("openai_16m.yaml", "h200:64", HALF, True),
        ("openai_16m.yaml", "v6e:16x16", HALF, True),
        ("openai_16m.yaml", "v5p:2x2x2", (), False),
        ("openai_16m_gpt2.yaml", "h200:8", (), True),
        # At full width it compiles for minutes.
        ("openai_16m_gpt2_h200.yaml", "h200:1", ("--sae.n-latents=1048576", "--train.batch-size=8192"), True),
    ],
)
def test_sixteen_million_latents(capsys, recipe, target, flags, fits):
    content = plan(capsys, recipe, target, *flags)
    assert content["source"] == "compiled"
    assert content["fits"] == fits
    assert content["compiler"]["host_bytes"] < 3e9
    assert content["compiler"]["cpu_seconds"] > 0
    if fits:
        device = content["device"]
        assert device["donated_bytes"] == pytest.approx(device["state_bytes"], rel=0.02)
    else:
        assert "Ran out of memory" in content["refusal"]
