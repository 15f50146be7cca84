"""Text that a language model writes while latents of a dictionary are set to values.

    clamp   x' = x + s (c - z_i) d_i for each latent i: its value becomes c, all else of the reconstruction and the
            dictionary's error stay (s: the scale of a norm of each vector, 1 elsewhere; d_i: its decoder row)
    add     y' = y + s c d_i, whatever the latent's value: also where a dictionary reads another place than it writes
    norm    y' = y + r |y| u, u the unit vector along the sum of m_i d_i (m_i: largest value of the latent): the edit is
            r = `scale` times as long as what it is added to, so that latents are compared at equal strength

c is `scale` times the largest value of the latent on rows of the set. Every position is changed, of the prompt and of
what is written, but for special tokens of the prompt, of which the set has no rows.

Source: Templeton et al. 2024, "Scaling Monosemanticity", methodological details (clamping with the error kept).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import lm, mesh
from sae_jax.activations.store import ActivationSet
from sae_jax.evaluation.prompts import MIN_ROOM, Subject
from sae_jax.evaluation.text import spread_chunks
from sae_jax.saes.base import AbstractSae
from sae_jax.saes.normalise import PER_VECTOR, normalise
from sae_jax.types import UsageError, UserError

How = Literal["clamp", "add", "norm"]
N_ROWS = 2**16  # of the set, to look for the largest value on
NO_LATENT = -1  # no code has it
MIN_SLOTS = 128  # of the cache of a stream


@dataclass(frozen=True)
class Steered:
    """What the model wrote."""

    scale: float | None  # None: unsteered
    text: str  # without the prompt


def largest_values(
    sae: AbstractSae, activations: ActivationSet, sources: Sequence[str], latents: Sequence[int], n_rows: int = N_ROWS
) -> np.ndarray:
    """The largest value of each latent on rows spread over a set, f32[L]; 0 for one that never fires there."""
    largest_L = np.zeros(len(latents), np.float32)
    for chunk in spread_chunks(activations, n_rows):
        parts = [activations.read_chunk(source, chunk).astype(np.float32) for source in sources]
        code = sae.encode(np.concatenate(parts, axis=1))
        indices, values = np.asarray(code.indices), np.asarray(code.values)
        for at, latent in enumerate(latents):
            largest_L[at] = max(largest_L[at], values[indices == latent].max(initial=0.0))
    return largest_L


def check(subject: Subject, latents: Sequence[int], how: How) -> None:
    """UsageError for what cannot be steered, see `steer`."""
    model, n_latents = subject.model, subject.sae.b_enc.shape[0]
    if not latents:
        raise UsageError("name at least one latent")
    for latent in latents:
        if not 0 <= latent < n_latents:
            raise UsageError(f"latent {latent} does not exist; choose 0 to {n_latents - 1}")
    if len(set(latents)) < len(latents):
        raise UsageError(f"latents {', '.join(map(str, latents))}: one is there twice; name each once")
    if not isinstance(model, lm.LanguageModel):
        raise UsageError(f"{model.reference} runs in torch, where nothing is steered; use a model that JAX runs here")
    is_one_place = subject.encoded == subject.reconstructed and len(subject.encoded) == 1
    if how != "norm" and not is_one_place and (kind := subject.sae.config.input_norm) in PER_VECTOR:
        raise UsageError(
            f"the dictionary reads another place than it writes, or several, in units of each vector's {kind}; nothing "
            f"says how large its values are there"
        )
    if how == "clamp" and not is_one_place:
        raise UsageError("the dictionary reads another place than it writes, or several; use --how add")


def steer(
    subject: Subject,
    ids_T: np.ndarray,
    latents: Sequence[int],
    largest_L: np.ndarray,
    scales: Sequence[float],
    how: How = "clamp",
    n_new: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Steered]:
    """Continuations of a prompt i32[T] as texts; arguments and errors as `write`."""
    written = write(subject, ids_T[None], latents, largest_L, scales, how, n_new, temperature, seed)
    return [Steered(scale, subject.tokenizer.decode(new_1N[0])) for scale, new_1N in written]


def write(
    subject: Subject,
    ids_PT: np.ndarray,
    latents: Sequence[int],
    largest_L: np.ndarray,
    scales: Sequence[float],
    how: How = "clamp",
    n_new: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[tuple[float | None, np.ndarray]]:
    """(scale, tokens that the model writes i32[P, n_new]), unsteered first, all with the same random numbers.

    Args:
        subject: the dictionary in its model.
        ids_PT: i32[P, T], prompts of one length.
        latents: that are set.
        largest_L: f32[L], what scales are multiples of.
        scales: of all these latents; with "norm" multiples of each row's norm.
        how: see the head.
        n_new: tokens that are written.
        temperature: 0: the likeliest token each time.
        seed: of the random numbers.

    Raises:
        UsageError: a latent that does not exist or is named twice, a clamp of a dictionary that reads another place
            than it writes, a model that torch runs, or a prompt that leaves no room for `n_new`.
        UserError: an edit so strong that the model's logits are no numbers.
    """
    check(subject, latents, how)
    model = subject.model
    assert isinstance(model, lm.LanguageModel)
    ids = jax.device_put(ids_PT, mesh.everywhere(model.params["embed"]))
    generate = partial(lm.generate, model, ids, n_new, jax.random.key(seed), temperature=temperature)
    steered = [(scale, _steered(subject, ids_PT, latents, scale, largest_L, how)) for scale in scales]
    written = [(None, generate()), *((scale, generate(**settings)) for scale, settings in steered)]
    return [(scale, _checked(np.asarray(whole)[:, ids_PT.shape[1] :])) for scale, whole in written]


def stream(
    subject: Subject,
    ids_T: np.ndarray,
    latents: Sequence[int] = (),
    largest_L: Sequence[float] = (),
    scale: float | None = None,
    how: How = "clamp",
    n_new: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[int]:
    """The tokens that the model writes after a prompt i32[T], one by one; arguments and errors as `write`.

    With `scale=None` nothing is steered. Few programs serve prompts of all lengths, and up to 8 latents.
    """
    model = subject.model
    assert isinstance(model, lm.LanguageModel)
    n_slots = _power_of_two(len(ids_T) + n_new, MIN_SLOTS, model.spec.n_context)
    n_filled = _power_of_two(len(ids_T), MIN_ROOM, model.spec.n_context)
    filled_1T = np.pad(ids_T, (0, max(n_filled - len(ids_T), 0)))[None]
    steered = {}
    if scale is not None:
        check(subject, latents, how)
        unused = [NO_LATENT] * (-len(latents) % 8)
        largest = np.array([*largest_L, *(0.0 for _ in unused)], np.float32)
        steered = _steered(subject, filled_1T, [*latents, *unused], scale, largest, how)
    written = lm.stream(
        model,
        jax.device_put(filled_1T, mesh.everywhere(model.params["embed"])),
        n_new,
        jax.random.key(seed),
        temperature=temperature,
        n_prompt=len(ids_T),
        n_slots=n_slots,
        **steered,
    )
    return (int(_checked(np.asarray(new_11))[0, 0]) for new_11 in written)


def _power_of_two(n: int, least: int, most: int) -> int:
    return min(max(1 << (n - 1).bit_length(), least), most)


def _steered(
    subject: Subject, ids_PT: np.ndarray, latents: Sequence[int], scale: float, largest_L: np.ndarray, how: How
) -> dict[str, Any]:
    """What `lm.stream` is given to steer with. NO_LATENT among the latents changes nothing."""
    sae, model = subject.sae, subject.model
    assert isinstance(model, lm.LanguageModel)
    keep_PT = ~np.isin(ids_PT, subject.tokenizer.special_ids)
    indices_L = jnp.asarray(latents, jnp.int32)
    edits, rows, first = {}, [], 0
    for at, hook in enumerate(subject.reconstructed):
        width = lm.hook_width(model.spec, hook)
        rows.append(jnp.where(indices_L[:, None] < 0, 0.0, sae.w_dec[indices_L, first : first + width]))
        first += width
        edits[hook] = _edit(how, at)
    values_L = scale * largest_L
    args = {"sae": sae, "latents": indices_L, "values": values_L, "keep": keep_PT, "rows": rows}
    if how == "norm":
        args = {"multiple": jnp.float32(scale), "largest": largest_L, "keep": keep_PT, "rows": rows}
    return {"edits": edits, "edit_args": jax.device_put(args, mesh.everywhere(model.params["embed"]))}


def _checked(new: np.ndarray) -> np.ndarray:
    if (new == lm.NO_TOKEN).any():
        raise UserError("with an edit of this strength the model's logits are no numbers; use a smaller one")
    return new


@cache
def _edit(how: How, at: int) -> Any:
    """The change of the at-th hook. The same function each time: with another, `generate` would compile again."""
    return partial({"clamp": _clamped, "add": _added, "norm": _by_norm}[how], at=at)


def _clamped(x_BTX: jax.Array, args: dict[str, Any], at: int) -> jax.Array:
    sae, latents_L = args["sae"], args["latents"]
    x_NX, _, scale_N1 = normalise(x_BTX.reshape(-1, x_BTX.shape[-1]), sae.config.input_norm)
    code = sae.encode_rows(x_NX, sae.most_slots)
    is_it_NKL = code.indices[:, :, None] == latents_L[None, None]
    z_NL = jnp.where(is_it_NKL, code.values[:, :, None], 0.0).sum(1)
    change_NY = scale_N1 * ((args["values"][None] - z_NL) @ args["rows"][at])
    return _where(args["keep"], x_BTX + change_NY.reshape(x_BTX.shape), x_BTX)


def _added(x_BTX: jax.Array, args: dict[str, Any], at: int) -> jax.Array:
    _, _, scale_N1 = normalise(x_BTX.reshape(-1, x_BTX.shape[-1]), args["sae"].config.input_norm)
    change_NY = (
        jnp.broadcast_to(scale_N1, (x_BTX.shape[0] * x_BTX.shape[1], 1)) * (args["values"] @ args["rows"][at])[None]
    )
    return _where(args["keep"], x_BTX + change_NY.reshape(x_BTX.shape), x_BTX)


def _by_norm(x_BTX: jax.Array, args: dict[str, Any], at: int) -> jax.Array:
    sum_Y = args["largest"] @ args["rows"][at]
    unit_Y = sum_Y / jnp.maximum(jnp.linalg.norm(sum_Y), 1e-30)
    norm_BT1 = jnp.linalg.norm(x_BTX, axis=-1, keepdims=True)
    return _where(args["keep"], x_BTX + args["multiple"] * norm_BT1 * unit_Y[None, None], x_BTX)


def _where(keep_PT: jax.Array, changed_BTX: jax.Array, x_BTX: jax.Array) -> jax.Array:
    """What is written after the prompt comes alone, and is changed whatever it is."""
    return jnp.where(keep_PT[:, :, None], changed_BTX, x_BTX) if x_BTX.shape[1] == keep_PT.shape[1] else changed_BTX
