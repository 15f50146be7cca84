"""What a latent does to the next token, and which latents made a model say one.

    on_tokens    change of log p(next token) of every token of the vocabulary, if a latent is set to a value at a token
                 where it is active and nowhere else, the dictionary's error kept; the mean over such tokens. Partial
                 ablation subtracts its decoder row only until it is inactive. Beside it stands the direct effect
                 (lm.logit_effect), which leaves out what later layers make of it
    attribute    of one token after a prompt: each latent's gradient times its activation,

                     sum over t of  s[t] z_i[t] d_i . dlog p(token) / dy[t]       (s: the scale of a norm, else 1)

                 which is how much less likely the token would be without the latent, to first order; and of the
                 strongest ones the same without approximation, by a run with the latent at 0 at all positions

Special tokens have no code, as in the set. What later layers make of a change, and its effect on other latents of the
same place, are part of all of it but the direct effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import lm
from sae_jax.evaluation import run_on
from sae_jax.evaluation.prompts import Subject
from sae_jax.evaluation.study import Case
from sae_jax.saes.base import AbstractSae
from sae_jax.types import Code, UsageError, UserError

AT_ONCE = 8  # tokens, or sequences


@dataclass(frozen=True)
class Effect:
    """What setting a latent does to the next token."""

    n_tokens: int  # at which it was active and set
    change: np.ndarray  # f64[V], mean change of the log-probability, nats
    direct: np.ndarray | None  # f64[V], of the logits, per unit of the latent; None where no direct path starts

    def most(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The n tokens that gain most and those that lose most, i64[n] each."""
        order_V = np.argsort(-self.change, kind="stable")
        return order_V[:n], order_V[::-1][:n]


@dataclass(frozen=True)
class Share:
    """One latent's share in a token's log-probability, over all positions of the prompt."""

    latent: int
    attribution: float  # nats, to first order
    ablated: float  # nats by which the log-probability falls without the latent
    position: int  # where the attribution is strongest
    value: float  # of the latent there


@dataclass(frozen=True)
class Attribution:
    """Who made the model say a token."""

    token: int
    text: str  # of the token
    prompt: list[str]  # its tokens
    log_prob: float
    latents: list[Share]  # strongest first, for or against
    others: float  # attribution of all other latents together
    error: float  # attribution of what the dictionary does not reconstruct


def check_latent(subject: Subject, latent: int) -> None:
    """UsageError for a latent that does not exist."""
    if not 0 <= latent < (n_latents := subject.sae.b_enc.shape[0]):
        raise UsageError(f"latent {latent} does not exist; choose 0 to {n_latents - 1}")


def on_tokens(
    case: Case, latent: int, value: float | None = 0.0, n_sequences: int = 64, max_tokens: int = 256
) -> Effect:
    """What setting a latent does to the next token, where it is active in a text.

    Args:
        case: the dictionary in its model, and the text.
        latent: that is set.
        value: to which it is set, in the units of its values; 0 ablates it, None ablates it partially.
        n_sequences: of the text, that are searched for tokens where it is active.
        max_tokens: at which it is set, the first of them.

    Raises:
        UsageError: a latent that does not exist, a dictionary of several hooks, or partial ablation where one reads
            another place than it writes.
        UserError: it is active nowhere in these sequences.
    """
    check_latent(case.subject, latent)
    at = run_on.place(case.subject)
    if value is None and at.encoded != at.reconstructed:
        raise UsageError("partial ablation needs a dictionary that reads the place it writes; set the latent to 0")
    row_Y = np.asarray(at.sae.w_dec[latent], np.float32)
    total_V, n_tokens = np.zeros(at.model.spec.n_vocab), 0
    for block in case.blocks(n_sequences, AT_ONCE):
        clean = run_on.read(at.model, jnp.asarray(block.ids), at.encoded, at.reconstructed)
        x_NX = np.asarray(clean.x).reshape(-1, clean.x.shape[-1])
        code, scale_N1 = run_on.encode(at.sae, x_NX)
        value_N = _value(code, latent)
        token_N = np.flatnonzero((value_N > 0) & block.is_row.reshape(-1))[: max_tokens - n_tokens]
        if not len(token_N):
            continue
        if value is None:
            amount_N = -until_inactive(at.sae, x_NX[token_N], latent)
        else:
            scale_N = np.broadcast_to(np.asarray(scale_N1).reshape(-1), len(value_N))
            amount_N = (scale_N * (value - value_N))[token_N]
        for first in range(0, len(token_N), AT_ONCE):
            chosen_P, amount_P = (part[first : first + AT_ONCE] for part in (token_N, amount_N))
            # The last few are filled up, so that all share a program.
            filled_P, amount_P = (np.pad(part, (0, AT_ONCE - len(chosen_P))) for part in (chosen_P, amount_P))
            sequence_P, position_P = np.divmod(filled_P, block.ids.shape[1])
            change_PV = _changed(clean, sequence_P, position_P, amount_P[:, None].astype(np.float32) * row_Y)
            total_V += np.asarray(change_PV, np.float64)[: len(chosen_P)].sum(0)
        n_tokens += len(token_N)
        if n_tokens >= max_tokens:
            break
    if not n_tokens:
        n_sequences = min(n_sequences, len(case.text.sequences))
        raise UserError(f"latent {latent} is active nowhere in {n_sequences} sequences of {case.text.name}; use more")
    return Effect(n_tokens, total_V / n_tokens, _direct(at, row_Y))


