"""FLOP of a token of training.

    dense      6 n (X + Y)      both matrices forward, and twice more backward, as if no latent were left out
    executed   with k active latents a row: the encoder forward, then k rows of the decoder, of its inner products with
               the error and of the gradients of both matrices, 2 n X + 2 k (X + 3 Y); without such a bound, as dense.
               JumpReLU at its target_l0: that with k = target_l0, and the eighth of the rows that moves thresholds,
               once through the encoder and once with the error

Laws over compute are in dense FLOP: their unit is then n times tokens, up to a constant, whatever k and the engine are
(Gao et al. 2024, arXiv 2406.04093, section 3.1). How long a run takes follows from what is executed. Both count
products alone, a multiplication and an addition as two.
"""

from __future__ import annotations

from sae_jax.ops import auxk as ops_auxk
from sae_jax.saes import jumprelu
from sae_jax.saes.base import KConfig, SaeConfig
from sae_jax.types import Widths


def dense(sae: SaeConfig, widths: Widths) -> int:
    """FLOP a token, by the dense count."""
    return 6 * sae.n_latents * (sum(widths.x) + sum(widths.y))


def executed(sae: SaeConfig, widths: Widths) -> int:
    """FLOP a token that the engine carries out while no latent is dead; `auxk` says what dead ones add."""
    encoded, decoded = sum(widths.x), sum(widths.y)
    if isinstance(sae, jumprelu.Config) and sae.may_be_sparse:
        sampled = sae.n_latents * (encoded + decoded) / jumprelu.STRIDE
        return round(2 * (encoded * (sae.n_latents + sae.target_l0) + 3 * sae.target_l0 * decoded + sampled))
    if sae.n_active is None:
        return dense(sae, widths)
    return 2 * (encoded * (sae.n_latents + sae.n_active) + 3 * sae.n_active * decoded)


def auxk(sae: SaeConfig, widths: Widths, n_rows: int, by_pairs: bool = False) -> int:
    """FLOP a token, at most, that AuxK adds to steps of `n_rows`: x and its gradient once, y and its gradients thrice.

    Five products over the latents and rows that ops/auxk.py looks at, but for the room that each of several devices
    leaves for an uneven spread. `by_pairs`: the one product of ops/auxk_pairs.py, whose rest is of k latents a row.
    """
    if not isinstance(sae, KConfig) or sae.n_active is None or not sae.aux_coefficient:
        return 0
    products = 2 * sae.n_latents * (sum(widths.x) if by_pairs else 2 * sum(widths.x) + 3 * sum(widths.y))
    return round(ops_auxk.most_work(n_rows, sae.aux_rows == "sampled") * products)


def optimiser_bytes(state_bytes: int) -> int:
    """Bytes that a step moves even if everything else hides in caches: weights and moments, read and written once."""
    return 2 * state_bytes
