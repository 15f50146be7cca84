"""How much memory does a training step need, and how does that grow with the batch and with the width?

Nothing is run: the real step is compiled for one CPU device, and its compiler asked what it will hold. Columns: state
(weights, moments, average, counters), gradients (one more copy of the weights), input (the batch in bfloat16, which the
compiler counts twice, as x and as y), and the rest: all that the step puts aside. The program's text is then searched
for arrays of at least batch x latents elements.

    python experiments/benchmarks/memory.py --out memory.json
    python experiments/benchmarks/memory.py --smoke

Guess beforehand: the rest below 1 GiB at n=131072 and batch 8192, and 15 % more peak for 8 times the batch.

Answer: RESULTS.md.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import jax
import tyro

from sae_jax.planning import hlo
from sae_jax.saes.topk import Config
from sae_jax.training.settings import TrainConfig

PARTS = ("state", "gradients", "input", "rest", "peak")


@dataclass(frozen=True)
class Benchmark:
    """Sizes of the benchmark."""

    d: int = 768
    k: int = 32
    latents: tuple[int, ...] = (32768, 65536, 131072)  # at the smallest batch
    batches: tuple[int, ...] = (8192, 16384, 32768, 65536)  # at the largest width
    ema: float = 0.0
    out: Path | None = None  # JSON with every measurement
    smoke: bool = False  # small sizes, seconds


def main(config: Benchmark) -> None:
    jax.config.update("jax_platforms", "cpu")
    if config.smoke:
        config = Benchmark(16, 4, (1024,), (256, 512), config.ema, config.out, True)
    cases = [(n, min(config.batches)) for n in config.latents]
    cases += [(max(config.latents), b) for b in config.batches if b != min(config.batches)]
    results = [measure(config, n, b) for n, b in cases]
    rows = [
        [
            f"{r['n_latents']:,}",
            f"{r['batch_size']:,}",
            *(common.mib(r[p]) for p in PARTS),
            " ".join(r["large"]) or "none",
        ]
        for r in results
    ]
    columns = ["n", "batch", *PARTS, "arrays of batch x n elements"]
    title = f"MiB of a step, d={config.d}, k={config.k}, AuxK on, EMA {'on' if config.ema else 'off'}, one device"
    common.report(common.table(title, columns, rows), {"config": asdict(config), "results": results}, config.out)


def measure(config: Benchmark, n_latents: int, batch_size: int) -> dict[str, Any]:
    """Bytes of one case."""
    sae, train = Config(n_latents=n_latents, k=config.k), TrainConfig(batch_size=batch_size, ema=config.ema)
    step = common.compile_step(sae, train, config.d, n_devices=1)
    buffers = hlo.analyse(step.text, n_largest=10**6).largest
    return {
        "n_latents": n_latents,
        "batch_size": batch_size,
        "state": step.state,
        "gradients": step.weights,
        "input": step.input,
        "rest": step.peak - step.state - step.weights - step.input,
        "peak": step.peak,
        "large": [buffer.shape for buffer in buffers if common.elements(buffer.shape) >= batch_size * n_latents],
    }


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
