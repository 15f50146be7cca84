"""A URL where code expects a path: joined, named and looked at as a `pathlib.Path` is."""

from __future__ import annotations

import os
from pathlib import Path

from sae_jax.storage.disk import StrPath, is_url
from sae_jax.storage.many import Files
from sae_jax.storage.whole import read_bytes


class Url(os.PathLike[str]):
    """An object at a URL, or the prefix of some, which takes the place of a folder."""

    def __init__(self, text: str) -> None:
        self._text = text.rstrip("/")

    def __fspath__(self) -> str:
        return self._text

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Url({self._text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Url) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __truediv__(self, part: str) -> Url:
        return Url(f"{self._text}/{part}")

    @property
    def name(self) -> str:
        """What comes after the last slash."""
        return self._text.rpartition("/")[2]

    @property
    def parent(self) -> Url:
        """What comes before it."""
        return Url(self._text.rpartition("/")[0])

    def exists(self) -> bool:
        """Whether there is an object, or some below it."""
        return read_bytes(self) is not None or self.is_dir()

    def is_dir(self) -> bool:
        """Whether there are objects below it."""
        return bool(Files(self).keys(""))


def path(given: StrPath) -> Path | Url:
    """A `Path`, or for a URL a `Url`."""
    return Url(os.fspath(given)) if is_url(given) else Path(given)
