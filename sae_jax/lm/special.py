"""Special tokens: what the files beside tokenizer.json say of them, and how the authors begin a sequence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import tokenizers

from sae_jax import storage
from sae_jax.lm.files import read_json
from sae_jax.types import UserError


class _Special(msgspec.Struct):
    id: str


class _Piece(msgspec.Struct):
    """One piece of a template: a special token, or the text."""

    SpecialToken: _Special | None = None


class _PostProcessing(msgspec.Struct):
    """What of a saved post-processing says how a sequence begins."""

    single: list[_Piece] = []
    processors: list[_PostProcessing] = []


class Stated(NamedTuple):
    """What the files beside tokenizer.json say of special tokens: some name them, config.json gives ids."""

    special: set[str]
    bos: str | None
    eos: str | None
    ids: set[int]
    bos_id: int | None
    eos_id: int | None
    begins: bool | None  # whether every sequence begins with bos


def stated_in(folder: Path) -> Stated:
    """What the files of a model folder say."""
    named, numbered = (
        {key: value for name in names if (folder / name).exists() for key, value in read_json(folder / name).items()}
        for names in (
            ("special_tokens_map.json", "tokenizer_config.json"),
            ("generation_config.json", "config.json"),
        )
    )
    decoder = named.get("added_tokens_decoder")
    decoder = decoder if isinstance(decoder, dict) else {}
    marked = [token for token in decoder.values() if isinstance(token, dict) and token.get("special")]
    tokens = {key: token_contents(value) for key, value in named.items() if key.endswith(("_token", "_special_tokens"))}
    ids = {key: _ids(value) for key, value in numbered.items() if key.endswith("_token_id")}
    bos, eos = (next(iter(tokens.get(key, ())), None) for key in ("bos_token", "eos_token"))
    bos_id, eos_id = (next(iter(ids.get(key, ())), None) for key in ("bos_token_id", "eos_token_id"))
    special = {content for contents in (*tokens.values(), token_contents(marked)) for content in contents}
    begins = named.get("add_bos_token")
    every = {i for of_key in ids.values() for i in of_key}
    return Stated(special, bos, eos, every, bos_id, eos_id, begins if isinstance(begins, bool) else None)


def begins_with_bos(
    stated: bool | None, state: Mapping[str, Any], backend: tokenizers.Tokenizer, bos: int | None
) -> bool:
    """Whether the authors begin every sequence with bos: as a file says, or as the saved post-processing does."""
    if bos is None or stated is not None:
        return bool(stated and bos is not None)
    try:
        process = storage.as_type(state.get("post_processor"), _PostProcessing | None, "post_processor")
    except UserError:
        return False  # of another form, as are those that only mend offsets
    for part in () if process is None else process.processors or [process]:
        for piece in part.single[:1]:
            return piece.SpecialToken is not None and backend.token_to_id(piece.SpecialToken.id) == bos
    return False


def token_contents(value: Any) -> list[str]:
    """The tokens in "<s>", in {"content": "<s>", ...} as older files spell it, and in a list or dict of these."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [value["content"]] if "content" in value else list(value.values())
    return [content for part in value for content in token_contents(part)] if isinstance(value, list) else []


def _ids(value: Any) -> list[int]:
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int and 0 <= i < 2**31]
