"""What of a record is the document: of a JSON object, of a row of a table or of a hub dataset."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sae_jax.activations import conversations
from sae_jax.activations.blocks import UnreadableError
from sae_jax.types import UsageError

COLUMN = "text"  # of JSON records, tables and hub datasets, unless another one is asked for


@dataclass(frozen=True)
class Fields:
    """A field, or a template over several. A field that is null is an empty one."""

    column: str = COLUMN
    template: str | None = None  # as "{title}\n{text}"; then `column` has no use
    is_chat: bool = False  # whether the field is a conversation, a list of messages

    def __post_init__(self) -> None:
        if self.template is not None and not self.names:
            raise UsageError(f"harvest.text_template={self.template!r} names no field; write one, as in {{text}}")

    @cached_property
    def _pieces(self) -> list[tuple[str, str | None]]:
        """What stands before each field of the template, and the field; None at the end."""
        if self.template is None:
            return [("", self.column)]
        try:
            parsed = list(string.Formatter().parse(self.template))
        except ValueError:
            parsed = [("", "", None, None)]
        if any(name == "" or spec or conversion for _, name, spec, conversion in parsed):
            raise UsageError(
                f"harvest.text_template={self.template!r}: write the name of a field alone in braces, as in {{text}}, "
                f"and {{{{ and }}}} for braces"
            )
        return [(literal, name) for literal, name, _, _ in parsed]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The fields that a record has to have."""
        return tuple(dict.fromkeys(name for _, name in self._pieces if name is not None))

    @property
    def what(self) -> str:
        """What a record has to have, in words."""
        return f"a {self.kind} {' and '.join(map(quoted, self.names))}"

    @property
    def kind(self) -> str:
        """What such a field holds, in words."""
        return "list of messages" if self.is_chat else "string"

    def document(self, record: Any, place: str) -> str:
        """The text of a record, which lies at `place`. Raises UnreadableError for one without."""
        if not isinstance(record, Mapping):
            raise UnreadableError(place, "is not a JSON object", f"every record has to be one, with {self.what}")
        for name in self.names:
            if name not in record or not (record[name] is None or self._suits(record[name])):
                held = f" (it holds {type(record[name]).__name__})" if name in record else ""
                there = [each for each, value in record.items() if self._suits(value)]
                raise UnreadableError(place, f"has no {self.kind} {quoted(name)}{held}", self.cure(there))
        if not any(record[name] for name in self.names):
            return ""
        if self.is_chat:
            text = conversations.as_document(record[self.column], place)
        else:
            text = "".join(literal + ((name and record[name]) or "") for literal, name in self._pieces)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            escape = f"\\u{ord(text[error.start]):04x}"
            raise UnreadableError(
                place, f"has {escape}, half of a surrogate pair, which is no text", "remove it"
            ) from None
        return text

    def _suits(self, value: Any) -> bool:
        return isinstance(value, list if self.is_chat else str)

    def cure(self, suitable: Sequence[str]) -> str:
        """What to do about a field that is missing; `suitable`: the fields that could be meant."""
        setting = "harvest.text_column" if self.template is None else "harvest.text_template"
        return f"it has {', '.join(suitable) or f'no {self.kind}'}; choose one with {setting}"


def quoted(name: str) -> str:
    """A name in double quotes, as JSON has it."""
    return f'"{name}"'


TEXT_FIELD = Fields()
