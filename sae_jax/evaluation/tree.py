"""What made one latent fire in a prompt, and what it made fire: latents of dictionaries at other places of the model.

A latent stands for its pre-activation u = w_enc . x at the token of the prompt where its value is greatest (x as the
encoder sees it; without biases, which do not change). The effect of latent a on latent b of a later place:

    estimate    sum over t of  s[t] z_a[t] d_a . du_b/dy_a[t]     gradient times activation: by how much u_b would fall
                                                                 without a, to first order
    measured    u_b - u_b', where u_b' is of a run without a at any token

(s: the scale of a norm of each vector, else 1; d_a: decoder row.) Both are effects by every path between the two
places, through latents of places in between, too. Upstream all estimates come from one gradient, and the strongest are
measured; downstream both come from one run each. Special tokens have no code, as in the set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import lm
from sae_jax.errors import printable
from sae_jax.evaluation import run_on
from sae_jax.evaluation.effects import check_latent
from sae_jax.evaluation.prompts import Subject
from sae_jax.saes.normalise import normalise
from sae_jax.types import UsageError, UserError


@dataclass(frozen=True)
class Link:
    """One latent at another place, and its effect, or the effect on it."""

    latent: int
    position: int  # where its value is greatest
    value: float  # there
    estimate: float
    measured: float


@dataclass(frozen=True)
class Level:
    """The latents of one other dictionary."""

    dictionary: str
    hook: str
    latents: list[Link]  # strongest estimates first, for or against
    others: float | None  # estimates of all others together; None downstream, where they are of many sums
    error: float | None  # estimate of what the dictionary does not reconstruct; None downstream


@dataclass(frozen=True)
class Tree:
    """A latent with what is up and down the stream of it."""

    dictionary: str
    hook: str
    latent: int
    prompt: list[str]  # its tokens
    position: int  # where the value is greatest
    value: float  # there
    upstream: list[Level]  # nearest places last
    downstream: list[Level]  # nearest places first

    def __str__(self) -> str:
        head = f"    {'latent':<8}{'estimate':>10}{'measured':>10}   value and token"
        lines = [f"latent {self.latent} of {self.dictionary} ({self.hook}): {self._at(self.value, self.position)}"]
        for title, levels in (("what made it fire:", self.upstream), ("what it made fire:", self.downstream)):
            lines += [title, head] if levels else []
            for level in levels:
                lines.append(f"  {level.dictionary} ({level.hook})")
                for link in level.latents:
                    effects = f"{link.latent:<8}{link.estimate:+10.3f}{link.measured:+10.3f}"
                    lines.append(f"    {effects}   {self._at(link.value, link.position)}")
                rest = (("others", level.others), ("error", level.error))
                lines += [f"    {name:<8}{value:+10.3f}" for name, value in rest if value is not None]
        return "\n".join(lines)

    def _at(self, value: float, position: int) -> str:
        return f"{value:.3g} at {position}: {printable(self.prompt[position])}"


class _Reading(NamedTuple):
    """One dictionary on the prompt, filled up to T tokens."""

    at: run_on.Place
    latents: np.ndarray  # i32[T, K]
    values: np.ndarray  # f32[T, K], 0 where a token has no code
    amounts: np.ndarray  # f32[T, K], how much of each decoder row there is
    error: np.ndarray  # f32[T, Y], what is not reconstructed

    def of_latents(self, latents_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(values, amounts) of latents at each token, f32[U, T] each."""
        is_it_UTK = self.latents[None] == latents_U[:, None, None]
        return (self.values[None] * is_it_UTK).sum(2), (self.amounts[None] * is_it_UTK).sum(2)

    @property
    def active(self) -> np.ndarray:
        """Latents that are active somewhere, i64[U]."""
        return np.unique(self.latents[self.values > 0])


