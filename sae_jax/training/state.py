"""The state of a run, and how it begins.

One tree says everything about the state: `initial` creates each array where it will live, so `abstract` of the same
function gives the shapes, dtypes and shardings that a checkpoint is restored into, on any mesh.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import AbstractMesh, Mesh

from sae_jax import mesh
from sae_jax.saes import base
from sae_jax.saes.base import AbstractSae, SaeConfig, Sample, Statistics
from sae_jax.training import optim
from sae_jax.training.settings import TrainConfig, Values
from sae_jax.types import Widths


@struct.dataclass
class TrainState:
    """Everything that changes during a run. `step` is also the position in the data."""

    step: jax.Array  # i32[], optimiser steps done
    sae: AbstractSae  # f32 master weights, DICT and REPLICATED
    moments: optax.OptState  # Adam's, placed like the weights; their form: training/optim.py
    average: Any  # running average of the weights; None when train.ema is 0
    statistics: Statistics
    key: jax.Array  # a step's randomness is this key folded with the step
    values: Values  # constant


def initial(sae_config: SaeConfig, config: TrainConfig, sample: Sample, values: Values | None = None) -> TrainState:
    """The state before the first step, born sharded on the mesh in use. Run under jit.

    `values` stand for those of `config` where several runs share this program.
    """
    values = Values.of(config, sae_config) if values is None else values
    key = jax.random.key(values.seed)
    sae = sae_config.init(jax.random.fold_in(key, 0), sample)
    return TrainState(
        step=jnp.int32(0),
        sae=sae,
        moments=optim.optimiser(config, values, sae_config.ADAM).init(sae),  # pyrefly: ignore[bad-argument-type]
        average=optim.nothing(sae, config.ema_dtype, optim.WEIGHT) if config.ema else None,
        statistics=Statistics(
            silent=base.zeros((sae_config.n_latents,), mesh.DICT, jnp.int32),
            dead_after=values.dead_after,
            loss_scale=1 / sample.variance,
            scale=sample.scale,
            own=sae_config.own_statistics(sample),
            coefficients=values.coefficients,
        ),
        key=jax.random.fold_in(key, 1),
        values=values,
    )


def abstract(
    sae_config: SaeConfig, config: TrainConfig, widths: Widths, place: Mesh | AbstractMesh | jax.sharding.Sharding
) -> TrainState:
    """Shapes, dtypes and shardings of the state at rest, without computing anything.

    `place` is the mesh to spread the state over (the one in use), or one sharding for every array.
    """
    state = jax.eval_shape(lambda sample: initial(sae_config, config, sample), base.abstract_sample(widths))

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # A leaf that no op placed (a scalar, the key) says nothing of a mesh; it is replicated.
        spec = getattr(leaf.sharding, "spec", mesh.REPLICATED)
        where = place if isinstance(place, jax.sharding.Sharding) else mesh.sharding(place, mesh.at_rest(spec, place))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(placed, state)
