"""ReLU with a decoder-norm-weighted L1 against its float64 oracle, and what its codes stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.saes import init, normalise, relu_norm
from sae_jax.types import UsageError
from tests.meshes import MESHES
from tests.oracles import relu_norm as oracle
from tests.saes.oracle_checks import D, F, arrays, assert_finite_differences, assert_is_oracle, float64, rows

NAMES = ("w_enc", "b_enc", "w_dec", "b_dec")


def make(**settings) -> relu_norm.ReluNorm:
    config = relu_norm.Config(
        **{"n_latents": F, "l1_coefficient": 0.7, "sparsity_warmup": 0.0, "dtype": "float32", **settings}
    )
    w_enc, b_enc, w_dec, b_dec = arrays(0, (F, D), (F,), (F, D), (D,))
    return relu_norm.ReluNorm(w_enc, b_enc - 2, w_dec, b_dec, config)


@pytest.mark.parametrize("shape", [None, *MESHES], ids=str)
def test_objective_and_gradients_are_the_oracle_on_every_mesh(shape):
    sae = make()
    assert_is_oracle(sae, oracle.objective(np.float64(rows()), **float64(sae, NAMES), coefficient=0.7), shape)


def test_the_oracle_gradients_are_finite_differences():
    assert_finite_differences(
        lambda weights: oracle.objective(np.float64(rows()), **weights, coefficient=0.7), float64(make(), NAMES)
    )


def test_users_see_what_latents_contribute():
    sae, x = make(input_norm="none"), rows()
    seen = sae.folded(normalise.Scale(jnp.ones(D), jnp.ones(D)))
    np.testing.assert_allclose(jnp.linalg.norm(seen.w_dec, axis=1), 1, rtol=1e-5)
    z = oracle.objective(np.float64(x), **float64(sae, NAMES), coefficient=0.7).z_BF
    code = seen.encode(x)
    want = np.take_along_axis(z * np.linalg.norm(sae.w_dec, axis=1), np.asarray(code.indices), 1)
    np.testing.assert_allclose(code.values, np.where(code.values > 0, want, 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen(x), sae(x), rtol=1e-4, atol=1e-4)


def test_initialisation():
    sample = init.sample_statistics(np.random.default_rng(0).standard_normal((500, 32)) + 7, "dataset_sqrt_d")
    sae = relu_norm.Config(n_latents=256).init(jax.random.key(0), sample)
    np.testing.assert_allclose(jnp.linalg.norm(sae.w_dec, axis=1), 0.1, rtol=1e-5)
    np.testing.assert_array_equal(sae.w_enc, sae.w_dec)
    np.testing.assert_allclose(sae.b_dec, sample.median)
    np.testing.assert_allclose(sae.w_enc @ sample.median + sae.b_enc, 0, atol=1e-4)


def test_bad_settings_are_refused():
    with pytest.raises(UsageError, match=r"sae.l1_coefficient=-1"):
        relu_norm.Config(l1_coefficient=-1.0)
