"""What the pages of `explore` ask of the language model: the latents of a text, and text written with latents set."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import msgspec
import numpy as np

from sae_jax import lm
from sae_jax.evaluation import steering
from sae_jax.evaluation.prompts import Subject
from sae_jax.lm.chat import Message, first_template
from sae_jax.types import UsageError, UserError, check_indices

N_AT_TOKEN = 30  # strongest latents of a token that are told
N_RANKED = 100  # latents of a text that are told by each order: by largest value, by sum, by number of tokens
WARM_TOKENS = 128  # texts of up to so many are ready when the page opens
HOWS: tuple[steering.How, ...] = ("clamp", "add", "norm")


class TextRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A text to look at."""

    text: str
    latent: int | None = None  # whose values are told at every token


class Turn(msgspec.Struct, forbid_unknown_fields=True):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Steered(msgspec.Struct, forbid_unknown_fields=True):
    """A latent that is steered with."""

    latent: int
    value: float  # that it is set to, that is added, or its weight in the direction of "norm"


class SteerRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Text to write as the model does, and steered: after one prompt, or in two conversations."""

    latents: list[Steered]
    prompt: str | None = None
    unsteered: list[Turn] = []
    steered: list[Turn] = []
    how: steering.How = "clamp"
    norm: float = 1.0  # length of the edit of "norm", in norms of what it is added to
    n_tokens: int = 40
    temperature: float = 0.0
    seed: int = 0


class Explorer:
    """A dictionary in its language model, asked from one thread at a time."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._refusals = {how: _refusal(subject, how) for how in HOWS}
        self._hows = [how for how, refusal in self._refusals.items() if refusal is None]
        self._ends: frozenset[int] = frozenset()
        self._no_chat: str | None = None
        try:
            template = first_template([subject.model.reference])
            self._ends = template.ends(subject.tokenizer)
        except UserError:
            self._no_chat = f"{subject.model.reference} has no chat template, as base models have none"

    def about(self) -> dict[str, Any]:
        """What can be asked."""
        return {
            "model": self._subject.model.reference,
            "nContext": self._subject.model.spec.n_context,
            "hows": self._hows,
            "noSteering": None if self._hows else self._refusals["norm"],
            "noChat": self._no_chat,
        }

    def latents(self, asked: TextRequest) -> dict[str, Any]:
        """The latents of a text.

        Returns {"tokens": texts, "nActive": of each token; "atTokens": for each the strongest, [latent, value, latent,
        value, ...]; "ranked": the strongest over the text, [latent, largest value, sum, number of tokens]; "nRanked":
        how many are active in it; "values": of the latent that is asked for, at each token}. UserError for a text that
        is empty or too long, or a latent that does not exist.
        """
        subject = self._subject
        if asked.latent is not None:
            n_latents = subject.sae.w_dec.shape[0]
            check_indices(np.array([asked.latent]), n_latents, "latent", f"choose 0 to {n_latents - 1}")
        ids_T = subject.ids(asked.text)
        ((latents_TK, values_TK),) = subject.codes([ids_T])
        order_TK = np.argsort(-values_TK, axis=1, kind="stable")
        latents_TK, values_TK = (np.take_along_axis(x, order_TK, 1) for x in (latents_TK, values_TK))
        n_active_T = (values_TK > 0).sum(1)
        pairs_TK2 = np.empty((*latents_TK[:, :N_AT_TOKEN].shape, 2), object)
        pairs_TK2[..., 0], pairs_TK2[..., 1] = latents_TK[:, :N_AT_TOKEN], _short(values_TK[:, :N_AT_TOKEN])
        values_T = np.where(latents_TK == asked.latent, values_TK, 0).sum(1)
        return {
            "tokens": subject.tokenizer.tokens(ids_T),
            "nActive": n_active_T.tolist(),
            "atTokens": [pairs[:n].ravel().tolist() for pairs, n in zip(pairs_TK2, n_active_T, strict=True)],
            "ranked": _ranked(latents_TK, values_TK),
            "nRanked": len(np.unique(latents_TK[values_TK > 0])),
            "values": None if asked.latent is None else _short(values_T),
        }

    def sides(self, asked: SteerRequest) -> dict[str, Iterator[dict[str, Any]]]:
        """What is written by "unsteered" and by "steered", token by token: {"text": what is new}, at last {"end": why}.

        UserError for what cannot be asked; also later, from the iterators.
        """
        settings: dict[str, Any] = {"n_new": asked.n_tokens, "temperature": asked.temperature, "seed": asked.seed}
        if not 0 <= asked.seed < 2**32:
            raise UsageError(f"seed={asked.seed} must be at least 0 and below {2**32}")
        if (asked.prompt is None) == (not asked.unsteered or not asked.steered):
            raise UsageError("give a prompt, or messages of both sides")
        latents, values = [each.latent for each in asked.latents], [each.value for each in asked.latents]
        for value in (*values, asked.norm):
            if not math.isfinite(value) or abs(value) > float(np.finfo(np.float32).max):
                raise UsageError(f"strength {value:g} is too large; choose a smaller one")
        steering.check(self._subject, latents, asked.how)
        scale = asked.norm if asked.how == "norm" else 1.0
        unsteered, steered = (self._ids(asked.prompt, turns) for turns in (asked.unsteered, asked.steered))
        ends = self._ends if asked.prompt is None else frozenset()
        written = {
            "unsteered": (unsteered, steering.stream(self._subject, unsteered, **settings)),
            "steered": (
                steered,
                steering.stream(self._subject, steered, latents, values, scale, asked.how, **settings),
            ),
        }
        return {name: _texts(self._subject.tokenizer, ids, new, ends) for name, (ids, new) in written.items()}

    def warm_up(self) -> Iterator[str]:
        """Compile what is asked first, one program after the other; yields what is being compiled."""
        longest = min(WARM_TOKENS, self._subject.model.spec.n_context or WARM_TOKENS)
        for n_tokens in range(32, longest + 1, 32):
            yield f"texts of {n_tokens} tokens"
            list(self._subject.codes([np.zeros(n_tokens, np.int32)]))
        if self._hows:
            yield "steering"
            n_tokens = min(SteerRequest([]).n_tokens, longest - 2)
            asked = SteerRequest([Steered(0, 1.0)], prompt="a", how=self._hows[0], n_tokens=n_tokens)
            for written in self.sides(asked).values():
                next(written)
                next(written, None)

    def _ids(self, prompt: str | None, turns: list[Turn]) -> np.ndarray:
        if prompt is not None:
            return self._subject.ids(prompt)
        messages: list[Message] = [{"role": turn.role, "content": turn.content} for turn in turns]
        return self._subject.chat_ids(messages)


