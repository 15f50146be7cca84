"""What a token costs: by hand, and counted in the compiled step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.planning import hlo
from sae_jax.saes import base, init, relu, topk
from sae_jax.scaling import flops
from sae_jax.training.settings import TrainConfig, hyperparameters
from sae_jax.training.state import initial
from sae_jax.training.step import Step
from sae_jax.types import Widths

BATCH, WIDTH = 64, 16


def test_what_a_token_costs():
    """n = 1000, d = 10, k = 5: the encoder forward is 20,000 FLOP, and four times k rows 400."""
    sae = topk.Config(n_latents=1000, k=5)
    assert flops.executed(sae, Widths.one(10)) == 20_000 + 400
    assert flops.dense(sae, Widths.one(10)) == 120_000
    dense = relu.Config(n_latents=1000)
    assert flops.executed(dense, Widths.one(10)) == flops.dense(dense, Widths.one(10)) == 120_000
    assert flops.executed(sae, Widths((10, 10), (30,))) == 2 * (20 * 1000 + 20 * 5 + 3 * 5 * 30)


def compiled_flop(sae) -> int:
    """Of the products of a step in which no latent is dead, a token."""
    rows = np.float32(np.random.default_rng(0).standard_normal((BATCH, WIDTH)))
    config = TrainConfig(batch_size=BATCH, ema=0)
    sample = init.sample_statistics(rows, "none")
    batch = base.Batch(jax.ShapeDtypeStruct(rows.shape, jnp.float32))
    with jax.numpy_dtype_promotion("standard"):  # optax
        state = jax.eval_shape(lambda sample: initial(sae, config, sample), sample)
        hparams = jax.eval_shape(lambda: hyperparameters(config, sae))
        text = Step(sae, config).trace(state, hparams, batch).lower().compile().as_text()
    return hlo.analyse(text or "", quietest=True).matmul_flop // BATCH


def test_the_compiled_step_spends_what_is_counted():
    sparse = topk.Config(n_latents=1024, k=4, dtype="float32")
    assert compiled_flop(sparse) == pytest.approx(flops.executed(sparse, Widths.one(WIDTH)), rel=0.03)
    # So small that there is one tile, whose pre-activations the backward pass need not compute again.
    tiled = relu.Config(variant="relu", n_latents=1024, dtype="float32")
    assert compiled_flop(tiled) == pytest.approx(flops.executed(tiled, Widths.one(WIDTH)) * 5 / 6, rel=0.03)
