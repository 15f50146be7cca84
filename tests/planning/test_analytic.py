"""Arithmetic of a run, against the same written out by hand."""

import jax
import pytest

from sae_jax import lm
from sae_jax import mesh as meshes
from sae_jax.planning import ThroughModel, analytic, targets
from sae_jax.saes import base
from sae_jax.training.settings import TrainConfig
from sae_jax.types import Widths

N, D, K, BATCH = 2**24, 12288, 64, 131072


@pytest.mark.parametrize(("ema", "copies"), [(0.999, 4), (0.0, 3)])
def test_state_is_weights_two_moments_and_the_average(ema, copies):
    mesh = meshes.abstract_mesh(meshes.MeshConfig(), 128)
    sae = base.config_class("topk")(n_latents=N, k=K)
    step = analytic.step(sae, TrainConfig(batch_size=BATCH, ema=ema), Widths.one(D), mesh)
    weights = 4 * (2 * N * D + N) / 128
    assert step.state_bytes == pytest.approx(copies * weights + 4 * N / 128, rel=1e-4)
    assert step.gradient_bytes == pytest.approx(weights, rel=1e-4)
    assert step.flop == (2 * BATCH * N * D + 8 * BATCH * K * D) // 128
    assert step.aux_flop == 5 * 2 * BATCH * N * D // 16 // 128 < 0.4 * step.flop


@pytest.mark.parametrize(
    ("settings", "n_rows", "share"),
    [({}, 1024, 1 / 8), ({"aux_rows": "all"}, 8192, 1), ({"aux_coefficient": 0.0}, 8192, 0)],
)
def test_work_of_dead_latents(settings, n_rows, share):
    """Of 128 rows at least, or of all."""
    sae = base.config_class("topk")(n_latents=1024, k=4, **settings)
    mesh = meshes.abstract_mesh(meshes.MeshConfig(), 1)
    step = analytic.step(sae, TrainConfig(batch_size=n_rows), Widths.one(64), mesh)
    assert step.aux_flop == share * 5 * 2 * n_rows * 1024 * 64


def test_narrow_weights_have_a_state_of_four_bytes_and_gradients_of_a_tile():
    """Two of weights and one of each moment, whose scales are a hundredth more; AuxK is one product, not five."""
    mesh, n, d = meshes.abstract_mesh(meshes.MeshConfig(), 1), 2**24, 768
    sae = base.config_class("topk")(n_latents=n, k=32, k_aux=512, aux_rows="all")
    train = TrainConfig(batch_size=BATCH, weights="bfloat16", moments="int8", ema=0.0)
    step = analytic.step(sae, train, Widths.one(d), mesh)
    assert step.state_bytes == pytest.approx(2 * n * d * (4 + 2 * 3 * 4 / d) + 16 * n, rel=1e-4)
    assert step.gradient_bytes + step.pair_bytes < 4 * 2**30
    assert step.aux_flop == 2 * BATCH * n * d


@pytest.mark.parametrize("data", [1, 4])
def test_state_lies_over_all_devices_whatever_the_mesh(data):
    mesh = meshes.abstract_mesh(meshes.MeshConfig(data=data), 8)
    sae = base.config_class("topk")(n_latents=1024, k=4)
    flat = analytic.step(sae, TrainConfig(), Widths.one(64), meshes.abstract_mesh(meshes.MeshConfig(), 8))
    assert analytic.step(sae, TrainConfig(), Widths.one(64), mesh).state_bytes == flat.state_bytes


def test_hours_are_work_over_rate():
    target = targets.parse("v5p:4x4x8")
    step = analytic.Step(state_bytes=0, gradient_bytes=0, flop=10**12)
    train = TrainConfig(steps=3600, batch_size=BATCH)
    run = analytic.run([(step, train)], target, n_slices=1, mfu=0.5, disk_bytes=20 * D)
    assert run.hours == pytest.approx(1e12 / 459e12 / 0.5)
    assert run.floor_hours == pytest.approx(1e12 / 459e12)
    assert (run.tokens, run.disk_bytes) == (3600 * BATCH, 20 * D)
    exact = analytic.Step(state_bytes=0, gradient_bytes=0, flop=10**12, dtype="float32")
    run = analytic.run([(exact, train)], target, n_slices=1, mfu=0.5, disk_bytes=0)
    assert run.hours == pytest.approx(6e12 / 459e12 / 0.5)


@pytest.mark.parametrize("mfu", [0.3, 1.0])
def test_no_time_is_below_the_floor(mfu):
    """Small steps are bound by the traffic of their state, whatever share of the matrix rate is asked for."""
    target, train = targets.parse("v5p:4x4x8"), TrainConfig(steps=3600, batch_size=BATCH)
    step = analytic.Step(state_bytes=2765 * 10**9, gradient_bytes=0, flop=459 * 10**12)
    run = analytic.run([(step, train)], target, n_slices=1, mfu=mfu, disk_bytes=0)
    assert run.floor_hours == pytest.approx(3)  # a second of work, two to read and write the state
    assert run.hours == pytest.approx(max(1 / mfu, 3))


def test_members_add_their_states_and_share_the_working_memory():
    small, large = (analytic.Step(state_bytes=n, gradient_bytes=n // 3, flop=n) for n in (3 * 2**30, 6 * 2**30))
    assert analytic.peak_bytes([small, large, small], 1) == 12 * 2**30 + large.working_bytes
    assert analytic.peak_bytes([small] * 4, 2) == 6 * 2**30 + small.working_bytes
    target, train = targets.parse("h200:8"), TrainConfig(steps=10, batch_size=BATCH)
    one, four, on_slices = (
        analytic.run([(small, train)] * n, target, n_slices=slices, mfu=0.3, disk_bytes=0)
        for n, slices in ((1, 1), (4, 1), (4, 2))
    )
    assert (four.hours, four.flop) == (pytest.approx(4 * one.hours), 4 * one.flop)
    assert (on_slices.hours, on_slices.flop) == (pytest.approx(2 * one.hours), 2 * one.flop)


def test_work_of_a_language_model_is_what_it_executes():
    """Against products counted one by one: all blocks once, those after the site twice more, the head three times."""
    spec = lm.read_spec("bundled")
    model = ThroughModel(spec, lm.Hook(1, "resid_post"), context=32)
    d, m, v, t = spec.d_model, spec.d_mlp, spec.n_vocab, 32
    block = 2 * (4 * d * d + 2 * d * m) + 2 * 2 * t * d  # q k v o, up and down; scores and their products with values
    after = spec.n_layers - 2
    assert model.n_blocks_after == after
    assert model.token_flop == spec.n_layers * block + 2 * after * block + 3 * 2 * d * v
    assert model.parameter_bytes == 4 * sum(x.size for x in jax.tree.leaves(lm.load("bundled").params))
    assert ThroughModel(spec, lm.Hook(1, "resid_mid"), 32).n_blocks_after == after + 1