def causal_tree(subjects: Mapping[str, Subject], ids_T: np.ndarray, name: str, latent: int, n: int = 5) -> Tree:
    """The latents of other dictionaries that act on a latent, and those that it acts on, in one prompt.

    Args:
        subjects: dictionaries by name, at different hooks of one model.
        ids_T: i32[T], the prompt.
        name: whose latent it is.
        latent: which.
        n: latents to name of each other dictionary.

    Raises:
        UsageError: one dictionary alone, two at one place, of several models or of several hooks, or a latent that does
            not exist.
        UserError: the latent is active at no token of the prompt.
    """
    if len(subjects) < 2:
        raise UsageError("a tree is of dictionaries at several places; name two or more")
    if name not in subjects:
        raise UsageError(f"dictionary {name!r} is none of {', '.join(subjects)}")
    check_latent(subjects[name], latent)
    places = {each: run_on.place(subject) for each, subject in subjects.items()}
    if len({place.model.digest for place in places.values()}) > 1:
        raise UsageError("the dictionaries are of several language models; give those of one")
    model, target = places[name].model, places[name]
    for each, place in places.items():
        if each != name and not (_is_before(place, target) or _is_before(target, place)):
            raise UsageError(f"{each} stands at {place.encoded}, neither before nor after {name} at {target.encoded}")
    ids_1T, readings = _read(model, subjects, places, ids_T)
    here = readings[name]
    (values_T,), (amounts_T,) = here.of_latents(np.array([latent]))
    position = int(values_T.argmax())
    if not values_T[position]:
        raise UserError(f"latent {latent} of {name} is active at no token of the prompt; choose another, or a prompt")
    before = {each: r for each, r in readings.items() if each != name and _is_before(r.at, target)}
    after = {each: r for each, r in readings.items() if each != name and each not in before}
    upstream = [
        _upstream(model, ids_1T, each, reading, target, latent, position, n) for each, reading in before.items()
    ]
    downstream = _downstream(model, ids_1T, after, target, latent, amounts_T, n) if after else []
    return Tree(
        dictionary=name,
        hook=str(target.encoded),
        latent=latent,
        prompt=subjects[name].tokenizer.tokens(ids_T),
        position=position,
        value=float(values_T[position]),
        upstream=sorted(upstream, key=lambda level: _order(places[level.dictionary].encoded)),
        downstream=sorted(downstream, key=lambda level: _order(places[level.dictionary].encoded)),
    )


def _order(hook: lm.Hook) -> tuple[int, int]:
    return hook.layer, lm.POINTS.index(hook.point)


def _is_before(a: run_on.Place, b: run_on.Place) -> bool:
    return _order(a.reconstructed) < _order(b.encoded)


