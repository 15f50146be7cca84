"""What does each device have to do, hold and send when a training step is split over more of them?

The real step is compiled for 1, 2, 4 and 8 virtual CPU devices, and not run: on two cores their wall time would say
nothing. Read from the compiled program of one device, for a step in which no latent is dead: FLOP of its products and
bytes of each kind of collective (of each the larger of what goes in and what comes out, loops counted as often as they
run); for any step: bytes of state, and peak. Strong scaling splits one problem; weak scaling widens the dictionary with
the number of devices.

    python experiments/benchmarks/scaling.py --out scaling.json
    python experiments/benchmarks/scaling.py --smoke

Guess beforehand: FLOP and state fall as 1 / devices, collectives stay flat, in weak scaling all of them stay.

Answer: RESULTS.md.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Before JAX starts, which reads it once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import common
import tyro

from sae_jax.planning import hlo
from sae_jax.saes.topk import Config
from sae_jax.training.settings import TrainConfig


@dataclass(frozen=True)
class Benchmark:
    """Sizes of the benchmark."""

    d: int = 768
    k: int = 32
    n_latents: int = 65536  # of strong scaling, and of weak scaling on one device
    batch_size: int = 8192
    devices: tuple[int, ...] = (1, 2, 4, 8)
    out: Path | None = None  # JSON with every figure
    smoke: bool = False  # small sizes, seconds


def main(config: Benchmark) -> None:
    if config.smoke:
        config = Benchmark(16, 4, 1024, 256, (8,), config.out, True)
    tables, record = [], {}
    for title, width, in_rows in (
        ("strong scaling, over the dictionary", lambda _: config.n_latents, False),
        ("weak scaling, over the dictionary", lambda n: config.n_latents * n, False),
        ("strong scaling, over the rows", lambda _: config.n_latents, True),
    ):
        results = [measure(config, n, width(n), in_rows) for n in config.devices]
        kinds = sorted({kind for result in results for kind in result["collectives"]})
        rows = []
        for n, result in zip(config.devices, results, strict=True):
            moved = (common.mib(result["collectives"].get(kind, 0)) for kind in kinds)
            held = (common.mib(result[name]) for name in ("state", "peak"))
            rows.append([n, f"{result['n_latents']:,}", f"{result['flop'] / 1e9:.2f}", *held, *moved])
        columns = ["devices", "n", "GFLOP of products", "state, MiB", "peak, MiB", *(f"{kind}, MiB" for kind in kinds)]
        tables.append(common.table(f"{title}: one device of d={config.d}, batch {config.batch_size}", columns, rows))
        record[title] = results
    common.report(tables, {"config": asdict(config), "results": record}, config.out)


def measure(config: Benchmark, n_devices: int, n_latents: int, in_rows: bool) -> dict[str, Any]:
    """What one device has to do."""
    sae, train = Config(n_latents=n_latents, k=config.k), TrainConfig(batch_size=config.batch_size, ema=0)
    step = common.compile_step(sae, train, config.d, n_devices, data=n_devices if in_rows else 1)
    program = hlo.analyse(step.text, quietest=True)
    return {
        "devices": n_devices,
        "n_latents": n_latents,
        "flop": program.matmul_flop,
        "state": step.state,
        "peak": step.peak,
        "collectives": {kind: found.bytes for kind, found in program.collectives.items()},
        "open_loops": program.open_loops,
    }


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