def until_inactive(sae: AbstractSae, x_NX: np.ndarray, latent: int) -> np.ndarray:
    """How much of a latent's decoder row has to go until it is inactive, in units of the rows, f64[N].

    It may be less than the row's part of the reconstruction: of the k largest values one need only become smaller than
    the others. Found by bisection, to a millionth of that part; at most 2^6 times that part goes, and where the latent
    is active still, its own part alone.
    """
    row_X = np.asarray(sae.w_dec[latent], np.float64)

    def is_active(amount_N: np.ndarray) -> np.ndarray:
        rows_NX = x_NX - amount_N[:, None] * row_X
        return _value(sae.encode(rows_NX.astype(np.float32)), latent) > 0

    code, scale_N1 = run_on.encode(sae, x_NX)
    own_N = (_value(code, latent)[:, None] * np.asarray(scale_N1, np.float64)).sum(1)
    low_N, high_N = np.zeros(len(x_NX)), own_N.copy()
    for _ in range(6):
        high_N = np.where(is_active(high_N), 2 * high_N, high_N)
    cannot_N = is_active(high_N)
    for _ in range(26):
        middle_N = (low_N + high_N) / 2
        still_N = is_active(middle_N)
        low_N, high_N = np.where(still_N, middle_N, low_N), np.where(still_N, high_N, middle_N)
    return np.where(cannot_N, own_N, high_N)


def _value(code: Code, latent: int) -> np.ndarray:
    """Of a latent in each row, f32[N]."""
    return np.where(np.asarray(code.indices) == latent, np.asarray(code.values), 0.0).sum(1)


def attribute(subject: Subject, ids_T: np.ndarray, tokens: Sequence[int] = (), n: int = 10) -> list[Attribution]:
    """The latents that made the model say a token after a prompt.

    Args:
        subject: the dictionary in its model.
        ids_T: i32[T], the prompt.
        tokens: each is attributed; none: the likeliest one.
        n: latents to name, of the strongest attributions, for or against.

    Raises:
        UsageError: a dictionary of several hooks, or a model that torch runs.
        UserError: a token that the model does not have.
    """
    at = run_on.place(subject)
    lm.check_ids(np.asarray(tokens, np.int32), at.model.spec)
    prompt = _read_prompt(at, ids_T, subject.tokenizer.special_ids)
    log_p_V = np.asarray(_log_probs(prompt.site, prompt.last))
    texts = subject.tokenizer.tokens(ids_T)
    attributions = []
    for token in tokens or [int(log_p_V.argmax())]:
        (text,) = subject.tokenizer.tokens(np.array([token]))
        shares = _attribute(at, prompt, token, n)
        attributions.append(Attribution(token, text, texts, float(log_p_V[token]), *shares))
    return attributions


def token_id(subject: Subject, text: str) -> int:
    """The id of a token by its text. UsageError if that is none, or several."""
    ids = subject.tokenizer.encode([text])[0]
    if len(ids) != 1:
        parts = " ".join(map(repr, subject.tokenizer.tokens(np.asarray(ids))))
        raise UsageError(
            f"{text!r} is {len(ids)} tokens ({parts}); give one token, with the space before it if it has one"
        )
    return int(ids[0])


class _Prompt(NamedTuple):
    """A prompt, filled up to T tokens, with its code."""

    site: lm.ReplacedSite
    last: jax.Array  # i32[], the position that predicts
    latents: np.ndarray  # i32[T, K]
    values: np.ndarray  # f32[T, K], 0 where a token has no code
    amounts: np.ndarray  # f32[T, K], how much of each decoder row there is
    error: np.ndarray  # f32[T, Y], what is not reconstructed


