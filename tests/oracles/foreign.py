"""What dictionaries of other programs compute, from their papers and layouts: float64, canonical orientation.

W_enc [d, n], W_dec [n, d_out]: h = (x - b_pre) W_enc + b_enc, z = act(h), y = z W_dec + b_dec (+ x W_skip^T).
"""

import math

import numpy as np


def topk(h, k):
    """The k largest of each row, the first of equals, then ReLU."""
    z = np.zeros_like(h)
    for row, kept in zip(h, z, strict=True):
        chosen = np.argsort(-row, kind="stable")[:k]
        kept[chosen] = np.maximum(row[chosen], 0)
    return z


def relu(h):
    return np.maximum(h, 0)


def jumprelu(h, threshold):
    """Active strictly above the threshold."""
    return np.where(h > threshold, np.maximum(h, 0), 0)


def gated(x, w_enc, b_gate, b_mag, r_mag):
    h = x @ w_enc
    return np.where(h + b_gate > 0, np.maximum(np.exp(r_mag) * h + b_mag, 0), 0)


def normalise(x, kind):
    """(normalised, mean, scale)."""
    if kind == "layer_norm":  # the unbiased deviation
        mean = x.mean(1, keepdims=True)
        scale = np.sqrt(((x - mean) ** 2).sum(1, keepdims=True) / (x.shape[1] - 1)) + 1e-5
        return (x - mean) / scale, mean, scale
    if kind == "constant_norm_rescale":
        scale = np.linalg.norm(x, axis=1, keepdims=True) / math.sqrt(x.shape[1])
        return x / scale, 0.0, scale
    return x, 0.0, 1.0
