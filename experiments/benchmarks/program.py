"""What does the compiled training step do, kernel by kernel, on machines that are not there?

The step is compiled as `sae-jax plan` compiles it and its program read (sae_jax/planning/hlo.py), while no latent is
dead. For each target and size:

    launches   kernels that a step starts, a loop's as often as it runs; a sort is one, though a GPU takes several
    HBM        bytes that kernels read and write, each operand once, as if nothing stayed in a cache between two; of an
               array from which rows are taken those rows, at most all of it
    arrays     passes over whole matrices [n, d], one for each that a kernel reads or writes, in float32 ones: what
               scatter-adds and gathers touch is not among them
    open loops such whose length depends on data: each turn of one is a wait for the host, and is counted once
    roofline   the sum over kernels of the larger of FLOP at the matrix rate and bytes at the bandwidth
    floor      what `sae-jax plan` calls so: products at the full rate, then the state read and written once

Rates are those of the makers' data sheets. No kernel reaches its roofline, and launches and waits cost time that is not
in it: this says what the compiler chose, not how long a step takes.

    python experiments/benchmarks/program.py --out program.json     # needs sae_jax[plan]; three minutes of two cores
    python experiments/benchmarks/program.py --smoke                # the step of this machine, tiny

Guess beforehand: the roofline is about twice the floor at both sizes, since a GPU writes the pre-activations out and
passes over the matrices thirty times where eighteen would do.

Answer: 2.0 (A) and 1.7 (B) on an H200, 2.2 and 1.8 on an H100. The matrices are passed over 27.5 times, of which the
optimiser's two largest kernels are 16; A reads the encoder in bfloat16 once more for each of four row blocks, which is
two more. RESULTS.md, "The compiled step", has the table.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import tyro
from common import SIZES, Size

from sae_jax import mesh as meshes
from sae_jax.ops.tuning import EngineConfig
from sae_jax.planning import analytic, compile, hlo, targets
from sae_jax.saes.base import KConfig, SaeConfig, config_class
from sae_jax.training.settings import TrainConfig
from sae_jax.types import Widths
from sae_jax.units import size

LARGEST = 12  # kernels shown


@dataclass(frozen=True)
class Benchmark:
    """Targets of the benchmark; the sizes are SIZES."""

    targets: tuple[str, ...] = ("h200:1", "h100:1")
    sizes: tuple[str, ...] = ("A", "B")
    variants: tuple[str, ...] = ("topk",)  # such as have a k, or a target_l0
    timeout: float = 600.0  # seconds until a compiler that does not come back is killed
    out: Path | None = None  # JSON with every kernel
    smoke: bool = False  # one tiny step, compiled for this machine; seconds


COLUMNS = ["", "launches", "HBM, GB", "arrays", "sorts", "open loops", "roofline, ms", "floor, ms", "roofline / floor"]


def main(config: Benchmark) -> None:
    names, machines = (("smoke",), ("h200:1",)) if config.smoke else (config.sizes, config.targets)
    rows, tables, record = [], [], {}
    for name in names:
        for variant, machine in itertools.product(config.variants, machines):
            target, of_size = targets.parse(machine), SIZES[name]
            kind = config_class(variant)
            k = {"k" if issubclass(kind, KConfig) else "target_l0": of_size.k}
            sae = kind(n_latents=of_size.n, dtype="bfloat16", **k)
            text = text_of(sae, of_size, target, config)
            counted = count(hlo.analyse(text, quietest=True), sae, of_size, target)
            title = f"{name}, {variant}, {machine}"
            print(f"{title}: {counted['launches']} launches", file=sys.stderr)
            record[title] = counted
            times = [counted[which] * 1e3 for which in ("roofline_seconds", "floor_seconds")]
            rows.append(
                [
                    *(title, counted["launches"], counted["bytes"] / 1e9, f"{counted['arrays']:.1f}"),
                    *(counted["sorts"], counted["open_loops"], *times, f"{times[0] / times[1]:.2f}"),
                ]
            )
            tables.append(largest(title, counted))
    common.report([common.table("The compiled step", COLUMNS, rows), *tables], {"programs": record}, config.out)


def text_of(sae: SaeConfig, of_size: Size, target: targets.Target, config: Benchmark) -> str:
    """The optimised program of a step; exits where it does not fit."""
    train = TrainConfig(batch_size=of_size.batch)
    if config.smoke:
        return common.compile_step(sae, train, of_size.d, 1).text
    parts = (sae, train, meshes.MeshConfig(), EngineConfig(), Widths.one(of_size.d), True)
    compiled = compile.compile_step(target, *parts, timeout=config.timeout)
    if compiled.text is None:
        sys.exit(f"{target.name} at {of_size}: {compiled.refusal}")
    return compiled.text


def count(program: hlo.Program, sae: SaeConfig, of_size: Size, target: targets.Target) -> dict[str, Any]:
    """What a program does on one device of a target."""
    train = TrainConfig(batch_size=of_size.batch)
    mesh = meshes.abstract_mesh(meshes.MeshConfig(), target.n_devices)
    weights = of_size.n * of_size.d // target.n_devices
    kernels = [
        {
            "origin": kernel.origin,
            "kind": kernel.kind,
            "times": kernel.times,
            "bytes": kernel.times * kernel.bytes,
            "flop": kernel.times * sum(kernel.flop.values()),
            "seconds": kernel.times * roofline(kernel, target),
        }
        for kernel in program.kernels
    ]
    passed = sum(
        kernel.times * moved.bytes
        for kernel in program.kernels
        for moved in kernel.moved
        if moved.is_whole and moved.elements == weights
    )
    return {
        "launches": sum(kernel.times for kernel in program.kernels),
        "bytes": program.moved_bytes,
        "arrays": passed / (4 * weights),
        "sorts": program.sorts,
        "open_loops": program.open_loops,
        "roofline_seconds": sum(kernel["seconds"] for kernel in kernels),
        "floor_seconds": analytic.floor_seconds(analytic.step(sae, train, Widths.one(of_size.d), mesh), target),
        "kernels": sorted(kernels, key=lambda kernel: -kernel["seconds"]),
    }


def roofline(kernel: hlo.Kernel, target: targets.Target) -> float:
    """Seconds that a kernel takes at least: its FLOP at the matrix rate, or its bytes at the bandwidth."""
    product = sum(n / target.rate("bfloat16" if kind == "bf16" else "float32") for kind, n in kernel.flop.items())
    return max(product, kernel.bytes / target.chip.bandwidth)


def largest(title: str, counted: dict[str, Any]) -> Any:
    """The kernels that take longest at their roofline."""
    rows = [
        [
            *(kernel["origin"][-60:] or kernel["kind"], kernel["times"], size(kernel["bytes"])),
            *(kernel["seconds"] * 1e3, kernel["seconds"] / counted["roofline_seconds"]),
        ]
        for kernel in counted["kernels"][:LARGEST]
    ]
    return common.table(title, ["kernel", "times", "HBM", "roofline, ms", "share"], rows)


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
