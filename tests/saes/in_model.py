"""A tiny random language model that continues from one of its hooks, for variants that are trained through one."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import lm
from sae_jax import mesh as meshes
from sae_jax.lm.params import abstract
from sae_jax.saes.base import Batch, SaeConfig
from tests.lm import tiny

SPEC = dataclasses.replace(tiny.SPEC, n_layers=2)
MODEL = tiny.random_model(SPEC)
HOOK = lm.Hook(0, "resid_post")
CONTEXT = 4


def batch_for(config: SaeConfig, rows: Any) -> Batch:
    """Rows [B, D], on the mesh in use, as what this variant learns from."""
    return Batch(rows, rows) if config.learns == "rows" else _jitted(MODEL, rows)


def lowered_for(config: SaeConfig, rows: jax.ShapeDtypeStruct) -> Batch:
    """The same of shapes, on an abstract mesh whose devices get a sequence each."""
    if config.learns == "rows":
        return Batch(rows, rows)  # pyrefly: ignore[bad-argument-type] (shapes for arrays)
    context = rows.shape[0] // meshes.axis_size(meshes.AXES)
    spec = dataclasses.replace(SPEC, d_model=rows.shape[1], n_context=context)
    return jax.eval_shape(partial(in_model, context=context), lm.LanguageModel(abstract(spec), spec), rows)


def in_model(model: lm.LanguageModel, rows: jax.Array, context: int = CONTEXT) -> Batch:
    """A batch whose rows the model has at HOOK, whatever the token ids say."""
    shape = (rows.shape[0] // context, context)
    ids = jax.sharding.reshard(jnp.zeros(shape, jnp.int32), meshes.ROWS) if meshes.current() else jnp.zeros(shape, int)
    keep = jnp.ones_like(ids, bool)
    site = lm.replaced_site(model, ids.astype(jnp.int32), keep, HOOK, with_later=True)
    logits, later = site.with_rows(rows)
    return Batch(
        rows, rows, dataclasses.replace(site, acts=site.by_hook(rows.astype(jnp.float32)), logits=logits, later=later)
    )


_jitted = jax.jit(in_model)


def random_batch(left_out: float = 0.2, hook: lm.Hook = HOOK, n_sequences: int = 8) -> Batch:
    """A batch of random sequences, some positions left out."""
    rng = np.random.default_rng(3)
    ids = rng.integers(0, SPEC.n_vocab, (n_sequences, CONTEXT)).astype(np.int32)
    site = jax.jit(lm.replaced_site, static_argnums=(3, 4))(MODEL, ids, rng.random(ids.shape) >= left_out, hook, True)
    return Batch(site.rows, site.rows, site)
