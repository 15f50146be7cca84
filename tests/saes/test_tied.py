"""Tied ReLU against its float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.saes import init, tied
from sae_jax.types import UsageError
from tests.meshes import MESHES
from tests.oracles import tied as oracle
from tests.saes.oracle_checks import D, F, arrays, assert_finite_differences, assert_is_oracle, float64, rows

NAMES = ("w_enc", "b_enc", "b_dec")


def make(**settings) -> tied.Tied:
    config = tied.Config(
        **{"n_latents": F, "l1_coefficient": 0.1, "sparsity_warmup": 0.0, "dtype": "float32", **settings}
    )
    w_enc, b_enc, b_dec = arrays(0, (F, D), (F,), (D,))
    return tied.Tied(init.unit_rows(w_enc), 0.3 * b_enc - 0.5, b_dec, config)


@pytest.mark.parametrize("shape", [None, *MESHES], ids=str)
def test_objective_and_gradients_are_the_oracle_on_every_mesh(shape):
    sae = make()
    assert_is_oracle(sae, oracle.objective(np.float64(rows()), **float64(sae, NAMES), coefficient=0.1), shape)


def test_the_oracle_gradients_are_finite_differences():
    weights = float64(make(), NAMES)
    centre = weights.pop("b_dec")  # which has none, though the loss depends on it
    assert_finite_differences(
        lambda weights: oracle.objective(np.float64(rows()), **weights, b_dec=centre, coefficient=0.1),
        weights,
        tangent=("w_enc",),
    )


def test_initialisation():
    x = np.random.default_rng(0).standard_normal((500, 32)) + 7
    sample = init.sample_statistics(x, "none")
    sae = tied.Config(n_latents=256, l1_coefficient=0.1, centre=False).init(jax.random.key(0), sample)
    np.testing.assert_allclose(jnp.linalg.norm(sae.w_enc, axis=1), 1, rtol=1e-5)
    assert sae.w_dec is sae.w_enc
    assert not sae.b_dec.any()
    assert not sae.b_enc.any()
    # Where the penalty is led there are 128 active latents at first, with a centre or without.
    for centre in (True, False):
        led = tied.Config(n_latents=2048, centre=centre).init(jax.random.key(0), sample)
        np.testing.assert_allclose(led.b_dec, centre * x.mean(0), rtol=1e-5)
        pre = (x - np.asarray(led.b_dec)) @ np.asarray(led.w_enc).T + np.asarray(led.b_enc)
        assert (pre > 0).sum(1).mean() == pytest.approx(128, rel=0.1)


def test_bad_settings_are_refused():
    with pytest.raises(UsageError, match=r"sae.l1_coefficient=nan"):
        tied.Config(l1_coefficient=float("nan"))