def _read(
    model: lm.LanguageModel, subjects: Mapping[str, Subject], places: Mapping[str, run_on.Place], ids_T: np.ndarray
) -> tuple[jax.Array, dict[str, _Reading]]:
    """The prompt, filled up, and what each dictionary makes of it."""
    n_tokens = len(ids_T)
    # Prompts of nearly one length share a program.
    n_filled = min(-(-n_tokens // 32) * 32, model.spec.n_context or n_tokens + 32)
    ids_1T = np.pad(ids_T, (0, n_filled - n_tokens)).astype(np.int32)[None]
    special = next(iter(subjects.values())).tokenizer.special_ids
    has_code_T1 = (np.arange(n_filled) < n_tokens)[:, None] & ~np.isin(ids_1T[0], special)[:, None]
    hooks = tuple(dict.fromkeys(hook for p in places.values() for hook in (p.encoded, p.reconstructed)))
    acts = dict(zip(hooks, map(np.asarray, _rows(model, jnp.asarray(ids_1T), hooks)), strict=True))
    readings = {}
    for name, place in places.items():
        x_TX, y_TY = acts[place.encoded], acts[place.reconstructed]
        code, scale_T1 = run_on.encode(place.sae, x_TX)
        values_TK = np.where(has_code_T1, np.asarray(code.values), 0.0)
        error_TY = np.where(has_code_T1, y_TY - np.asarray(place.sae(x_TX)), 0.0)
        amounts_TK = values_TK * np.asarray(scale_T1)
        readings[name] = _Reading(place, np.asarray(code.indices), values_TK, amounts_TK, error_TY)
    return jnp.asarray(ids_1T), readings


def _upstream(
    model: lm.LanguageModel,
    ids_1T: jax.Array,
    name: str,
    reading: _Reading,
    target: run_on.Place,
    latent: int,
    position: int,
    n: int,
) -> Level:
    at, kind = reading.at, target.sae.config.input_norm
    static = {"hook": at.reconstructed, "later": target.encoded, "kind": kind}
    args = model, ids_1T, jnp.asarray(target.sae.w_enc[latent], jnp.float32), jnp.int32(position)
    gradient_TY = np.asarray(_gradient(*args, jnp.asarray(reading.error), **static))
    latents_U, w_dec_FY = reading.active, np.asarray(at.sae.w_dec, np.float32)
    values_UT, amounts_UT = reading.of_latents(latents_U)
    estimate_U = (amounts_UT * (w_dec_FY[latents_U] @ gradient_TY.T)).sum(1)
    strongest = np.argsort(-np.abs(estimate_U), kind="stable")[:n]
    rows_nY = jnp.asarray(w_dec_FY[latents_U[strongest]])
    measured_n = np.asarray(_ablated(*args, jnp.asarray(amounts_UT[strongest]), rows_nY, **static))
    return Level(
        name,
        str(at.encoded),
        [_link(latents_U, values_UT, u, estimate_U[u], m) for u, m in zip(strongest, measured_n, strict=True)],
        float(estimate_U.sum() - estimate_U[strongest].sum()),
        float((gradient_TY * reading.error).sum()),
    )


def _downstream(
    model: lm.LanguageModel,
    ids_1T: jax.Array,
    after: Mapping[str, _Reading],
    target: run_on.Place,
    latent: int,
    amounts_T: np.ndarray,
    n: int,
) -> list[Level]:
    change_TY = jnp.asarray(-amounts_T[:, None] * np.asarray(target.sae.w_dec[latent], np.float32)[None])
    later = tuple(dict.fromkeys(reading.at.encoded for reading in after.values()))
    clean, slope, without = _pushed(model, ids_1T, change_TY, hook=target.reconstructed, later=later)
    levels = []
    for name, reading in after.items():
        place, sae = later.index(reading.at.encoded), reading.at.sae
        latents_U = reading.active
        values_UT, _ = reading.of_latents(latents_U)
        position_U, w_enc_UX = values_UT.argmax(1), sae.w_enc[latents_U]
        see = partial(normalise, kind=sae.config.input_norm)
        seen, tangent = jax.jvp(lambda x, see=see: see(x)[0], (clean[place],), (slope[place],))
        measured_UT, estimate_UT = (
            np.asarray(-(w_enc_UX @ each_TX.T)) for each_TX in (see(without[place])[0] - seen, tangent)
        )
        which = np.arange(len(latents_U))
        estimate_U, measured_U = estimate_UT[which, position_U], measured_UT[which, position_U]
        strongest = np.argsort(-np.abs(estimate_U), kind="stable")[:n]
        links = [_link(latents_U, values_UT, u, estimate_U[u], measured_U[u]) for u in strongest]
        levels.append(Level(name, str(reading.at.encoded), links, None, None))
    return levels


def _link(latents_U: np.ndarray, values_UT: np.ndarray, u: int, estimate: float, measured: float) -> Link:
    position = int(values_UT[u].argmax())
    return Link(int(latents_U[u]), position, float(values_UT[u, position]), float(estimate), float(measured))


@partial(jax.jit, static_argnames="hooks")
def _rows(model: lm.LanguageModel, ids_1T: jax.Array, hooks: tuple[lm.Hook, ...]) -> list[jax.Array]:
    """Activations f32[T, width] at each hook."""
    return _after(model, ids_1T, None, hooks)


def _after(
    model: lm.LanguageModel, ids_1T: jax.Array, edit: tuple[lm.Hook, jax.Array] | None, hooks: tuple[lm.Hook, ...]
) -> list[jax.Array]:
    """Activations f32[T, width] at each hook, with (hook, f32[T, Y]) added to those of an earlier one."""
    edits = {} if edit is None else lm.intervene.edits({edit[0]: lm.intervene.add(edit[1][None])})
    acts = lm.run(model, ids_1T, edits=edits, capture=hooks, logits=False).acts
    return [acts[hook].reshape(ids_1T.shape[1], -1).astype(jnp.float32) for hook in hooks]


def _pre(model, ids_1T, w_X, position, edit_TY, hook, later, kind) -> jax.Array:
    """The pre-activation of a latent at a token, f32[], without its bias."""
    (x_TX,) = _after(model, ids_1T, (hook, edit_TY), (later,))
    return normalise(x_TX, kind)[0][position] @ w_X


@partial(jax.jit, static_argnames=("hook", "later", "kind"))
def _gradient(model, ids_1T, w_X, position, like_TY, *, hook, later, kind) -> jax.Array:
    """Of the pre-activation with respect to the activations at the earlier hook, f32[T, Y]."""
    return jax.grad(lambda edit_TY: _pre(model, ids_1T, w_X, position, edit_TY, hook, later, kind))(0 * like_TY)


@partial(jax.jit, static_argnames=("hook", "later", "kind"))
def _ablated(model, ids_1T, w_X, position, amounts_nT, rows_nY, *, hook, later, kind) -> jax.Array:
    """How far the pre-activation falls without each latent of the earlier hook, f32[n]."""

    def with_edit(edit_TY: jax.Array) -> jax.Array:
        return _pre(model, ids_1T, w_X, position, edit_TY, hook, later, kind)

    def fall(latent: tuple[jax.Array, jax.Array]) -> jax.Array:
        removed_TY = latent[0][:, None] * latent[1][None]
        return with_edit(0 * removed_TY) - with_edit(-removed_TY)

    return jax.lax.map(fall, (amounts_nT, rows_nY))


@partial(jax.jit, static_argnames=("hook", "later"))
def _pushed(model, ids_1T, change_TY, *, hook, later) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
    """Activations at later hooks as they are, their slope along a change at `hook`, and after it."""

    def after(edit_TY: jax.Array) -> list[jax.Array]:
        return _after(model, ids_1T, (hook, edit_TY), later)

    clean, slope = jax.jvp(after, (0 * change_TY,), (change_TY,))
    return clean, slope, after(change_TY)
