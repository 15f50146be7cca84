"""Float64 numpy definition of a transcoder with a skip, TopK or ReLU with L1; imports nothing of ours."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Result:
    z_BF: np.ndarray
    y_hat_BY: np.ndarray
    loss: float
    gradients: dict[str, np.ndarray]


def objective(x_BX, y_BY, w_enc, b_enc, w_dec, b_dec, w_skip, k, scale, coefficient) -> Result:
    """s * MSE with the k largest active; with k = 0 all positive ones are, and the loss is SE + c ||z||_1.

    No latent is dead. The decoder's gradient loses its component along each unit row.
    """
    n_rows = len(x_BX)
    pre = x_BX @ w_enc.T + b_enc
    z = np.maximum(pre, 0)
    if k:
        for b, row in enumerate(pre):
            z[b, np.argsort(-row, kind="stable")[k:]] = 0
    y_hat = z @ w_dec + b_dec + x_BX @ w_skip.T
    weight = scale / y_BY.size if k else 1 / n_rows
    loss = weight * ((y_hat - y_BY) ** 2).sum() + (0 if k else coefficient * z.sum() / n_rows)

    g_y_hat = 2 * weight * (y_hat - y_BY)
    g_pre = (g_y_hat @ w_dec.T + (0 if k else coefficient / n_rows)) * (z > 0)
    g_w_dec = z.T @ g_y_hat
    return Result(
        z_BF=z,
        y_hat_BY=y_hat,
        loss=loss,
        gradients={
            "w_enc": g_pre.T @ x_BX,
            "b_enc": g_pre.sum(0),
            "w_dec": g_w_dec - (g_w_dec * w_dec).sum(1, keepdims=True) * w_dec,
            "b_dec": g_y_hat.sum(0),
            "w_skip": g_y_hat.T @ x_BX,
        },
    )
