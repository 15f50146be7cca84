"""The state of a run, and how it begins.

One tree says everything about the state: `initial` creates each array where it will live, so `abstract` of the same
function gives the shapes, dtypes and shardings that a checkpoint is restored into, on any mesh.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import AbstractMesh, Mesh

from sae_jax import mesh
from sae_jax.saes import init
from sae_jax.saes.base import AbstractSae, Constants, Counters, Hyperparameters, SaeConfig
from sae_jax.saes.init import Sample
from sae_jax.training import optim
from sae_jax.training.quantise import WEIGHT, zeros_like_moments
from sae_jax.training.settings import TrainConfig, hyperparameters
from sae_jax.types import Widths


@struct.dataclass
class TrainState:
    """What a run carries from step to step. `step` is also the position in the data."""

    step: jax.Array  # i32[], optimiser steps done
    sae: AbstractSae  # weights that steps change, DICT and REPLICATED; vectors f32, matrices as train.weights says
    optimiser_state: optax.OptState  # moments, placed like the weights; how they are kept: training/quantise.py
    average: Any  # running average of the weights; None when train.ema is 0
    counters: Counters
    constants: Constants


def initial(
    sae_config: SaeConfig, config: TrainConfig, sample: Sample, hparams: Hyperparameters | None = None
) -> TrainState:
    """The state before the first step, born sharded on the mesh in use. Run under jit.

    `hparams` stand for those of the two configs where several runs share this program.
    """
    hparams = hyperparameters(config, sae_config) if hparams is None else hparams
    sae = initial_weights(sae_config, config.weights, jax.random.fold_in(jax.random.key(hparams.seed), 0), sample)
    tx = optim.optimiser(config, hparams, sae_config.ADAM)
    return TrainState(
        step=jnp.int32(0),
        sae=sae,
        optimiser_state=tx.init(sae),  # pyrefly: ignore[bad-argument-type]
        average=zeros_like_moments(sae, config.ema_dtype, WEIGHT) if config.ema else None,
        counters=Counters(
            silent=init.zeros((sae_config.n_latents,), mesh.DICT, jnp.int32),
            extra=sae_config.initial_counters(sample),
        ),
        constants=Constants(loss_scale=1 / sample.variance, scale=sample.scale),
    )


def initial_weights(sae_config: SaeConfig, precision: str, key: jax.Array, sample: Sample) -> AbstractSae:
    """The dictionary before the first step, its matrices kept as `train.weights` says."""
    return sae_config.init(key, sample) if precision == "float32" else sae_config.init(key, sample, jnp.bfloat16)  # pyrefly: ignore[bad-argument-count]


def step_key(hparams: Hyperparameters, step: jax.Array) -> jax.Array:
    """The randomness of one step: a function of the seed and the step alone."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(hparams.seed), 1), step)


def abstract(
    sae_config: SaeConfig, config: TrainConfig, widths: Widths, place: Mesh | AbstractMesh | jax.sharding.Sharding
) -> TrainState:
    """Shapes, dtypes and shardings of the state at rest, without computing anything.

    `place` is the mesh to spread the state over (the one in use), or one sharding for every array.
    """
    return placed(
        jax.eval_shape(lambda sample: initial(sae_config, config, sample), init.abstract_sample(widths)), place
    )


def placed(tree: Any, place: Mesh | AbstractMesh | jax.sharding.Sharding) -> Any:
    """Abstract arrays with the shardings that they have at rest on `place`."""

    def put(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # A leaf that no op placed, such as a scalar, says nothing of a mesh; it is replicated.
        spec = getattr(leaf.sharding, "spec", mesh.REPLICATED)
        where = place if isinstance(place, jax.sharding.Sharding) else mesh.sharding(place, mesh.at_rest(spec, place))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(put, tree)


def with_config(state: TrainState, config: SaeConfig) -> TrainState:
    """The same arrays, whose dictionary and all trees that are like it say `config`."""

    def swap(node: Any) -> Any:
        return replace(node, config=config) if isinstance(node, AbstractSae) else node  # pyrefly: ignore[bad-specialization]

    return jax.tree.map(swap, state, is_leaf=lambda node: isinstance(node, AbstractSae))
