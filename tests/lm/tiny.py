"""A random model small enough to check by hand, whose norms and biases are far from their defaults."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.lm import LanguageModel, Spec, run
from sae_jax.lm.params import abstract

SPEC = Spec(family="gpt2", n_layers=4, d_model=16, n_heads=2, d_head=8, d_mlp=40, n_vocab=23, n_context=12)


def random_model(spec: Spec) -> LanguageModel:
    """Every parameter random and sizeable, so that a forgotten term shows."""
    rng = np.random.default_rng(0)

    def draw(array):
        return jnp.asarray(rng.normal(0.1, 0.2, array.shape), jnp.float32)

    params = jax.tree.map(draw, abstract(spec))
    return LanguageModel(params, spec, reference="random")


@functools.partial(jax.jit, static_argnames=("capture", "options"))
def jit_run(model, ids_BT, capture=(), options=(), cache=None):
    """`run` compiled once per set of hooks; options are pairs."""
    return run(model, ids_BT, capture=capture, cache=cache, **dict(options))
