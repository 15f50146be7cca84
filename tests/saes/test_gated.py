"""Gated against its float64 oracle, and the JumpReLU that it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.saes import gated, init, normalise
from sae_jax.types import UsageError
from tests.meshes import MESHES
from tests.oracles import gated as oracle
from tests.saes.oracle_checks import D, F, arrays, assert_finite_differences, assert_is_oracle, float64, rows

NAMES = ("w_enc", "b_enc", "b_gate", "log_gain", "w_dec", "b_dec")


def make(**settings) -> gated.Gated:
    config = gated.Config(
        **{"n_latents": F, "l1_coefficient": 0.7, "sparsity_warmup": 0.0, "dtype": "float32", **settings}
    )
    w_enc, b_enc, b_gate, log_gain, w_dec, b_dec = arrays(0, (F, D), (F,), (F,), (F,), (F, D), (D,))
    return gated.Gated(w_enc, b_enc, b_gate - 2, 0.3 * log_gain, init.unit_rows(w_dec), b_dec, config)


@pytest.mark.parametrize("shape", [None, *MESHES], ids=str)
def test_objective_and_gradients_are_the_oracle_on_every_mesh(shape):
    sae = make()
    assert_is_oracle(sae, oracle.objective(np.float64(rows()), **float64(sae, NAMES), coefficient=0.7), shape)


def test_the_oracle_gradients_are_finite_differences():
    weights = float64(make(), NAMES)
    frozen = weights["w_dec"], weights["b_dec"]
    assert_finite_differences(
        lambda weights: oracle.objective(np.float64(rows()), **weights, coefficient=0.7, frozen=frozen),
        weights,
        tangent=("w_dec",),
    )


def test_it_is_a_jumprelu_with_thresholds_in_closed_form():
    """Also where a threshold comes out below 0, and after folding."""
    sae, x = make(input_norm="dataset_sqrt_d"), rows()
    threshold_F = np.asarray(sae.b_enc - jnp.exp(sae.log_gain) * sae.b_gate)
    assert (threshold_F < 0).any()
    scale = normalise.Scale(jnp.full(D, 0.3), jnp.full(D, 0.3))
    for mine, other in (
        (sae, sae.to_jumprelu()),
        (sae.folded(scale), sae.to_jumprelu().folded(scale)),
        (sae.folded(scale), sae.folded(scale).to_jumprelu()),
    ):
        np.testing.assert_allclose(mine(x), other(x), rtol=1e-4, atol=1e-4)
        want, got = mine.encode(x), other.encode(x)
        np.testing.assert_array_equal(got.values > 0, want.values > 0)
        np.testing.assert_allclose(got.values, want.values, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sae.to_jumprelu().threshold, np.maximum(threshold_F, 0), rtol=1e-4, atol=1e-6)


def test_initialisation():
    sample = init.sample_statistics(np.random.default_rng(0).standard_normal((500, 32)) + 7, "dataset_sqrt_d")
    sae = gated.Config(n_latents=256).init(jax.random.key(0), sample)
    np.testing.assert_allclose(jnp.linalg.norm(sae.w_dec, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(sae.w_enc, sae.w_dec)
    np.testing.assert_array_equal(sae.b_dec, sample.median)
    assert not any(field.any() for field in (sae.b_enc, sae.b_gate, sae.log_gain))


def test_bad_settings_are_refused():
    with pytest.raises(UsageError, match=r"sae.sparsity_warmup=-1"):
        gated.Config(sparsity_warmup=-1.0)
