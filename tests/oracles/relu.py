"""Float64 numpy definition of the ReLU autoencoder with an L1 penalty, from the equations; imports nothing of ours."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Result:
    z_BF: np.ndarray
    x_hat_BD: np.ndarray
    loss: float
    silent_F: np.ndarray
    gradients: dict[str, np.ndarray]


def objective(x_BD, w_enc, b_enc, w_dec, b_dec, coefficient, silent_F, dead_after) -> Result:
    """Loss SE + c ||z||_1, means over rows; the decoder's gradient loses its component along each unit row."""
    n_rows = len(x_BD)
    x_in = x_BD - b_dec
    pre = x_in @ w_enc.T + b_enc
    z = np.maximum(pre, 0)
    x_hat = z @ w_dec + b_dec
    loss = (((x_hat - x_BD) ** 2).sum() + coefficient * z.sum()) / n_rows

    g_x_hat = 2 * (x_hat - x_BD) / n_rows
    g_pre = (g_x_hat @ w_dec.T + coefficient / n_rows) * (pre > 0)
    g_w_dec = z.T @ g_x_hat
    return Result(
        z_BF=z,
        x_hat_BD=x_hat,
        loss=loss,
        silent_F=np.where((z > 1e-3).any(0), 0, np.minimum(silent_F + n_rows, dead_after + 1)),
        gradients={
            "w_enc": g_pre.T @ x_in,
            "b_enc": g_pre.sum(0),
            "w_dec": g_w_dec - (g_w_dec * w_dec).sum(1, keepdims=True) * w_dec,
            "b_dec": g_x_hat.sum(0) - g_pre.sum(0) @ w_enc,
        },
    )
