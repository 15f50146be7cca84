"""Text to packed token sequences: what the language model reads when activations are harvested.

Documents are joined, each after a separator token, into one stream that is cut into sequences of equal length, so that
sequence number n always holds the same tokens. Long documents are tokenised in parts, which gives the same tokens
(lm/tokenizer.py), so that a few thousand tokens of a large file take no longer than they must.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from sae_jax.activations.conversations import Conversations
from sae_jax.activations.fields import TEXT_FIELD, Fields
from sae_jax.activations.text import named_documents
from sae_jax.lm import Tokenizer
from sae_jax.progress import console
from sae_jax.types import UsageError, UserError

# Of a tokeniser call, which works on its texts in parallel.
_BATCH_TEXTS = 64
_BATCH_CHARACTERS = 2**20
_LONG = 2**23  # characters that take a tokeniser seconds

OnRead = Callable[[str, int], None]


class Encoder(Protocol):
    """What `sequences` needs of a tokeniser."""

    @property
    def separator_id(self) -> int:
        """The token that goes before each document."""
        ...

    def parts(self, text: str) -> Iterable[str]:
        """A text in parts whose token ids, joined, are those of the whole."""
        ...

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        ...


class _Part(NamedTuple):
    """Part of a document."""

    file: str
    text: str
    is_first: bool


@dataclass(frozen=True)
class PackedText:
    """A text as sequences for the language models with one tokenizer, as `marked_sequences`."""

    reference: str
    tokenizer: Tokenizer
    context: int
    fields: Fields = TEXT_FIELD
    files: Sequence[str] = ()
    chat: Conversations | None = None
    first: int | None = None
    seed: int | None = None  # of the order of documents; None: as they lie

    def sequences(
        self, start: int = 0, stop: int | None = None, on_read: OnRead = lambda file, n_bytes: None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids i32[context], bool[context]: which are text that rows are made of, and no special tokens)."""
        special, text = np.asarray(self.tokenizer.special_ids, np.int32), (self.reference, self.tokenizer, self.context)
        reading = (self.fields, self.files, on_read, self.chat, self.first, self.seed)
        for ids_T, of_role_T in marked_sequences(*text, start, stop, *reading):
            yield ids_T, of_role_T & ~np.isin(ids_T, special)

    def stacked(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """These sequences of a text that has some: ids i32[n, context], and bool[n, context]."""
        ids, marks = zip(*self.sequences(start, stop), strict=True)
        return np.stack(ids), np.stack(marks)


def sequences(reference: str, tokenizer: Encoder, context: int, *args: Any, **settings: Any) -> Iterator[np.ndarray]:
    """The ids of `marked_sequences`."""
    return (ids_T for ids_T, _ in marked_sequences(reference, tokenizer, context, *args, **settings))


def marked_sequences(
    reference: str,
    tokenizer: Encoder,
    context: int,
    start: int = 0,
    stop: int | None = None,
    fields: Fields = TEXT_FIELD,
    files: Sequence[str] = (),
    on_read: OnRead = lambda file, n_bytes: None,
    chat: Conversations | None = None,
    first: int | None = None,
    seed: int | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Sequences `start` to `stop` - 1 of a text: ids i32[context], and bool[context], the tokens that rows are made of.

    These are all tokens of a text, and of conversations those of one role. What is left over at the end is dropped.

    Skipping costs as much as reading: the text before `start` is tokenised and discarded.

    Args:
        reference: of the text (activations/text.py).
        tokenizer: of the model.
        context: tokens of a sequence.
        start: first sequence.
        stop: where to end; None: with the text.
        fields: of records that make a document.
        files: that `text.scan` found to have documents; without them it is asked first.
        on_read: called with the file and the bytes of each part of it, once it has got into a sequence or is left over.
        chat: makes tokens of the documents of `fields` that are conversations.
        first: a token that every sequence begins with, before `context` - 1 of the text, as the authors of many models
            have it. Where a document begins there, its separator comes second.
        seed: of the order of documents; None: as they lie.

    Raises:
        UsageError: for a context below 1 or a range that is none.
        UserError: as `named_documents` and Conversations.encode, and if the whole text is shorter than one context.
    """
    if context < 1 + (first is not None):
        raise UsageError(f"context={context} is not a length; use {1 + (first is not None)} or more")
    if start < 0 or (stop is not None and stop < start):
        raise UsageError(f"sequences {start} to {stop} are no range; use 0 <= start <= stop")
    if stop == start:
        return
    head = np.array([] if first is None else [first], np.int32)
    width = context - len(head)  # tokens of the stream that a sequence has
    number, rest, rest_marks = 0, np.zeros(0, np.int32), np.zeros(0, bool)
    unread: deque[tuple[int, _Part]] = deque()  # (place of its first token in the stream, part)
    separator = np.array([tokenizer.separator_id], np.int32)
    for parts in _batches(_parts(named_documents(reference, fields, files, seed), fields, reference, tokenizer)):
        pieces, marks, end = [rest], [rest_marks], number * width + len(rest)
        for part, (ids, of_role) in zip(parts, _encoded(parts, tokenizer, chat), strict=True):
            unread.append((end, part))
            has_its_own = chat is not None and ids[:1].tolist() == [tokenizer.separator_id]  # from the chat template
            if part.is_first and not has_its_own:
                ids, of_role = np.concatenate([separator, ids]), np.append(True, of_role)
            pieces.append(ids)
            marks.append(of_role)
            end += len(ids)
        stream, stream_marks = np.concatenate(pieces), np.concatenate(marks)
        n_whole = len(stream) // width
        for i in range(n_whole):
            if number + i == stop:
                return
            while unread and unread[0][0] < (number + i + 1) * width:
                _, part = unread.popleft()
                on_read(part.file, len(part.text.encode()))
            if number + i >= start:
                here = slice(i * width, (i + 1) * width)
                # Copies: a view would keep the whole stream alive.
                yield np.concatenate([head, stream[here]]), np.concatenate([head < 0, stream_marks[here]])
        number, rest, rest_marks = number + n_whole, stream[n_whole * width :], stream_marks[n_whole * width :]
    for _, part in unread:
        on_read(part.file, len(part.text.encode()))
    if number == 0:
        raise UserError(f"text {reference!r} has {len(rest)} tokens, less than one context of {context}; use more text")


def _encoded(
    parts: list[_Part], tokenizer: Encoder, chat: Conversations | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, which of them rows are made of) of each part."""
    if chat is None:
        for ids in tokenizer.encode([part.text for part in parts]):
            yield np.asarray(ids, np.int32), np.ones(len(ids), bool)
        return
    for part in parts:
        try:
            yield chat.encode(part.text)
        except UserError as error:
            raise UserError(f"{part.file}: {error}" if part.file else str(error)) from None


def _parts(documents: Iterable[tuple[str, str]], fields: Fields, reference: str, tokenizer: Encoder) -> Iterator[_Part]:
    for file, document in documents:
        if fields.is_chat:
            yield _Part(file, document, True)
            continue
        for number, text in enumerate(tokenizer.parts(document)):
            if len(text) > _LONG:
                console.print(
                    f"{file or reference}: {len(text):,} characters are tokenised at once, since this tokenizer does "
                    f"not part them at white space"
                )
            yield _Part(file, text, number == 0)


def _batches(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    """Parts for one tokeniser call."""
    batch, n_characters = [], 0
    for part in parts:
        batch.append(part)
        n_characters += len(part.text)
        if len(batch) == _BATCH_TEXTS or n_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch
