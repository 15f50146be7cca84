"""Float64 numpy definition of the tied ReLU autoencoder, from the equations; imports nothing of ours."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Result:
    z_BF: np.ndarray
    x_hat_BD: np.ndarray
    loss: float
    gradients: dict[str, np.ndarray]


def objective(x_BD, w_enc, b_enc, b_dec, coefficient) -> Result:
    """Loss MSE + c ||z||_1, means over rows; the gradient of rows loses its component along each, b_dec has none."""
    n_rows, d_model = x_BD.shape
    x_in = x_BD - b_dec
    pre = x_in @ w_enc.T + b_enc
    z = np.maximum(pre, 0)
    x_hat = z @ w_enc + b_dec
    loss = ((x_hat - x_BD) ** 2).mean() + coefficient * z.sum() / n_rows
    g_x_hat = 2 * (x_hat - x_BD) / (n_rows * d_model)
    g_pre = (g_x_hat @ w_enc.T + coefficient / n_rows) * (pre > 0)
    g_w = z.T @ g_x_hat + g_pre.T @ x_in
    return Result(
        z_BF=z,
        x_hat_BD=x_hat,
        loss=loss,
        gradients={
            "w_enc": g_w - (g_w * w_enc).sum(1, keepdims=True) * w_enc,
            "b_enc": g_pre.sum(0),
            "b_dec": np.zeros(d_model),
        },
    )
