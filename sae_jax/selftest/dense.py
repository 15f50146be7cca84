"""TopK with AuxK in float64 on the host, written from the equations: no mesh, no blocks but of rows, no JAX.

    pre = W_enc (x - b_dec) + b_enc,   z = ReLU(keep_k(pre)),   x_hat = W_dec^T z + b_dec,   e = x - x_hat
    loss = s mean(e^2) + c ||e - W_dec^T z_dead||^2 / ||e - mean e||^2        (e is a constant in the second part)

A code is a list of its active (row, latent, value). Of latents with equal values the lowest comes first in z; in z_dead
all that equal the last one are in (ops/auxk.py).

Source: Gao et al. 2024, arXiv 2406.04093, sections 2.3 and A.2.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sae_jax.saes.base import FIRED_ABOVE

BLOCK = 1 << 24  # pre-activations at a time


class Pairs(NamedTuple):
    """The active latents of rows, in order of row and latent."""

    rows: np.ndarray  # i64[P]
    latents: np.ndarray  # i64[P]
    values: np.ndarray  # f64[P], above 0


def encode(x_BD: np.ndarray, w_enc_FD: np.ndarray, b_enc_F: np.ndarray, k: int, ties: bool = False) -> Pairs:
    """The code of centred rows; with `ties`, all latents whose value equals the k-th largest."""
    w_DF = w_enc_FD.astype(np.float64).T
    size = max(1, BLOCK // len(b_enc_F))
    found = []
    for first in range(0, len(x_BD), size):
        pre_bF = x_BD[first : first + size].astype(np.float64) @ w_DF + b_enc_F
        least_b1 = np.partition(pre_bF, len(b_enc_F) - k, axis=1)[:, [len(b_enc_F) - k]]
        above_bF, equal_bF = pre_bF > least_b1, pre_bF == least_b1
        if not ties:
            equal_bF &= np.cumsum(equal_bF, axis=1) <= k - above_bF.sum(1, keepdims=True)
        rows_P, latents_P = np.nonzero((above_bF | equal_bF) & (pre_bF > 0))
        found.append((rows_P + first, latents_P, pre_bF[rows_P, latents_P]))
    return Pairs(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def objective(
    x_BD: np.ndarray,
    weights: dict[str, np.ndarray],
    k: int,
    k_aux: int,
    aux_coefficient: float,
    loss_scale: float,
    silent_F: np.ndarray,
) -> tuple[float, dict[str, np.ndarray]]:
    """(loss, gradients) of a batch; the decoder's gradient loses its component along each row.

    Args:
        x_BD: rows.
        weights: w_enc [F, D], b_enc [F], w_dec [F, D], b_dec [D].
        k, k_aux: active latents of the code, and dead ones.
        aux_coefficient, loss_scale: c and s.
        silent_F: bool, latents that are dead if they do not fire in this batch. At least k_aux must be.
    """
    x_BD = x_BD.astype(np.float64)
    w_enc_FD, b_enc_F, w_dec_FD, b_dec_D = (weights[n].astype(np.float64) for n in ("w_enc", "b_enc", "w_dec", "b_dec"))
    centred_BD = x_BD - b_dec_D

    def decode(code: Pairs) -> np.ndarray:
        x_hat_BD = np.zeros_like(x_BD)
        np.add.at(x_hat_BD, code.rows, code.values[:, None] * w_dec_FD[code.latents])
        return x_hat_BD

    code = encode(centred_BD, w_enc_FD, b_enc_F, k)
    e_BD = centred_BD - decode(code)
    dead_F = silent_F.copy()
    dead_F[code.latents[code.values > FIRED_ABOVE]] = False
    dead_code = encode(centred_BD, w_enc_FD, np.where(dead_F, b_enc_F, -np.inf), k_aux, ties=True)
    left_BD, total = decode(dead_code) - e_BD, ((e_BD - e_BD.mean(0)) ** 2).sum()
    loss = loss_scale * (e_BD**2).mean() + aux_coefficient * (left_BD**2).sum() / total

    g_x_hat_BD, g_aux_BD = -2 * loss_scale * e_BD / e_BD.size, 2 * aux_coefficient * left_BD / total
    g = {name: np.zeros(np.shape(weight)) for name, weight in weights.items()}
    g["b_dec"] += g_x_hat_BD.sum(0)
    for (rows_P, latents_P, z_P), g_BD in ((code, g_x_hat_BD), (dead_code, g_aux_BD)):
        g_pre_P = (w_dec_FD[latents_P] * g_BD[rows_P]).sum(1)
        np.add.at(g["w_dec"], latents_P, z_P[:, None] * g_BD[rows_P])
        np.add.at(g["w_enc"], latents_P, g_pre_P[:, None] * centred_BD[rows_P])
        np.add.at(g["b_enc"], latents_P, g_pre_P)
        g["b_dec"] -= (g_pre_P[:, None] * w_enc_FD[latents_P]).sum(0)
    g["w_dec"] -= (g["w_dec"] * w_dec_FD).sum(1, keepdims=True) * w_dec_FD
    return loss, g
