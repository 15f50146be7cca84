"""What two folders have to agree in to be the same set, run, sweep, dictionary or page."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sae_jax import config as configs
from sae_jax import storage
from sae_jax.saes import base
from sae_jax.storage import digests
from sae_jax.training import logs
from sae_jax.training.checkpoint import Checkpoints, members, read_record
from sae_jax.training.settings import TrainConfig
from sae_jax.training.state import abstract

# Fields that the clock and the place decide; the digest of a record covers these, too.
PASSING = ("seconds", *logs.WALL_CLOCK, "since", "time", "path", digests.SEAL)


def content(folder: Path) -> dict[str, str]:
    """{name: digest}: of files their bytes, times and places apart; of checkpoints the state that they hold."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if "checkpoints" in path.parts or path.name == "attempts.jsonl" or path.is_dir():
            continue
        if _stays_for_a_day(path):
            continue
        found[name] = digest(_timeless(path))
    for checkpoints in sorted(folder.rglob("checkpoints")):
        run = checkpoints.parent
        steps = sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
        found[f"{checkpoints.relative_to(folder)}: the last"] = str(steps[-1:])
        # A set has none left when it has ended: that there are some is the difference.
        if steps and storage.read_json(run / "config.json") and not members(run):
            for leaf, array in _state(run).items():
                found[f"{checkpoints.relative_to(folder)}: {leaf}"] = digest(array)
    return found


def _stays_for_a_day(path: Path) -> bool:
    """Whether it is a temporary that may be of another process, as of all files but those of a run in training."""
    temporary = re.fullmatch(r"\.(.+)\.[0-9a-f]{16}\.tmp", path.name)
    of_many = not (path.parent / "attempts.jsonl").exists()
    return temporary is not None and (of_many or temporary[1].startswith(("owner.", "evaluation.json")))


def _timeless(path: Path) -> bytes:
    if path.suffix == ".jsonl":
        return json.dumps([_without(row) for row in storage.read_lines(path)], sort_keys=True).encode()
    if path.suffix == ".json":
        return json.dumps(_without(storage.read_json(path)), sort_keys=True).encode()
    return path.read_bytes()


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(part) for key, part in value.items() if key not in PASSING}
    return [_without(part) for part in value] if isinstance(value, list) else value


def _state(run: Path) -> dict[str, bytes]:
    record = read_record(run)
    sae = configs.from_dict(base.config_class(record.dictionary.variant), record.dictionary.sae)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = abstract(sae, configs.from_dict(TrainConfig, record.train), record.dictionary.widths, here)
    with Checkpoints(run, writes=False) as saved:
        state = saved.restore({"": target})[""]
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def digest(data: bytes) -> str:
    """Of bytes."""
    return hashlib.sha256(data).hexdigest()[:16]
