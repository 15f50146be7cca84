"""Float64 numpy definition of the TopK autoencoder with AuxK, written from the equations; imports nothing of ours."""

from dataclasses import dataclass

import numpy as np


def select(pre_BF: np.ndarray, k: int) -> np.ndarray:
    """Indices [B, k] of the k largest of each row, larger first, ties to the lower index, -0.0 equal to 0.0."""
    return np.stack([sorted(range(len(row)), key=lambda f: (-row[f], f))[:k] for row in pre_BF + 0.0])


def select_batch(pre_BF: np.ndarray, k: int) -> np.ndarray:
    """bool[B, F]: the B*k largest positive values of the batch, ties to the lower row, then to the lower latent."""
    entries = [(-value, b, f) for b, row in enumerate(pre_BF) for f, value in enumerate(row) if value > 0]
    keep_BF = np.zeros(pre_BF.shape, bool)
    for _, b, f in sorted(entries)[: len(pre_BF) * k]:
        keep_BF[b, f] = True
    return keep_BF


@dataclass
class Result:
    z_BF: np.ndarray
    x_hat_BD: np.ndarray
    loss: float
    aux_loss: float
    silent_F: np.ndarray
    gradients: dict[str, np.ndarray]


def objective(
    x_BD, w_enc, b_enc, w_dec, b_dec, k, scale, silent_F, dead_after, aux_coefficient, k_aux, multi=0.0
) -> Result:
    """Loss s * MSE(k) + multi * s * MSE(4k) + c * L_aux and its gradients.

    The decoder's gradient loses its component along each unit row.
    """
    n_rows, d_model = x_BD.shape
    x_in = x_BD - b_dec
    pre = x_in @ w_enc.T + b_enc
    z = _code(pre, k)
    x_hat = z @ w_dec + b_dec
    loss = scale * np.mean((x_hat - x_BD) ** 2)

    g_x_hat = 2 * scale * (x_hat - x_BD) / (n_rows * d_model)
    g_w_dec, g_pre = z.T @ g_x_hat, (g_x_hat @ w_dec.T) * (z > 0)
    g_b_dec = g_x_hat.sum(0)

    z_wide = _code(pre, min(4 * k, len(w_enc)))
    wide_error = z_wide @ w_dec + b_dec - x_BD
    loss = loss + multi * scale * np.mean(wide_error**2)
    g_wide = multi * 2 * scale * wide_error / (n_rows * d_model)
    g_w_dec, g_pre = g_w_dec + z_wide.T @ g_wide, g_pre + (g_wide @ w_dec.T) * (z_wide > 0)
    g_b_dec = g_b_dec + g_wide.sum(0)

    fired = (z > 1e-3).any(0)
    silent_F = np.where(fired, 0, np.minimum(silent_F + n_rows, dead_after + 1))
    dead = silent_F > dead_after
    aux = 0.0
    if dead.any():
        error = x_BD - x_hat
        z_aux = _code(np.where(dead, pre, -np.inf), min(k_aux, dead.sum()))
        error_hat = z_aux @ w_dec
        total = ((error - error.mean(0)) ** 2).sum()
        aux = ((error - error_hat) ** 2).sum() / total
        g_error_hat = aux_coefficient * 2 * (error_hat - error) / total
        g_w_dec = g_w_dec + z_aux.T @ g_error_hat
        g_pre = g_pre + (g_error_hat @ w_dec.T) * (z_aux > 0)
    return Result(
        z_BF=z,
        x_hat_BD=x_hat,
        loss=loss + aux_coefficient * aux,
        aux_loss=aux,
        silent_F=silent_F,
        gradients={
            "w_enc": g_pre.T @ x_in,
            "b_enc": g_pre.sum(0),
            "w_dec": g_w_dec - (g_w_dec * w_dec).sum(1, keepdims=True) * w_dec,
            "b_dec": g_b_dec - g_pre.sum(0) @ w_enc,
        },
    )


def _code(pre_BF: np.ndarray, k: int) -> np.ndarray:
    z_BF = np.zeros_like(pre_BF)
    for b, chosen in enumerate(select(pre_BF, k)):
        z_BF[b, chosen] = np.maximum(pre_BF[b, chosen], 0)
    return z_BF
