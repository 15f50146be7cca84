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

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import lm
from sae_jax.evaluation.reconstruction import Reconstruction
from sae_jax.evaluation.text import HeldOut
from sae_jax.saes.base import AbstractSae


def splice(
    sae: AbstractSae,
    text: HeldOut,
    means: Mapping[str, np.ndarray],
    batches: Iterable[np.ndarray],
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Reconstruction and downstream metrics over batches of token sequences.

    Args:
        sae: trained on the sites of `text`.
        text: the language model, and where it is replaced.
        means: f64[D] of each source that is reconstructed, by name: what mean ablation puts there.
        batches: i32[B, T] token ids; a short last batch costs a second compilation.
        progress: called with the number of sequences done.
    """
    model, hooks = text.model, tuple(dict.fromkeys(text.encoded + text.reconstructed))
    mean_Y = jnp.asarray(np.concatenate(list(means.values())), jnp.float32)
    reconstruction = Reconstruction(sae.b_enc.shape[0])
    sums: dict[str, float] = {}
    n_predictions = n_sequences = 0
    for ids_BT in batches:
        acts, clean_BTV = _clean(model, jnp.asarray(ids_BT, jnp.int32), hooks)
        norms = [jnp.linalg.norm(acts[hook], axis=-1) for hook in hooks]
        keep_BT = jnp.asarray(text.keep(ids_BT, np.stack(norms, axis=-1)))
        x_BTX = jnp.concatenate([acts[hook] for hook in text.encoded], axis=-1)
        y_BTY = jnp.concatenate([acts[hook] for hook in text.reconstructed], axis=-1)
        x_NX, y_NY = (side.reshape(-1, side.shape[-1]) for side in (x_BTX, y_BTY))
        y_hat_NY = reconstruction.add(sae, x_NX, keep_BT.ravel(), y_NY)
        replaced = {"sae": y_hat_NY.reshape(y_BTY.shape), "zero": jnp.zeros_like(y_BTY)}
        replaced["mean"] = jnp.broadcast_to(mean_Y, y_BTY.shape)
        text_BT = ~np.isin(ids_BT, text.special)
        counted_BT = jnp.asarray(text_BT[:, :-1] & text_BT[:, 1:], jnp.float32)
        block = {"clean": (lm.cross_entropy(clean_BTV, jnp.asarray(ids_BT)) * counted_BT).sum()}
        for name, y_BTY in replaced.items():
            cross_entropy, kl = _spliced(model, ids_BT, text.reconstructed, y_BTY, keep_BT, counted_BT, clean_BTV)
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
        **reconstruction.result({name: len(mean_D) for name, mean_D in means.items()}),
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


@partial(jax.jit, static_argnames="hooks")
def _clean(
    model: lm.LanguageModel, ids_BT: jax.Array, hooks: tuple[lm.Hook, ...]
) -> tuple[dict[lm.Hook, jax.Array], jax.Array]:
    out = lm.run(model, ids_BT, capture=hooks)
    assert out.logits is not None
    return {h: out.acts[h].reshape(*ids_BT.shape, -1).astype(jnp.float32) for h in hooks}, out.logits


@partial(jax.jit, static_argnames="hooks")
def _spliced(model, ids_BT, hooks, y_BTY, keep_BT, counted_BT, clean_BTV) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy and KL(clean || spliced) of the next-token predictions."""

    def put(part_BTD: jax.Array, x: jax.Array) -> jax.Array:
        y = part_BTD.reshape(x.shape).astype(x.dtype)
        return jnp.where(keep_BT.reshape(*keep_BT.shape, *(1,) * (x.ndim - 2)), y, x)

    edits, first = {}, 0
    for hook in hooks:
        width = lm.hook_width(model.spec, hook)
        edits[hook] = partial(put, y_BTY[..., first : first + width])
        first += width
    logits_BTV = lm.run(model, ids_BT, edits=edits).logits
    assert logits_BTV is not None
    clean_log_BTV, log_BTV = (jax.nn.log_softmax(z[:, :-1]) for z in (clean_BTV, logits_BTV))
    kl_BT = (jnp.exp(clean_log_BTV) * (clean_log_BTV - log_BTV)).sum(-1)
    return (lm.cross_entropy(logits_BTV, ids_BT) * counted_BT).sum(), (kl_BT * counted_BT).sum()
