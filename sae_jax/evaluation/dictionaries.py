"""Comparing dictionaries with each other and with known directions.

    MMCS          mean over one set of directions of the greatest cosine with another set; not symmetric
    duplicates    pairs of directions with a cosine above 0.9
    absorption    a parent's latent stays silent because latents of its children represent it too

Cosines are signed: a latent that points the other way is a different latent. Directions are rows, of any norm.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.saes import base
from sae_jax.saes.base import AbstractSae

TILE = 4096  # cosines are computed for blocks of TILE x TILE directions: 64 MiB, whatever the widths


def closest(a_FD: jax.Array | np.ndarray, b_GD: jax.Array | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row of a [F, D] the row of b [G, D] of greatest cosine: (indices i64[F], cosines f32[F])."""
    index_F, best_F = np.zeros(len(a_FD), np.int64), np.full(len(a_FD), -np.inf, np.float32)
    for first_a, first_b, cosines_ab in _tiles(jnp.asarray(a_FD, jnp.float32), jnp.asarray(b_GD, jnp.float32)):
        index_a, best_a = (np.asarray(value) for value in (cosines_ab.argmax(1), cosines_ab.max(1)))
        here = slice(first_a, first_a + len(best_a))
        better_a = best_a > best_F[here]
        index_F[here] = np.where(better_a, index_a + first_b, index_F[here])
        best_F[here] = np.maximum(best_a, best_F[here])
    return index_F, best_F


def mmcs(a_FD: jax.Array | np.ndarray, b_GD: jax.Array | np.ndarray) -> tuple[float, float]:
    """Mean greatest cosine of a's rows with b's, and of b's with a's.

    With a the true directions and b a decoder, the first is like recall, the second like precision.

    Source: Sharkey, Braun and Millidge 2022, "Taking features out of superposition with sparse autoencoders".
    """
    forth, back = (closest(*pair)[1].mean(dtype=np.float64) for pair in ((a_FD, b_GD), (b_GD, a_FD)))
    return float(forth), float(back)


def duplicates(w_FD: jax.Array | np.ndarray, above: float = 0.9) -> np.ndarray:
    """Pairs (i, j), i < j, of rows [F, D] with a cosine greater than `above`, as i64[P, 2] in ascending order."""
    w_FD = jnp.asarray(w_FD, jnp.float32)
    pairs = []
    for first_a, first_b, cosines_ab in _tiles(w_FD, w_FD):
        if first_b + cosines_ab.shape[1] > first_a:
            pairs_P2 = np.argwhere(np.asarray(cosines_ab > above)) + np.array([first_a, first_b])
            pairs.append(pairs_P2[pairs_P2[:, 0] < pairs_P2[:, 1]])
    pairs_P2 = np.concatenate(pairs)
    return pairs_P2[np.lexsort(pairs_P2.T[::-1])]


def absorption(
    sae: AbstractSae,
    rows_ND: np.ndarray,
    codes_NG: np.ndarray,
    directions_GD: np.ndarray,
    parents_G: np.ndarray,
    min_cosine: float = 0.1,
    min_share: float = 0.4,
) -> np.ndarray:
    """How often each parent is absorbed, f64[P], parents in ascending order (NaN for one that is never active).

    The latent of a parent p is the one whose decoder row has the greatest cosine with p's direction. The latents of
    its children are the others whose decoder row has a cosine of at least `min_cosine` both with p and with a child
    of p. On a row where p is active with strength c, p is absorbed if its latent is silent while its children's active
    latents together contribute at least `min_share` * c along p's direction. The result is the share of p's rows on
    which this happens.

    Source: after Karvonen et al. 2025, "SAEBench", arXiv 2503.09532. Differences: known directions take the place of
    probes, latents are chosen by the decoder, and the threshold on the cosine is 0.1 where theirs is 0.025.

    Args:
        sae: a dictionary.
        rows_ND: f32[N, D], made of
        codes_NG: f32[N, G], strengths of
        directions_GD: f32[G, D], unit rows.
        parents_G: i64[G], the parent of each direction; -1: none.
        min_cosine: for a latent to count as a child's.
        min_share: of the parent's strength that these latents must contribute together.
    """
    code = jax.tree.map(np.asarray, sae.encode(rows_ND))
    w_dec = np.asarray(sae.w_dec, np.float64)
    along_FG = w_dec @ np.asarray(directions_GD, np.float64).T
    cosine_FG = along_FG / np.maximum(np.linalg.norm(w_dec, axis=1, keepdims=True), 1e-30)
    absorbed = []
    for parent in np.unique(parents_G[parents_G >= 0]):
        latent = cosine_FG[:, parent].argmax()
        children_F = (cosine_FG[:, parents_G == parent] >= min_cosine).any(1) & (cosine_FG[:, parent] >= min_cosine)
        children_F[latent] = False
        active = np.flatnonzero(codes_NG[:, parent] > 0)
        indices_NK, values_NK = code.indices[active], code.values[active]
        silent_N = ~((indices_NK == latent) & (values_NK > 0)).any(1)
        contributed_N = (values_NK * (along_FG[:, parent] * children_F)[indices_NK]).sum(1)
        absorbed_N = silent_N & (contributed_N >= min_share * codes_NG[active, parent])
        absorbed.append(absorbed_N.mean() if len(active) else np.nan)
    return np.asarray(absorbed)


def _tiles(a_FD: jax.Array, b_GD: jax.Array) -> Iterator[tuple[int, int, jax.Array]]:
    """(first row of a, first row of b, cosines f32[<= TILE, <= TILE])."""
    for first_a in range(0, len(a_FD), TILE):
        for first_b in range(0, len(b_GD), TILE):
            yield first_a, first_b, _cosines(a_FD[first_a : first_a + TILE], b_GD[first_b : first_b + TILE])


@jax.jit
def _cosines(a_FD: jax.Array, b_GD: jax.Array) -> jax.Array:
    return jnp.matmul(base.unit_rows(a_FD), base.unit_rows(b_GD).T, precision=jax.lax.Precision.HIGHEST)
