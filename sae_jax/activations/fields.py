"""Which field of a record is the document: of a JSON object, of a row of a table or of a hub dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sae_jax.activations.blocks import UnreadableError

COLUMN = "text"  # of JSON records, tables and hub datasets, unless another one is asked for


@dataclass(frozen=True)
class Fields:
    """The field that holds the text. One that is null holds none, as an empty one."""

    column: str = COLUMN

    @property
    def names(self) -> tuple[str, ...]:
        """The fields that a record has to have."""
        return (self.column,)

    @property
    def what(self) -> str:
        """What a record has to have, in words."""
        return f'a string "{self.column}"'

    @property
    def setting(self) -> str:
        """What the user names them with."""
        return "harvest.text_column"

    def document(self, record: Any, place: str) -> str:
        """The text of a record, which lies at `place`. Raises UnreadableError for one without."""
        if not isinstance(record, Mapping):
            raise UnreadableError(place, "is not a JSON object", f"every record has to be one, with {self.what}")
        values = [record.get(name) for name in self.names]
        for name, value in zip(self.names, values, strict=True):
            if name not in record or not isinstance(value, str | None):
                held = f" (it holds {type(value).__name__})" if name in record else ""
                raise UnreadableError(place, f'has no string "{name}"{held}', self.cure(record))
        text = values[0] or ""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            escape = f"\\u{ord(text[error.start]):04x}"
            raise UnreadableError(
                place, f"has {escape}, half of a surrogate pair, which is no text", "remove it"
            ) from None
        return text

    def cure(self, there: Mapping[str, Any]) -> str:
        """What to do about a field that is missing; `there`: the fields that are there, with a value of each."""
        names = [name for name, value in there.items() if isinstance(value, str)]
        return f"it has {', '.join(names) or 'no string'}; choose one with {self.setting}"


TEXT_FIELD = Fields()
