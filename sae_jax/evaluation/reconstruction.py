"""How well and how sparsely a dictionary rewrites activations, accumulated over a set of any size.

    fvu               E||x - x_hat||^2 / E||x - E x||^2, both over the whole set: a ratio of sums
    fvu_by_source     the same of each source by itself, where several are reconstructed
    nmse_uncentered   E||x - x_hat||^2 / E||x||^2
    gamma             E||x_hat||^2 / E[x . x_hat]; 1 is unbiased, below 1 is shrinkage (Rajamanoharan et al. 2024,
                      arXiv 2404.16014)

Blocks are summed in f32 on the device and added up in float64 on the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.saes.base import AbstractSae
from sae_jax.types import Code

DENSITY_EDGES = np.arange(-6.0, 0.01, 0.25)  # of log10 firing rate


class Reconstruction:
    """Running sums over blocks of rows; `result()` gives the metrics of all rows seen."""

    def __init__(self, n_latents: int) -> None:
        self._sums: dict[str, Any] | None = None
        self._fired_F = np.zeros(n_latents, np.int64)
        self._l0 = np.zeros(0, np.int64)

    def add(
        self,
        sae: AbstractSae,
        x_NX: jax.Array | np.ndarray,
        keep_N: jax.Array | np.ndarray | None = None,
        y_NY: jax.Array | np.ndarray | None = None,
    ) -> jax.Array:
        """Count a block of rows; those where `keep_N` is False are left out. Returns y_hat f32[N, Y].

        Args:
            sae: a dictionary.
            x_NX: what it encodes.
            keep_N: bool; None: all.
            y_NY: what it reconstructs; None: x.
        """
        x_NX = jnp.asarray(x_NX, jnp.float32)
        x_ND = x_NX if y_NY is None else jnp.asarray(y_NY, jnp.float32)
        keep_N = jnp.ones(x_ND.shape[0], bool) if keep_N is None else jnp.asarray(keep_N, bool)
        if self._sums is None:
            # Sums of squares are taken around the first block's mean: activations far from the origin would
            # lose their variance to rounding otherwise.
            self._centre_D = x_ND.mean(0, where=keep_N[:, None])
        # Outside jit: how many slots a code has may depend on the rows.
        code, x_hat_ND = sae.encode(x_NX), sae(x_NX)
        sums, fired_F, l0_N = _block_sums(code, x_ND, x_hat_ND, keep_N, self._centre_D, len(self._fired_F))
        sums = jax.tree.map(lambda a: np.asarray(a, np.float64), jax.device_get(sums))
        self._sums = sums if self._sums is None else jax.tree.map(np.add, self._sums, sums)
        self._fired_F += np.asarray(fired_F, np.int64)
        histogram = np.bincount(np.asarray(l0_N)[np.asarray(keep_N)], minlength=len(self._l0))
        histogram[: len(self._l0)] += self._l0
        self._l0 = histogram
        return x_hat_ND

    @property
    def firing_rates(self) -> np.ndarray:
        """Share of the rows seen on which each latent was active, f64[F]."""
        return self._fired_F / max(float(self._sums["rows"]) if self._sums else 0.0, 1.0)

    def result(self, sources: Mapping[str, int] | None = None) -> dict[str, Any]:
        """fvu, nmse_uncentered, l0, cosine, gamma, silent_fraction, and the distributions behind them.

        Args:
            sources: widths of the sources side by side in y, by name; if there are several, `fvu_by_source` has each.
        """
        if self._sums is None or self._sums["rows"] == 0:
            raise ValueError("no rows were added")
        s, n = self._sums, self._sums["rows"]
        centre_D = np.asarray(self._centre_D, np.float64)
        mean_D = s["offset_D"] / n + centre_D
        error_D, variance_D = s["error2_D"], s["offset2_D"] - n * (mean_D - centre_D) ** 2
        rates = self.firing_rates
        counts, _ = np.histogram(np.log10(np.maximum(rates[rates > 0], 1e-6)), DENSITY_EDGES)
        of_each, first = {}, 0
        for name, width in (sources or {}).items():
            own = slice(first, first := first + width)
            of_each[name] = float(error_D[own].sum() / variance_D[own].sum())
        return {
            "n_rows": int(n),
            "fvu": float(error_D.sum() / variance_D.sum()),
            **({"fvu_by_source": of_each} if len(of_each) > 1 else {}),
            "nmse_uncentered": float(error_D.sum() / s["x2"]),
            "l0": float(self._l0 @ np.arange(len(self._l0)) / n),
            "l0_histogram": self._l0.tolist(),
            "cosine": s["cosine"] / n,
            "gamma": s["x_hat2"] / s["product"] if s["product"] else float("nan"),
            "silent_fraction": float((rates == 0).mean()),
            "density_histogram": {"log10_edges": DENSITY_EDGES.round(2).tolist(), "counts": counts.tolist()},
        }


def on_rows(sae: AbstractSae, x_NX: np.ndarray, block_rows: int = 4096) -> dict[str, Any]:
    """`Reconstruction.result()` of an autoencoder on rows [N, X] in memory."""
    reconstruction = Reconstruction(sae.b_enc.shape[0])
    for first in range(0, len(x_NX), block_rows):
        block_BX = x_NX[first : first + block_rows]
        # The last block is short; filled up, it does not compile anew.
        keep_B, fill = np.arange(block_rows) < len(block_BX), ((0, block_rows - len(block_BX)), (0, 0))
        reconstruction.add(sae, np.pad(block_BX, fill), keep_B)
    return reconstruction.result()


@partial(jax.jit, static_argnames="n_latents")
def _block_sums(
    code: Code, x_ND: jax.Array, x_hat_ND: jax.Array, keep_N: jax.Array, centre_D: jax.Array, n_latents: int
):
    x2_N, x_hat2_N, product_N = (x_ND**2).sum(-1), (x_hat_ND**2).sum(-1), (x_ND * x_hat_ND).sum(-1)
    offset_ND = x_ND - centre_D[None]
    weight_N = keep_N.astype(jnp.float32)
    cosine_N = product_N / jnp.maximum(jnp.sqrt(x2_N * x_hat2_N), 1e-30)
    active_NK = (code.values > 0) & keep_N[:, None]
    sums = {
        "rows": keep_N.sum(),
        "x2": (weight_N * x2_N).sum(),
        "x_hat2": (weight_N * x_hat2_N).sum(),
        "product": (weight_N * product_N).sum(),
        "error2_D": (weight_N[:, None] * (x_ND - x_hat_ND) ** 2).sum(0),
        "offset_D": (weight_N[:, None] * offset_ND).sum(0),
        "offset2_D": (weight_N[:, None] * offset_ND**2).sum(0),
        "cosine": (weight_N * cosine_N).sum(),
    }
    fired_F = jnp.zeros(n_latents, jnp.int32).at[code.indices.ravel()].add(active_NK.ravel().astype(jnp.int32))
    return sums, fired_F, (code.values > 0).sum(-1)
