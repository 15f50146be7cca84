"""What the judge is asked, and how its answers are read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from sae_jax.autointerp.fragments import LEVELS, Fragment, readable
from sae_jax.autointerp.judge import UselessError

VERSION = 1  # of these words; it stands in every label

LONGEST_EXPLANATION = 500  # characters
LONGEST_ANSWER = 2**17

_ABOUT = (
    "A language model has a feature, a number that it computes at every token of a text. The feature is active at some "
    f"tokens, with strengths from 1 to {LEVELS}, and 0 at all others."
)


def explanation(fragments: Sequence[Fragment], largest: float) -> str:
    """Asks what a latent stands for."""
    shown = "\n\n".join(f"Passage {i}:\n{_marked(f, largest)}" for i, f in enumerate(fragments, 1))
    return (
        f"{_ABOUT} In these passages a token at which it is active is written <<token>>(strength).\n\n{shown}\n\n"
        "What do the tokens have in common at which the feature is active? Look at the tokens and at what comes before "
        "them. Answer with one short phrase that says when the feature is active, and nothing else."
    )


def read_explanation(answer: str) -> str:
    """One line."""
    line = " ".join(_thought_out(answer).split())
    if line[:1] in ("'", '"') and line[:1] == line[-1:]:
        line = line[1:-1].strip()
    if not 0 < len(line) <= LONGEST_EXPLANATION:
        raise UselessError(f"an explanation of {len(line)} characters")
    return line


def simulation(said: str, fragments: Sequence[Fragment]) -> str:
    """Asks for the values of a latent, by its explanation."""
    listed = "\n\n".join(
        "\n".join([f"Passage {i}:", *(f"{t} {_quoted([token])}" for t, token in enumerate(f.tokens))])
        for i, f in enumerate(fragments, 1)
    )
    return (
        f"{_ABOUT} This is when it is active: {said}\n\nPredict its strength at every token of these passages, which "
        f"are given as numbered tokens.\n\n{listed}\n\nAnswer with one JSON object and nothing else. It has an entry "
        f"for each passage: the strengths from 1 to {LEVELS}, by the numbers of the tokens. Leave out tokens at which "
        'the strength is 0. Of three passages it may be {"1": {"4": 10, "5": 3}, "2": {}, "3": {"17": 8}}.'
    )


def read_simulation(answer: str, fragments: Sequence[Fragment]) -> list[np.ndarray]:
    """Predicted strengths f64[T] of each fragment."""
    said = _json(answer, "{", dict[str, dict[str, float]])
    predicted = [np.zeros(len(fragment.tokens)) for fragment in fragments]
    if said.keys() != {str(i) for i in range(1, len(fragments) + 1)}:
        raise UselessError(f"passages {', '.join(sorted(said))[:100] or 'none'} of {len(fragments)}")
    for i, strengths in said.items():
        values_T = predicted[int(i) - 1]
        for token, strength in strengths.items():
            if not (token.isdecimal() and len(token) < 10 and int(token) < len(values_T) and 0 <= strength <= LEVELS):
                raise UselessError(f"strength {strength} of token {token[:20]} of {len(values_T)}")
            values_T[int(token)] = strength
    return predicted


def detection(said: str, fragments: Sequence[Fragment]) -> str:
    """Asks in which fragments a latent fires, by its explanation."""
    listed = "\n\n".join(f"Passage {i}:\n{_quoted(f.tokens)}" for i, f in enumerate(fragments, 1))
    return (
        f"{_ABOUT} This is when it is active: {said}\n\nIn which of these passages is it active at one token or more? "
        f"It may be none of them, or all.\n\n{listed}\n\nAnswer with a JSON list of the numbers of these passages and "
        "nothing else, such as [1, 4] or []."
    )


def read_detection(answer: str, fragments: Sequence[Fragment]) -> np.ndarray:
    """bool[fragments]: in which it is said to fire."""
    said = _json(answer, "[", list[int])
    if strange := [i for i in said if not 1 <= i <= len(fragments)]:
        raise UselessError(f"passage {strange[0]} of {len(fragments)}")
    return np.isin(np.arange(1, len(fragments) + 1), said)


def _marked(fragment: Fragment, largest: float) -> str:
    levels = fragment.levels(largest)
    return readable(
        [f"<<{token}>>({n})" if n else token for token, n in zip(fragment.tokens, levels.tolist(), strict=True)]
    )


def _quoted(tokens: Sequence[str]) -> str:
    return json.dumps(readable(tokens), ensure_ascii=False)


def _thought_out(answer: str) -> str:
    """What comes after a model's thoughts, where it writes them down."""
    return answer.rpartition("</think>")[2].strip()


def _json(answer: str, opening: str, kind: Any) -> Any:
    """The first JSON value of this kind in an answer, whatever stands around it."""
    text = _thought_out(answer)
    at = text.find(opening)
    if at < 0 or len(text) > LONGEST_ANSWER:
        raise UselessError(f"no JSON: {text[:60]!r}")
    try:
        return msgspec.convert(json.JSONDecoder().raw_decode(text, at)[0], kind)
    except (ValueError, RecursionError) as error:  # msgspec's is a ValueError, too
        raise UselessError(f"JSON of another form: {' '.join(str(error).split())[:100]}") from None
