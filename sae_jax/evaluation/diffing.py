"""What two sources of a crosscoder share and what only one of them has: a model and its fine-tuned version.

    r_i = ||d_i^b|| / (||d_i^a|| + ||d_i^b||)      0: latent i writes to a alone, 1: to b alone, 1/2: equally to both

A penalty on f_i (||d_i^a|| + ||d_i^b||) makes latents look exclusive that are not. It shrinks small decoder rows to
zero, and where a concept is active at different times in the two sources it favours two latents, one for each.
Latent scaling tests this on the rows: how much of what latent i writes to b would help to reconstruct a?

    beta = argmin over rows of ||target - beta f_i d_i^b||^2 = sum f_i (d_i^b . target) / sum f_i^2 ||d_i^b||^2

With the error of a as target, a beta near that of b means that the decoder row was shrunk; with the reconstruction of
a, that other latents write it there. `Scaling.nu_*` are these ratios, near 0 for a latent that only b has.

Each source is in units in which its mean squared norm is 1.

Sources: Lindsey et al. 2024, "Sparse crosscoders for cross-layer features and model diffing"; latent scaling: Minder et
al. 2025, "Robustly identifying concepts introduced during chat fine-tuning using crosscoders", arXiv 2504.02922.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.activations.store import ActivationSet
from sae_jax.saes.base import AbstractSae
from sae_jax.types import Code, Sites

LOW, HIGH = 0.3, 0.7  # shared latents lie between
LATENTS_AT_ONCE = 2048


class Side(NamedTuple):
    """Where a source lies in the rows that a dictionary reconstructs, and its scale."""

    columns: slice  # of y
    unit: float = 1.0  # root mean square norm of its rows


class Split(NamedTuple):
    """Which latents write to which source; each bool[F]."""

    a: np.ndarray
    shared: np.ndarray
    b: np.ndarray


class Scaling(NamedTuple):
    """Betas of some latents; each f64[L], NaN for a latent that was never active."""

    error: np.ndarray  # of the other source's error
    reconstruction: np.ndarray  # of its reconstruction
    source_error: np.ndarray  # of the error of the source that the latent writes to, without the latent
    source_reconstruction: np.ndarray

    @property
    def nu_error(self) -> np.ndarray:
        """How much of the latent is in the other source's error: shrinkage if far from 0."""
        return self.error / self.source_error

    @property
    def nu_reconstruction(self) -> np.ndarray:
        """How much of it other latents write to the other source: decoupled if far from 0."""
        return self.reconstruction / self.source_reconstruction


def side(activations: ActivationSet, sites: Sites, name: str) -> Side:
    """The side of a source among those that a dictionary reconstructs."""
    first = sum(activations.source(other).d for other in sites.y[: sites.y.index(name)])
    return Side(slice(first, first + activations.source(name).d), activations.stats(name).mean_square ** 0.5)


def relative_norms(sae: AbstractSae, a: Side, b: Side) -> np.ndarray:
    """r, f64[F], in [0, 1]; NaN for a latent that writes to neither."""
    norm_a, norm_b = (np.linalg.norm(_decoder(sae, at), axis=1) for at in (a, b))
    with np.errstate(invalid="ignore"):
        return norm_b / (norm_a + norm_b)


def histogram(relative_F: np.ndarray, n_bins: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """(counts i64[n_bins], edges f64[n_bins + 1]) of relative norms over [0, 1]."""
    return np.histogram(relative_F[np.isfinite(relative_F)], n_bins, (0.0, 1.0))


def split(relative_F: np.ndarray, low: float = LOW, high: float = HIGH) -> Split:
    """Latents of a alone (r < low), shared, and of b alone (r > high)."""
    return Split(relative_F < low, (relative_F >= low) & (relative_F <= high), relative_F > high)


def decoder_cosines(sae: AbstractSae, a: Side, b: Side) -> np.ndarray:
    """Cosine of the two decoder rows of each latent, f64[F]. Raises ValueError for sources of different widths."""
    rows_a, rows_b = (_decoder(sae, at) for at in (a, b))
    if rows_a.shape != rows_b.shape:
        raise ValueError(f"rows of {rows_a.shape[1]} and of {rows_b.shape[1]} numbers have no angle between them")
    norms_F = np.linalg.norm(rows_a, axis=1) * np.linalg.norm(rows_b, axis=1)
    return (rows_a * rows_b).sum(1) / np.maximum(norms_F, 1e-30)


def latent_scaling(
    sae: AbstractSae, blocks: Iterable[np.ndarray], latents: np.ndarray, source: Side, other: Side
) -> Scaling:
    """How much of what each latent writes to one source is present in the other.

    Args:
        sae: a dictionary that reconstructs what it encodes.
        blocks: rows f32[n, X] of the set, in blocks of one length; another length compiles again.
        latents: i64[L], the latents to test: those that `split` gives to one source.
        source: the source that they write to.
        other: the source that they do not write to; of the same width.
    """
    sums_5L = np.zeros((5, len(latents)))
    for x_BX in blocks:
        x_BX = jnp.asarray(x_BX, jnp.float32)
        code, x_hat_BX = sae.encode(x_BX), sae(x_BX)
        targets = [
            part_BX[:, at.columns] / at.unit for at in (other, source) for part_BX in (x_BX - x_hat_BX, x_hat_BX)
        ]
        for first in range(0, len(latents), LATENTS_AT_ONCE):
            here = slice(first, first + LATENTS_AT_ONCE)
            place_F = np.full(sae.b_enc.shape[0], -1)
            place_F[latents[here]] = np.arange(len(latents[here]))
            rows_LD = sae.w_dec[latents[here], source.columns] / source.unit
            sums_5L[:, here] += np.asarray(_block_sums(code, jnp.asarray(place_F), rows_LD, targets))
    squares_L = np.where(sums_5L[4] > 0, sums_5L[4], np.nan)
    error_L, reconstruction_L, source_error_L, source_reconstruction_L = sums_5L[:4] / squares_L
    # The error without the latent is the error plus what the latent writes.
    return Scaling(error_L, reconstruction_L, source_error_L + 1, source_reconstruction_L)


def _decoder(sae: AbstractSae, at: Side) -> np.ndarray:
    return np.asarray(sae.w_dec[:, at.columns], np.float64) / at.unit


@jax.jit
def _block_sums(code: Code, place_F: jax.Array, rows_LD: jax.Array, targets: list[jax.Array]) -> jax.Array:
    """sum f (d . target) for each target, and sum f^2 ||d||^2: f32[targets + 1, L]."""
    n_rows, n_latents = code.indices.shape[0], len(rows_LD)
    slot_BK = place_F[code.indices]
    f_BL = (
        jnp.zeros((n_rows, n_latents))
        .at[jnp.arange(n_rows)[:, None], slot_BK]
        .add(jnp.where(slot_BK >= 0, code.values, 0.0), mode="drop")
    )
    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    along = [(f_BL * product(target_BD, rows_LD.T)).sum(0) for target_BD in targets]
    return jnp.stack([*along, (f_BL**2).sum(0) * (rows_LD**2).sum(1)])
