"""The real train step, or the real pass of a harvest, compiled for devices that are not here.

This runs in a process of its own: the environment must be set before JAX starts, a compiler may hang or take all
memory, and its use of time and memory can then be measured.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_jax import config as configs
from sae_jax import storage
from sae_jax.errors import UsageError, UserError
from sae_jax.planning.forward import ForwardPass
from sae_jax.planning.targets import Target
from sae_jax.planning.through_model import ThroughModel
from sae_jax.types import Widths

INSTALL = "pip install 'sae_jax[plan]'"
PARTS = ("sae", "train", "mesh", "engine")

# The devices of this machine are not used. Without the rest libtpu asks a metadata server what it is, complains that
# none answers, and refuses to run in two processes at once.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler reports for one device, or that it refused because memory does not suffice."""

    text: str | None  # the optimised program; None: refused
    peak_bytes: int | None  # None: refused without a figure
    argument_bytes: int = 0
    alias_bytes: int = 0  # of the arguments, what the results take over
    refusal: str | None = None
    lower_seconds: float = 0.0
    compile_seconds: float = 0.0
    cpu_seconds: float = 0.0  # of the same, over all threads: at most this long on a machine with nothing else to do
    host_bytes: int = 0  # most memory that compiling took


def is_installed(target: Target) -> bool:
    """Whether the compiler for this target is."""
    names = ("libtpu",) if target.is_tpu else ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            if importlib.util.find_spec(name) is not None:
                return True
    return False


def compile_step(
    target: Target,
    sae: Any,
    train: Any,
    mesh: Any,
    engine: Any,
    widths: Widths,
    same: bool,
    model: ThroughModel | None = None,
    timeout: float = 600.0,
) -> Compiled:
    """The step of these configs on this target; with an axis for members, on one slice of it.

    Args:
        target: whose compiler `is_installed`.
        sae: the variant's config.
        train: TrainConfig.
        mesh: MeshConfig.
        engine: EngineConfig.
        widths: of the sources.
        same: what is encoded is what is reconstructed.
        model: the language model it is trained through, whose pass is then part of the program.
        timeout: seconds until the compiler is killed.

    Raises:
        UsageError: the target or the mesh does not exist.
        UserError: the compiler failed, was killed or took too long.
    """
    job: dict[str, Any] = {"widths": widths.to_json(), "same": same, "model": model.to_json() if model else None}
    job |= {name: configs.to_dict(part) for name, part in zip(PARTS, (sae, train, mesh, engine), strict=True)}
    return _compile_apart(target, {"step": job}, timeout)


def compile_forward(target: Target, forward: ForwardPass, timeout: float = 600.0) -> Compiled:
    """A model's pass on this target, whose compiler `is_installed`; `timeout` and errors as `compile_step`."""
    return _compile_apart(target, {"forward": forward.to_json()}, timeout)


