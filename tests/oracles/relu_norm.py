"""Float64 numpy definition of the ReLU autoencoder whose L1 penalty is weighted by decoder norms; numpy alone."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Result:
    z_BF: np.ndarray
    x_hat_BD: np.ndarray
    loss: float
    gradients: dict[str, np.ndarray]


def objective(x_BD, w_enc, b_enc, w_dec, b_dec, coefficient) -> Result:
    """Loss SE + c sum_i z_i ||d_i||, means over rows."""
    n_rows = len(x_BD)
    pre = x_BD @ w_enc.T + b_enc
    z = np.maximum(pre, 0)
    x_hat = z @ w_dec + b_dec
    norm = np.linalg.norm(w_dec, axis=1)
    loss = (((x_hat - x_BD) ** 2).sum() + coefficient * (z * norm).sum()) / n_rows
    g_x_hat = 2 * (x_hat - x_BD) / n_rows
    g_pre = (g_x_hat @ w_dec.T + coefficient / n_rows * norm) * (pre > 0)
    return Result(
        z_BF=z,
        x_hat_BD=x_hat,
        loss=loss,
        gradients={
            "w_enc": g_pre.T @ x_BD,
            "b_enc": g_pre.sum(0),
            "w_dec": z.T @ g_x_hat + coefficient / n_rows * (z.sum(0) / norm)[:, None] * w_dec,
            "b_dec": g_x_hat.sum(0),
        },
    )
