"""A dictionary in its language model, for texts that somebody gives: which latents are active, and what they separate.

    active       the strongest latents at each token of a text
    separating   the latents whose activity tells texts of one kind from texts of another

A text begins with the token that sequences of the dictionary's set begin with. Special tokens have no code, as in the
set.

`separating` takes for each text a latent's largest value. The latents are ranked by half of the texts (every other one)
and judged by the other half: among thousands of latents the best of few texts is best by luck. AUC is the share of
pairs, one text of each kind, in which the latent is stronger in the positive one, ties counted half; its interval is
method 5 of Newcombe 2006 (Statistics in Medicine 25, pages 559 to 573).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import jax
import numpy as np
import scipy.optimize
import scipy.stats

from sae_jax import lm, mesh
from sae_jax.activations.forward import Hooks, hook_of, read_hooks
from sae_jax.activations.store import ActivationSet
from sae_jax.evaluation.base import NORMAL_QUANTILE
from sae_jax.evaluation.text import load_model, say_or_refuse
from sae_jax.lm.chat import Message, first_template
from sae_jax.record import Record
from sae_jax.saes.base import AbstractSae
from sae_jax.types import UsageError, UserError

MIN_TEXTS = 4  # of each kind
MIN_ROOM = 32  # positions


@dataclass(frozen=True)
class Subject:
    """A dictionary, and the language model at whose hooks it stands."""

    sae: AbstractSae
    model: lm.LanguageModel | lm.TorchModel
    tokenizer: lm.Tokenizer
    encoded: Hooks
    reconstructed: Hooks
    first: int  # token that texts begin with

    def ids(self, text: str) -> np.ndarray:
        """The tokens of a text, i32[T]. UsageError if there are none, or more than the model has room for."""
        ids = np.array([self.first, *self.tokenizer.encode([text])[0]], np.int32)
        if len(ids) < 2:
            raise UsageError("the text is empty; give one of a token or more")
        if self.model.spec.n_context is not None and len(ids) > self.model.spec.n_context:
            raise UsageError(
                f"the text has {len(ids):,} tokens, and the model has room for {self.model.spec.n_context:,}; give a "
                f"shorter one"
            )
        return ids

    def chat_ids(self, messages: str | Sequence[Message]) -> np.ndarray:
        """The tokens of a conversation, or of a user's message, in the model's chat template, i32[T].

        They end where the assistant's next message begins.
        """
        template = first_template([self.model.reference])
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return np.array(template.encode(messages, self.tokenizer, by_message=False, answer=True)[0], np.int32)

    def filled(self, ids_T: np.ndarray) -> np.ndarray:
        """A text i32[T] with room after it, as a batch of one: texts of nearly one length share a program."""
        return np.pad(ids_T, (0, room(len(ids_T), self.model.spec.n_context) - len(ids_T)))[None]

    def codes(self, ids: Sequence[np.ndarray]) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        """(latents i32[T, K], values f32[T, K]) of each of these texts; values of special tokens are 0."""
        for ids_T in ids:
            acts, _ = read_hooks(self.model, self.filled(ids_T), self.encoded, "float32")
            code = self.sae.encode(np.concatenate([np.asarray(acts[str(hook)][0]) for hook in self.encoded], axis=-1))
            values_TK = np.asarray(code.values)[: len(ids_T)]
            is_special_T = np.isin(ids_T, self.tokenizer.special_ids)
            yield np.asarray(code.indices)[: len(ids_T)], np.where(is_special_T[:, None], 0.0, values_TK)


@dataclass(frozen=True)
class Separation:
    """How well a latent tells texts apart, on the texts that it was not chosen by."""

    latent: int
    auc: float
    interval: tuple[float, float]
    positive: float  # mean over texts of the largest value
    negative: float
    fires_in_positive: float  # share of texts
    fires_in_negative: float


def subject(
    sae: AbstractSae,
    record: Record,
    activations: ActivationSet | None,
    model: str | None = None,
    split: int = 1,
    another: Subject | None = None,
) -> Subject:
    """A dictionary in the language model that its record names, or in `model`; that of `another` if it is the same.

    UsageError for a dictionary of rows that come from no model or from several; UserError if model or tokenizer are not
    those that the set was made with, unless `model` is given.
    """
    sources = dict.fromkeys(record.encodes + record.reconstructs)
    models = {source.model for source in sources}
    if any(source.hook is None for source in sources) or models == {None}:
        raise UsageError("the dictionary names no language model and hook: its rows came from elsewhere")
    if len(models) > 1:
        raise UsageError("the dictionary is of several language models; give one of a single model")
    recorded = models.pop()
    assert recorded is not None
    reference = lm.moved(model, recorded)
    if another is not None and another.model.reference == reference:
        loaded: lm.LanguageModel | lm.TorchModel = another.model
    elif activations is None:
        loaded = lm.load(reference, "float32", recorded=True)
    else:
        loaded = load_model(activations, reference, split)
    if next(iter(sources)).model_digest not in (None, loaded.digest):
        say_or_refuse(f"the weights of {reference} are not those that the dictionary was trained on", model, "model")
    if split > 1 and isinstance(loaded, lm.LanguageModel):  # which is steered with the dictionary on its devices
        sae = jax.device_put(sae, mesh.everywhere(loaded.params["embed"]))
    tokenizer = lm.tokenizer(reference, loaded.spec.n_vocab, recorded=True)
    first = None if activations is None else activations.spec.first_token
    x, y = (
        tuple(hook_of(source.hook or "", loaded) for source in side) for side in (record.encodes, record.reconstructs)
    )
    return Subject(sae, loaded, tokenizer, x, y, tokenizer.separator_id if first is None else first)


def room(n: int, n_context: int | None) -> int:
    """The length to which a text of n tokens is filled up: at most four of them between n and 2 n, and no shorter."""
    step = max(MIN_ROOM, 1 << max((n - 1).bit_length() - 3, 0))
    return min(-(-n // step) * step, n_context or sys.maxsize)


def active(subject: Subject, text: str, n: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Tokens of a text, and the strongest latents at each, i32[T, n] and f32[T, n]; a value of 0 is none."""
    ids_T = subject.ids(text)
    ((latents_TK, values_TK),) = subject.codes([ids_T])
    order_TK = np.argsort(-values_TK, axis=1, kind="stable")[:, :n]
    latents_Tn, values_Tn = (np.take_along_axis(x, order_TK, 1) for x in (latents_TK, values_TK))
    return subject.tokenizer.tokens(ids_T), latents_Tn, values_Tn


