"""The optimiser's part of a step, a tile of latents at a time and in place, so that there is no gradient of the whole.

    gradients of a tile from pairs (ops/pairs.py) -> along the sphere -> Adam -> unit rows -> rounded -> averaged

All of it is done by the functions that the step of a whole dictionary calls, on trees of slices. Weights may be kept in
bf16, rounded stochastically (training/quantise.py).

Rows in bf16 have norm 1 to about 1e-4. To divide by the norm in each step would move them at random, latents that never
fire too, since what is left of the division is rounded anew: so a row is scaled only once its norm is off by SLACK.
Its norm moves by what a step rounds, about 1e-5, and is unbiased but for the square of that.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sae_jax import mesh
from sae_jax.mesh import DICT, REPLICATED
from sae_jax.ops import pairs, spmd, tuning
from sae_jax.ops.pairs import Pairs
from sae_jax.saes.base import AbstractSae, Adam, Hyperparameters
from sae_jax.saes.init import row_norms
from sae_jax.training import optim, quantise
from sae_jax.training.optim import AdamState
from sae_jax.training.settings import TrainConfig

OF_LATENTS = {"w_enc", "b_enc", "w_dec"}  # arrays with a row, or a number, for each latent
SLACK = 2.0**-10  # of the norm of a row in bf16


def update(
    sae: AbstractSae,
    optimiser_state: Any,
    average: Any,
    gradients: AbstractSae,
    parts: dict[str, list[Pairs]],
    assigned: dict[str, jax.Array],
    config: TrainConfig,
    defaults: Adam,
    hparams: Hyperparameters,
) -> tuple[AbstractSae, AdamState, Any, jax.Array]:
    """Weights, moments and average after a step, rows of norm 1 restored; and the norm of the gradient.

    Args:
        sae: weights; matrices in bf16 or f32.
        optimiser_state, average: as `TrainState` has them; the first an AdamState.
        gradients: of all but the matrices.
        parts: of the gradient of each matrix.
        assigned: vectors that are set, not learnt.
        config, defaults, hparams: as `optim.optimiser` takes them.
    """
    # What reads the weights comes before what writes them in place, else there would be two of them.
    state = sae, optimiser_state.mean, optimiser_state.square, average
    state, gradients, parts = lax.optimization_barrier((state, gradients, parts))
    others, of_others = _other_arrays(state), _other_arrays(gradients)
    norm_of_others = optax.tree.norm(of_others)

    def local(state: Any, g_b_R, parts, count, norm_of_others, hparams):
        n_own, update = len(g_b_R), optim.optimiser(config, hparams, defaults).update
        first_own = spmd.index((*mesh.LATENT, mesh.DATA)) * n_own
        in_order = {name: [pairs.sort(part, n_own) for part in of_matrix] for name, of_matrix in parts.items()}

        def gradients_of(start, size, kept):
            """Weights of a tile in f32, gradients along the sphere, and their norm."""
            weights = _f32(kept)
            summed = {name: jnp.zeros(getattr(weights, name).shape) for name in in_order}
            for name, of_matrix in in_order.items():
                for part in of_matrix:
                    summed[name] = part.add_up(summed[name], start)
            gradients = replace(weights, b_enc=_taken(g_b_R, start, size), **summed)
            return weights, *optim.along_sphere(gradients, weights)

        def squares(start, size, square):
            return square + gradients_of(start, size, _taken(state[0], start, size))[2] ** 2

        def tile(norm, start, size, carry):
            state, square = carry
            kept, mean, second, average = _taken(state, start, size)
            weights, gradients, norm_of_tile = gradients_of(start, size, kept)
            first: Any = first_own + start
            before: Any = AdamState(count, mean, second)
            updates, moments = cast(Any, update)(gradients, before, norm=norm, first=first)
            is_finite = jnp.isfinite(norm_of_tile + norm)  # if not, the weights stay, as in the step of the whole
            moved = jax.tree.map(lambda w, update: jnp.where(is_finite, w + update, w), weights, updates)
            kept = quantise.rounded_like(kept, _with_unit_rows(moved, kept), moments.count, salt=3, first=first)
            if config.ema:
                average = optim.ema_update(average, _f32(kept), hparams.ema, moments.count, first=first)
            return _put(state, (kept, moments.mean, moments.square, average), start), square + norm_of_tile**2

        def over_tiles(body, carry):
            _, size = spmd.even(n_own, max(1, tuning.current().block_bytes // (4 * state[0].w_dec.shape[1])))
            carry = lax.fori_loop(0, n_own // size, lambda i, carry: body(i * size, size, carry), carry)
            return body(n_own - n_own % size, n_own % size, carry) if n_own % size else carry

        def norm_of_all(square):
            return jnp.sqrt(spmd.total(square) + norm_of_others**2)

        norm = norm_of_others  # all there is before the tiles; enough unless gradients are clipped
        if config.clip:
            norm = norm_of_all(over_tiles(squares, jnp.float32(0)))
        state, square = over_tiles(partial(tile, norm), (state, jnp.float32(0)))
        return state, norm_of_all(square)

    part_specs = {name: [pairs.SPECS] * len(of_matrix) for name, of_matrix in parts.items()}
    in_specs = (DICT, DICT, part_specs, *(REPLICATED,) * 3)
    args = _of_latents(state), gradients.b_enc, parts, optimiser_state.count, norm_of_others, hparams
    state, norm = spmd.per_device(local, in_specs, (DICT, REPLICATED))(*args)

    weights, mean, second, average = others
    before: Any = AdamState(optimiser_state.count, mean, second)
    updates, moments = cast(Any, optim.optimiser(config, hparams, defaults).update)(of_others, before, norm=norm)
    weights = jax.tree.map(lambda w, update: jnp.where(jnp.isfinite(norm), w + update, w), weights, updates)
    weights = replace(weights, **assigned)
    if config.ema:
        average = optim.ema_update(average, weights, hparams.ema, moments.count)
    sae, mean, second, average = map(_joined, state, (weights, moments.mean, moments.square, average))
    return sae, AdamState(moments.count, mean, second), average, norm


def _with_unit_rows(weights: AbstractSae, kept: AbstractSae) -> AbstractSae:
    """`weights` in f32 with rows of norm 1, or near it where they are `kept` in bf16."""
    if kept.w_dec.dtype == jnp.float32:
        return weights.constrained()
    scaled = {}
    for name in weights.unit_rows:
        w_tD = getattr(weights, name)
        norm_t = row_norms(w_tD)
        scaled[name] = w_tD * jnp.where(jnp.abs(norm_t - 1) < SLACK, 1.0, 1 / norm_t)[:, None]
    return replace(cast(Any, weights), **scaled)


def _of_latents(trees: Any) -> Any:
    """The same without arrays that have no row for each latent."""
    return _map_saes(lambda sae: replace(sae, **dict.fromkeys(_names(sae) - OF_LATENTS)), trees)


def _other_arrays(trees: Any) -> Any:
    """The same without arrays that have a row for each latent."""
    return _map_saes(lambda sae: replace(sae, **dict.fromkeys(OF_LATENTS)), trees)


def _joined(of_latents: Any, others: Any) -> Any:
    """The tree that was split."""
    if others is None:
        return None
    return replace(of_latents, **{name: getattr(others, name) for name in _names(others) - OF_LATENTS})


def _names(sae: Any) -> set[str]:
    return {field.name for field in fields(sae) if field.metadata.get("pytree_node", True)}


def _map_saes(change: Any, trees: Any) -> Any:
    return jax.tree.map(change, trees, is_leaf=lambda node: isinstance(node, AbstractSae))


def _f32(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.astype(jnp.float32), tree)


def _taken(tree: Any, start: Any, size: int) -> Any:
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, size), tree)


def _put(tree: Any, parts: Any, start: Any) -> Any:
    return jax.tree.map(lambda a, part: lax.dynamic_update_slice_in_dim(a, part, start, 0), tree, parts)
