"""Baselines that a trained dictionary has to beat: bases and random directions, in the form of dictionaries.

    identity   every dimension, both signs
    pca        principal components, both signs; with n_components = L0 the best affine reconstruction of that rank
    ica        independent components (FastICA), both signs
    random     random directions, negative values clipped

Each is a ReLU autoencoder without a penalty or, if `k` is given, a TopK autoencoder. Codes are not negative, so a basis
has two latents for each direction, of which at most one is active.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from sae_jax.saes import relu, topk
from sae_jax.saes.base import AbstractSae
from sae_jax.types import UsageError


def identity(rows_ND: np.ndarray, k: int = 0) -> AbstractSae:
    """The coordinate directions, around the mean of the rows."""
    basis_DD = np.eye(rows_ND.shape[1])
    return _dictionary(_both(basis_DD), _both(basis_DD), rows_ND, k)


def pca(rows_ND: np.ndarray, n_components: int | None = None, k: int = 0) -> AbstractSae:
    """The `n_components` directions of greatest variance; None: all."""
    variances_D, components_DC = np.linalg.eigh(np.cov(rows_ND.T.astype(np.float64)))
    components_CD = components_DC.T[np.argsort(-variances_D)][:n_components]
    return _dictionary(_both(components_CD), _both(components_CD), rows_ND, k)


def ica(rows_ND: np.ndarray, n_components: int | None = None, k: int = 0, seed: int = 0) -> AbstractSae:
    """Directions along which rows are mixtures of independent values. Needs scikit-learn.

    Source: Hyvärinen and Oja 2000, "Independent component analysis: algorithms and applications".
    """
    try:
        from sklearn.decomposition import FastICA
    except ImportError as error:
        raise UsageError(f"ICA needs scikit-learn ({error}); pip install 'sae_jax[baselines]'") from None
    # The symmetric update divides by a Gram matrix; in f32 it may not converge.
    ica = FastICA(n_components, whiten="unit-variance", random_state=seed).fit(np.asarray(rows_ND, np.float64))
    return _dictionary(_both(ica.components_), _both(ica.mixing_.T), rows_ND, k)


def random(rows_ND: np.ndarray, n_latents: int, k: int = 0, seed: int = 0) -> AbstractSae:
    """Random unit directions; one scale for all codes, the one that reconstructs the rows best."""
    directions_FD = np.random.default_rng(seed).standard_normal((n_latents, rows_ND.shape[1]))
    directions_FD /= np.linalg.norm(directions_FD, axis=1, keepdims=True)
    unscaled = _dictionary(directions_FD, directions_FD, rows_ND, k)
    # Without an encoder bias, the reconstruction minus the mean is proportional to the encoder.
    b_dec, guess_ND = np.asarray(unscaled.b_dec), np.asarray(unscaled(rows_ND))
    offset_ND, guess_ND = np.float64(rows_ND - b_dec), np.float64(guess_ND - b_dec)
    scale = (offset_ND * guess_ND).sum() / max((guess_ND**2).sum(), 1e-30)
    return _dictionary(directions_FD * scale, directions_FD, rows_ND, k)


def _both(directions_CD: np.ndarray) -> np.ndarray:
    return np.concatenate([directions_CD, -directions_CD])


def _dictionary(enc_FD: np.ndarray, dec_FD: np.ndarray, rows_ND: np.ndarray, k: int) -> AbstractSae:
    """z = ReLU(enc (x - mean)), x_hat = dec^T z + mean, with rows of dec scaled to norm 1 and z accordingly."""
    norm_F1 = np.linalg.norm(dec_FD, axis=1, keepdims=True)
    w_enc, w_dec = (jnp.asarray(w_FD, jnp.float32) for w_FD in (enc_FD * norm_F1, dec_FD / norm_F1))
    b_enc = jnp.zeros(len(enc_FD), jnp.float32)
    b_dec = jnp.asarray(rows_ND.mean(0, dtype=np.float64), jnp.float32)
    if k:
        return topk.TopK(w_enc, b_enc, w_dec, b_dec, topk.Config(n_latents=len(enc_FD), k=k, dtype="float32"))
    return relu.Relu(w_enc, b_enc, w_dec, b_dec, relu.Config(n_latents=len(enc_FD), dtype="float32"))
