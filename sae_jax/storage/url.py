"""Paths at a URL, used as those of pathlib are: gs:// and s3:// have keys where a disk has folders and files."""

from __future__ import annotations

import fnmatch
import functools
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from sae_jax.errors import UserError
from sae_jax.storage.disk import StrPath, is_url
from sae_jax.storage.many import Files
from sae_jax.storage.objects import STORAGE_ERRORS, open_store, reason
from sae_jax.storage.whole import delete, read_bytes


@functools.total_ordering
class Url:
    """The path of an object, or of all objects below it. A folder is there when something is in it."""

    def __init__(self, url: StrPath) -> None:
        """`url`: with its scheme; a / at its end does not count."""
        self._root, separator, rest = os.fspath(url).partition("://")
        self._root += separator
        self._parts = tuple(part for part in rest.split("/") if part)
        self._root += "/" * rest.startswith("/")  # file:///

    def __fspath__(self) -> str:
        return self._root + "/".join(self._parts)

    __str__ = __fspath__

    def __repr__(self) -> str:
        return f"Url({str(self)!r})"

    def __truediv__(self, below: StrPath) -> Url:
        return Url(f"{self}/{os.fspath(below)}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Url) and str(self) == str(other)

    def __lt__(self, other: Url) -> bool:
        return self._parts < other._parts

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def name(self) -> str:
        """Its last part."""
        return self._parts[-1] if self._parts else ""

    @property
    def suffix(self) -> str:
        """As of `Path.suffix`."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> Url:
        """What it is in."""
        return Url(self._root + "/".join(self._parts[:-1]))

    def with_name(self, name: str) -> Url:
        """Beside it."""
        return self.parent / name

    def resolve(self) -> Url:
        """Itself: a URL is from the root, and has no links."""
        return self

    def exists(self) -> bool:
        """Whether it is an object, or something is below it."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Whether it is an object."""
        try:
            found = open_store(self).read("", byte_range=slice(0, 0)).result()
        except STORAGE_ERRORS as error:
            if "Is a directory" in str(error):  # at file://
                return False
            raise UserError(f"cannot read {self}: {reason(error)}") from error
        return found.state == "value"

    def is_dir(self) -> bool:
        """Whether something is below it."""
        return bool(Files(self.parent).keys(f"{self.name}/"))

    def glob(self, pattern: str) -> Iterator[Url]:
        """Objects and folders below it that match, as of `Path.glob`; `**` is not known."""
        wanted = [part for part in pattern.split("/") if part]
        plain = pattern.partition("*")[0].rpartition("/")[0]  # only what is below it can match
        found = {}
        for key in Files(self).keys(f"{plain}/" if plain else ""):
            parts = key.split("/")[: len(wanted)]
            if len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted)):
                found["/".join(parts)] = None
        return (self / key for key in sorted(found))

    def iterdir(self) -> Iterator[Url]:
        """What is in it."""
        return self.glob("*")

    def read_text(self, errors: str = "strict") -> str:
        """Its content as UTF-8; "" if there is none."""
        return (read_bytes(self) or b"").decode(errors=errors)

    def unlink(self, missing_ok: bool = True) -> None:
        """As `storage.delete`; a missing object is no error, whatever `missing_ok` says."""
        delete(self)


AnyPath = Path | Url


def path(given: StrPath) -> AnyPath:
    """A path on a disk, or at a URL."""
    return Url(given) if is_url(given) else Path(given)