def separating(subject: Subject, positive: Sequence[str], negative: Sequence[str], n: int) -> list[Separation]:
    """The n latents that are best at telling two kinds of texts apart, by the half of them that it was not chosen by.

    Those that are stronger in negative texts have an AUC below a half. UsageError for fewer than MIN_TEXTS of a kind.
    """
    for name, texts in (("positive", positive), ("negative", negative)):
        if len(texts) < MIN_TEXTS:
            raise UsageError(f"{len(texts)} {name} texts are too few; give at least {MIN_TEXTS}, one a line")
    strongest = [_strongest(subject, texts) for texts in (positive, negative)]
    latents_U = np.unique(np.concatenate([latents for side in strongest for latents, _ in side]))
    if not len(latents_U):
        raise UserError("no latent is active in any of these texts")
    positive_NU, negative_NU = (_dense(side, latents_U) for side in strongest)
    chosen_by = auc(positive_NU[::2], negative_NU[::2])
    separations = []
    for u in np.argsort(-np.abs(chosen_by - 0.5), kind="stable")[:n]:
        p, q = positive_NU[1::2, u], negative_NU[1::2, u]
        value = float(auc(p[:, None], q[:, None])[0])
        means = (float(p.mean()), float(q.mean()), float((p > 0).mean()), float((q > 0).mean()))
        separations.append(Separation(int(latents_U[u]), value, auc_interval(value, len(p), len(q)), *means))
    return separations


def auc(positive_NU: np.ndarray, negative_MU: np.ndarray) -> np.ndarray:
    """Of each column, the share of pairs in which the positive is larger, ties counted half: f64[U]."""
    n, m = len(positive_NU), len(negative_MU)
    rank_U = scipy.stats.rankdata(np.concatenate([positive_NU, negative_MU]), axis=0)[:n].sum(0)
    return (rank_U - n * (n + 1) / 2) / (n * m)


def auc_interval(value: float, n: int, m: int) -> tuple[float, float]:
    """The interval of 90 % of an AUC of n positive and m negative texts, which has a width at 0 and 1, too."""

    def excess(theta: float) -> float:
        """How far the value lies from theta, less what theta's standard error allows."""
        within = (n + m) / 2 - 1
        spread = 1 + within * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return abs(value - theta) - NORMAL_QUANTILE * math.sqrt(theta * (1 - theta) * spread / (n * m))

    def crossing(low: float, high: float) -> float:
        return cast(float, scipy.optimize.brentq(excess, low, high))

    tiny = 1e-9  # where theta is 0, 1 or the value itself, there is nothing to find
    low = crossing(tiny, value - tiny) if value > 3 * tiny and excess(tiny) > 0 else 0.0
    high = crossing(value + tiny, 1 - tiny) if value < 1 - 3 * tiny and excess(1 - tiny) > 0 else 1.0
    return low, high


def _strongest(subject: Subject, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(active latents, the largest value of each) of each text."""
    found = []
    for latents_TK, values_TK in subject.codes([subject.ids(text) for text in texts]):
        is_active_TK = values_TK > 0
        latents, which = np.unique(latents_TK[is_active_TK], return_inverse=True)
        largest = np.zeros(len(latents), np.float32)
        np.maximum.at(largest, which, values_TK[is_active_TK])
        found.append((latents, largest))
    return found


def _dense(found: Sequence[tuple[np.ndarray, np.ndarray]], latents_U: np.ndarray) -> np.ndarray:
    value_NU = np.zeros((len(found), len(latents_U)), np.float32)
    for row, (latents, values) in zip(value_NU, found, strict=True):
        row[np.searchsorted(latents_U, latents)] = values
    return value_NU
