"""Objects at a URL (gs://, s3://), through tensorstore's key-value stores, which write an object with one request."""

from __future__ import annotations

import functools
import os
import re
from typing import TYPE_CHECKING

from sae_jax.errors import UserError
from sae_jax.storage.disk import StrPath, absolute, is_url

if TYPE_CHECKING:  # importing it takes a third of a second, which `sae-jax --help` need not wait for
    import tensorstore as ts

# tensorstore reports a failed request as ValueError, KeyError or OSError with the status in the text.
STORAGE_ERRORS = (ValueError, KeyError, OSError, RuntimeError)


@functools.cache
def context() -> ts.Context:
    """What all of tensorstore's stores share here: no cache, and reads that leave the CPU to others."""
    import tensorstore as ts

    return ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_concurrency": {"limit": 16}})


def spec(path: StrPath, suffix: str = "") -> str | dict[str, str]:
    """What tensorstore opens a key-value store by."""
    name = f"{os.fspath(path)}{suffix}"
    return name if is_url(name) else {"driver": "file", "path": name}


def open_object(path: StrPath) -> ts.KvStore:
    """A key-value store whose key "" is the file."""
    import tensorstore as ts

    return ts.KvStore.open(spec(path), context=context()).result()


def create_object(path: StrPath, data: bytes) -> bool:
    """Write an object, or a file on a disk, unless there is one; whether it was written."""
    path = path if is_url(path) else absolute(path)
    try:
        store = open_object(path)
        found = store.read("").result()
        if found.state == "value":
            return False
        # The loser of a race gets no exception but an empty generation.
        return bool(store.write("", data, if_equal=found.stamp.generation).result().generation)
    except STORAGE_ERRORS as error:
        raise write_error(os.fspath(path), error) from error


def reason(error: BaseException) -> str:
    """The first sentence of a tensorstore message, without its source locations and spec dumps."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return re.split(r" \[(?:source locations|tensorstore_spec)=", text)[0]


def write_error(name: str, error: BaseException) -> UserError:
    """The error for a failed write through tensorstore: what to do when the disk is full, else the reason."""
    if "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error):
        return UserError(f"no space left to write {name}; free some and run the same command to go on")
    return UserError(f"cannot write {name}: {reason(error)}")