def _compile_apart(target: Target, job: dict[str, Any], timeout: float) -> Compiled:
    """What `main` answers in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        answer, program = Path(folder) / "answer.json", Path(folder) / "program.txt"
        try:
            done = subprocess.run(
                # Not -m: the package has imported this module already, of which Python would warn.
                [sys.executable, "-c", f"import {__name__} as module; module.main()", str(answer), str(program)],
                input=json.dumps({"topology": target.topology, **job}),
                env={**os.environ, **ENVIRONMENT, "XLA_FLAGS": _flags(target)},
                timeout=timeout,
                capture_output=True,
                text=True,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"compiling for {target.name} took more than {timeout:.0f} s; raise --timeout") from None
        said = storage.read_json(answer)
        text = program.read_text() if program.exists() else None
    if said is None:
        if done.returncode < 0:
            why = f"was killed by signal {-done.returncode}; it may have run out of host memory"
        else:
            why = f"failed: {next(reversed(done.stderr.strip().splitlines()), 'without a word')[:300]}"
        raise UserError(f"the compiler for {target.name} {why}")
    if "refused" in said:
        raise UsageError(f"--target={target.name}: {said['refused']}")
    return Compiled(text=text, **said)


def _flags(target: Target) -> str:
    """XLA_FLAGS as commands have them on such a machine."""
    from sae_jax.ops import tuning

    return f"{os.environ.get('XLA_FLAGS', '')} {'' if target.is_tpu else tuning.gpu_flags()}".strip()


def _compile(job: dict[str, Any], program: Path) -> dict[str, Any]:
    """Compile a job, in the new process: the answer as JSON. Writes the text of the program."""
    import jax
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(**job["topology"]).devices
    except NotImplementedError as error:  # of a platform without compiler, with which a wrong version of one is meant
        raise UserError(f"{error}; the compiler must have the version of JAX, {jax.__version__}") from None
    except jax.errors.JaxRuntimeError as error:
        raise UsageError(str(error).splitlines()[0]) from None
    answer: dict[str, Any] = {}
    began = time.monotonic()
    lowered = _lower_step(job["step"], [*devices]) if "step" in job else _lower_forward(job["forward"], [*devices])
    answer["lower_seconds"] = time.monotonic() - began
    began, cpu_began = time.monotonic(), time.process_time()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or "hbm" not in str(error).lower():
            raise
        answer |= _refusal(str(error))
    else:
        memory = compiled.memory_analysis()
        answer |= {
            "peak_bytes": memory.peak_memory_in_bytes,
            "argument_bytes": memory.argument_size_in_bytes,
            "alias_bytes": memory.alias_size_in_bytes,
        }
        program.write_text(compiled.as_text())
    answer["compile_seconds"] = time.monotonic() - began
    answer["cpu_seconds"] = time.process_time() - cpu_began
    answer["host_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return answer


def _lower_step(job: dict[str, Any], devices: list[Any]) -> Any:
    """The traced step, of shapes alone. All that this package knows of how training calls it stands here."""
    import jax
    import jax.numpy as jnp

    from sae_jax import mesh as meshes
    from sae_jax.ops import tuning
    from sae_jax.saes import base
    from sae_jax.training.settings import TrainConfig, hyperparameters
    from sae_jax.training.state import abstract
    from sae_jax.training.step import Step

    sae = configs.from_dict(base.config_class(job["sae"]["variant"]), job["sae"]).on(devices[0].platform)
    train = configs.from_dict(TrainConfig, job["train"])
    mesh = meshes.first_slice(meshes.make_mesh(configs.from_dict(meshes.MeshConfig, job["mesh"]), devices))
    meshes.check_divides(mesh, sae.n_latents, train.batch_size)
    engine, widths = configs.from_dict(tuning.EngineConfig, job["engine"]), Widths.from_json(job["widths"])
    with jax.set_mesh(mesh), tuning.using(engine.on(devices[0].platform)):
        state, step = abstract(sae, train, widths, mesh), Step(sae, train)
        hparams = jax.eval_shape(lambda: hyperparameters(train, sae))
        if job["model"]:
            return ThroughModel.from_json(job["model"]).lower(step, state, hparams, train.batch_size, mesh)
        placed = meshes.sharding(mesh, meshes.ROWS)
        x, y = (jax.ShapeDtypeStruct((train.batch_size, sum(side)), jnp.bfloat16, sharding=placed) for side in widths)
        batch = base.Batch(x, None if job["same"] else y)  # pyrefly: ignore[bad-argument-type] (shapes for arrays)
        return step.trace(state, hparams, batch).lower()


def _lower_forward(job: dict[str, Any], devices: list[Any]) -> Any:
    """The traced pass, of shapes alone."""
    import jax

    from sae_jax import mesh as meshes

    forward = ForwardPass.from_json(job)
    mesh = meshes.lm_mesh(forward.split, devices)
    with jax.set_mesh(mesh):
        return forward.lower(mesh)


def _refusal(message: str) -> dict[str, Any]:
    """The message of a TPU's compiler when a program does not fit, and the memory that it would have taken."""
    figure = re.search(r"(?:temporaries \(|Used )([\d.]+)([KMGT])", message)
    taken = int(float(figure[1]) * 1024 ** ("KMGT".index(figure[2]) + 1)) if figure else None
    return {"refusal": message.splitlines()[0], "peak_bytes": taken}


def main() -> None:
    """Answer the job on stdin; argv: where to write the answer, and the text of the program."""
    try:
        answer = _compile(json.load(sys.stdin), Path(sys.argv[2]))
    except UserError as error:
        answer = {"refused": str(error)}
    storage.write_json(sys.argv[1], answer)
