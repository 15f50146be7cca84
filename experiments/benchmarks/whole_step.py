"""What does a whole training step take on this machine, and what does each setting change?

Steps are queued and waited for together, on a batch that lies on the device, at sizes A (d=768, n=131,072, k=32) and B
(d=4,096, n=262,144, k=64) with 8,192 rows; and at C (d=768, n=32,768, k=32) with 2,048 for CPUs, if it is named. First
the defaults, then each change alone: no average, no clipping, bf16 moments, the kernels where there is a GPU, larger
and smaller blocks, other variants at the same k or L0, and dead latents that stay so. Where a part is named, only
settings that contain it are run.

The floor is the encoder product at this machine's rate and 16 arrays of weight size, weights and moments read and
written, at its bandwidth, both measured in the same process. Each line is written as soon as it is known.

    python experiments/benchmarks/whole_step.py --out steps.json                    # one GPU of 80 GB; ten minutes
    python experiments/benchmarks/whole_step.py --sizes A --only dead --out dead.json
    python experiments/benchmarks/whole_step.py --smoke

Guess beforehand: 2.3 times the floor at A and 1.8 at B by default; BatchTopK 1.1 and Matryoshka 1.2 times a TopK step,
JumpReLU 4 times.

Answer: RESULTS.md has what was timed at A and B on an H200 before ("One H200"). At C, on a CPU, BatchTopK and
Matryoshka take 1.39 times a TopK step, JumpReLU 1.08 ("What families cost").
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import SIZES, Size

from sae_jax.ops import tuning
from sae_jax.saes import base, init
from sae_jax.training.settings import TrainConfig, hyperparameters
from sae_jax.training.state import initial
from sae_jax.training.step import Step

DEAD = (0.02, 0.1, 0.5, 0.95)  # shares of the latents
VARIANTS = ("batch_topk", "matryoshka", "jumprelu")


@dataclass(frozen=True)
class Benchmark:
    """What to time."""

    sizes: tuple[str, ...] = ("A", "B")
    only: tuple[str, ...] = ()  # parts of the names of settings; all if none is named
    queued: int = 8  # steps that are waited for together
    turns: int = 6  # of which the third least counts
    out: Path | None = None  # JSON with every measurement
    smoke: bool = False  # tiny, seconds


@dataclass(frozen=True)
class Setting:
    """One change of the defaults."""

    name: str
    variant: str = "topk"
    sae: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    engine: tuning.EngineConfig = field(default_factory=tuning.EngineConfig)
    dead: float = 0.0  # share of the latents


def settings() -> Iterator[Setting]:
    """The defaults, and each change alone."""
    yield Setting("default")
    yield Setting("no average", train={"ema": 0.0})
    yield Setting("no clipping", train={"clip": 0.0})
    yield Setting("bf16 moments", train={"moments": "bfloat16"})
    yield Setting("int8 moments", train={"moments": "int8"})
    if jax.default_backend() == "gpu":
        yield Setting("kernels", engine=tuning.EngineConfig(kernels=True))
        yield Setting("blocks of 1,024 rows", engine=tuning.EngineConfig(block_rows=1024, block_mib=512))
        yield Setting("blocks of 4,096 rows", engine=tuning.EngineConfig(block_rows=4096, block_mib=2048))
    for variant in VARIANTS:
        yield Setting(variant, variant)
    for share in DEAD:
        yield Setting(f"{share:.0%} dead", dead=share)
        yield Setting(f"{share:.0%} dead, all rows", sae={"aux_rows": "all"}, dead=share)


def main(config: Benchmark) -> None:
    if config.smoke:
        config = replace(config, sizes=("smoke",), queued=1, turns=3)
    rows, record = [], {}
    for name in config.sizes:
        size, times = SIZES[name], {}
        floor = floor_seconds(size)
        for setting in settings():
            if config.only and not any(part in setting.name for part in config.only):
                continue
            try:
                times[setting.name] = measured = measure(setting, size, config)
            except jax.errors.JaxRuntimeError as error:  # it does not fit; the others go on
                print(f"{name}, {setting.name}: {str(error).splitlines()[0][:120]}", file=sys.stderr, flush=True)
                continue
            seconds, first = measured["seconds"], next(iter(times.values()))["seconds"]
            print(f"{name}, {setting.name}: {seconds * 1e3:.3f} ms", file=sys.stderr, flush=True)
            rows.append([f"{name}, {setting.name}", seconds * 1e3, seconds / floor, seconds / first, measured["peak"]])
            record[name] = {"size": vars(size), "floor_seconds": floor, "settings": times}
            if config.out is not None:
                common.report([], {"sizes": record}, config.out)
    columns = ["", "ms a step", "times the floor", "times the first", "peak, GiB"]
    common.report(common.table("Whole steps", columns, rows), {"sizes": record}, config.out)


def floor_seconds(size: Size) -> float:
    """One encoder product, then weights and moments of both matrices read and written."""
    product = 2 * size.batch * size.n * size.d / common.matmul_rate(size.n, size.d)
    return product + 16 * 4 * size.n * size.d / common.memory_rate()


def measure(setting: Setting, size: Size, config: Benchmark) -> dict[str, Any]:
    """Seconds of a step, and the most memory that the process has had on the device."""
    cls = base.config_class(setting.variant)
    active = {"target_l0": float(size.k)} if setting.variant == "jumprelu" else {"k": size.k}
    sae_config = cls(n_latents=size.n, **active, **setting.sae)  # pyrefly: ignore[unexpected-keyword]
    train_config = TrainConfig(batch_size=size.batch, dead_after_tokens=10_000_000, **setting.train)
    x_BD = jnp.asarray(np.concatenate([*common.structured_rows(size.batch, size.d, seed=0, block=size.batch)]))
    batch, hparams = base.Batch(x_BD, x_BD), hyperparameters(train_config, sae_config)
    sample = init.sample_statistics(np.asarray(x_BD), sae_config.input_norm)
    with tuning.using(setting.engine.on(jax.default_backend())):
        state = tuning.jit(lambda sample: initial(sae_config, train_config, sample))(sample)
        if setting.variant == "jumprelu":
            state = replace(state, sae=as_sparse(state.sae, x_BD, size.k))
        if setting.dead:
            is_dead = np.random.default_rng(0).random(size.n) < setting.dead
            silent = jnp.where(is_dead, train_config.dead_after_tokens + 1, 0).astype(jnp.int32)
            # A bias keeps them from firing.
            sae = replace(state.sae, b_enc=jnp.asarray(np.where(is_dead, np.float32(-1e6), np.float32(0))))
            state = replace(state, sae=sae, counters=replace(state.counters, silent=silent))
        step = Step(sae_config, train_config)
        state, metrics = step(state, hparams, batch)
        turns: list[float] = []
        for _ in range(config.turns):
            jax.block_until_ready(state)
            began = time.perf_counter()
            for _ in range(config.queued):
                state, metrics = step(state, hparams, batch)
            jax.block_until_ready(state)
            turns.append((time.perf_counter() - began) / config.queued)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    loss = float(metrics["loss"])
    return {"seconds": sorted(turns)[min(2, len(turns) - 1)], "turns": turns, "peak": peak / 2**30, "loss": loss}


def as_sparse(sae: Any, x_BD: jax.Array, k: int) -> Any:
    """A JumpReLU with biases at which k latents are active on average, as they are once it has come to its L0."""
    above_SF = (x_BD[:256] - sae.b_dec) @ sae.w_enc.T + sae.b_enc - sae.threshold
    return replace(sae, b_enc=sae.b_enc - jnp.quantile(above_SF, 1 - k / sae.b_enc.shape[0]))


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
