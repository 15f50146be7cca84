"""GPT-2 from its equations in float64 numpy: every intermediate, one sequence and one head at a time.

Source: Radford et al. 2019 (GPT-2), section 2.3, after Vaswani et al. 2017, arXiv 1706.03762; LayerNorm: Ba
et al. 2016, arXiv 1607.06450; GELU and its tanh form: Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2.
"""

import math

import numpy as np

ACTIVATIONS = {
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def forward(params, ids_BT, n_heads, activation="gelu_new", eps=1e-5, edits=None):
    """Logits [B, T, V] and each intermediate {(layer, point): value}; `edits` has a function at some.

    A linear layer without a bias in `params` has none.
    """
    edits = edits or {}
    layers = {name: value.astype(np.float64) for name, value in params["layers"].items()}
    params = {name: value.astype(np.float64) for name, value in params.items() if name != "layers"}
    acts = {}

    def point(layer, name, value):
        acts[layer, name] = edits.get((layer, name), lambda v: v)(value)
        return acts[layer, name]

    n_positions = ids_BT.shape[1]
    x = params["embed"][ids_BT] + params["positions"][:n_positions]
    for i in range(layers["q.w"].shape[0]):
        w = {name: value[i] for name, value in layers.items()}
        x = point(i, "resid_pre", x)
        h = point(i, "attn_in", layer_norm(x, w["norm1.w"], w["norm1.b"], eps))
        q, k, v = (h @ w[f"{name}.w"] + w.get(f"{name}.b", 0) for name in "qkv")
        z = point(i, "attn_z", attention(q, k, v, n_heads))
        out = point(i, "attn_out", z.reshape(*z.shape[:2], -1) @ w["o.w"] + w.get("o.b", 0))
        x = point(i, "resid_mid", x + out)
        h = point(i, "mlp_in", layer_norm(x, w["norm2.w"], w["norm2.b"], eps))
        act = point(i, "mlp_act", ACTIVATIONS[activation](h @ w["up.w"] + w.get("up.b", 0)))
        x = point(i, "resid_post", x + point(i, "mlp_out", act @ w["down.w"] + w.get("down.b", 0)))
    head = params.get("unembed", params["embed"])
    return layer_norm(x, params["norm.w"], params["norm.b"], eps) @ head.T, acts


def attention(q, k, v, n_heads):
    """Causal attention outputs per head, [B, T, H, d]."""
    n_rows, n_positions, width = q.shape
    d = width // n_heads
    z = np.zeros((n_rows, n_positions, n_heads, d))
    for row in range(n_rows):
        for head in range(n_heads):
            part = slice(head * d, (head + 1) * d)
            for t in range(n_positions):
                scores = k[row, : t + 1, part] @ q[row, t, part] / np.sqrt(d)
                weights = np.exp(scores - scores.max())
                z[row, t, head] = weights / weights.sum() @ v[row, : t + 1, part]
    return z


def layer_norm(x, w, b, eps):
    """LayerNorm over the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * w + b
