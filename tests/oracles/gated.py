"""Float64 numpy definition of the gated autoencoder, from the equations; imports nothing of ours."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Result:
    z_BF: np.ndarray
    x_hat_BD: np.ndarray
    loss: float
    gradients: dict[str, np.ndarray]


def objective(x_BD, w_enc, b_enc, b_gate, log_gain, w_dec, b_dec, coefficient, frozen=None) -> Result:
    """Loss SE + c ||ReLU(gate)||_1 + SE of the gate's own reconstruction, means over rows.

    `frozen` = (w_dec, b_dec) of that reconstruction, which get no gradient; None: the same as the others. The decoder's
    gradient loses its component along each unit row.
    """
    n_rows, gain = len(x_BD), np.exp(log_gain)
    frozen_w, frozen_b = frozen or (w_dec, b_dec)
    x_in = x_BD - b_dec
    pre = x_in @ w_enc.T
    gate, size = pre + b_gate, gain * pre + b_enc
    z = (gate > 0) * np.maximum(size, 0)
    via = np.maximum(gate, 0)
    x_hat, via_hat = z @ w_dec + b_dec, via @ frozen_w + frozen_b
    loss = (((x_hat - x_BD) ** 2).sum() + coefficient * via.sum() + ((via_hat - x_BD) ** 2).sum()) / n_rows
    g_x_hat, g_via_hat = 2 * (x_hat - x_BD) / n_rows, 2 * (via_hat - x_BD) / n_rows
    g_size = g_x_hat @ w_dec.T * (z > 0)
    g_gate = (g_via_hat @ frozen_w.T + coefficient / n_rows) * (gate > 0)
    g_pre = g_size * gain + g_gate
    g_w_dec = z.T @ g_x_hat
    return Result(
        z_BF=z,
        x_hat_BD=x_hat,
        loss=loss,
        gradients={
            "w_enc": g_pre.T @ x_in,
            "b_enc": g_size.sum(0),
            "b_gate": g_gate.sum(0),
            "log_gain": (g_size * pre).sum(0) * gain,
            "w_dec": g_w_dec - (g_w_dec * w_dec).sum(1, keepdims=True) * w_dec,
            "b_dec": g_x_hat.sum(0) - g_pre.sum(0) @ w_enc,
        },
    )
