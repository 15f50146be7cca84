"""Baselines that a trained dictionary has to beat: bases and random directions, in the form of dictionaries.

    identity   every dimension, both signs
    pca        principal components, both signs; with n_components = L0 the best affine reconstruction of that rank
    ica        independent components (FastICA), both signs
    random     random directions, negative values clipped
    neurons    the MLP neurons of the layer, both signs

Each is a ReLU autoencoder without a penalty or, if `k` is given, a TopK autoencoder. Codes are not negative, so a basis
has two latents for each direction, of which at most one is active.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np

from sae_jax import lm
from sae_jax.evaluation.batches import Candidate
from sae_jax.evaluation.text import HeldOut, spread_chunks
from sae_jax.progress import console
from sae_jax.saes import relu, topk
from sae_jax.saes.base import AbstractSae
from sae_jax.types import Sites, UsageError, Widths

Baseline = Literal["identity", "pca", "ica", "random", "neurons"]
N_ROWS = 2**15  # of the set, that bases are fitted to
NEURON_TOKENS = 2**14  # of the held-out text, for the mean of neurons


def choose(names: Sequence[str]) -> tuple[Baseline, ...]:
    """Baselines by name, or `all`: then ICA is left out, and said so, where scikit-learn is not there."""
    known = get_args(Baseline)
    if unknown := set(names) - {*known, "all"}:
        raise UsageError(f"baseline {sorted(unknown)[0]!r} does not exist; choose {', '.join(known)} or all")
    if "all" not in names:
        return tuple(name for name in known if name in names)
    if find_spec("sklearn") is None:
        console.print("ICA is left out of the baselines: it needs scikit-learn; pip install 'sae_jax[baselines]'")
        return tuple(name for name in known if name != "ica")
    return known


def of_site(candidate: Candidate, text: HeldOut | None, names: Sequence[Baseline]) -> dict[str, Candidate]:
    """Baselines at the place of a dictionary, with as many active latents a row as it has there.

    Args:
        candidate: the dictionary. It has to reconstruct the one source that it encodes.
        text: of its set, which neurons need.
        names: which.

    Raises UsageError for a dictionary of several sources, and for neurons where there is no text or no MLP.
    """
    activations, sites = candidate.activations, candidate.sites
    if sites.x != sites.y or len(sites.x) != 1:
        raise UsageError(
            f"baselines stand where a dictionary reconstructs what it reads, and this one reads {', '.join(sites.x)} "
            f"and writes {', '.join(sites.y)}; leave --baselines out"
        )
    chunks = spread_chunks(activations, N_ROWS)
    rows_ND = np.concatenate([activations.read_chunk(sites.x[0], chunk).astype(np.float32) for chunk in chunks])
    rows_ND = rows_ND[:N_ROWS]
    k = max(round(float((np.asarray(candidate.sae.encode(rows_ND[:4096]).values) > 0).sum(1).mean())), 1)
    console.print(f"baselines have {k} active latents a row, as the dictionary has")
    made: dict[str, Candidate] = {}
    for name in names:
        if name == "neurons":
            made[name] = _neurons(candidate, text, k)
            continue
        n_latents, width = candidate.sae.w_dec.shape[0], rows_ND.shape[1]
        make = {
            "identity": lambda: identity(rows_ND, min(k, 2 * width)),
            "pca": lambda: pca(rows_ND, k=min(k, 2 * width)),
            "ica": lambda: ica(rows_ND, k=min(k, 2 * width)),
            "random": lambda: random(rows_ND, n_latents, k),
        }
        made[name] = Candidate(make[name](), sites, candidate.widths, activations)
    return made


def _neurons(candidate: Candidate, text: HeldOut | None, k: int) -> Candidate:
    if text is None or not isinstance(text.model, lm.LanguageModel):
        raise UsageError("the baseline of neurons needs held-out text and a model that JAX runs; leave it out")
    hook = lm.check_hook((text.encoded[0].layer, "mlp_act"), text.model.spec)
    short = text.sequences[: max(NEURON_TOKENS // text.sequences.shape[1], 1)]
    (rows_NX,) = replace(text, sequences=short, text=text.text[: len(short)], max_norm_multiple=None).rows_of((hook,))
    width = rows_NX.shape[1]
    return Candidate(
        identity(rows_NX, min(k, 2 * width)),
        Sites.one(str(hook)),
        Widths.one(width),
        candidate.activations,
        hook=hook,
        mean=rows_NX.mean(0, dtype=np.float64),
    )


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
