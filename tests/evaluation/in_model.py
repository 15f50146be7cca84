"""A dictionary at a hook of the bundled language model, with text: what studies are given, small."""

from __future__ import annotations

import jax
import numpy as np

from sae_jax import lm
from sae_jax.activations.forward import activations_at
from sae_jax.evaluation.prompts import Subject
from sae_jax.evaluation.study import Case
from sae_jax.evaluation.text import HeldOut
from sae_jax.saes import init, topk


def case(hook: lm.Hook, config=None, n_sequences: int = 4, length: int = 24, writes: lm.Hook | None = None) -> Case:
    """A random dictionary of `hook`, which writes at `writes` if that is another, and random text."""
    model, tokenizer = lm.load("bundled"), lm.tokenizer("bundled")
    ids = np.random.default_rng(0).integers(1, model.spec.n_vocab, (n_sequences, length)).astype(np.int32)
    acts, _ = activations_at(model, ids, (hook,), "float32")
    rows = np.asarray(acts[str(hook)]).reshape(ids.size, -1)
    config = config or topk.Config(n_latents=64, k=4, dtype="float32", input_norm="none")
    sae = config.init(jax.random.key(0), init.sample_statistics(rows, config.input_norm))
    hooks = (hook,), (writes or hook,)
    subject = Subject(sae, model, tokenizer, *hooks, tokenizer.separator_id)
    return Case(subject, HeldOut("text", model, *hooks, ids, ids != 0, None))
