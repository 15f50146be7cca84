"""Does a dictionary whose state is a sixth of the size learn as well, and how wide is the widest that one GPU trains?

Question: with weights in bf16 (rounded stochastically), int8 moments and gradients by tiles of latents, is the FVU on
rows that no step has seen within the spread of seeds of a float32 state? Does a step of 2^20, and of 16,777,216 latents
x 768 run on one GPU, in which time and memory, and does FVU fall?
Guess: the FVU is within the spread of three seeds; a step of 16M latents with 8,192 rows takes half a second, in 100
GiB.
Command: python experiments/narrow_state.py --out OUT --only seeds       # 2^16 latents, 10,000 steps, three seeds
         python experiments/narrow_state.py --out OUT --only million     # 2^20 latents, float32 and narrow
         XLA_FLAGS=--xla_gpu_autotune_level=0 python experiments/narrow_state.py --out OUT --only sixteen    # 2^24
         python experiments/narrow_state.py --smoke
Cost: a run of part seeds 25 to 60 seconds on an H200; each part writes OUT/results.json after every measurement.
Answer: as well, as far as it was run; 16M latents did not start. On an H200 with other runs beside (JAX 0.11.2), 2^16
latents of d=768, 10,000 steps of 1,024 rows, FVU of 2,048 rows held out: seed 0 0.1797 narrow, 0.1802 in float32, with
14.1 and 13.0 % dead, 4.7 and 2.6 ms a step, 0.38 and 1.13 GiB of state; seed 1 0.1803 in float32, the rest was cut off
(narrow at step 7,000: as in float32 to a thousandth). 2^24: while the step was compiled beside its state, XLA tried
variants of a kernel on arrays of their own and asked for 24 GiB more than there was; without that (the flag above, not
tried yet) the step takes 105 GiB by its program. Now the step is compiled before there is a state. 2^20: not run.

On two busy cores (JAX 0.10.2), small, FVU of 2,048 rows held out after 512,000 tokens:

    --only seeds --d-model 128 --n-latents 4096 --batch-size 512 --steps 1000

    seed       0         1         2         mean
    float32    0.19375   0.19412   0.19380   0.19389
    narrow     0.19373   0.19361   0.19476   0.19403

The means differ by 0.00014, the seeds of float32 by up to 0.00037; one narrow run of three is 0.0006 above the worst of
float32, two are below its best. Norms of decoder rows were within 0.001 of 1.

Rows are made on the device, each step its own: a mean, 24 of 2^15 random directions, those of low rank more often than
others, with exponential strengths, and noise of a tenth of the variance. So the FVU of a batch is that of rows which
the dictionary has not learnt from.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

# Before JAX starts: it would take three quarters of a GPU's memory, and 16M latents need more.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax

from sae_jax.ops import tuning
from sae_jax.progress import console
from sae_jax.saes import init, topk
from sae_jax.saes.base import Batch
from sae_jax.training.settings import TrainConfig, hyperparameters
from sae_jax.training.state import initial
from sae_jax.training.step import make_step

STATES: dict[str, dict[str, Any]] = {
    "float32": {"weights": "float32", "moments": "float32"},
    "narrow": {"weights": "bfloat16", "moments": "int8"},
}
N_ACTIVE = 24  # directions of a row
HELD_OUT = 99  # seed of the rows that are measured on
SIXTEEN_GIB = 105


@dataclasses.dataclass(frozen=True)
class Config:
    """Which parts, and their sizes."""

    out: Path = Path("build/narrow_state")
    """Folder for results.json."""
    only: tuple[str, ...] = ("seeds", "sixteen", "million")
    """Parts, in this order."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of part seeds."""
    d_model: int = 768
    """Width of the rows."""
    n_latents: int = 2**16
    """Of part seeds."""
    steps: int = 10_000
    """Of each run of part seeds."""
    batch_size: int = 1024
    """Rows of a step of part seeds."""
    wide_steps: int = 40
    """Of part sixteen; five times as many of part million."""
    wide_batch_size: int = 8192
    """Rows of a step of parts sixteen and million."""
    wide_lr: float | None = None
    """Learning rate of parts sixteen and million; None: that of long runs, 2e-4 at 2^14 latents, less by the root."""
    smoke: bool = False
    """All parts at toy sizes: do they run?"""


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a run."""

    d_model: int
    n_latents: int
    batch_size: int
    steps: int
    chunk: int  # steps that are queued as one program
    lr: float | None = None
    k: int = 32


def main(config: Config) -> None:
    """Do the parts, one after another."""
    results: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    config.out.mkdir(parents=True, exist_ok=True)

    def note(part: str, found: dict[str, Any]) -> None:
        results.setdefault(part, []).append(found)
        console.print(f"{part}: {json.dumps(found)}")
        (config.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    if config.smoke:
        config = dataclasses.replace(config, d_model=64, n_latents=512, steps=60, batch_size=256, seeds=(0, 1))
        config = dataclasses.replace(config, wide_steps=4, wide_batch_size=256)
    million, sixteen = (2**12, 2**13) if config.smoke else (2**20, 2**24)

    def wide(n_latents: int, steps: int, chunk: int) -> Size:
        lr = config.wide_lr or 2e-4 * (2**14 / n_latents) ** 0.5
        return Size(config.d_model, n_latents, config.wide_batch_size, steps, chunk, lr)

    for part in config.only:
        if part == "seeds":
            size = Size(config.d_model, config.n_latents, config.batch_size, config.steps, max(1, config.steps // 20))
            for seed in config.seeds:
                for state in STATES:
                    note(part, trained(size, state, seed))
                note("spread", spread(results["seeds"]))
        elif part == "million":
            for state in STATES:
                note(part, trained(wide(million, 5 * config.wide_steps, config.wide_steps), state, 0))
        elif part == "sixteen":
            limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0) / 2**30
            if 0 < limit < SIXTEEN_GIB and not config.smoke:
                note(part, {"skipped": f"JAX has {limit:.0f} GiB of this device, and it takes {SIXTEEN_GIB}"})
            else:
                note(part, trained(wide(sixteen, config.wide_steps, 1), "narrow", 0))
        else:
            raise SystemExit(f"--only {part}: there are seeds, million, sixteen")


def trained(size: Size, state: str, seed: int) -> dict[str, Any]:
    """A run: FVU of the first batches and the last, and of rows held out; time of a step, once compiled; memory."""
    sae, train = settings(size, state)
    hparams = hyperparameters(dataclasses.replace(train, seed=seed), sae)
    began = time.monotonic()
    world = directions(size)
    first_rows = sample(size, world)
    start, steps, measure = programs(size, state, first_rows, hparams, world)
    console.print(f"  {state}, seed {seed}: compiled after {time.monotonic() - began:.0f} s")
    at = jax.block_until_ready(start(first_rows, hparams))
    before = float(measure(at.sae, world))
    born = time.monotonic()
    fvu, seconds = [], []
    for first in range(0, size.steps, size.chunk):
        queued = time.monotonic()
        at, found = steps(at, hparams, jnp.int32(seed), world)
        fvu += [float(f) for f in np.asarray(jax.device_get(found["fvu"]))]
        seconds.append((time.monotonic() - queued) / size.chunk)
        done = first + size.chunk
        console.print(f"  {state}, seed {seed}, step {done}: fvu {fvu[-1]:.4f}, {1e3 * seconds[-1]:.2f} ms a step")
    held_out = float(measure(at.sae, world))
    norms = np.asarray(jax.device_get(row_norms(at.sae)))
    memory = jax.devices()[0].memory_stats() or {}
    n = max(1, min(100, size.steps // 10))
    return {
        "state": state,
        "seed": seed,
        **dataclasses.asdict(size),
        "tokens": size.steps * size.batch_size,
        "fvu_held_out_before": before,
        "fvu_held_out": held_out,
        "fvu_first": float(np.mean(fvu[:n])),
        "fvu_last": float(np.mean(fvu[-n:])),
        "fvu_of_batches": [round(f, 5) for f in fvu[:: max(1, len(fvu) // 20)]],
        "dead_fraction": float(found["dead_fraction"][-1]),
        "norms_of_rows": [float(norms.min()), float(norms.max())],
        "ms_a_step": 1e3 * float(np.median(seconds[1:] or seconds)),
        "seconds_to_compile_and_begin": born - began,
        "seconds": time.monotonic() - began,
        # Of the process so far: the first run of a kind says what it took.
        "gib_at_most": memory.get("peak_bytes_in_use", 0) / 2**30,
        "gib_of_state": sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(at)) / 2**30,
    }


def spread(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """FVU on rows held out of each kind of state, by seed, and how far apart the seeds of float32 are."""
    fvu = {state: [run["fvu_held_out"] for run in runs if run["state"] == state] for state in STATES}
    means = {state: float(np.mean(values)) for state, values in fvu.items()}
    return {
        **fvu,
        "spread_of_float32": max(fvu["float32"]) - min(fvu["float32"]),
        "narrow_minus_float32": means["narrow"] - means["float32"],
    }


def settings(size: Size, state: str) -> tuple[topk.Config, TrainConfig]:
    """TopK as configs/openai_16m_gpt2.yaml has it: no clipping, here without an average."""
    sae = topk.Config(n_latents=size.n_latents, k=size.k, input_norm="none")
    sae = sae.on(jax.default_backend())
    kept = STATES[state]
    train = TrainConfig(steps=size.steps, batch_size=size.batch_size, lr=size.lr, clip=0.0, ema=0.0, **kept)
    return sae, train


_programs: dict[Any, Any] = {}


def programs(size: Size, state: str, sample: init.Sample, hparams: Any, world: jax.Array) -> tuple[Any, Any, Any]:
    """(initial state, the steps of a chunk, FVU on rows held out), compiled once for all seeds.

    The steps are compiled before there is a state: the compiler tries variants of kernels on arrays of their own.
    """
    if (size, state) not in _programs:
        sae, train = settings(size, state)
        step = make_step(sae.program, train, by_tiles=train.weights != "float32")

        def start(sample: init.Sample, hparams: Any) -> Any:
            return initial(sae.program, train, sample, hparams)

        def one(hparams: Any, seed: jax.Array, world: jax.Array, at: Any, _: Any) -> tuple[Any, Any]:
            at, metrics = step(at, hparams, Batch(x := rows(size, world, seed, at.step), x))
            return at, {name: metrics[name] for name in ("fvu", "dead_fraction")}

        def chunk(at: Any, hparams: Any, seed: jax.Array, world: jax.Array) -> tuple[Any, Any]:
            if size.chunk == 1:  # no loop around a step: its state must not be there twice
                at, found = one(hparams, seed, world, at, None)
                return at, jax.tree.map(lambda a: a[None], found)
            return lax.scan(partial(one, hparams, seed, world), at, None, size.chunk)

        def measure(sae: Any, world: jax.Array) -> jax.Array:
            def sums(i: jax.Array) -> tuple[jax.Array, jax.Array]:
                x = rows(size, world, jnp.int32(HELD_OUT), i).astype(jnp.float32)
                x_hat, _ = sae.reconstruct_rows(x)
                return ((x - x_hat) ** 2).sum(), ((x - mean_row(size)[None]) ** 2).sum()

            left, all_ = lax.map(sums, jnp.arange(4, dtype=jnp.int32))
            return left.sum() / all_.sum()

        begin, steps = tuning.jit(start), tuning.jit(chunk, donate_argnums=0)
        compiled = steps.trace(jax.eval_shape(begin, sample, hparams), hparams, jnp.int32(0), world).lower().compile()
        _programs[size, state] = begin, compiled, tuning.jit(measure)
    return _programs[size, state]


def sample(size: Size, world: jax.Array) -> init.Sample:
    """What a dictionary begins from."""
    x = jax.jit(partial(rows, size))(world, jnp.int32(HELD_OUT), jnp.int32(10**6))
    return init.sample_statistics(np.asarray(x, np.float32)[:1024], "none")


def directions(size: Size) -> jax.Array:
    """What rows are made of, bf16[A, D]."""
    shape = (2**15 if size.d_model > 64 else 1024, size.d_model)
    return jax.random.normal(jax.random.key(0), shape, jnp.bfloat16) * jnp.bfloat16(size.d_model**-0.5)


def rows(size: Size, world: jax.Array, seed: jax.Array, number: jax.Array) -> jax.Array:
    """Batch `number` of a seed, bf16[B, D], made of the directions `world`."""
    d, b = size.d_model, size.batch_size
    keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(1), seed), number), 3)
    # The rank of a direction is chosen with a chance that falls as 1 / rank.
    chosen = jnp.exp(jax.random.uniform(keys[0], (b, N_ACTIVE)) * np.float32(np.log(len(world)))).astype(jnp.int32)
    strengths = jax.random.exponential(keys[1], (b, N_ACTIVE))
    noise = jax.random.normal(keys[2], (b, d)) * np.float32((N_ACTIVE / 5 / d) ** 0.5)

    x = (strengths[:, :, None] * world[jnp.minimum(chosen, len(world)) - 1].astype(jnp.float32)).sum(1)
    return (x + noise + mean_row(size)[None]).astype(jnp.bfloat16)


def mean_row(size: Size) -> jax.Array:
    """What is added to all rows, f32[D]."""
    return jax.random.normal(jax.random.key(2), (size.d_model,)) / 2


@jax.jit
def row_norms(sae: Any) -> jax.Array:
    """Least and largest norm of a decoder row, f32[2]."""
    norms = jnp.sqrt((sae.w_dec.astype(jnp.float32) ** 2).sum(-1))
    return jnp.stack([norms.min(), norms.max()])


if __name__ == "__main__":
    main(tyro.cli(Config))
