"""Float64 numpy definition of the crosscoder, source by source, from the equations; imports nothing of ours."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Result:
    f_BF: np.ndarray
    y_hat: list[np.ndarray]
    l1: float
    loss: float
    gradients: dict[str, np.ndarray]


def parts(a, widths):
    """[..., Y] as one array a source."""
    return np.split(a, np.cumsum(widths)[:-1], axis=-1)


def allowed(mask, window, n_latents, n_sources):
    """(reads, writes), bool[F, S]: which latent may read and write which source."""
    reads, writes = np.zeros((2, n_latents, n_sources), bool)
    n_groups = n_sources - 1 if mask == "strictly_causal" else n_sources
    for latent in range(n_latents):
        group = min(latent // (n_latents // n_groups), n_groups - 1)
        for source in range(n_sources):
            near = abs(source - group) <= window
            reads[latent, source] = {"acausal": True, "window": near}.get(mask, source == group)
            writes[latent, source] = {
                "acausal": True,
                "weakly_causal": source >= group,
                "strictly_causal": source > group,
                "window": near,
            }[mask]
    return reads, writes


def objective(x, y, w_enc, b_enc, w_dec, b_dec, widths_x, widths_y, coefficient, root, reads, writes) -> Result:
    """Loss of rows x [B, X] and y [B, Y]: squared errors summed over sources, means over rows."""
    n_rows = len(x)
    encoders, decoders, biases = parts(w_enc, widths_x), parts(w_dec, widths_y), parts(b_dec, widths_y)
    pre = b_enc + sum(x_l @ w_l.T for x_l, w_l in zip(parts(x, widths_x), encoders, strict=True))
    f = np.maximum(pre, 0)
    norms = np.stack([np.sqrt((w_l**2).sum(1)) for w_l in decoders], 1)
    norm = np.sqrt((norms**2).sum(1)) if root else norms.sum(1)
    l1 = (f * norm).sum() / n_rows
    y_hat, loss, g_pre = [], coefficient * l1, coefficient / n_rows * norm * np.ones_like(f)
    g_dec, g_b_dec = [], []
    for source, (y_l, w_l, b_l) in enumerate(zip(parts(y, widths_y), decoders, biases, strict=True)):
        y_hat.append(f @ w_l + b_l)
        loss += ((y_hat[-1] - y_l) ** 2).sum() / n_rows
        g_y = 2 * (y_hat[-1] - y_l) / n_rows
        g_pre = g_pre + g_y @ w_l.T
        length = norm if root else norms[:, source]
        pull = coefficient / n_rows * f.sum(0) / np.maximum(length, 1e-30)
        g_dec.append((f.T @ g_y + pull[:, None] * w_l) * writes[:, [source]])
        g_b_dec.append(g_y.sum(0))
    g_pre = g_pre * (pre > 0)
    g_enc = [(g_pre.T @ x_l) * reads[:, [source]] for source, x_l in enumerate(parts(x, widths_x))]
    return Result(
        f_BF=f,
        y_hat=y_hat,
        l1=l1,
        loss=loss,
        gradients={
            "w_enc": np.concatenate(g_enc, 1),
            "b_enc": g_pre.sum(0),
            "w_dec": np.concatenate(g_dec, 1),
            "b_dec": np.concatenate(g_b_dec),
        },
    )
