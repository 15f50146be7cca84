"""Numbers that are not defined are said to be so: no division by zero, and no overflow that reads as a perfect fit."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import sae_jax
from sae_jax import UsageError
from sae_jax.evaluation.evaluate import on_rows
from sae_jax.saes import losses

ROWS = np.random.default_rng(0).standard_normal((512, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def dictionary() -> sae_jax.Dictionary:
    return sae_jax.train(ROWS, n_latents=32, k=4, steps=5, batch_size=64)


@pytest.mark.parametrize("rows", [ROWS * 1e18, ROWS * 1e19, ROWS * 0, ROWS * 0 + 7.3])
def test_fvu_of_rows_without_a_variance_or_with_too_much_is_not_a_number(dictionary, rows: np.ndarray) -> None:
    metrics = on_rows(dictionary.sae, rows)
    assert not np.isfinite(metrics["fvu"]) or metrics["fvu"] > 0.1
    assert np.isnan(losses.batch_fvu(jnp.asarray(rows * 10), jnp.zeros_like(rows)))


def test_fvu_at_the_scales_between_is_what_it_was(dictionary) -> None:
    expected = on_rows(dictionary.sae, ROWS)["fvu"]
    assert np.isclose(losses.batch_fvu(jnp.asarray(ROWS), dictionary(ROWS)), expected, rtol=1e-3)


@pytest.mark.parametrize("variant", ["jumprelu", "gated", "relu_norm", "crosscoder"])
def test_a_source_of_zeros_that_would_be_scaled_is_refused_by_name(variant: str) -> None:
    settings = {"n_latents": 32, "steps": 3, "batch_size": 64}
    if variant == "crosscoder":
        settings["site"] = ("a", "zero")
    else:
        settings["site"] = "zero"
    with pytest.raises(UsageError, match=r"source zero: the mean square of its rows is 0, so dataset_"):
        sae_jax.train({"a": ROWS, "zero": ROWS * 0}, variant=variant, **settings)
