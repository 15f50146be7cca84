"""Dictionaries by their places on the hub: loaded in whatever format they are in, and published in any that is written.

load("hf:owner/repo[/folder][@revision]"), load("saelens:RELEASE/ID")
push(dictionary, "owner/repo[/folder]", "saelens")
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_jax import artifact
from sae_jax.artifact import Dictionary
from sae_jax.interchange import convert, hub
from sae_jax.storage import StrPath
from sae_jax.types import UsageError


def load(path: StrPath, ema: bool = False) -> Dictionary:
    """A dictionary from a folder that `save` wrote, a run, a member of a run, or the hub.

    Args:
        path: the folder; of a run, the newest checkpoint is taken. hf:owner/repo[/folder][@revision] and
            saelens:RELEASE/ID are fetched, in whatever format of sae_jax/interchange/formats they are.
        ema: the averaged weights of a run instead of the live ones.

    Raises:
        UserError: nothing there, no checkpoint yet, a damaged file, a record of another version, or what the hub says.
        UsageError: averages asked of what has none.
    """
    if not hub.is_remote(path):
        return artifact.load(path, ema)
    if ema:
        raise UsageError(f"{path}: a published dictionary is the one that was published; load it without ema")
    with tempfile.TemporaryDirectory() as folder:
        convert.import_dictionary(path, Path(folder) / "dictionary")
        return artifact.load(Path(folder) / "dictionary")


def push(
    dictionary: convert.Exported | Sequence[convert.Exported],
    repo: str,
    format: str = convert.OURS,
    *,
    calibrate: Any = None,
    private: bool = False,
    revision: str | None = None,
    licence: str | None = None,
) -> str:
    """Publish a dictionary on the hub, with a card; returns the hf: reference that loads it, with the commit.

    Args:
        dictionary: as `load` gives it, or its folder; or several, see `sae_jax.export`.
        repo: owner/name[/folder]; a repository that is not there is made.
        format: in which it is written, see `sae_jax.export`.
        calibrate: see `sae_jax.export`.
        private: a repository that is made is seen by its owner alone.
        revision: branch to push to, made if it is not there; None: main.
        licence: as the hub names it, such as apache-2.0; None: that of the dictionary's origin, if it names one.

    Raises:
        UsageError: `repo` is none, the folder there holds other files, or the format cannot hold the dictionary.
        UserError: the hub refuses, or cannot be reached.
    """
    hub.destination(repo)  # before anything is written
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / os.path.basename(repo)
        record = convert.export(dictionary, format, out, calibrate)
        return hub.upload(out, repo, record, format, private, revision, licence)
