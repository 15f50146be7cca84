"""What the compiled step holds and sends: nothing that grows with batch x dictionary, or with the number of devices."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from sae_jax import mesh as meshes
from sae_jax.ops import tuning
from sae_jax.planning import hlo
from sae_jax.saes import base, topk
from sae_jax.training.settings import TrainConfig, hyperparameters
from sae_jax.training.state import abstract
from sae_jax.training.step import Step
from sae_jax.types import Widths
from tests.hlo import largest_array

D, B = 16, 4096
PIECES = tuning.Tuning(
    block_bytes=2**16, block_rows=8, latent_major=True, in_stages=True, exchange_bytes=2**14, pair_bytes=2**12
)


def program(n_latents: int, data: int, latent: int, n_rows: int = B, cut: tuning.Tuning = PIECES) -> str:
    """The whole train step, AuxK and Multi-TopK on."""
    config = topk.Config(n_latents=n_latents, k=4, k_aux=8, multi_topk=0.125)
    train = TrainConfig(batch_size=n_rows)
    mesh = meshes.make_mesh(meshes.MeshConfig(data, latent), jax.devices()[: data * latent])
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"), tuning.using(cut):
        rows = jax.ShapeDtypeStruct((n_rows, D), jnp.bfloat16, sharding=meshes.sharding(mesh, meshes.ROWS))
        state = abstract(config, train, Widths.one(D), mesh)
        hparams = jax.eval_shape(lambda: hyperparameters(train, config))
        return Step(config, train).trace(state, hparams, base.Batch(rows)).lower().compile().as_text()


@pytest.mark.parametrize(("data", "latent"), [pytest.param(1, 1, marks=pytest.mark.long), (2, 2)])
def test_no_array_of_rows_by_latents(data, latent, monkeypatch):
    """With a small budget the largest arrays are the weights and the codes, far below a device's rows x latents.

    And no loop's length depends on data.
    """
    monkeypatch.setattr(tuning, "MIN_TILE", 64)
    n_latents = 8192
    n_local, rows = n_latents // latent, B // data
    codes = rows * 4 * 4 * latent  # 4k slots a shard
    text = program(n_latents, data, latent)
    assert largest_array(text) <= max(n_local * D, codes, B * D) < rows * n_local / 8
    assert not hlo.analyse(text).open_loops


def collectives(text: str) -> dict[str, int]:
    return {kind: found.bytes for kind, found in hlo.analyse(text, quietest=True).collectives.items()}


@pytest.mark.long
def test_traffic_does_not_grow_with_the_dictionary():
    few, many = (collectives(program(n, 1, 8, n_rows=512)) for n in (512, 2048))
    assert few
    assert few == many


@pytest.mark.long
def test_traffic_of_a_device_does_not_grow_with_the_number_of_devices():
    whole = replace(PIECES, exchange_bytes=2**20)  # in one block: padding would blur the comparison
    few, many = (collectives(program(2048, 1, latent, n_rows=512, cut=whole)) for latent in (2, 8))
    assert few.keys() == many.keys()
    for kind, n_bytes in many.items():
        assert n_bytes <= 1.05 * few[kind], kind


@pytest.fixture(scope="module")
def at_size():
    """A function that compiles the step of a variant at the size of the benchmark on CPUs: its text."""

    @functools.cache
    def compiled(variant: str) -> str:
        config, train = (
            base.config_class(variant)(n_latents=32768, k=32, dtype="bfloat16"),
            TrainConfig(batch_size=2048),
        )
        mesh = meshes.make_mesh(meshes.MeshConfig(), jax.devices()[:1])
        with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
            rows = jax.ShapeDtypeStruct((2048, 768), jnp.bfloat16, sharding=meshes.sharding(mesh, meshes.ROWS))
            state = abstract(config, train, Widths.one(768), mesh)
            hparams = jax.eval_shape(lambda: hyperparameters(train, config))
            return Step(config, train).trace(state, hparams, base.Batch(rows)).lower().compile().as_text()

    return compiled


@pytest.mark.parametrize(
    ("variant", "most"),
    [("batch_topk", 1.15), pytest.param("matryoshka", 1.5, marks=pytest.mark.long)],
)
def test_a_selection_over_the_batch_costs_little_more_than_one_of_each_row(at_size, variant, most):
    """And so do several reconstructions from one code: products and bytes beside TopK's."""
    ours, topks = (hlo.analyse(at_size(name), quietest=True) for name in (variant, "topk"))
    assert ours.matmul_flop <= most * topks.matmul_flop
    assert ours.moved_bytes <= most * topks.moved_bytes
    assert not ours.open_loops  # or bytes are counted once that are moved many times


def test_dead_latents_cost_at_most_four_tenths_of_a_step(at_size):
    """However many there are: products with other work, and bytes, of the busiest branch beside the quietest."""
    busiest, quietest = (hlo.analyse(at_size("topk"), quietest) for quietest in (False, True))
    assert busiest.matmul_flop > quietest.matmul_flop
    assert busiest.matmul_flop + busiest.other_flop <= 1.4 * (quietest.matmul_flop + quietest.other_flop)
    assert busiest.moved_bytes <= 1.4 * quietest.moved_bytes
    assert not busiest.open_loops