def _refusal(subject: Subject, how: steering.How) -> str | None:
    try:
        steering.check(subject, [0], how)
    except UsageError as error:
        return str(error)
    return None


def _ranked(latents_TK: np.ndarray, values_TK: np.ndarray) -> list[list[Any]]:
    """See `Explorer.latents`."""
    is_active_TK = values_TK > 0
    value = values_TK[is_active_TK]
    latents_U, which, count_U = np.unique(latents_TK[is_active_TK], return_inverse=True, return_counts=True)
    largest_U, sum_U = np.zeros(len(latents_U), np.float32), np.bincount(which, value, len(latents_U))
    np.maximum.at(largest_U, which, value)
    orders = [np.argsort(-by_U, kind="stable")[:N_RANKED] for by_U in (largest_U, sum_U, count_U)]
    first = np.unique(np.concatenate(orders))
    columns = (latents_U[first].tolist(), _short(largest_U[first]), _short(sum_U[first]), count_U[first].tolist())
    return [list(row) for row in zip(*columns, strict=True)]


def _short(values: np.ndarray) -> list[Any]:
    """Numbers of five digits, which is more than a page shows."""
    size = np.floor(np.log10(values, where=values > 0, out=np.zeros(values.shape)))
    scale = 10.0 ** (4 - size)
    return (np.round(values * scale) / scale).tolist()


def _texts(
    tokenizer: lm.Tokenizer, prompt_T: np.ndarray, new: Iterator[int], ends: frozenset[int]
) -> Iterator[dict[str, Any]]:
    """What each new token adds to the text. A character of several tokens comes with its last one."""
    tail = prompt_T[-1:].tolist()  # after which a decoder keeps the space that it takes from a beginning
    said = len(tokenizer.decode(tail))
    ids: list[int] = []
    text = ""
    for each in new:
        if each in ends:
            yield {"end": "the answer ends", "text": text[said:]}
            return
        ids.append(each)
        text = tokenizer.decode([*tail, *ids])
        whole = text.rstrip("\ufffd")
        yield {"text": whole[said:]}
        said = max(said, len(whole))
    yield {"end": f"{len(ids)} tokens", "text": text[said:]}
