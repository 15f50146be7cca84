"""How weights begin: what a sample of the data says, and the random and constrained matrices that variants share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.scipy.special import ndtri

from sae_jax import mesh
from sae_jax.ops import spmd, tuning
from sae_jax.saes.normalise import InputNorm, Scale, factor, normalise_pair
from sae_jax.types import UsageError, Widths

RIDGE = 1e-2


@struct.dataclass
class Sample:
    """What initialisation needs to know of the data, in the units the dictionary sees."""

    median: jax.Array  # f32[X], geometric median of x
    mean: jax.Array  # f32[Y], of y
    variance: jax.Array  # f32[], mean over rows and dimensions of (y - mean y)^2
    scale: Scale
    widths: Widths = struct.field(pytree_node=False)
    same: bool = struct.field(pytree_node=False, default=True)  # y is x
    from_x: jax.Array | None = None  # f32[Y, X], see `linear_map`; None: y is x, or x is several sources


def sample_statistics(
    x_ND: np.ndarray,
    kind: InputNorm,
    y_ND: np.ndarray | None = None,
    widths: Widths | None = None,
    mean_squares: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Sample:
    """What initialisation needs, from a sample of rows, in float64 on the host.

    Args:
        x_ND: f32[N, X], in the units of the set.
        kind: how they will be normalised.
        y_ND: f32[N, Y]; None: x.
        widths: of the sources side by side in x and y; None: one each.
        mean_squares: mean squared norm of each source in x and in y, over the whole set; None: over the sample.

    Raises:
        UsageError: rows that are not finite, or do not vary.
    """
    same, y_ND = y_ND is None, x_ND if y_ND is None else y_ND
    widths = widths or Widths((x_ND.shape[1],), (y_ND.shape[1],))
    scales = []
    for side, (rows_ND, side_widths) in enumerate(((x_ND, widths.x), (y_ND, widths.y))):
        parts = np.split(rows_ND, np.cumsum(side_widths)[:-1], axis=1)
        squares = mean_squares[side] if mean_squares else [float((np.float64(p) ** 2).sum(1).mean()) for p in parts]
        factors = [factor(kind, square, width) for square, width in zip(squares, side_widths, strict=True)]
        with np.errstate(over="ignore"):  # of rows so small that they are refused below
            scales.append(np.repeat(np.asarray(factors, np.float32), side_widths))
    scale = Scale(*map(jnp.asarray, scales))
    seen = normalise_pair(jnp.asarray(x_ND, jnp.float32), jnp.asarray(y_ND, jnp.float32), kind, scale)[:2]
    x_ND, y_ND = (np.asarray(rows, np.float64) for rows in seen)
    variance = ((y_ND - y_ND.mean(0)) ** 2).mean()
    if not np.isfinite(variance) or not np.isfinite(x_ND).all() or variance == 0:
        raise UsageError(
            f"the sample of {len(x_ND)} activations has variance {variance}; a set must hold finite, varied rows"
        )
    statistics = (geometric_median(x_ND), y_ND.mean(0), variance)
    median, mean, variance = (jnp.asarray(value, jnp.float32) for value in statistics)
    # Transcoders begin with it, and encode one source; with several side by side it would take minutes for nothing.
    from_x = None if same or len(widths.x) > 1 else jnp.asarray(linear_map(x_ND, y_ND), jnp.float32)
    return Sample(median, mean, variance, scale, widths, same, from_x)


def linear_map(x_ND: np.ndarray, y_ND: np.ndarray) -> np.ndarray:
    """f64[Y, X]: A of y - mean y ~ A (x - mean x) with the least squared error, by ridge regression.

    The penalty is RIDGE of the mean variance of x, so that directions in which x hardly varies say nothing.
    """
    x_ND = x_ND - x_ND.mean(0)
    gram_XX = x_ND.T @ x_ND
    ridge = RIDGE * np.trace(gram_XX) / len(gram_XX)
    if ridge == 0:
        return np.zeros((y_ND.shape[1], len(gram_XX)))
    return np.linalg.solve(gram_XX + ridge * np.eye(len(gram_XX)), x_ND.T @ (y_ND - y_ND.mean(0))).T


def abstract_sample(widths: Widths) -> Sample:
    """Shapes in the place of a sample."""
    x, y, one = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((sum(widths.x),), (sum(widths.y),), ()))
    from_x = jax.ShapeDtypeStruct((*y.shape, *x.shape), jnp.float32)
    return Sample(x, y, one, Scale(x, y), widths, from_x=from_x)  # pyrefly: ignore[bad-argument-type] (shapes)


def geometric_median(rows_ND: np.ndarray, max_iterations: int = 100, tolerance: float = 1e-5) -> np.ndarray:
    """Point with the least summed distance to the rows [N, D], by Weiszfeld's iteration from the mean (float64)."""
    rows_ND = np.asarray(rows_ND, np.float64)
    guess_D = rows_ND.mean(0)
    for _ in range(max_iterations):
        # A row that coincides with the guess would get infinite weight.
        weight_N = 1.0 / np.maximum(np.linalg.norm(rows_ND - guess_D, axis=1), 1e-12)
        previous_D, guess_D = guess_D, weight_N @ rows_ND / weight_N.sum()
        if np.linalg.norm(guess_D - previous_D) < tolerance:
            break
    return guess_D


