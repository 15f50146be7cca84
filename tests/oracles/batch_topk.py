"""Float64 numpy definition of BatchTopK with AuxK, and of Matryoshka, its generalisation; imports nothing of ours."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Result:
    z_BF: np.ndarray
    x_hat_BD: np.ndarray
    loss: float
    least: float  # the smallest value kept
    silent_F: np.ndarray
    gradients: dict[str, np.ndarray]


def objective(
    x_BD, w_enc, b_enc, w_dec, b_dec, k, scale, silent_F, dead_after, aux_coefficient, k_aux, prefixes_GF=None
) -> Result:
    """Mean over prefixes of s * MSE, plus c * L_aux; `prefixes_GF` says which latents each holds, the last all of them.

    The decoder's gradient loses its component along each unit row.
    """
    n_rows, d_model = x_BD.shape
    prefixes_GF = np.ones((1, len(w_enc)), bool) if prefixes_GF is None else prefixes_GF
    x_in = x_BD - b_dec
    pre = x_in @ w_enc.T + b_enc
    order = sorted((-value, b, f) for b, row in enumerate(pre) for f, value in enumerate(row) if value > 0)
    kept = order[: n_rows * k]
    z = np.zeros_like(pre)
    for value, b, f in kept:
        z[b, f] = -value

    loss, g_w_dec, g_z, g_b_dec = 0.0, np.zeros_like(w_dec), np.zeros_like(z), np.zeros_like(b_dec)
    for holds_F in prefixes_GF:
        x_hat = (z * holds_F) @ w_dec + b_dec
        loss += scale * np.mean((x_hat - x_BD) ** 2) / len(prefixes_GF)
        g_x_hat = 2 * scale * (x_hat - x_BD) / (n_rows * d_model * len(prefixes_GF))
        g_w_dec += (z * holds_F).T @ g_x_hat
        g_z += (g_x_hat @ w_dec.T) * holds_F
        g_b_dec += g_x_hat.sum(0)
    g_pre = g_z * (z > 0)

    silent_F = np.where((z > 1e-3).any(0), 0, np.minimum(silent_F + n_rows, dead_after + 1))
    dead = silent_F > dead_after
    if dead.any():
        error = x_BD - x_hat
        z_aux = np.zeros_like(pre)
        for b, row in enumerate(np.where(dead, pre, -np.inf)):
            chosen = np.argsort(-row, kind="stable")[: min(k_aux, dead.sum())]
            z_aux[b, chosen] = np.maximum(row[chosen], 0)
        total = ((error - error.mean(0)) ** 2).sum()
        left = z_aux @ w_dec - error
        loss += aux_coefficient * (left**2).sum() / total
        g_error_hat = aux_coefficient * 2 * left / total
        g_w_dec += z_aux.T @ g_error_hat
        g_pre += (g_error_hat @ w_dec.T) * (z_aux > 0)
    return Result(
        z_BF=z,
        x_hat_BD=x_hat,
        loss=loss,
        least=-kept[-1][0] if len(order) > n_rows * k else 0.0,
        silent_F=silent_F,
        gradients={
            "w_enc": g_pre.T @ x_in,
            "b_enc": g_pre.sum(0),
            "w_dec": g_w_dec - (g_w_dec * w_dec).sum(1, keepdims=True) * w_dec,
            "b_dec": g_b_dec - g_pre.sum(0) @ w_enc,
        },
    )
