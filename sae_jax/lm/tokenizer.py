"""Text to token ids and back, for any model folder with a Hugging Face tokenizer.

A folder with tokenizer.json is read by the `tokenizers` library alone: importing `transformers` takes
seconds.

What a call means does not depend on what was saved with the vocabulary: truncation, padding, post-processing and
dropout of merges are off. Which tokens are special is asked of every file that says so. Only this program puts special
tokens into a sequence: where a text has the characters of one, it gets the tokens of these characters.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from sae_jax import storage
from sae_jax.lm import gguf_file, trial
from sae_jax.lm.checkpoint import gguf_of
from sae_jax.lm.files import read_json
from sae_jax.lm.special import begins_with_bos, stated_in
from sae_jax.progress import say_once
from sae_jax.types import UserError

# How byte-level tokenizers spell bytes: printable Latin-1 as itself, the others in order from U+0100.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = tuple(byte for byte in range(256) if byte not in _PRINTABLE)
_BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(0x100 + i): b for i, b in enumerate(_OTHERS)}
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")  # how SentencePiece spells the bytes of what it has no piece for

PART = 2**18  # characters of a long text that are tokenised at a time
AROUND = 256  # characters on each side of a place that tell whether a text may be cut there
CUTS_TRIED = 64
FRAMES_TRIED = 4096
_WORD_END = re.compile(r"\S(?=\s)")

_ASSETS = Path(__file__).parents[1] / "assets"
# What is saved in tokenizer.json but belongs to one use of it, by the part of the file.
_OF_ONE_USE = {None: ("truncation", "padding", "post_processor"), "model": ("dropout", "alpha", "nbest_size")}


class Tokenizer:
    """A model's vocabulary: encodes documents, decodes ids, and knows the token between documents."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        bos_id: int | None,
        eos_id: int | None,
        special: Iterable[int] = (),
        digest: str = "",
        first_id: int | None = None,
    ) -> None:
        """Wrap `backend`; UserError without a beginning or end token to separate documents with.

        Args:
            backend: without truncation, padding and the like.
            bos_id: of the token at the beginning of a document.
            eos_id: of the token at its end.
            special: ids that stand for no text, beside those two and what the backend calls special.
            digest: what identifies how this tokenizer encodes, wherever it lies.
            first_id: of the token that the model's authors begin every sequence with, if they do.
        """
        separator_id = eos_id if bos_id is None else bos_id
        if separator_id is None:
            raise UserError("the tokenizer names no bos_token and no eos_token; add one to tokenizer_config.json")
        backend.encode_special_tokens = True  # the characters of one in a text are text
        self._backend = backend
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.separator_id: int = separator_id
        self.digest = digest
        self.first_id = first_id
        marked = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        named = {i for i in (bos_id, eos_id) if i is not None}
        self.special_ids: tuple[int, ...] = tuple(sorted({*special, *marked, *named}))  # what a harvest leaves out
        self._inside_markers = self._places_inside_markers()

    @property
    def size(self) -> int:
        """The largest id and one; there may be fewer tokens, and a model's embedding may have more rows."""
        return max(self.vocabulary.values()) + 1

    @property
    def n_used(self) -> int:
        """How many rows an embedding needs: the largest id that comes of a text or separates two, and one.

        Special tokens that were added to a vocabulary do not come of a text.
        """
        added = self._backend.get_added_tokens_decoder().keys() & {*self.special_ids}
        own = self._backend.get_vocab(with_added_tokens=False).values()
        return max({*self.vocabulary.values()} - (added - {*own}) | {self.separator_id}) + 1

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Id of every token: where these are equal, ids are the same text."""
        return self._backend.get_vocab()

    def parts(self, text: str) -> Iterator[str]:
        """A long text in parts of about PART characters whose ids, joined, are those of the whole.

        It is cut before white space, where words are told apart first and then tokenised one by one. A tokeniser that
        does not do so gets the text whole: what it makes of a part depends on all that stands around it.
        """
        begin = low = 0
        while (low := low + PART) + PART + AROUND <= len(text):
            if cut := self._cut(text, low):
                yield text[begin:cut]
                begin = low = cut
        yield text[begin:]

    def _cut(self, text: str, low: int) -> int | None:
        """The first place after `low` at which a text may be cut, if it is near."""
        if self._backend.pre_tokenizer is None:
            return None
        for match in itertools.islice(_WORD_END.finditer(text, low, low + PART), CUTS_TRIED):
            # A window around the place tells whether words end there, and whether a part begins with tokens of its own.
            begin, cut = max(low - AROUND, 0), match.end()
            window = text[begin : cut + AROUND]
            with _said_by_library("part this text"):
                normal = window if self._backend.normalizer is None else self._backend.normalizer.normalize_str(window)
                if normal != window:
                    continue
                ends = {end for _, (_, end) in self._backend.pre_tokenizer.pre_tokenize_str(window)}
            whole, before, after = self.encode([window, text[begin:cut], text[cut : cut + AROUND]])
            if cut - begin in ends and whole == before + after:
                return cut
        return None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without beginning or end tokens. UserError for one that cannot be spelled."""
        if self._inside_markers is None:
            return self._encode(texts)
        pieces = [self._inside_markers.split(text) for text in texts]
        ids = iter(self._encode([piece for of_text in pieces for piece in of_text]))
        return [[i for _ in of_text for i in next(ids)] for of_text in pieces]

    def encode_with_special(self, text: str, spans: Sequence[tuple[int, int, int]]) -> tuple[list[int], list[int]]:
        """Token ids of a text in which special tokens are written out, as a chat template does.

        Args:
            text: of template and messages.
            spans: (begin, end, number) of the messages in it, in order. Special tokens in these are text.

        Returns: the ids, and for each the number of the span that it has characters of, or -1.
        """
        owner = np.full(len(text) + 1, -1)
        for begin, end, number in spans:
            owner[begin:end] = number
        cuts = [0, *(place for begin, end, _ in spans for place in (begin, end)), len(text)]
        meant = {
            (begin + found.start(), begin + found.end())
            for begin, end in zip(cuts[::2], cuts[1::2], strict=True)
            for found in self._special_text.finditer(text[begin:end])
        }
        not_meant = [found.start() for found in self._special_text.finditer(text) if found.span() not in meant]
        ids: list[int] = []
        owners: list[int] = []

        def add(begin: int, end: int, as_text: bool) -> None:
            part = text[begin:end]
            for i, first, last in self._encode_inner(part, begin > 0) if as_text else self._encode_special(part):
                ids.append(i)
                owners.append(int(owner[begin + first : begin + last].max(initial=-1)))

        # What stands between two special tokens that are meant is text where it has the characters of others.
        at = 0
        ends = sorted(meant)
        for (_, begin), (end, _) in itertools.pairwise([(0, 0), *ends, (len(text), len(text))]):
            if any(begin <= place < end for place in not_meant):
                if at < begin:
                    add(at, begin, as_text=False)
                add(begin, end, as_text=True)
                at = end
        if at < len(text):
            add(at, len(text), as_text=False)
        return ids, owners

    def has_special(self, text: str) -> bool:
        """Whether a text has the characters of a special token."""
        return self._special_text.search(text) is not None

    def _encode_special(self, text: str) -> list[tuple[int, int, int]]:
        """(id, its first character, one after its last) of a text in which special tokens are what they look like."""
        with _said_by_library("encode this text"):
            encoded = self._with_special.encode(text, add_special_tokens=False)
        return [(i, *place) for i, place in zip(encoded.ids, encoded.offsets, strict=True)]

    def _encode_inner(self, text: str, goes_on: bool) -> list[tuple[int, int, int]]:
        """The same where none are; `goes_on`: something stands before it, so that no space is put there."""
        cuts = self._inside_markers.finditer(text) if self._inside_markers else ()
        places = [0, *(found.start() for found in cuts), len(text)]
        tokens = []
        for begin, end in itertools.pairwise(places):
            tokens += [
                (i, begin + a, begin + b) for i, a, b in self._encode_after(text[begin:end], goes_on or begin > 0)
            ]
        return tokens

    def _encode_after(self, text: str, goes_on: bool) -> list[tuple[int, int, int]]:
        with _said_by_library("encode this text"):
            line, after = (self._backend.encode(each, add_special_tokens=False) for each in ("\n", "\n" + text))
            n = len(line.ids)
            if (
                goes_on and after.ids[:n] == line.ids
            ):  # as `transformers` keeps SentencePiece from putting a space first
                return [(i, a - 1, b - 1) for i, (a, b) in zip(after.ids[n:], after.offsets[n:], strict=True)]
            encoded = self._backend.encode(text, add_special_tokens=False)
        return [(i, a, b) for i, (a, b) in zip(encoded.ids, encoded.offsets, strict=True)]

    @cached_property
    def _special_text(self) -> re.Pattern[str]:
        """Special tokens as a template writes them."""
        contents = sorted({self._backend.id_to_token(i) or "" for i in self.special_ids} - {""}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, contents)) or "(?!)")  # the longest first; (?!) is nowhere

    @cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        """The backend as it finds special tokens in a text."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = False
        known = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        others = [token for i in self.special_ids if i not in known and (token := backend.id_to_token(i))]
        backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in others])
        return backend

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        with _said_by_library("encode this text"):  # as for a word that it has no token for
            return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _places_inside_markers(self) -> re.Pattern[str] | None:
        """Where to cut a text so that the model's vocabulary does not find a special token in it.

        Unigram and whole-word vocabularies hold special tokens like any other piece; most others cannot spell them.
        """
        found = []
        for i in self.special_ids:
            with contextlib.suppress(UserError):
                token = self._backend.id_to_token(i)
                found += [token] if token and i in self._encode([token])[0] else []
        inside = [f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in found if len(token) > 1]
        return re.compile("|".join(inside)) if inside else None

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; a special token is written out, bytes that are no UTF-8 become U+FFFD."""
        with _said_by_library("decode these ids"):
            return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def tokens(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """What each id adds to the text of many; bytes that are no UTF-8 as the handler "surrogateescape" has them.

        An id without a token adds nothing.
        """
        texts = self._between([int(i) for i in ids])
        for place, i in enumerate(ids):
            if "\ufffd" not in texts[place]:
                continue
            stored = self._backend.id_to_token(int(i)) or ""
            if match := _BYTE_PIECE.fullmatch(stored):
                texts[place] = bytes([int(match[1], 16)]).decode("utf-8", "surrogateescape")
            elif all(character in _BYTE_OF for character in stored):
                data = bytes(_BYTE_OF[character] for character in stored)
                texts[place] = data.decode("utf-8", "surrogateescape")
        return texts

    def _between(self, ids: list[int]) -> list[str]:
        """The text of each id in the middle of a text: at its ends many decoders take spaces away."""
        if self._frame is None:
            return self._decode_each([[i] for i in ids])
        frame, before, after = self._frame
        texts = self._decode_each([[frame, i, frame] for i in ids])
        return [
            text[len(before) : len(text) - len(after)] if text.startswith(before) and text.endswith(after) else text
            for text in texts
        ]

    @cached_property
    def _frame(self) -> tuple[int, str, str] | None:
        """A token to decode others between, with its text at the beginning and at the end."""
        ids = sorted({*self.vocabulary.values()} - {*self.special_ids})[:FRAMES_TRIED]
        once, twice = (self._decode_each([[i] * n for i in ids]) for n in (1, 2))
        frames = [
            (i, alone, both[len(alone) :])
            for i, alone, both in zip(ids, once, twice, strict=True)
            if alone.isascii() and alone.isalpha() and both.startswith(alone) and both[len(alone) :].endswith(alone)
        ]
        return min(frames, key=lambda frame: frame[1] != frame[2], default=None)  # best one that reads alike at both

    def _decode_each(self, sequences: list[list[int]]) -> list[str]:
        with _said_by_library("decode these ids"):
            return self._backend.decode_batch(sequences, skip_special_tokens=False)


@contextlib.contextmanager
def _said_by_library(what: str) -> Iterator[None]:
    """What the library raises, as a UserError: bare Exceptions, and panics, which are none."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"the tokenizer cannot {what} ({storage.one_line(error)}); use another tokenizer") from error


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder; UserError if it has none that can be read."""
    if folder.is_file() and (folder.parent / "tokenizer.json").exists():
        folder = folder.parent  # beside a .gguf file
    stated = stated_in(folder)
    try:
        if (folder / "tokenizer.json").exists():
            state = read_json(folder / "tokenizer.json")
            backend, digest = _backend(state, stated.special, is_ours=folder.resolve().is_relative_to(_ASSETS))
        elif (path := gguf_of(folder)) is not None:
            state, bos, eos, special, begins = gguf_file.tokenizer(path)
            stated = stated._replace(bos=bos, eos=eos, special={*special}, begins=begins)
            backend, digest = _backend(state, stated.special)
        else:
            converted = trial.convert(folder)
            stated = stated._replace(
                bos=converted.bos, eos=converted.eos, special=stated.special | {*converted.special}
            )
            state = converted.state
            backend, digest = _backend(state, stated.special)
    except UserError as error:
        raise UserError(str(error).replace("its tokenizer.json", str(folder / "tokenizer.json"))) from None
    except Exception as error:
        # Both libraries raise bare Exceptions for a damaged or missing file.
        reason = str(error).partition("\n")[0]
        raise UserError(f"{folder} has no tokenizer that can be read: {reason}") from error
    if backend.get_vocab_size(with_added_tokens=False) == 0:  # what transformers makes of a folder without one
        raise UserError(f"{folder} has no tokenizer; copy the tokenizer.json of the model into it")
    special = {i for token in stated.special if (i := backend.token_to_id(token)) is not None}
    bos, eos = (None if token is None else backend.token_to_id(token) for token in (stated.bos, stated.eos))
    if bos is None and eos is None:
        bos, eos = stated.bos_id, stated.eos_id
    special |= {i for i in (bos, eos) if i is not None}
    in_config = {i for i in stated.ids if backend.id_to_token(i) is not None}
    first = bos if begins_with_bos(stated.begins, state, backend, bos) else None
    tokenizer = Tokenizer(backend, bos, eos, special | in_config, digest, first)
    marked = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    for i in sorted(in_config - special - marked):
        say_once(
            f"{folder}: token {i} ({backend.id_to_token(i)!r}) is special by config.json alone, and counts as special"
        )
    return tokenizer


def _backend(state: Mapping[str, Any], special: set[str], is_ours: bool = False) -> tuple[tokenizers.Tokenizer, str]:
    """The tokenizer that the content of a tokenizer.json describes, and its digest.

    Args:
        state: the content, of which what belongs to one use is left out.
        special: tokens that other files call special.
        is_ours: it came with the package, so that it need not be tried first.
    """
    plain = {**state, "model": {**state["model"]}}
    for part, names in _OF_ONE_USE.items():
        where = plain if part is None else plain[part]
        where.update({name: None for name in names if name in where})
    plain["added_tokens"] = [
        {**token, "special": bool(token.get("special")) or token["content"] in special}
        for token in plain.get("added_tokens") or ()
    ]
    text = json.dumps(plain, sort_keys=True)
    if not is_ours:
        trial.try_out(text)
    return tokenizers.Tokenizer.from_str(text), hashlib.sha256(text.encode()).hexdigest()
