"""Float64 numpy definition of the end-to-end autoencoder, from the equations; the language model is a function."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Result:
    z_BF: np.ndarray
    x_hat_BD: np.ndarray
    loss: float


def objective(x_BD, keep_B, w_enc, b_enc, w_dec, b_dec, model, k, coefficient, beta, local) -> Result:
    """Loss, means over rows that are kept; `model` maps rows to (logits [B, V], later residuals [[B, D], ...])."""
    pre = (x_BD - b_dec) @ w_enc.T + b_enc
    z = np.maximum(pre, 0)
    if k:
        for row in z:
            row[np.argsort(-row, kind="stable")[k:]] = 0
    x_hat = z @ (w_dec / np.linalg.norm(w_dec, axis=1, keepdims=True)) + b_dec
    if local:
        loss_B = ((x_hat - x_BD) ** 2).mean(1)
    else:
        clean, clean_later = model(x_BD)
        put, put_later = model(np.where(keep_B[:, None], x_hat, x_BD))
        log_p, log_q = _log_softmax(clean), _log_softmax(put)
        loss_B = (np.exp(log_p) * (log_p - log_q)).sum(1)
        for a, b in zip(clean_later, put_later, strict=True):
            loss_B = loss_B + beta / len(clean_later) * ((a - b) ** 2).sum(1)
    if not k:
        loss_B = loss_B + coefficient / x_BD.shape[1] * z.sum(1)
    return Result(z, x_hat, loss_B[keep_B].mean())


def _log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
