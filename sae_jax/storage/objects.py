"""Objects at a URL (gs://, s3://), through tensorstore's key-value stores, which write an object with one request."""

from __future__ import annotations

import functools
import os
import re
from typing import TYPE_CHECKING, Any

from sae_jax.errors import UserError
from sae_jax.storage.disk import StrPath, absolute, is_url

if TYPE_CHECKING:  # importing it takes a third of a second, which `sae-jax --help` need not wait for
    import tensorstore as ts

# tensorstore reports a failed request as ValueError, KeyError or OSError with the status in the text.
STORAGE_ERRORS = (ValueError, KeyError, OSError, RuntimeError)

RETRIES = 10  # of a request that fails, in the course of a minute and a half


@functools.cache
def context() -> ts.Context:
    """What all of tensorstore's stores share here: no cache, and reads that leave the CPU to others."""
    import tensorstore as ts

    retries = {"max_retries": RETRIES, "initial_delay": "100ms", "max_delay": "32s"}
    settings = {"s3_request_retries": retries, "gcs_request_retries": retries}
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_concurrency": {"limit": 16}, **settings})


def kvstore(path: StrPath, suffix: str = "") -> str | dict[str, Any]:
    """How tensorstore opens a key-value store, also that of an array."""
    name = f"{os.fspath(path)}{suffix}"
    if not name.startswith("s3://"):
        return name if is_url(name) else {"driver": "file", "path": name}
    bucket, _, key = name.removeprefix("s3://").partition("/")
    return {**_bucket(bucket), "path": key}


def open_store(path: StrPath, suffix: str = "") -> ts.KvStore:
    """A key-value store whose keys begin after `path` and `suffix`; key "" is the file of that name."""
    import tensorstore as ts

    return ts.KvStore.open(kvstore(path, suffix), context=context()).result()


def _bucket(name: str) -> dict[str, Any]:
    """A bucket by variables of the AWS tools, which tensorstore does not all read by itself."""
    of_s3, of_all, region, usual_region, key_id = map(
        os.environ.get,
        ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID"),
    )
    found: dict[str, Any] = {"driver": "s3", "bucket": name}
    if endpoint := of_s3 or of_all:
        found |= {"endpoint": endpoint.rstrip("/"), "aws_region": region or usual_region or "us-east-1"}
    elif region or usual_region:
        found["aws_region"] = region or usual_region
    if key_id:  # else each look for a credentials file that is not there is told on stderr
        found["aws_credentials"] = {"type": "environment"}
    return found


def create_object(path: StrPath, data: bytes) -> bool:
    """Write an object, or a file on a disk, unless there is one; whether it was written, or by then held the same."""
    path = path if is_url(path) else absolute(path)
    try:
        store = open_store(path)
        found = store.read("").result()
        if found.state == "value":
            return False
        # The loser of a race gets no exception but an empty generation. So does who wrote it, if the answer was lost
        # and the request made again.
        is_done = bool(store.write("", data, if_equal=found.stamp.generation).result().generation)
        return is_done or store.read("").result().value == data
    except STORAGE_ERRORS as error:
        raise write_error(os.fspath(path), error) from error


def reason(error: BaseException) -> str:
    """The first sentence of a tensorstore message, without its source locations and spec dumps."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    text = re.split(r" \[(?:source locations|tensorstore_spec)=", text)[0]
    if found := re.search(r"All (\d+) retry attempts failed: (.*)", text):
        text = (
            f"no answer in {found[1]} tries ({found[2]}); see to the network and the address, and run the same command "
            f"again"
        )
    return text


def write_error(name: str, error: BaseException) -> UserError:
    """The error for a failed write through tensorstore: what to do when the disk is full, else the reason."""
    if "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error):
        return UserError(f"no space left to write {name}; free some and run the same command to go on")
    return UserError(f"cannot write {name}: {reason(error)}")