def unit_rows(w_FD: jax.Array) -> jax.Array:
    """Rows scaled to norm 1, in f32. A row of zeros stays."""
    # Norms are taken with what made the rows, where a compiler can; what follows stays apart from it: XLA on GPU would
    # write moments of fewer bytes out in f32, as operands of one fusion, and joins the scaling with an average instead.
    w_FD, norm_F = lax.optimization_barrier((w_FD, row_norms(w_FD)))
    return w_FD.astype(jnp.float32) * (1 / norm_F)[:, None]


def row_norms(w_FD: jax.Array) -> jax.Array:
    """Norm of each row, f32[F], to divide by: above 0."""
    return jnp.maximum(jnp.linalg.norm(w_FD.astype(jnp.float32), axis=-1), 1e-12)


def biases_for(w_FD: jax.Array, sample: Sample, b_pre: jax.Array, n_active: int) -> jax.Array:
    """f32[F]: so many latents of a row exceed 0, as far as a normal distribution can tell, but at most half of all."""
    mean_F = (w_FD * (sample.mean - b_pre)[None]).sum(-1)
    spread_F = jnp.sqrt(sample.variance) * jnp.linalg.norm(w_FD, axis=-1)
    return -mean_F - ndtri(1 - min(0.5, n_active / len(w_FD))) * spread_F


def centring(w_FX: jax.Array, median_X: jax.Array) -> jax.Array:
    """f32[F]: biases with which latents begin as if the median were subtracted from x.

    Ours, for variants that subtract nothing. With biases of 0 a latent along a large mean begins active on nearly every
    row, and one against it on none. On resid_post.1 of the bundled model, whose mean is 46 % of the mean square, the
    share of silent latents fell from 30 to 13 % (jumprelu) and from 50 to 18 % (relu_norm), FVU from 0.089 to 0.083 and
    from 0.111 to 0.101; on resid_post.2 (25 %) from 3 to 0 %, and nothing changed by more than 1 % of itself.
    """
    return -(w_FX * median_X[None]).sum(-1)


def linear_rows(key: jax.Array, n_latents: int, d_model: int, dtype: Any = jnp.float32) -> jax.Array:
    """[F, D], DICT: U(-1/sqrt(D), 1/sqrt(D)), a linear layer's usual default. Born sharded on a mesh.

    In bf16 a range of latents at a time, each from its own key: nothing of this size is ever in f32.
    """
    bound = d_model**-0.5
    if dtype == jnp.float32:
        shape = (n_latents, d_model)
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound, out_sharding=mesh.placed(mesh.DICT))

    def local(key):
        n_own = n_latents // mesh.axis_size(mesh.AXES)
        latents_R = spmd.index((*mesh.LATENT, mesh.DATA)) * n_own + jnp.arange(n_own, dtype=jnp.int32)
        _, size = spmd.even(n_own, max(1, tuning.current().block_bytes // (16 * d_model)))

        def row(latent):
            return jax.random.uniform(jax.random.fold_in(key, latent), (d_model,), minval=-bound, maxval=bound)

        return lax.map(lambda latent: row(latent).astype(dtype), latents_R, batch_size=size)

    return spmd.per_device(local, (mesh.REPLICATED,), mesh.DICT)(key)


def zeros(shape: tuple[int, ...], role: Any, dtype: Any = jnp.float32) -> jax.Array:
    """Zeros placed by role where there is a mesh."""
    return jnp.zeros(shape, dtype, out_sharding=mesh.placed(role))
