"""Conversations as the tokens that a model's authors trained it on, with the message that each token comes from.

The chat template of a model (chat_template.jinja, "chat_template" in tokenizer_config.json, or that of its .gguf file)
writes the messages as
one text, special tokens included. The content of every message is marked with characters that no text has, to find out
what the text does not say:

    which characters are a message's  the template is rendered with marks and without; the two agree but for the marks
    which special tokens are meant    those that the template writes; where a message has the characters of one, they
                                      are text, as in any document (tokenizer.py)

A template is a program of strangers: it runs in Jinja's sandbox, without files, modules or the clock. One that asks for
today's date gets DATE, so that the tokens do not depend on the day.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from sae_jax import storage
from sae_jax.lm import gguf_file
from sae_jax.lm.checkpoint import gguf_of
from sae_jax.lm.files import read_json
from sae_jax.lm.model import locate
from sae_jax.lm.special import token_contents
from sae_jax.lm.tokenizer import Tokenizer
from sae_jax.types import UsageError, UserError

DATE = datetime.datetime(2024, 7, 26)  # the day that the template of Llama 3 writes where it knows no other
MAX_TEMPLATE_BYTES = 1 << 20
FILES = ["chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"]
# Before and after the number of a message, and after its content: code points that are assigned to no character.
_BEGIN, _NUMBERED, _END = "\ufdd0", "\ufdd1", "\ufdd2"
_MARKED = re.compile(f"{_BEGIN}([0-9]+){_NUMBERED}([^{_BEGIN}-{_END}]*){_END}")

Message = Mapping[str, str]  # {"role": ..., "content": ...}


class ChatTemplate:
    """Writes the conversations of one model."""

    def __init__(self, template: str, tokens: Mapping[str, str], name: str) -> None:
        """Args:
        template: in Jinja.
        tokens: what it may call bos_token and the like.
        name: of the model, for errors.

        Raises UserError for what is no template.
        """
        self.name, self._tokens = name, dict(tokens)
        self.digest = hashlib.sha256(json.dumps([template, self._tokens], sort_keys=True).encode()).hexdigest()
        try:
            self._template = _environment().from_string(template)
        except (jinja2.TemplateError, RecursionError) as error:
            raise UserError(
                f"the chat template of {name} cannot be read ({storage.one_line(error)}); get its files again"
            ) from None

    def encode(
        self, messages: Sequence[Message], tokenizer: Tokenizer, by_message: bool, answer: bool = False
    ) -> tuple[list[int], list[int]]:
        """Token ids of a conversation, and the number of the message that each has characters of; -1 for none.

        Args:
            messages: of the conversation.
            tokenizer: of the model.
            by_message: whether the numbers are needed. Without them, they may all be -1.
            answer: end where the assistant's next message begins.

        Raises UserError for a conversation that the template refuses, and for one of which it changes a message, so
        that it cannot be said which tokens are its.
        """
        text = self._render(messages, answer)
        marked = [{**message, "content": _mark(number, message["content"])} for number, message in enumerate(messages)]
        pieces = _MARKED.split(self._render(marked, answer))
        spans, at = [], 0
        if "".join(piece for i, piece in enumerate(pieces) if i % 3 != 1) != text:
            if by_message or any(tokenizer.has_special(message["content"]) for message in messages):
                raise UserError(
                    f"the chat template of {self.name} changes a message of {_told(messages)}, such as reasoning that "
                    f"it leaves out, so that it cannot be said whose tokens are whose; leave such conversations out"
                )
            return tokenizer.encode_with_special(text, [])
        for i, piece in enumerate(pieces):
            if i % 3 == 2:
                spans.append((at, at + len(piece), int(pieces[i - 1])))
            at += len(piece) if i % 3 != 1 else 0
        return tokenizer.encode_with_special(text, spans)

    def ends(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Special tokens that end an answer: the one that this template puts after it, and that which ends a text."""
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ends = set() if tokenizer.eos_id is None else {tokenizer.eos_id}
        with contextlib.suppress(UserError):  # of a template that changes what was said
            ids, owners = self.encode(said, tokenizer, by_message=True)
            last = max((at for at, owner in enumerate(owners) if owner == 1), default=len(ids))
            ends |= {*[i for i in ids[last + 1 :] if i in tokenizer.special_ids][:1]}
        return frozenset(ends)

    def _render(self, messages: Sequence[Message], answer: bool) -> str:
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=answer, **self._tokens
            )
        except Exception as error:  # whatever a template does to what it is given
            raise UserError(
                f"the chat template of {self.name} does not take {_told(messages)}: {storage.one_line(error)}; leave "
                f"such conversations out"
            ) from None


def read_template(reference: str) -> ChatTemplate | None:
    """The chat template of the model that `reference` names (as `resolve` made it); None if it has none.

    Raises UserError for one that cannot be read.
    """
    place = locate(reference, FILES, recorded=True)
    folder = place.parent if place.is_file() else place  # files beside a .gguf file come first
    stated: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            stated |= read_json(folder / name)
    template = _text_of(folder / "chat_template.jinja") or stated.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
        if template is None:
            raise UserError(
                f"{folder / 'tokenizer_config.json'} has chat templates named {', '.join(map(str, named))} and no "
                f"default; put the one to use into {folder / 'chat_template.jinja'}"
            )
    of_gguf: dict[str, str] = {}
    if template is None and (path := gguf_of(place)) is not None:
        template, of_gguf = gguf_file.chat_template(path)
    if template is None:
        return None
    if not isinstance(template, str):
        raise UserError(f"{folder / 'tokenizer_config.json'}: chat_template is no text; get the file again")
    contents = {key: token_contents(value) for key, value in stated.items() if key.endswith("_token")}
    tokens = {key: content[0] for key, content in contents.items() if content}
    return ChatTemplate(template, of_gguf | tokens, reference)


def first_template(references: Sequence[str]) -> ChatTemplate:
    """The chat template of the first of several models that has one. Raises UsageError if none has."""
    for reference in references:
        if template := read_template(reference):
            return template
    raise UsageError(
        f"{' and '.join(references)} {'have' if len(references) > 1 else 'has'} no chat template (chat_template.jinja, "
        f"chat_template in tokenizer_config.json, or that of a .gguf file), as base models have none; use an instruct "
        f"model, or leave out harvest.chat"
    )


def _text_of(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        return storage.read_limited(path, MAX_TEMPLATE_BYTES).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; get the file again") from None


def _mark(number: int, content: str) -> str:
    """The content with marks inside of the white space around it, which templates take away."""
    if not (core := content.strip()):
        return content
    before, after = content.split(core, 1)
    core = re.sub(f"[{_BEGIN}-{_END}]", "", core)
    return f"{before}{_BEGIN}{number}{_NUMBERED}{core}{_END}{after}"


def _told(messages: Sequence[Message]) -> str:
    """Which conversation it is, in words."""
    begin = " ".join(messages[0]["content"].split())[:40] if messages else ""
    return f"the conversation of {', '.join(message['role'] for message in messages[:4])} that begins {begin!r}"


def _environment() -> jinja2.Environment:
    """As `transformers` has it."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **settings)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    added: dict[str, Any] = {"raise_exception": refuse, "strftime_now": DATE.strftime}
    environment.globals.update(added)
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, with which some templates mark what the assistant says: what is in it as it stands."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
