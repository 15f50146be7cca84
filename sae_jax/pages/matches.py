"""Which latents of two dictionaries are alike: whose decoder rows are near, and which fire on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse

from sae_jax.analysis.examples import Activations
from sae_jax.evaluation.dictionaries import closest
from sae_jax.pages.latents import Subject
from sae_jax.progress import say_once

_MOST_COSINES = 2**37  # some minutes
_MOST_PAIRS = 2**32  # of activations on one row, that are counted
_PAIRS = 2**23  # of them at once: some 100 MB


@dataclass(frozen=True)
class Matches:
    """Of each latent of one dictionary the one of the other that is most like it."""

    latents: np.ndarray  # i64[F], -1: none
    values: np.ndarray  # f32[F]


def by_decoder(a: Subject, b: Subject) -> Matches | None:
    """By the cosine of decoder rows; None, and it is said why, where these are of other widths or too many."""
    widths, n_cosines = (a.w_dec.shape[1], b.w_dec.shape[1]), len(a.w_dec) * len(b.w_dec)
    if widths[0] != widths[1]:
        say_once(
            f"decoder rows of {widths[0]} and of {widths[1]} numbers have no cosine; latents are matched by firing"
        )
        return None
    if n_cosines > _MOST_COSINES:
        say_once(f"{n_cosines:,} cosines of decoder rows are too many; latents are matched by firing")
        return None
    return Matches(*closest(a.w_dec, b.w_dec))


def by_firing(a: Activations, b: Activations) -> Matches | None:
    """By the Jaccard index: of the tokens on which one of the two fires, the share on which both do.

    None, and it is said why, where the samples are of other texts, or too large.
    """
    same_text = np.array_equal(a.sequences, b.sequences) and np.array_equal(a.has_row, b.has_row)
    if not same_text:
        say_once("the two dictionaries have other samples of text; latents are not matched by firing")
        return None
    n_a, n_b = (np.bincount(table.places[:], minlength=table.has_row.size) for table in (a, b))
    if (n_pairs := int((n_a * n_b).sum())) > _MOST_PAIRS:
        say_once(f"{n_pairs:,} pairs of latents on one row are too many; latents are not matched by firing")
        return None
    fires_a, fires_b = _firing(a), _firing(b).T.tocsr()
    latents, values = np.full(a.n_latents, -1, np.int64), np.zeros(a.n_latents, np.float32)
    n_pairs_F = np.cumsum(fires_a @ n_b)
    for part in np.split(np.arange(a.n_latents), np.flatnonzero(np.diff(n_pairs_F // _PAIRS)) + 1):
        both = (fires_a[part] @ fires_b).tocsr()
        row = np.repeat(np.arange(len(part)), np.diff(both.indptr))
        jaccard = both.data / (a.counts[part][row] + b.counts[both.indices] - both.data)
        order = np.lexsort((both.indices, -jaccard, row))
        first = order[np.flatnonzero(np.diff(row[order], prepend=-1))]
        latents[part[row[first]]], values[part[row[first]]] = both.indices[first], jaccard[first]
    return Matches(latents, values)


def _firing(table: Activations) -> scipy.sparse.csr_array:
    """i32[F, places], 1 where a latent fires."""
    ones = np.ones(int(table.offsets[-1]), np.int32)
    return scipy.sparse.csr_array((ones, table.places[:], table.offsets), (table.n_latents, table.has_row.size))
