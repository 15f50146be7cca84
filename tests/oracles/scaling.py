"""The scaling laws of Gao et al. 2024 (arXiv 2406.04093), as published, in float64."""

import numpy as np

# Section 3.2: TopK on GPT-4 activations.
PUBLISHED = {"alpha": -0.50, "beta_k": 0.26, "beta_n": -0.017, "gamma": -0.042, "zeta": -1.32, "eta": -0.085}


def joint(n: np.ndarray, k: np.ndarray, of: dict[str, float] = PUBLISHED) -> np.ndarray:
    """L(n, k)."""
    reducible = (
        np.exp(of["alpha"]) * k ** of["beta_k"] * n ** of["beta_n"] * np.exp(of["gamma"] * np.log(k) * np.log(n))
    )
    return reducible + np.exp(of["zeta"]) * k ** of["eta"]


def compute(flops: np.ndarray) -> np.ndarray:
    """L(C) = 0.09 + 0.056 C^-0.084."""
    return 0.09 + 0.056 * flops**-0.084


def trained(n: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Error after some tokens: a floor that falls with n, and a part still to learn that is larger for larger n.

    0.1 + 8 n^-1/2 + 4000 n^1/2 tokens^-1 is, along n * tokens = c, least where 8 n^-1/2 = 3 * 4000 n^3/2 / c.
    """
    return 0.1 + 8 * n**-0.5 + 4000 * n**0.5 / tokens


def best_width(n_times_tokens: np.ndarray) -> np.ndarray:
    """Where `trained` is least at a given n * tokens."""
    return np.sqrt(8 * n_times_tokens / (3 * 4000))
