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


def batch_topk(
    x, y, w_enc, b_enc, w_dec, b_dec, widths_y, k, scale, root, reads, writes, silent_F, dead_after, k_aux
) -> Result:
    """s * MSE of the B*k largest f ||d||, plus AuxK / 32. Decoder gradients lose what lies along each row."""
    n_rows = len(x)
    pre = x @ w_enc.T + b_enc
    norms = np.stack([np.sqrt((w_l**2).sum(1)) for w_l in parts(w_dec, widths_y)], 1)
    norm = np.sqrt((norms**2).sum(1)) if root else norms.sum(1)
    ranked = np.argsort(-(np.maximum(pre, 0) * norm).ravel(), kind="stable")[: n_rows * k]
    f = np.zeros(pre.size)
    f[ranked] = np.maximum(pre, 0).ravel()[ranked]
    f = f.reshape(pre.shape)
    y_hat = f @ w_dec + b_dec
    g_y = 2 * scale * (y_hat - y) / y.size
    g_pre, g_dec = g_y @ w_dec.T * (f > 0), f.T @ g_y
    silent_F = np.where((f > 1e-3).any(0), 0, silent_F + n_rows)
    pre_dead, error = np.where(silent_F > dead_after, pre, -np.inf), y - y_hat
    chosen = np.argsort(-pre_dead, axis=1, kind="stable")[:, : min(k_aux, (silent_F > dead_after).sum())]
    f_aux = np.zeros_like(pre)
    np.put_along_axis(f_aux, chosen, np.maximum(np.take_along_axis(pre_dead, chosen, 1), 0), 1)
    left, total = f_aux @ w_dec - error, ((error - error.mean(0)) ** 2).sum()
    g_left = 2 / 32 * left / total
    g_pre, g_dec = g_pre + g_left @ w_dec.T * (f_aux > 0), g_dec + f_aux.T @ g_left
    g_dec = g_dec * np.repeat(writes, widths_y, axis=1)
    g_dec -= (g_dec * w_dec).sum(1, keepdims=True) / (w_dec**2).sum(1, keepdims=True) * w_dec
    reads = np.repeat(reads, x.shape[1] // reads.shape[1], axis=1)
    return Result(
        f_BF=f,
        y_hat=parts(y_hat, widths_y),
        l1=np.nan,
        loss=scale * ((y_hat - y) ** 2).mean() + (left**2).sum() / total / 32,
        gradients={"w_enc": g_pre.T @ x * reads, "b_enc": g_pre.sum(0), "w_dec": g_dec, "b_dec": g_y.sum(0)},
    )