def _read_prompt(at: run_on.Place, ids_T: np.ndarray, special_ids: Sequence[int]) -> _Prompt:
    n_tokens = len(ids_T)
    # Prompts of nearly one length share a program.
    n_filled = min(-(-n_tokens // 32) * 32, at.model.spec.n_context)
    ids_1T = np.pad(ids_T, (0, n_filled - n_tokens)).astype(np.int32)[None]
    site, x_TX = _read(at.model, ids_1T, at.encoded, at.reconstructed)
    code, scale_T1 = run_on.encode(at.sae, x_TX)
    has_code_T1 = (np.arange(n_filled) < n_tokens)[:, None] & ~np.isin(ids_1T[0], special_ids)[:, None]
    values_TK = np.where(has_code_T1, np.asarray(code.values), 0.0)
    error_TY = np.where(has_code_T1, np.asarray(site.rows) - np.asarray(at.sae(x_TX)), 0.0)
    last, amounts_TK = jnp.int32(n_tokens - 1), values_TK * np.asarray(scale_T1)
    return _Prompt(site, last, np.asarray(code.indices), values_TK, amounts_TK, error_TY)


def _attribute(at: run_on.Place, prompt: _Prompt, token: int, n: int) -> tuple[list[Share], float, float]:
    """The strongest latents, and the attribution of all others and of the error."""
    gradient_TY = np.asarray(_gradient(prompt.site, prompt.last, jnp.int32(token)))
    # A position at a time: the decoder rows of all would be many.
    along_TK = [np.asarray(at.sae.w_dec[k_K]) @ g_Y for k_K, g_Y in zip(prompt.latents, gradient_TY, strict=True)]
    share_TK, is_active_TK = prompt.amounts * np.stack(along_TK), prompt.values > 0
    latents_U, which = np.unique(prompt.latents[is_active_TK], return_inverse=True)
    total_U = np.bincount(which, share_TK[is_active_TK], minlength=len(latents_U))
    strongest = np.argsort(-np.abs(total_U), kind="stable")[:n]
    is_it_nTK = (prompt.latents == latents_U[strongest, None, None]) & is_active_TK
    amounts_nT, rows_nY = (prompt.amounts * is_it_nTK).sum(2), at.sae.w_dec[latents_U[strongest]]
    ablated_n = _ablated(prompt.site, prompt.last, jnp.int32(token), amounts_nT, rows_nY)
    shares = []
    for u, is_it_TK, ablated in zip(strongest, is_it_nTK, np.asarray(ablated_n), strict=True):
        t, k = np.unravel_index(np.argmax(np.where(is_it_TK, np.abs(share_TK), -1.0)), share_TK.shape)
        value = float(prompt.values[t, k])
        shares.append(Share(int(latents_U[u]), float(total_U[u]), float(ablated), int(t), value))
    others = float(total_U.sum() - total_U[strongest].sum())
    return shares, others, float((gradient_TY * prompt.error).sum())


def _direct(at: run_on.Place, row_Y: np.ndarray) -> np.ndarray | None:
    if at.reconstructed.point in lm.READ_BY_BLOCK:
        return None
    return np.asarray(lm.logit_effect(at.model, at.reconstructed, jnp.asarray(row_Y[None])), np.float64)[0]


@jax.jit
def _changed(clean: run_on.Clean, sequence_P: jax.Array, position_P: jax.Array, change_PY: jax.Array) -> jax.Array:
    """What a change does to the log-probabilities of the next token, f32[P, V]."""

    def of_one(token: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        sequence, position, change_Y = token
        logits_2V = run_on.logits_after(clean, sequence, position, jnp.stack([0 * change_Y, change_Y]), 1)[:, 0]
        before_V, after_V = jax.nn.log_softmax(logits_2V)
        return after_V - before_V

    return jax.lax.map(of_one, (sequence_P, position_P, change_PY))


@partial(jax.jit, static_argnames=("encoded", "reconstructed"))
def _read(
    model: lm.LanguageModel, ids_1T: jax.Array, encoded: lm.Hook, reconstructed: lm.Hook
) -> tuple[lm.ReplacedSite, jax.Array]:
    """The prompt as it is, and what is encoded of it, f32[T, X]."""
    x_1TX = lm.run(model, ids_1T, capture=(encoded,), logits=False).acts[encoded]
    site = lm.replaced_site(model, ids_1T, jnp.ones_like(ids_1T, bool), reconstructed, with_later=False)
    return site, x_1TX.reshape(ids_1T.shape[1], -1).astype(jnp.float32)


def _edited(site: lm.ReplacedSite, last: jax.Array, edit_TY: jax.Array) -> jax.Array:
    """Log-probabilities of the next token after an edit, f32[V]."""
    logits_1TV, _ = site.with_rows(site.rows + edit_TY)
    return jax.nn.log_softmax(logits_1TV[0, last])


@jax.jit
def _log_probs(site: lm.ReplacedSite, last: jax.Array) -> jax.Array:
    return _edited(site, last, jnp.zeros_like(site.rows))


@jax.jit
def _gradient(site: lm.ReplacedSite, last: jax.Array, token: jax.Array) -> jax.Array:
    """Of the token's log-probability with respect to the activations, f32[T, Y]."""
    return jax.grad(lambda edit_TY: _edited(site, last, edit_TY)[token])(jnp.zeros_like(site.rows))


@jax.jit
def _ablated(
    site: lm.ReplacedSite, last: jax.Array, token: jax.Array, amounts_nT: jax.Array, rows_nY: jax.Array
) -> jax.Array:
    """How far the token's log-probability falls without each latent, f32[n]."""

    def without(latent: tuple[jax.Array, jax.Array]) -> jax.Array:
        amount_T, row_Y = latent
        return _edited(site, last, -amount_T[:, None] * row_Y[None].astype(jnp.float32))[token]

    return _edited(site, last, jnp.zeros_like(site.rows))[token] - jax.lax.map(without, (amounts_nT, rows_nY))
