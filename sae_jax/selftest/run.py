"""The parts of the self-test in their order, and the report on them.

report    program, device, n_devices, n_processes, mesh, passed, seconds, parts
a part    name, tried, outcome (passed, failed, left out), seen and expected where it failed, seconds, figures
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed  # processes speak of what they saw by JAX's own service: collectives are under test
from jax.experimental import multihost_utils

import sae_jax
from sae_jax import mesh as meshes
from sae_jax import storage
from sae_jax.ops import tuning
from sae_jax.selftest.checks import Figures, LeftOutError, MismatchError, Where
from sae_jax.selftest.collectives import collectives
from sae_jax.selftest.engine import gradients, kernels, selection
from sae_jax.selftest.killed import killed
from sae_jax.selftest.saves import saves
from sae_jax.selftest.step_time import step_time
from sae_jax.selftest.stored import stored
from sae_jax.types import UsageError, UserError

PARTS: dict[str, tuple[str, Callable[[Where], Figures]]] = {
    "collectives": ("every exchange between devices and between processes, with known numbers", collectives),
    "selection": ("exact top-k over the split dictionary, against float64 on the host", selection),
    "gradients": ("gradients of TopK with AuxK, against float64 on the host", gradients),
    "kernels": ("both again with the GPU kernels", kernels),
    "storage": ("a small activation set written, and read by another process if there is one", stored),
    "save and restore": ("a state saved and restored; a run cut in two, and one that was not", saves),
    "kill in a save": ("a run on the CPU killed in the midst of a save, and resumed", killed),
    "step": ("time of a training step", step_time),
}
SECONDS_TO_ANSWER = 600  # of another process


@dataclass
class Part:
    """What came of a part."""

    name: str
    tried: str
    outcome: str = "passed"  # or failed, or left out
    seen: str | None = None  # where it failed; of what is left out, why
    expected: str | None = None
    seconds: float = 0.0
    figures: Figures = field(default_factory=dict)


def selftest(
    out: str, mesh: meshes.MeshConfig, engine: tuning.EngineConfig, say: Callable[[Part], None] = lambda part: None
) -> dict[str, Any]:
    """Try all parts on all devices; writes OUT/selftest.json. All processes of a job call it together.

    Args:
        out: a folder that all processes share; what is written there beside the report is removed.
        mesh: how the devices are arranged.
        engine: sizes of the pieces in which ops work.
        say: told of every part once it is over.

    Returns the report, see the head of this file. Raises UsageError for a mesh or folder that cannot be, UserError
    where another process does not answer.
    """
    if storage.is_url(out):
        raise UsageError(f"--out={out}: the self-test tries a disk; give a directory that all processes share")
    if mesh.member > 1:
        raise UsageError(f"mesh.member={mesh.member}: the self-test is of one dictionary; leave it out")
    began, devices = time.monotonic(), meshes.make_mesh(mesh)
    platform = devices.devices.flat[0].platform
    tuned = engine.on(platform)
    folder = Path(out) / f"selftest-{_agreed_number():08x}"
    where = Where(devices, mesh, engine, folder)
    storage.make_folder(folder)
    try:
        with jax.set_mesh(devices), tuning.using(tuned):
            parts = [_try(name, where, say) for name in PARTS]
    finally:
        if jax.process_index() == 0:
            shutil.rmtree(folder, ignore_errors=True)
    report = {
        "program": f"sae_jax {sae_jax.__version__}, jax {jax.__version__}",
        "device": devices.devices.flat[0].device_kind,
        "n_devices": devices.size,
        "n_processes": jax.process_count(),
        "mesh": meshes.sizes(devices),
        "passed": all(part.outcome != "failed" for part in parts),
        "seconds": round(time.monotonic() - began, 1),
        "parts": [asdict(part) for part in parts],
    }
    if jax.process_index() == 0:
        storage.write_json(Path(out) / "selftest.json", report)
    return report


def _try(name: str, where: Where, say: Callable[[Part], None]) -> Part:
    tried, run = PARTS[name]
    part, began = Part(name, tried), time.monotonic()
    try:
        part.figures = run(where)
    except LeftOutError as why:
        part.outcome, part.seen = "left out", str(why)
    except MismatchError as problem:
        part.outcome, part.seen, part.expected = "failed", problem.seen, problem.expected
    except Exception as error:  # whatever a machine that is not in order may raise
        lines = str(error).splitlines() or [""]
        part.outcome, part.seen, part.expected = "failed", f"{type(error).__name__}: {lines[0][:500]}", "no error"
    _agree(part)
    part.seconds = round(time.monotonic() - began, 2)
    say(part)
    return part


def _agree(part: Part) -> None:
    """All processes take the outcome of the first one that failed."""
    client, process, n = distributed.global_state.client, jax.process_index(), jax.process_count()
    if n == 1 or client is None:
        return
    key, patience = f"sae_jax/selftest/{part.name}", SECONDS_TO_ANSWER * 1000
    client.key_value_set(f"{key}/{process}", json.dumps([part.outcome, part.seen, part.expected]))
    try:
        if process == 0:
            said = [json.loads(client.blocking_key_value_get(f"{key}/{p}", patience)) for p in range(n)]
            p = next((p for p, (outcome, *_) in enumerate(said) if outcome == "failed"), 0)
            outcome, seen, expected = said[p]
            seen = f"process {p}: {seen}" if outcome == "failed" else seen
            client.key_value_set(f"{key}/all", json.dumps([outcome, seen, expected]))
        verdict = client.blocking_key_value_get(f"{key}/all", 2 * patience)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{part.name}: another process has not answered for {SECONDS_TO_ANSWER} s ({reason})") from None
    part.outcome, part.seen, part.expected = json.loads(verdict)


def _agreed_number() -> int:
    """A number that the first process draws, on all."""
    return int(multihost_utils.broadcast_one_to_all(secrets.randbits(31)))
