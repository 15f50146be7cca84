"""What the benchmarks share: data with structure, the machine's own rates, and how a result is shown and kept."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from sae_jax import mesh as meshes
from sae_jax.progress import plain_console
from sae_jax.saes.base import Batch, SaeConfig
from sae_jax.training import step as training
from sae_jax.training.settings import TrainConfig, hyperparameters
from sae_jax.training.state import abstract
from sae_jax.types import Widths

ROOT = Path(__file__).parents[2]
PACKAGES = ("jax", "jaxlib", "numpy", "torch", "eai-sparsify", "dictionary-learning", "sae-lens")
STEPS_TIMED = 5  # together: a GPU runs behind what it is told
SECONDS = 0.5  # that one measurement of a rate or a stage takes at least


@dataclass(frozen=True)
class Size:
    """Of a step: width, latents, active latents, rows."""

    d: int
    n: int
    k: int
    batch: int


SIZES = {
    "A": Size(768, 131_072, 32, 8192),
    "B": Size(4096, 262_144, 64, 8192),
    "C": Size(768, 32_768, 32, 2048),  # for CPUs
    "smoke": Size(32, 512, 4, 64),
}


def structured_rows(n_rows: int, d: int, seed: int, block: int = 8192) -> Iterator[np.ndarray]:
    """Blocks f32[block, d] that a sparse autoencoder can explain, and only with many latents.

    Each row is a mean plus about 24 of 8 d random directions, those of low rank more often than others (1 / rank), with
    exponential strengths, plus noise of a tenth of the variance. The directions are the same for every seed.
    """
    world = np.random.default_rng(0)
    n_directions = 8 * d
    directions_AD = world.standard_normal((n_directions, d), np.float32) / np.float32(d**0.5)
    mean_D = world.standard_normal(d, np.float32) / 2
    chance_A = 1 / np.arange(1, n_directions + 1)
    cumulative_A = np.cumsum(chance_A / chance_A.sum())
    rng = np.random.default_rng(seed + 1)
    for first in range(0, n_rows, block):
        n = min(block, n_rows - first)
        index_BK = np.searchsorted(cumulative_A, rng.random((n, 24))).clip(max=n_directions - 1)
        strength_BK = rng.standard_exponential((n, 24), np.float32)
        x_BD = np.einsum("bk,bkd->bd", strength_BK, directions_AD[index_BK], optimize=True)
        noise_BD = rng.standard_normal((n, d), np.float32) * np.float32((4.8 / d) ** 0.5)
        yield x_BD + noise_BD + mean_D


def fvu(x_BD: np.ndarray, x_hat_BD: np.ndarray) -> float:
    """Fraction of variance unexplained over all rows."""
    x_BD, x_hat_BD = x_BD.astype(np.float64), x_hat_BD.astype(np.float64)
    return float(((x_BD - x_hat_BD) ** 2).sum() / ((x_BD - x_BD.mean(0)) ** 2).sum())


def seconds_of(call: Callable[[], Any], seconds: float = SECONDS) -> float:
    """Least time of a call whose result is waited for. The first call, which compiles, does not count."""
    jax.block_until_ready(call())
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return min(times)


def matmul_rate(n: int, d: int) -> float:
    """FLOP/s of a bf16 product [n, d] x [d, rows] with f32 result: the best over some block sizes."""
    w_FD = jnp.ones((n, d), jnp.bfloat16)
    product = jax.jit(lambda w, x: jnp.einsum("fd,bd->fb", w, x, preferred_element_type=jnp.float32))

    def rate(rows: int) -> float:
        x_BD = jnp.ones((rows, d), jnp.bfloat16)
        return 2 * n * d * rows / seconds_of(lambda: product(w_FD, x_BD))

    return max(rate(rows) for rows in (64, 128, 512, 2048))


def memory_rate(n_bytes: int = 2**29) -> float:
    """Bytes/s that a scaled sum of two large arrays reads and writes."""
    a = jnp.ones(n_bytes // 4, jnp.float32)
    b = jnp.ones(n_bytes // 4, jnp.float32)
    scaled_sum = jax.jit(lambda a, b: a * 0.5 + b)
    return 3 * n_bytes / seconds_of(lambda: scaled_sum(a, b))


@dataclass(frozen=True)
class Step:
    """The real train step, compiled and not run: bytes are those of one device."""

    text: str  # the optimised program
    state: int  # weights, moments, average, counters
    weights: int  # and as much again for their gradients
    input: int  # the batch, as x and as y
    peak: int  # all of these, the gradients and what is put aside


def compile_step(sae: SaeConfig, train: TrainConfig, d: int, n_devices: int, data: int = 1) -> Step:
    """The step of these configs over the first `n_devices` of this machine, `data` of them in rows."""
    mesh = meshes.make_mesh(meshes.MeshConfig(data=data), jax.devices()[:n_devices])
    with jax.set_mesh(mesh):
        state = abstract(sae, train, Widths.one(d), mesh)
        rows = jax.ShapeDtypeStruct((train.batch_size, d), jnp.bfloat16, sharding=meshes.sharding(mesh, meshes.ROWS))
        hparams = jax.eval_shape(lambda: hyperparameters(train, sae))
        compiled = training.Step(sae, train).trace(state, hparams, Batch(rows)).lower().compile()
    memory = compiled.memory_analysis()
    weights = sum(math.prod(w.sharding.shard_shape(w.shape)) * 4 for w in jax.tree.leaves(state.sae))
    batch = 2 * 2 * train.batch_size * d // n_devices
    # On a CPU `peak_memory_in_bytes` leaves out the temporaries, which there are one block for the whole step.
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
    return Step(compiled.as_text(), memory.argument_size_in_bytes - batch, weights, batch, peak)


def elements(shape: str) -> int:
    """Of an array as a program's text has it, such as `f32[2,3]`."""
    return math.prod(int(size) for size in re.findall(r"\d+", shape.partition("[")[2]))


def machine() -> dict[str, Any]:
    """Where, with what and beside what a number was measured."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "commit": git.stdout.strip(),
        **{name: metadata.version(name) for name in PACKAGES if _is_installed(name)},
    }


def report(tables: Table | list[Table], record: dict[str, Any], out: Path | None) -> None:
    """Show the tables; write the record, with the machine, as JSON."""
    for table in tables if isinstance(tables, list) else [tables]:
        plain_console(width=None if plain_console().is_terminal else 160).print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": machine(), **record}, default=str, indent=1))


def table(title: str, columns: list[str], rows: list[list[Any]]) -> Table:
    """A table whose cells are shown as they are; floats to three digits."""
    shown = Table(title=title)
    for i, column in enumerate(columns):
        shown.add_column(column, justify="right" if i else "left")
    for row in rows:
        shown.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    return shown


def mib(n_bytes: float) -> str:
    """A number of bytes in MiB."""
    return f"{n_bytes / 2**20:,.1f}"


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
