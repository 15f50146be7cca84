"""Patching: which features of an activation make a model predict what it predicts on a counterfactual prompt.

    x'[t] = x[t] + sum over j in F of (c'_j[t] - c_j[t]) d_j       at every position up to the one that predicts

Features are latents (of_latents), whose values c and c' are those on the prompt and on the counterfactual one, or the
directions of an orthonormal basis (of_directions), such as principal components or neurons. All latents together leave
out what the dictionary does not explain, while a whole basis patches everything. What is measured is

    KL(predictions on the counterfactual prompt || predictions with F patched)        nats, at one position

against the number of patches and against the norm of the edit. Features are ordered for each pair of prompts

    by_attribution    by the slope of the KL: its gradient at the prompt's activations times the change
    pruned            from all features patched, by which are given up first: those go, least by attribution first,
                      whose loss costs less than a threshold, with the threshold rising in rounds (greedy flat ACDC)

Sources: Cunningham et al. 2023, arXiv 2309.08600, section 4; Conmy et al. 2023, arXiv 2304.14997 (ACDC), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sae_jax import lm
from sae_jax.evaluation.run_on import amounts
from sae_jax.saes.base import AbstractSae
from sae_jax.types import UsageError

# Of what a patch may be worth in the rounds of pruning, as shares of the KL without patches.
THRESHOLDS = tuple(2.0**-i for i in range(14, -1, -1))
AT_ONCE = 16  # points of a curve, which share the reading of the model's weights


@struct.dataclass
class Pair:
    """A prompt and a counterfactual one of the same length, at one place of a model."""

    site: lm.ReplacedSite  # of the prompt
    x: jax.Array  # f32[2, T, X], what is encoded of the prompt and of the counterfactual one
    y: jax.Array  # f32[2, T, Y], what is reconstructed
    logits: jax.Array  # f32[1, V], the predictions of the counterfactual prompt
    at: jax.Array  # i32[], the position that predicts: later ones of the counterfactual prompt are those of the prompt


@struct.dataclass
class Features:
    """What may be patched."""

    ids: jax.Array  # i32[J]: latents, or numbers of directions
    change: jax.Array  # f32[T, J], from the prompt to the counterfactual one
    directions: jax.Array  # f32[J, Y]


class Curve(NamedTuple):
    """What patching the first 0, 1, ... J features of an order does."""

    kl: np.ndarray  # f64[J + 1], nats
    norm: np.ndarray  # f64[J + 1], of the edit over all positions, in units of the activations


def pair(
    model: lm.LanguageModel,
    encoded: lm.Hook,
    reconstructed: lm.Hook,
    prompt_T: np.ndarray,
    counterfactual_T: np.ndarray,
    at: int | None = None,
) -> Pair:
    """Both prompts through the model as it is.

    Args:
        model: that is patched.
        encoded: the hook that a dictionary reads; for a basis the same as the next.
        reconstructed: the hook that is patched.
        prompt_T: i32[T]. Prompts of several lengths share programs if they are filled up at the end.
        counterfactual_T: i32[T].
        at: the position whose predictions count; None: the last.

    Raises:
        UsageError: prompts of different lengths, or a position that they do not have.
    """
    n = len(prompt_T)
    if len(counterfactual_T) != n:
        raise UsageError(f"the prompts have {n} and {len(counterfactual_T)} tokens; patching needs equally many")
    at = n - 1 if at is None else at
    if not 0 <= at < n:
        raise UsageError(f"at={at} is no position of prompts of {n} tokens; use 0 to {n - 1}")
    ids_2T = np.stack([prompt_T, counterfactual_T]).astype(np.int32)
    lm.check_ids(ids_2T, model.spec)
    return _pair(model, ids_2T, jnp.int32(at), encoded, reconstructed)


def of_latents(sae: AbstractSae, pair: Pair) -> Features:
    """The latents that are active in one of the two prompts and differ."""
    code = amounts(sae, pair.x.reshape(-1, pair.x.shape[-1]))
    indices_NK, amounts_NK = np.asarray(code.indices), np.asarray(code.values)
    latents_J, column_NK = np.unique(indices_NK, return_inverse=True)
    amounts_NJ = np.zeros((len(indices_NK), len(latents_J)), np.float32)
    # Slots that are not in use may name a latent that another slot has.
    np.add.at(amounts_NJ, (np.arange(len(indices_NK))[:, None], column_NK.reshape(indices_NK.shape)), amounts_NK)
    change_TJ = np.subtract(*amounts_NJ.reshape(2, -1, len(latents_J))[::-1])
    differs_J = change_TJ.any(0)
    latents_J = latents_J[differs_J]
    directions_JY = sae.w_dec[latents_J].astype(jnp.float32)
    return Features(jnp.asarray(latents_J, jnp.int32), jnp.asarray(change_TJ[:, differs_J]), directions_JY)


def of_directions(directions_JY: np.ndarray, pair: Pair) -> Features:
    """Orthonormal directions f32[J, Y], in which the two prompts differ by their projections."""
    rows_JY = jnp.asarray(directions_JY, jnp.float32)
    return Features(jnp.arange(len(rows_JY)), (pair.y[1] - pair.y[0]) @ rows_JY.T, rows_JY)


def by_attribution(pair: Pair, features: Features) -> np.ndarray:
    """Places of features i64[J], those first whose change lowers the KL most, to first order."""
    return np.argsort(np.asarray(_slopes(pair, features)), kind="stable")


def pruned(pair: Pair, features: Features, most: int | None = None) -> np.ndarray:
    """Places of features i64[J], those first that pruning gives up last.

    Each trial is a run of the model. With `most`, only so many features, the first by attribution, are pruned among
    themselves, and the others follow them by attribution.
    """
    return pruned_together([(pair, features)], most)[0]


def pruned_together(parts: Sequence[tuple[Pair, Features]], most: int | None = None) -> list[np.ndarray]:
    """`pruned` of several pairs or features at once, whose trials share the reading of the model's weights.

    UsageError for pairs of different lengths; all are of one model and one place in it.
    """
    lengths = sorted({pair.site.ids.shape[1] for pair, _ in parts})
    if len(lengths) > 1:
        raise UsageError(f"pairs of {lengths[0]} and {lengths[-1]} tokens are not pruned together; fill them up")
    orders = [by_attribution(*part) for part in parts]
    firsts = [order_J[: len(order_J) if most is None else most] for order_J in orders]
    n_slots = _n_slots(max(map(len, firsts)))
    tried = [
        _padded(Features(all_of.ids[places], all_of.change[:, places], all_of.directions[places]), n_slots)
        for (_, all_of), places in zip(parts, firsts, strict=True)
    ]
    # What fills up changes nothing: it goes at once, and then the others from the least by attribution.
    worst_first = [np.concatenate([np.arange(len(f), n_slots), np.arange(len(f))[::-1]]) for f in firsts]
    bare = [_with_model(pair, None) for pair, _ in parts]  # or it would be copied for each
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *zip(bare, tried, worst_first, strict=True))
    given_up = np.asarray(_prune(parts[0][0].site.model, *stacked))
    return [
        np.concatenate([first[np.argsort(-when[: len(first)], kind="stable")], order_J[len(first) :]])
        for order_J, first, when in zip(orders, firsts, given_up, strict=True)
    ]


def curve(pair: Pair, features: Features, order_J: np.ndarray, longest: int | None = None) -> Curve:
    """What patching features does, one after the other in this order; with `longest`, so many of them at most."""
    n = len(features.ids)
    n_slots = _n_slots(n)
    padded = _padded(features, n_slots)
    rank_J = np.full(n_slots, n_slots)
    rank_J[order_J] = np.arange(n)
    n_points = 1 + (n_slots if longest is None else min(longest, n_slots))
    kl_N, norm_N = _curve(pair, padded, jnp.asarray(rank_J), jnp.arange(-(-n_points // AT_ONCE) * AT_ONCE))
    return Curve(*(np.asarray(part, np.float64)[: min(n + 1, n_points)] for part in (kl_N, norm_N)))


def all_patched(pair: Pair, features: Features) -> float:
    """The KL with every feature patched, nats."""
    return float(_kl_of_all(pair, _padded(features, _n_slots(len(features.ids)))))


def mean(curves: list[Curve]) -> Curve:
    """The mean at each number of patches; a curve of fewer features stays where it ended."""
    longest = max(len(curve.kl) for curve in curves)

    def mean_of(parts: list[np.ndarray]) -> np.ndarray:
        return np.mean([np.pad(part, (0, longest - len(part)), "edge") for part in parts], axis=0)

    return Curve(mean_of([curve.kl for curve in curves]), mean_of([curve.norm for curve in curves]))


def _n_slots(n: int) -> int:
    """Of so many features filled up, so that pairs share programs."""
    return 1 << (max(n, 1) - 1).bit_length()


def _padded(features: Features, n_slots: int) -> Features:
    """Filled up with features that change nothing."""
    filling, none = (0, n_slots - len(features.ids)), (0, 0)
    padded = ((features.ids, (filling,)), (features.change, (none, filling)), (features.directions, (filling, none)))
    return Features(*(jnp.pad(part, widths) for part, widths in padded))


@partial(jax.jit, static_argnames=("encoded", "reconstructed"))
def _pair(model: lm.LanguageModel, ids_2T: jax.Array, at: jax.Array, encoded: lm.Hook, reconstructed: lm.Hook) -> Pair:
    out = lm.run(model, ids_2T, capture=(encoded, reconstructed))
    assert out.logits is not None
    before_1T1 = (jnp.arange(ids_2T.shape[1]) <= at)[None, :, None]

    def acts(hook: lm.Hook) -> jax.Array:
        acts_2TX = out.acts[hook].reshape(*ids_2T.shape, -1).astype(jnp.float32)
        return jnp.where(before_1T1, acts_2TX, acts_2TX[:1])

    everywhere_1T = jnp.ones_like(ids_2T[:1], bool)
    site = lm.replaced_site(model, ids_2T[:1], everywhere_1T, reconstructed, with_later=False)
    return Pair(site, acts(encoded), acts(reconstructed), out.logits[1:, at], at)


def _with_model(pair: Pair, model: lm.LanguageModel | None) -> Pair:
    return replace(pair, site=replace(pair.site, model=model))  # pyrefly: ignore  # None for a while


def _kl(pair: Pair, edit_TY: jax.Array) -> jax.Array:
    """From the predictions on the counterfactual prompt to those after an edit, f32[]."""
    logits_11V, _ = pair.site.with_rows(pair.site.rows + edit_TY, pair.at)
    return lm.kl_divergence(pair.logits, logits_11V[:, 0])[0]


def _edit(features: Features, is_patched_J: jax.Array) -> jax.Array:
    return (features.change * is_patched_J[None]) @ features.directions


@jax.jit
def _slopes(pair: Pair, features: Features) -> jax.Array:
    """Change of the KL by each feature's patch, to first order, f32[J]."""
    gradient_TY = jax.grad(partial(_kl, pair))(jnp.zeros_like(pair.y[0]))
    return (features.change * (gradient_TY @ features.directions.T)).sum(0)


