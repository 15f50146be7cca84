"""Arithmetic of a run, against the same written out by hand."""

import pytest

from sae_jax import mesh as meshes
from sae_jax.planning import analytic, targets
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


@pytest.mark.parametrize("data", [1, 4])
def test_state_lies_over_all_devices_whatever_the_mesh(data):
    mesh = meshes.abstract_mesh(meshes.MeshConfig(data=data), 8)
    sae = base.config_class("topk")(n_latents=1024, k=4)
    flat = analytic.step(sae, TrainConfig(), Widths.one(64), meshes.abstract_mesh(meshes.MeshConfig(), 8))
    assert analytic.step(sae, TrainConfig(), Widths.one(64), mesh).state_bytes == flat.state_bytes


def test_hours_are_work_over_rate():
    target = targets.parse("v5p:4x4x8")
    step = analytic.Step(state_bytes=0, gradient_bytes=0, flop=10**12)
    sae, train = base.config_class("topk")(n_latents=N, k=K), TrainConfig(steps=3600, batch_size=BATCH)
    run = analytic.run(sae, train, Widths.one(D), step, target, mfu=0.5, rows=10, row_bytes=2 * D)
    assert run.hours == pytest.approx(1e12 / 459e12 / 0.5)
    assert run.floor_hours == pytest.approx(1e12 / 459e12)
    assert (run.tokens, run.disk_bytes) == (3600 * BATCH, 20 * D)
