"""What the tests of variants with a float64 oracle share: rows, statistics, and the comparison on a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import mesh as meshes
from sae_jax.saes import base, normalise
from sae_jax.training import optim
from tests.saes.contexts import context_of

B, D, F = 16, 8, 48


def rows() -> np.ndarray:
    """f32[B, D]."""
    return np.random.default_rng(5).standard_normal((B, D)).astype(np.float32)


def arrays(seed: int, *shapes: tuple[int, ...]) -> list[jax.Array]:
    """Normal f32 arrays: weights away from the initialisation, so that a missed bias or norm would show."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def float64(sae: Any, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Its weights."""
    return {name: np.asarray(getattr(sae, name), np.float64) for name in names}


def learnt(objective: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """sae -> what the objective says of it, and the gradient as the optimiser takes it: see `optim.along_sphere`."""

    def value_and_gradient(sae):
        value, gradients = jax.value_and_grad(objective, has_aux=True)(sae)
        return value, optim.along_sphere(gradients, sae)[0]

    return value_and_gradient


def assert_is_oracle(sae: Any, want: Any, shape: tuple[int, int] | None) -> None:
    """Loss, reconstruction, L0, gradients, and where these lie, on a mesh of this shape or without one."""

    def value_and_gradient(sae, x, silent):
        one = jnp.ones(D)
        stats = context_of(silent, jnp.int32(100), jnp.float32(0.7), normalise.Scale(one, one), {}, coefficients)

        def objective(sae):
            return sae.objective(base.Batch(x, x), stats)

        return learnt(objective)(sae)

    def place(a, role):
        return jax.device_put(a, meshes.sharding(mesh, role))

    # Its coefficients come as data, its config says 1 for each.
    coefficients, sae = sae.config.coefficients, sae.replace(config=sae.config.program)
    x, silent = rows(), np.zeros(F, np.int32)
    if shape is None:
        (loss, outcome), gradients = jax.jit(value_and_gradient)(sae, x, silent)
    else:
        mesh = meshes.make_mesh(meshes.MeshConfig(*shape))
        with jax.set_mesh(mesh):
            placed = jax.tree.map(lambda a: place(a, meshes.DICT if len(a) == F else meshes.REPLICATED), sae)
            batch = place(x, meshes.ROWS), place(silent, meshes.DICT)
            (loss, outcome), gradients = jax.jit(value_and_gradient)(placed, *batch)
            assert jax.tree.map(jax.typeof, gradients) == jax.tree.map(jax.typeof, placed)
    np.testing.assert_allclose(loss, want.loss, rtol=1e-5)
    np.testing.assert_allclose(outcome.y_hat, want.x_hat_BD, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outcome.l0, (want.z_BF > 0).sum(1).mean(), rtol=1e-6)
    for name, gradient in want.gradients.items():
        np.testing.assert_allclose(getattr(gradients, name), gradient, rtol=1e-4, atol=1e-5, err_msg=name)


def assert_finite_differences(result: Any, weights: dict[str, np.ndarray], tangent: tuple[str, ...] = ()) -> None:
    """Gradients of an oracle's loss, `result(weights)`; those of `tangent` have no component along unit rows."""
    gradients = result(weights).gradients
    rng = np.random.default_rng(2)
    for name, value in weights.items():
        step = 1e-6 * rng.standard_normal(value.shape)
        if name in tangent:
            step -= (step * value).sum(1, keepdims=True) * value
        up, down = (result({**weights, name: value + sign * step}).loss for sign in (1, -1))
        expected = (gradients[name] * step).sum()
        np.testing.assert_allclose((up - down) / 2, expected, rtol=1e-4, atol=1e-12, err_msg=name)