@jax.jit
def _prune(model: lm.LanguageModel, pairs: Pair, features: Features, worst_first_PJ: jax.Array) -> jax.Array:
    """When each feature of each pair was given up, i32[P, J]; those that never were, last."""

    def of_one(pair: Pair, features: Features, worst_first_J: jax.Array) -> jax.Array:
        pair = _with_model(pair, model)
        n, n_steps = len(worst_first_J), len(worst_first_J) * len(THRESHOLDS)
        tried_S = jnp.tile(worst_first_J, len(THRESHOLDS))
        threshold_S = jnp.repeat(jnp.asarray(THRESHOLDS), n) * _kl(pair, jnp.zeros_like(pair.y[0]))

        def next_step(step: jax.Array, is_patched_J: jax.Array) -> jax.Array:
            """The first from `step` on that tries a feature which is still patched; n_steps if there is none."""
            is_due_S = (jnp.arange(n_steps) >= step) & (is_patched_J[tried_S] > 0)
            return jnp.where(is_due_S.any(), is_due_S.argmax(), n_steps)

        def try_one(state: tuple) -> tuple:
            step, is_patched_J, kl, given_up_J = state
            j = tried_S[step]
            fewer_J = is_patched_J.at[j].set(0.0)
            new = _kl(pair, _edit(features, fewer_J))
            goes = new - kl < threshold_S[step]
            is_patched_J = jnp.where(goes, fewer_J, is_patched_J)
            given_up_J = given_up_J.at[j].set(jnp.where(goes, step, given_up_J[j]))
            return next_step(step + 1, is_patched_J), is_patched_J, jnp.where(goes, new, kl), given_up_J

        all_J = jnp.ones(n)
        state = (next_step(jnp.int32(0), all_J), all_J, _kl(pair, _edit(features, all_J)), jnp.full(n, n_steps))
        # Each pair goes on to its own next trial, so that none waits for what another has given up.
        return jax.lax.while_loop(lambda state: state[0] < n_steps, try_one, state)[3]

    return jax.vmap(of_one)(pairs, features, worst_first_PJ)


@jax.jit
def _curve(pair: Pair, features: Features, rank_J: jax.Array, n_patched_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    def point(n: jax.Array) -> tuple[jax.Array, jax.Array]:
        edit_TY = _edit(features, (rank_J < n).astype(jnp.float32))
        return _kl(pair, edit_TY), jnp.linalg.norm(edit_TY)

    return jax.lax.map(point, n_patched_N, batch_size=AT_ONCE)


@jax.jit
def _kl_of_all(pair: Pair, features: Features) -> jax.Array:
    return _kl(pair, _edit(features, jnp.ones(len(features.ids))))
