"""Float64 numpy definition of the JumpReLU autoencoder, from the equations; imports nothing of ours.

Gradients of the step come from its estimator: that of thresholds from rows within half a bandwidth, none for weights.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class Result:
    z_BF: np.ndarray
    x_hat_BD: np.ndarray
    sparsity: float
    loss: float
    gradients: dict[str, np.ndarray]


def objective(
    x_BD,
    w_enc,
    b_enc,
    w_dec,
    b_dec,
    log_threshold,
    *,
    coefficient,
    bandwidth,
    pre_bias=False,
    target_l0=None,
    frequency_scale=None,
    tanh=False,
    below_coefficient=0.0,
) -> Result:
    """Squared error, summed over D, and the sparsity; means over rows.

    The decoder's gradient loses its component along each unit row, but for the tanh.
    """
    n_rows, theta = len(x_BD), np.exp(log_threshold)
    x_in = x_BD - b_dec if pre_bias else x_BD
    pi = x_in @ w_enc.T + b_enc
    h = (pi > theta).astype(np.float64)
    near = (np.abs(pi - theta) < bandwidth / 2) / bandwidth
    z = pi * h
    x_hat = z @ w_dec + b_dec
    norm = np.linalg.norm(w_dec, axis=1)
    share = (np.tanh(4 * z * norm) if tanh else h).sum(0) / n_rows
    if target_l0 is not None:
        sparsity, g_share = (share.sum() / target_l0 - 1) ** 2, 2 * (share.sum() / target_l0 - 1) / target_l0
    elif frequency_scale is not None:
        sparsity, g_share = (share * (1 + share / frequency_scale)).sum(), 1 + 2 * share / frequency_scale
    else:
        sparsity, g_share = share.sum(), 1.0
    below = np.maximum(theta - pi, 0) * norm
    loss = ((x_hat - x_BD) ** 2).sum() / n_rows + coefficient * sparsity
    g_x_hat = 2 * (x_hat - x_BD) / n_rows
    g_z, g_h, g_pi, g_theta, g_norm = g_x_hat @ w_dec.T, np.zeros_like(z), np.zeros_like(z), 0.0, 0.0
    g_count = coefficient * g_share / n_rows * np.ones_like(z)
    if tanh:
        slope = 1 - np.tanh(4 * z * norm) ** 2
        g_z = g_z + g_count * slope * 4 * norm
        g_norm = (g_count * slope * 4 * z).sum(0)
        loss += below_coefficient * below.sum() / n_rows
        reached = (theta > pi) * below_coefficient / n_rows
        g_pi, g_theta = -reached * norm, (reached * norm).sum(0)
        g_norm = g_norm + (reached * (theta - pi)).sum(0)
    else:
        g_h = g_count
    g_pi = g_pi + g_z * h
    g_theta = g_theta - ((g_z * theta + g_h) * near).sum(0)
    g_w_dec = z.T @ g_x_hat
    if tanh:
        g_w_dec = g_w_dec + (g_norm / norm)[:, None] * w_dec
    else:
        g_w_dec = g_w_dec - (g_w_dec * w_dec).sum(1, keepdims=True) * w_dec
    return Result(
        z_BF=z,
        x_hat_BD=x_hat,
        sparsity=sparsity,
        loss=loss,
        gradients={
            "w_enc": g_pi.T @ x_in,
            "b_enc": g_pi.sum(0),
            "w_dec": g_w_dec,
            "b_dec": g_x_hat.sum(0) - pre_bias * (g_pi.sum(0) @ w_enc),
            "log_threshold": g_theta * theta,
        },
    )
