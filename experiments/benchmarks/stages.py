"""Where does a training step spend its time, and how far is each stage from what the machine allows?

Each stage runs alone, jitted, on one device, with arguments of the shapes that it has in a step; the whole step runs as
in training. The floor of a stage is the longer of two times: its FLOP at the rate of a large bf16 product, measured in
the same run, and the bytes that it must move, each array once, at the rate of a scaled sum of two large arrays. A stage
can be below a floor of bytes where its data stay in cache. The floor of the whole step is that of what cannot hide
behind anything else: encoder product, Adam and running average. Two more steps show what AuxK adds.

    python experiments/benchmarks/stages.py --out stages.json
    python experiments/benchmarks/stages.py --smoke

Guess beforehand: products near their floor, selection twice its own, scatters three times theirs.

Answer: RESULTS.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from sae_jax.ops import encode, sparse, topk, tuning
from sae_jax.saes import base, init
from sae_jax.saes.topk import Config
from sae_jax.training import optim
from sae_jax.training.settings import TrainConfig, hyperparameters
from sae_jax.training.state import initial
from sae_jax.training.step import Step

CANNOT_HIDE = ("encoder product and selection", "Adam", "running average")


@dataclass(frozen=True)
class Benchmark:
    """Sizes of the benchmark."""

    d: int = 768
    n_latents: int = 32768
    k: int = 32
    batch_size: int = 2048
    out: Path | None = None  # JSON with every measurement
    smoke: bool = False  # small sizes, seconds


@dataclass(frozen=True)
class Stage:
    """A part of a step: how often a step runs it, and what it must do each time."""

    call: Callable[[], Any]
    times: float = 1
    flop: float = 0
    n_bytes: float = 0


def main(config: Benchmark) -> None:
    if config.smoke:
        config = Benchmark(32, 2048, 4, 256, config.out, True)
    flop_rate, byte_rate = common.matmul_rate(config.n_latents, config.d), common.memory_rate()
    rows, record = [], {}
    for name, stage in stages(config).items():
        seconds = stage.times * common.seconds_of(stage.call)
        floor = stage.times * max(stage.flop / flop_rate, stage.n_bytes / byte_rate)
        floor = floor or sum(record[part]["floor"] for part in CANNOT_HIDE)
        record[name] = {"seconds": seconds, "floor": floor}
        rows.append([name, f"{seconds * 1e3:.1f}", f"{floor * 1e3:.1f}", seconds / floor])
    title = (
        f"d={config.d}, n={config.n_latents}, k={config.k}, batch {config.batch_size}; "
        f"{flop_rate / 1e9:,.0f} GFLOP/s, {byte_rate / 1e9:.1f} GB/s"
    )
    facts = {"config": asdict(config), "flop_rate": flop_rate, "byte_rate": byte_rate, "stages": record}
    common.report(common.table(title, ["stage", "ms a step", "floor, ms", "ratio"], rows), facts, config.out)


def stages(config: Benchmark) -> dict[str, Stage]:
    """The stages in the order of a step, the parts of the encoder indented below it; the whole step last."""
    n, d, k, b = config.n_latents, config.d, config.k, config.batch_size
    sae_config = Config(n_latents=n, k=k)
    train_config = TrainConfig(batch_size=b, clip=0, ema=0.999, dead_after_tokens=10_000_000)
    x_BD = jnp.asarray(np.concatenate([*common.structured_rows(b, d, seed=0)]))
    sample = init.sample_statistics(np.asarray(x_BD), "none")
    begin = jax.jit(lambda sample: initial(sae_config, train_config, sample))
    hparams = hyperparameters(train_config, sae_config)
    state, tx = begin(sample), optim.optimiser(train_config, hparams, sae_config.ADAM)
    sae = state.sae
    bf16, cut = jnp.dtype(jnp.bfloat16), tuning.current()
    largest = jax.jit(lambda x, sae: encode.largest(x.astype(bf16), sae.w_enc, sae.b_enc, k, bf16))
    values_BK, index_BK = largest(x_BD, sae)
    pre = jax.random.normal(jax.random.key(0), (n, cut.block_rows) if cut.latent_major else (cut.block_rows, n))
    select = jax.jit(lambda pre: (topk.top_k_latent_major if cut.latent_major else topk.top_k)(pre, k))
    gather = jax.jit(lambda index, value, w: sparse.gather_rows(index, value, w))
    products = jax.jit(lambda index, value, x, w: sparse.sampled_products(index, value, x[:, None], w))

    along = jax.jit(lambda gradient, sae: (optim.along_sphere(gradient, sae)[1], (gradient.w_dec * sae.w_dec).sum(-1)))

    def adam(held, gradient):
        updates, moments = tx.update(gradient, held[1], norm=jnp.float32(1))
        return optax.apply_updates(held[0], updates), moments

    matrix, touched = 4 * n * d, 4 * min(b * k, n) * d  # bytes of a weight matrix, and of its rows that a code names
    batch = 4 * b * d
    pairs = 8 * b * k
    gradient = jax.tree.map(jnp.ones_like, sae)
    step = Step(sae_config, train_config)

    def whole_step(dead_share: float) -> Callable[[], jax.Array]:
        """A step in which that share of the latents is dead and stays so: a bias keeps them from firing."""
        held = [begin(sample)]
        is_dead = np.random.default_rng(0).random(n) < dead_share
        silent = jnp.where(is_dead, train_config.dead_after_tokens + 1, 0).astype(jnp.int32)
        sae = replace(held[0].sae, b_enc=jnp.where(is_dead, -1e6, 0.0))
        held[0] = replace(held[0], sae=sae, counters=replace(held[0].counters, silent=silent))

        def call() -> jax.Array:
            held[0], metrics = step(held[0], hparams, base.Batch(x_BD, x_BD))  # donates the state
            return metrics["loss"]

        return call

    return {
        "encoder product and selection": Stage(
            lambda: largest(x_BD, sae), flop=2 * b * n * d, n_bytes=matrix + batch + pairs
        ),
        "  of which selection": Stage(lambda: select(pre), b / cut.block_rows, n_bytes=pre.nbytes),
        "decode": Stage(lambda: gather(index_BK, values_BK, sae.w_dec), n_bytes=touched + batch + pairs),
        "sampled products": Stage(
            lambda: products(index_BK, values_BK, x_BD, sae.w_dec), n_bytes=touched + batch + pairs
        ),
        "row scatter-adds, both matrices": Stage(
            in_place(
                lambda out, index, value, x: sparse.scatter_rows(jnp.zeros_like(out), index, value, x[:, None]),
                *(gradient.w_dec, index_BK, values_BK, x_BD),
            ),
            times=2,
            n_bytes=matrix + batch + pairs,
        ),
        "norm of the gradients, and what is along unit rows": Stage(lambda: along(gradient, sae), n_bytes=3 * matrix),
        "Adam": Stage(in_place(adam, (sae, state.optimiser_state), gradient), n_bytes=7 * 2 * matrix),
        "renormalise": Stage(in_place(init.unit_rows, sae.w_dec), n_bytes=2 * matrix),
        "running average": Stage(
            in_place(lambda kept, w: optim.ema_update(kept, w, 0.999, jnp.int32(1)), state.average, sae),
            n_bytes=3 * 2 * matrix,
        ),
        "whole step": Stage(whole_step(0.0)),
        "whole step, 5 % of the latents dead": Stage(whole_step(0.05)),
        "whole step, 50 % of the latents dead": Stage(whole_step(0.5)),
    }


def in_place(function: Callable[..., Any], held: Any, *fixed: Any) -> Callable[[], Any]:
    """A call that turns what it holds into the next, in the same memory, as a step does: new memory costs more."""
    run = jax.jit(function, donate_argnums=0, keep_unused=True)
    kept = [jax.tree.map(jnp.copy, held)]

    def call() -> Any:
        kept[0] = run(kept[0], *fixed)
        return kept[0]

    return call


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
