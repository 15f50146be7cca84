"""Text to token ids and back, for any model folder with a Hugging Face tokenizer.

A folder with tokenizer.json is read by the `tokenizers` library alone: importing `transformers` takes
seconds.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from sae_jax.types import UserError

# How byte-level tokenizers spell bytes: printable Latin-1 as itself, the others in order from U+0100.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = tuple(byte for byte in range(256) if byte not in _PRINTABLE)
_BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(0x100 + i): b for i, b in enumerate(_OTHERS)}


PART = 2**18  # characters of a long text that are tokenised at a time
AROUND = 256  # characters on each side of a place that tell whether a text may be cut there
CUTS_TRIED = 64
_WORD_END = re.compile(r"\S(?=\s)")


class Tokenizer:
    """A model's vocabulary: encodes documents, decodes ids, and knows the token between documents."""

    def __init__(self, backend: tokenizers.Tokenizer, bos_id: int | None, eos_id: int | None) -> None:
        """Wrap `backend`; UserError without a beginning or end token to separate documents with."""
        separator_id = eos_id if bos_id is None else bos_id
        if separator_id is None:
            raise UserError("the tokenizer names no bos_token and no eos_token; add one to tokenizer_config.json")
        self._backend = backend
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.separator_id: int = separator_id

    @property
    def size(self) -> int:
        """Number of tokens; a model's embedding may have more rows, as padding."""
        return self._backend.get_vocab_size()

    @property
    def vocabulary(self) -> dict[str, int]:
        """Id of every token: where these are equal, ids are the same text."""
        return self._backend.get_vocab()

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids that stand for no text: what a harvest may leave out."""
        return tuple(sorted(i for i, token in self._backend.get_added_tokens_decoder().items() if token.special))

    def parts(self, text: str) -> Iterator[str]:
        """A long text in parts of about PART characters whose ids, joined, are those of the whole.

        It is cut before white space, where words are told apart first and then tokenised one by one. A tokeniser that
        does not do so gets the text whole: what it makes of a part depends on all that stands around it.
        """
        begin = 0
        while (low := begin + PART) + PART <= len(text) and (cut := self._cut(text, low)):
            yield text[begin:cut]
            begin = cut
        yield text[begin:]

    def _cut(self, text: str, low: int) -> int | None:
        """The first place after `low` at which a text may be cut, if it is near."""
        if self._backend.pre_tokenizer is None:
            return None
        for match in itertools.islice(_WORD_END.finditer(text, low, low + PART), CUTS_TRIED):
            # A window around the place tells whether words end there, and whether a part begins with tokens of its own.
            begin, cut = max(low - AROUND, 0), match.end()
            window = text[begin : cut + AROUND]
            normal = window if self._backend.normalizer is None else self._backend.normalizer.normalize_str(window)
            if normal != window:
                continue
            ends = {end for _, (_, end) in self._backend.pre_tokenizer.pre_tokenize_str(window)}
            whole, before, after = self.encode([window, text[begin:cut], text[cut : cut + AROUND]])
            if cut - begin in ends and whole == before + after:
                return cut
        return None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without beginning or end tokens."""
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; a special token is written out, bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def tokens(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The text of each id by itself; bytes that are no UTF-8 as the error handler "surrogateescape" has them."""
        texts = self._backend.decode_batch([[int(i)] for i in ids], skip_special_tokens=False)
        for place, i in enumerate(ids):
            stored = self._backend.id_to_token(int(i)) or ""
            if "\ufffd" in texts[place] and all(character in _BYTE_OF for character in stored):
                data = bytes(_BYTE_OF[character] for character in stored)
                texts[place] = data.decode("utf-8", "surrogateescape")
        return texts


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder; UserError if it has none that can be read."""
    path = folder / "tokenizer.json"
    try:
        if path.exists():
            backend = tokenizers.Tokenizer.from_file(str(path))
            bos, eos = _special_tokens(folder)
        else:
            from transformers import AutoTokenizer

            loaded: Any = AutoTokenizer.from_pretrained(folder)
            backend, bos, eos = loaded.backend_tokenizer, loaded.bos_token, loaded.eos_token
    except Exception as error:
        # Both libraries raise bare Exceptions for a damaged or missing file.
        reason = str(error).partition("\n")[0]
        raise UserError(f"{folder} has no tokenizer that can be read: {reason}") from error
    if backend.get_vocab_size(with_added_tokens=False) == 0:  # what transformers makes of a folder without one
        raise UserError(f"{folder} has no tokenizer; copy the tokenizer.json of the model into it")
    bos_id, eos_id = (None if token is None else backend.token_to_id(token) for token in (bos, eos))
    return Tokenizer(backend, bos_id, eos_id)


def _special_tokens(folder: Path) -> list[str | None]:
    stated = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            stated.update(json.loads((folder / name).read_text(encoding="utf-8")))
    # Older files spell a token as {"content": "<s>", ...}.
    return [
        token["content"] if isinstance(token, dict) else token
        for token in (stated.get("bos_token"), stated.get("eos_token"))
    ]
