"""Conversations: lists of messages with a role each, as documents, and which of their tokens a set has rows of.

A conversation goes through the text pipeline as JSON, [{"role": ..., "content": ...}, ...], which is what its digest is
of. The chat template of the model makes tokens of it (lm/chat.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_jax.activations.blocks import UnreadableError
from sae_jax.progress import say_once
from sae_jax.types import check_indices

if TYPE_CHECKING:
    from sae_jax.lm import Tokenizer
    from sae_jax.lm.chat import ChatTemplate

ALL = "all"  # the rows of all tokens
_KEYS = ("role", "content")


def as_document(messages: list[Any], place: str) -> str:
    """A conversation as JSON; "" for one in which nobody says anything. Raises UnreadableError for what is none."""
    plain = []
    for number, message in enumerate(messages):
        stated = (
            {key: value for key, value in message.items() if value is not None} if isinstance(message, Mapping) else {}
        )
        content = stated.get("content", "")
        if not isinstance(stated.get("role"), str) or not isinstance(content, str):
            has = f" (it has {', '.join(map(str, stated))})" if stated else ""
            raise UnreadableError(
                place, f'message {number} has no string "role" and "content"{has}', "write messages with these two"
            )
        plain.append({"role": stated["role"], "content": content})
        if others := sorted(map(str, stated.keys() - {*_KEYS})):
            say_once(f"messages also have {', '.join(others)}; the chat template is not given these")
    return json.dumps(plain, ensure_ascii=False) if any(message["content"] for message in plain) else ""


def roles_of(document: str) -> set[str]:
    """The roles in a conversation."""
    return {message["role"] for message in json.loads(document)}


class Conversations:
    """The tokens of conversations, and those of one role."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, role: str, n_vocab: int) -> None:
        """Args:
        template: of the model.
        tokenizer: of the model.
        role: the one whose messages a set has rows of, or ALL.
        n_vocab: rows of the model's embedding.
        """
        self.template, self._tokenizer, self._role, self._n_vocab = template, tokenizer, role, n_vocab

    def encode(self, document: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids i32[n] of a conversation, and bool[n]: those of the role. Errors as ChatTemplate.encode.

        UserError too for a token that the model has no row for.
        """
        messages = json.loads(document)
        ids, numbers = self.template.encode(messages, self._tokenizer, by_message=self._role != ALL)
        cure = f"the embedding has {self._n_vocab} rows; use the tokenizer and template that the model was trained with"
        check_indices(ids, self._n_vocab, f"the chat template of {self.template.name} writes token id", cure)
        # The last is that of what is no message's.
        of_role = np.array([self._role in (message["role"], ALL) for message in messages] + [self._role == ALL])
        return np.asarray(ids, np.int32), of_role[np.asarray(numbers, np.int64)]
