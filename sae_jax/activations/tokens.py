"""Text to token sequences: what the language model reads when activations are harvested.

    packed      documents are joined, each after a separator token, into one stream that is cut into sequences
    document    each document is a sequence of its own: what does not fit is cut off, what is left over is padding

Sequence number n always holds the same tokens. Long documents are tokenised in parts, which gives the same tokens
(lm/tokenizer.py).

Padding is the separator token, after the document: positions before it do not see it, as attention is causal, and since
that token is special no row is made of it and no prediction from it or of it counts.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from sae_jax.activations.conversations import Conversations
from sae_jax.activations.fields import TEXT_FIELD, Fields
from sae_jax.activations.places import START, Place, Places, digest
from sae_jax.activations.text import Mark, named_documents
from sae_jax.lm import Tokenizer
from sae_jax.progress import console
from sae_jax.types import UsageError, UserError

# Of a tokeniser call, which works on its texts in parallel.
_BATCH_TEXTS = 64
_BATCH_CHARACTERS = 2**20
_LONG = 2**23  # characters that take a tokeniser seconds
_MARKS = 2  # kept of a text: a sequence begins in what was tokenised last, which is less than lies between two

OnRead = Callable[[str, int], None]
OnDocument = Callable[[int], None]


class _Part(NamedTuple):
    """Part of a document."""

    file: str
    text: str
    document: int  # its number
    number: int  # in the document
    whole: str  # the document


@dataclass(frozen=True)
class TokenText:
    """A text as sequences for the language models with one tokenizer."""

    reference: str  # see activations/text.py
    tokenizer: Tokenizer
    context: int  # tokens of a sequence
    fields: Fields = TEXT_FIELD  # of records that make a document
    files: Sequence[str] = ()  # that `text.scan` found to have documents; without them it is asked first
    chat: Conversations | None = None  # makes tokens of the documents of `fields` that are conversations
    # A token that every sequence begins with, before `context` - 1 of the text, as the authors of many models have it.
    # Where a document begins there in a packed text, its separator comes second.
    first: int | None = None
    seed: int | None = None  # of the order of documents; None: as they lie
    kind: Literal["packed", "document"] = "packed"  # see the head

    def sequences(
        self,
        start: int = 0,
        stop: int | None = None,
        on_read: OnRead = lambda file, n_bytes: None,
        on_document: OnDocument = lambda n_tokens: None,
        places: Places | None = None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids i32[context], bool[context]) of sequences `start` to `stop` - 1: which ids rows are made of.

        These are all tokens of a text but special ones, and of conversations those of one role. What is left over at
        the end of a packed text is dropped. There, skipping costs as much as reading: the text before `start` is
        tokenised and discarded, or what of it comes after a known place.

        Args:
            start: first sequence.
            stop: where to end; None: with the text.
            on_read: called with the file and the bytes of each part of it, once it has got into a sequence or is left
                over.
            on_document: called with the tokens of each document that is a sequence of its own, however many of them are
                in it.
            places: of a packed text: where to begin, and what notes where each shard begins.

        Raises:
            UsageError: for a context below 1 or a range that is none.
            UserError: as `named_documents` and Conversations.encode, if a whole packed text is shorter than one
                context, and if a known place is not in it.
        """
        if self.context < 1 + (self.first is not None):
            raise UsageError(f"context={self.context} is not a length; use {1 + (self.first is not None)} or more")
        if start < 0 or (stop is not None and stop < start):
            raise UsageError(f"sequences {start} to {stop} are no range; use 0 <= start <= stop")
        if stop == start:
            return
        special = np.asarray(self.tokenizer.special_ids, np.int32)
        is_packed = self.kind == "packed"
        if is_packed:
            found = self._packed(start, stop, on_read, places)
        else:
            found = self._one_by_one(start, stop, on_read, on_document)
        for ids_T, of_role_T in found:
            yield ids_T, of_role_T & ~np.isin(ids_T, special)

    def stacked(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """These sequences of a text that has some: ids i32[n, context], and bool[n, context]."""
        ids, marks = zip(*self.sequences(start, stop), strict=True)
        return np.stack(ids), np.stack(marks)

    def _packed(
        self, start: int, stop: int | None, on_read: OnRead, places: Places | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        head = np.array([] if self.first is None else [self.first], np.int32)
        width = self.context - len(head)  # tokens of the stream that a sequence has
        number, place = (0, START) if places is None else places.before(start)
        n_before = place.n_tokens  # of the first part, which are none of these sequences'
        rest, rest_marks = np.zeros(0, np.int32), np.zeros(0, bool)
        unread: deque[tuple[int, _Part]] = deque()  # (place of its first token in the stream, part)
        begun: tuple[int, _Part] | None = None  # the last part that a sequence has reached
        separator = np.array([self.tokenizer.separator_id], np.int32)
        marks_of_text = deque([] if place.mark is None else [place.mark], _MARKS)
        for parts in self._batches(place, on_read, marks_of_text.append):
            pieces, marks, end = [rest], [rest_marks], number * width + len(rest) - n_before
            for part, ids, of_role in parts:
                unread.append((end, part))
                has_its_own = self.chat is not None and ids[:1].tolist() == separator.tolist()  # from the chat template
                if part.number == 0 and not has_its_own:
                    ids, of_role = np.concatenate([separator, ids]), np.append(True, of_role)
                pieces.append(ids)
                marks.append(of_role)
                end += len(ids)
            stream, stream_marks = np.concatenate(pieces)[n_before:], np.concatenate(marks)[n_before:]
            n_before = 0
            n_whole = len(stream) // width
            for i in range(n_whole):
                if number + i == stop:
                    return
                if places is not None:
                    at = (number + i) * width
                    first, part = begun if begun and not (unread and unread[0][0] <= at) else unread[0]
                    places.note(number + i, partial(_place, part, at - first, marks_of_text))
                while unread and unread[0][0] < (number + i + 1) * width:
                    begun = _, part = unread.popleft()
                    on_read(part.file, len(part.text.encode()))
                if number + i >= start:
                    here = slice(i * width, (i + 1) * width)
                    # Copies: a view would keep the whole stream alive.
                    yield np.concatenate([head, stream[here]]), np.concatenate([head < 0, stream_marks[here]])
            number, rest, rest_marks = number + n_whole, stream[n_whole * width :], stream_marks[n_whole * width :]
        for _, part in unread:
            on_read(part.file, len(part.text.encode()))
        if number == 0:
            raise UserError(
                f"text {self.reference!r} has {len(rest)} tokens, less than one context of {self.context}; use more "
                f"text"
            )

    def _one_by_one(
        self, start: int, stop: int | None, on_read: OnRead, on_document: OnDocument
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        separator = self.tokenizer.separator_id
        head = np.array([separator if self.first is None else self.first], np.int32)
        pieces = itertools.chain.from_iterable(self._batches(Place(start, 0, 0, ""), on_read))
        for number, of_document in itertools.groupby(pieces, key=lambda piece: piece[0].document):
            if number == stop:
                return
            parts, ids, of_role = zip(*of_document, strict=True)
            for part in parts:
                on_read(part.file, len(part.text.encode()))
            ids, of_role = np.concatenate(ids), np.concatenate(of_role)
            if ids[:1].tolist() != head.tolist():  # a chat template may have written it
                ids, of_role = np.concatenate([head, ids]), np.append(False, of_role)
            on_document(len(ids))
            n_padding = max(self.context - len(ids), 0)
            yield (
                np.pad(ids[: self.context], (0, n_padding), constant_values=separator),
                np.pad(of_role[: self.context], (0, n_padding)),
            )

    def _batches(
        self, place: Place, on_read: OnRead, on_mark: Callable[[Mark], None] = lambda mark: None
    ) -> Iterator[list[tuple[_Part, np.ndarray, np.ndarray]]]:
        """(part, its ids, which of them rows are made of) from a place on, for one tokeniser call each."""
        batch, n_characters = [], 0
        for part in self._parts(place, on_read, on_mark):
            batch.append(part)
            n_characters += len(part.text)
            if len(batch) == _BATCH_TEXTS or n_characters >= _BATCH_CHARACTERS:
                yield list(self._encoded(batch))
                batch, n_characters = [], 0
        if batch:
            yield list(self._encoded(batch))

    def _parts(self, place: Place, on_read: OnRead, on_mark: Callable[[Mark], None]) -> Iterator[_Part]:
        documents = named_documents(self.reference, self.fields, self.files, self.seed, place.mark, on_mark)
        is_there = not place.xxh3_64
        for number, (file, document) in enumerate(documents, 0 if place.mark is None else place.mark.n_documents):
            if number < place.document:
                on_read(file, len(document.encode()))
                continue
            if not is_there and digest(document) != place.xxh3_64:
                break
            is_there = True
            parts = [document] if self.fields.is_chat else self.tokenizer.parts(document)
            for number_in_document, text in enumerate(parts):
                if (number, number_in_document) < (place.document, place.part):
                    on_read(file, len(text.encode()))
                    continue
                if len(text) > _LONG and not self.fields.is_chat:
                    console.print(
                        f"{file or self.reference}: {len(text):,} characters are tokenised at once, since this "
                        f"tokenizer does not part them at white space"
                    )
                yield _Part(file, text, number, number_in_document, document)
        if not is_there:
            raise UserError(
                f"text {self.reference!r} is another one than when this set was begun: its document {place.document} "
                f"has changed or is not there; harvest into another folder (of the hub name a dataset@revision)"
            )

    def _encoded(self, parts: list[_Part]) -> Iterator[tuple[_Part, np.ndarray, np.ndarray]]:
        if self.chat is None:
            for part, ids in zip(parts, self.tokenizer.encode([part.text for part in parts]), strict=True):
                yield part, np.asarray(ids, np.int32), np.ones(len(ids), bool)
            return
        for part in parts:
            try:
                yield part, *self.chat.encode(part.text)
            except UserError as error:
                raise UserError(f"{part.file}: {error}" if part.file else str(error)) from None


def _place(part: _Part, n_tokens: int, marks: Iterable[Mark]) -> Place:
    before = [mark for mark in marks if mark.n_documents <= part.document]
    return Place(part.document, part.number, n_tokens, digest(part.whole), before[-1] if before else None)


def sequences(
    reference: str, tokenizer: Tokenizer, context: int, start: int = 0, stop: int | None = None, **settings: Any
) -> Iterator[np.ndarray]:
    """The ids of TokenText.sequences; `settings` are other fields of TokenText."""
    return (ids_T for ids_T, _ in TokenText(reference, tokenizer, context, **settings).sequences(start, stop))
