"""What replacing a site's activations by their reconstruction does to the language model.

    ce_clean          cross-entropy of the model as it is                      nats per token
    ce_sae            with the site replaced by its reconstruction
    ce_zero, ce_mean  with the site replaced by zeros, by the training set's mean
    loss_recovered    (ce_mean - ce_sae) / (ce_mean - ce_clean);  loss_recovered_zero: the same from ce_zero
    kl                KL(clean || reconstruction), mean over tokens            nats

Positions that the activation set leaves out (special tokens, sinks) keep their activations and count in no
reconstruction metric. Predictions from or of a special token count in no cross-entropy and no divergence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import lm
from sae_jax.evaluation.reconstruction import Reconstruction
from sae_jax.saes.base import AbstractSae


def splice(
    sae: AbstractSae,
    model: lm.LanguageModel,
    hook: lm.Hook,
    mean_D: np.ndarray,
    batches: Iterable[np.ndarray],
    keep: Callable[[np.ndarray, np.ndarray], np.ndarray],
    special: np.ndarray,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Reconstruction and downstream metrics over batches of token sequences.

    Args:
        sae: trained on `hook` of `model`.
        model: the language model.
        hook: the site.
        mean_D: f64[D], what mean ablation puts there.
        batches: i32[B, T] token ids; a short last batch costs a second compilation.
        keep: (ids [B, T], norms [B, T]) -> bool [B, T], positions whose activations are replaced and measured.
        special: token ids that stand for no text.
        progress: called with the number of sequences done.
    """
    reconstruction = Reconstruction(sae.b_enc.shape[0])
    sums: dict[str, float] = {}
    n_predictions = n_sequences = 0
    for ids_BT in batches:
        x_BTD, clean_BTV = _clean(model, jnp.asarray(ids_BT, jnp.int32), hook)
        keep_BT = jnp.asarray(keep(ids_BT, np.asarray(jnp.linalg.norm(x_BTD, axis=-1))))
        x_hat_ND = reconstruction.add(sae, x_BTD.reshape(-1, x_BTD.shape[-1]), keep_BT.ravel())
        replaced = {"sae": x_hat_ND.reshape(x_BTD.shape), "zero": jnp.zeros_like(x_BTD)}
        replaced["mean"] = jnp.broadcast_to(jnp.asarray(mean_D, jnp.float32), x_BTD.shape)
        text_BT = ~np.isin(ids_BT, special)
        counted_BT = jnp.asarray(text_BT[:, :-1] & text_BT[:, 1:], jnp.float32)
        block = {"clean": (lm.cross_entropy(clean_BTV, jnp.asarray(ids_BT)) * counted_BT).sum()}
        for name, y_BTD in replaced.items():
            cross_entropy, kl = _spliced(model, ids_BT, hook, y_BTD, keep_BT, counted_BT, clean_BTV)
            block[name] = cross_entropy
            if name == "sae":
                block["kl"] = kl
        for name, value in jax.device_get(block).items():
            sums[name] = sums.get(name, 0.0) + float(value)
        n_predictions += int(counted_BT.sum())
        n_sequences += ids_BT.shape[0]
        progress(n_sequences)
    ce = {name: total / n_predictions for name, total in sums.items()}
    return {
        **reconstruction.result(),
        "n_predictions": n_predictions,
        "ce_clean": ce["clean"],
        "ce_sae": ce["sae"],
        "ce_zero": ce["zero"],
        "ce_mean": ce["mean"],
        "kl": ce["kl"],
        "loss_recovered": _recovered(ce["mean"], ce["sae"], ce["clean"]),
        "loss_recovered_zero": _recovered(ce["zero"], ce["sae"], ce["clean"]),
    }


def _recovered(ablated: float, spliced: float, clean: float) -> float:
    return (ablated - spliced) / (ablated - clean) if ablated != clean else float("nan")


@partial(jax.jit, static_argnames="hook")
def _clean(model: lm.LanguageModel, ids_BT: jax.Array, hook: lm.Hook) -> tuple[jax.Array, jax.Array]:
    out = lm.run(model, ids_BT, capture=(hook,))
    assert out.logits is not None
    return out.acts[hook].reshape(*ids_BT.shape, -1).astype(jnp.float32), out.logits


@partial(jax.jit, static_argnames="hook")
def _spliced(model, ids_BT, hook, y_BTD, keep_BT, counted_BT, clean_BTV) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy and KL(clean || spliced) of the next-token predictions."""

    def edit(x):
        y = y_BTD.reshape(x.shape).astype(x.dtype)
        return jnp.where(keep_BT.reshape(*keep_BT.shape, *(1,) * (x.ndim - 2)), y, x)

    logits_BTV = lm.run(model, ids_BT, edits={hook: edit}).logits
    assert logits_BTV is not None
    clean_log_BTV, log_BTV = (jax.nn.log_softmax(z[:, :-1]) for z in (clean_BTV, logits_BTV))
    kl_BT = (jnp.exp(clean_log_BTV) * (clean_log_BTV - log_BTV)).sum(-1)
    return (lm.cross_entropy(logits_BTV, ids_BT) * counted_BT).sum(), (kl_BT * counted_BT).sum()
