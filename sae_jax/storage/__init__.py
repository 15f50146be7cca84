"""Files at a path or a URL (gs://, s3://): read, write whole, create if absent, append lines; and who owns what.

Everything that outlives a process is written here: sets, runs, sweeps, claims, pages. A reader sees the old content or
the new, never half of it, and what a function has written is on the disk when the function returns. Paths on a disk
take plain system calls, URLs requests to a bucket.

On a disk, errors are OSErrors that name the file. At a URL they are UserErrors.
"""

from sae_jax.storage.digests import sealed, unsealed
from sae_jax.storage.disk import StrPath, absolute, is_url, make_folder
from sae_jax.storage.folder import is_whole, lease_of_folder, new_folder, on_disk, refuse_large, remove_folder
from sae_jax.storage.guarded import (
    DAMAGED,
    as_type,
    one_line,
    open_safetensors,
    parse_json,
    parse_npz,
    parse_yaml,
)
from sae_jax.storage.lease import HeldError, Lease, LostError
from sae_jax.storage.lines import Lines, read_lines, write_lines
from sae_jax.storage.many import Files
from sae_jax.storage.objects import STORAGE_ERRORS, context, kvstore, reason, write_error
from sae_jax.storage.url import AnyPath, Url, path
from sae_jax.storage.whole import (
    create,
    delete,
    json_text,
    read_bytes,
    read_json,
    read_limited,
    write_bytes,
    write_json,
    write_safetensors,
    write_text,
)

__all__ = [
    "DAMAGED",
    "STORAGE_ERRORS",
    "AnyPath",
    "Files",
    "HeldError",
    "Lease",
    "Lines",
    "LostError",
    "StrPath",
    "Url",
    "absolute",
    "as_type",
    "context",
    "create",
    "delete",
    "is_url",
    "is_whole",
    "json_text",
    "kvstore",
    "lease_of_folder",
    "make_folder",
    "new_folder",
    "on_disk",
    "one_line",
    "open_safetensors",
    "parse_json",
    "parse_npz",
    "parse_yaml",
    "path",
    "read_bytes",
    "read_json",
    "read_limited",
    "read_lines",
    "reason",
    "refuse_large",
    "remove_folder",
    "sealed",
    "unsealed",
    "write_bytes",
    "write_error",
    "write_json",
    "write_lines",
    "write_safetensors",
    "write_text",
]
