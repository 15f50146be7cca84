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


def open_store(path: StrPath, suffix: str = "") -> ts.KvStore:
    """A key-value store whose keys begin after `path` and `suffix`; key "" is the file of that name."""
    import tensorstore as ts

    name = f"{os.fspath(path)}{suffix}"
    if name.startswith("s3://"):
        bucket, _, key = name.removeprefix("s3://").partition("/")
        return _bucket(bucket, *map(os.environ.get, _S3)) + key
    spec = name if is_url(name) else {"driver": "file", "path": name}
    return ts.KvStore.open(spec, context=context()).result()


# Variables of the AWS tools that tensorstore does not read, or not by itself.
_S3 = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID")


@functools.cache
def _bucket(name: str, *variables: str | None) -> ts.KvStore:
    import tensorstore as ts

    of_s3, of_all, region, usual_region, key_id = variables
    spec: dict[str, Any] = {"driver": "s3", "bucket": name}
    if endpoint := of_s3 or of_all:
        spec |= {"endpoint": endpoint.rstrip("/"), "aws_region": region or usual_region or "us-east-1"}
    elif region or usual_region:
        spec["aws_region"] = region or usual_region
    if key_id:  # else each look for a credentials file that is not there is told on stderr
        spec["aws_credentials"] = {"type": "environment"}
    return ts.KvStore.open(spec, context=context()).result()


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
    return re.split(r" \[(?:source locations|tensorstore_spec)=", text)[0]


def write_error(name: str, error: BaseException) -> UserError:
    """The error for a failed write through tensorstore: what to do when the disk is full, else the reason."""
    if "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error):
        return UserError(f"no space left to write {name}; free some and run the same command to go on")
    return UserError(f"cannot write {name}: {reason(error)}")
