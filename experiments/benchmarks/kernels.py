"""Are the GPU kernels of sae_jax/ops/pallas_*.py faster than XLA at the same ops, and how far from the floor?

Each op runs on one GPU at two sizes, by kernel and by XLA. Before it is timed it is checked: whole-number inputs have
exact products in any order, so both must choose the same latents, ties included. The floor of an op is the larger of
its FLOP at the matrix rate and its bytes at the memory rate, both measured here by one large product and one large
copy; bytes count each array that must be read or written once, and a gathered row once for each time it is wanted, as
tables are larger than the cache.

    python experiments/benchmarks/kernels.py --out kernels.json      # one GPU with 40 GB or more; minutes
    python experiments/benchmarks/kernels.py --smoke                 # any machine: equality only, in interpret mode

Guess beforehand: selection is where the kernel wins (XLA sorts every row whole, or its best k groups, for k above 16),
three times or more; sums and products win the traffic of the running sum that XLA's scan carries, about two times.

Answer: on an H200 sums are: 0.6 to 0.8 of XLA's time with its slots taken at once (RESULTS.md). Selection with its
product takes 0.84 of XLA's product and selection at d=768 and 1.08 at d=4096; sampled products are slower than one
fused op of XLA's. A whole step takes 6 to 14 % less. They are off by default: at d=768 a latent in every row makes the
scatter-add three times as slow.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.table import Table

from sae_jax.ops import pallas_encode, pallas_sparse, sparse, topk
from sae_jax.progress import plain_console

BLOCK_BYTES = 256 * 2**20  # of pre-activations in one row block


@dataclass(frozen=True)
class Size:
    """One problem; `block_rows` rows are encoded at a time, `n_rows` are decoded."""

    d: int
    n: int
    k: int
    block_rows: int
    n_rows: int


@dataclass(frozen=True)
class Benchmark:
    """Which sizes, and how often."""

    sizes: tuple[Size, ...] = tuple(
        Size(d, n, k, BLOCK_BYTES // (4 * n), 8192) for d, n, k in ((768, 131072, 32), (4096, 262144, 64))
    )
    repeats: int = 20
    out: Path | None = None  # JSON with every measurement
    smoke: bool = False  # tiny sizes in interpret mode; nothing is timed


def main(config: Benchmark) -> None:
    if config.smoke:
        for size in (Size(24, 1100, 3, 5, 6), Size(40, 8192, 2, 16, 9)):
            check(size, interpret=True)
        plain_console().print("kernels and XLA agree")
        return
    if jax.default_backend() != "gpu":
        raise SystemExit(
            "this benchmark times GPU kernels and JAX sees no GPU here; --smoke checks them on any machine"
        )
    flops, bandwidth = measured_rates(config.repeats)
    results = []
    for size in config.sizes:
        check(size, interpret=False)
        for name, floor, (kernel, by_xla), args in ops(size, interpret=False):
            inputs = make_inputs(args, whole_numbers=False)
            results.append(
                {
                    "op": name,
                    **asdict(size),
                    **floor,
                    "floor_seconds": max(floor["flop"] / flops, floor["bytes"] / bandwidth),
                    "kernel_seconds": seconds(kernel, inputs, config.repeats),
                    "xla_seconds": seconds(by_xla, inputs, config.repeats),
                }
            )
    report(config, results, flops, bandwidth)


def ops(size: Size, interpret: bool):
    """Name, floor, (kernel, XLA) and the shapes of the inputs of each op."""
    d, n, k, b, n_rows = size.d, size.n, size.k, size.block_rows, size.n_rows
    f32, bf16 = jnp.float32, jnp.bfloat16
    index, weight = (("latents", n), (n_rows, k)), (f32, (n_rows, k))
    rows, table = (f32, (n_rows, d)), (f32, (n, d))
    chosen = 4 * n_rows * k * (d + 2)  # a row, its number and its weight

    def encode_xla(x_bD, w_FD, b_F):
        pre_bF = jnp.einsum("bd,fd->bf", x_bD, w_FD, preferred_element_type=f32)
        return topk.top_k(pre_bF + b_F[None], k)

    def decode_xla(index_BK, weight_BK, table_FD):
        return sparse.gather_rows(index_BK, weight_BK, table_FD)[:, 0]

    def products_xla(index_BK, weight_BK, rows_BD, table_FD):
        return sparse.sampled_products(index_BK, weight_BK, rows_BD[:, None], table_FD)

    def scatter_xla(sum_FD, index_BK, weight_BK, rows_BD):
        return sparse.scatter_rows(sum_FD, index_BK, weight_BK, rows_BD[:, None])

    def onto_zeros(scatter_rows, index_BK, weight_BK, rows_BD):
        return scatter_rows(jnp.zeros((n, d)), index_BK, weight_BK, rows_BD)

    on = partial(partial, interpret=interpret)
    yield (
        "encode",
        {"flop": 2 * b * n * d, "bytes": 2 * (n + b) * d + 4 * n + 8 * b * k},
        (on(pallas_encode.block_topk, k=k), encode_xla),
        ((bf16, (b, d)), (bf16, (n, d)), (f32, (n,))),
    )
    yield (
        "decode",
        {"flop": 2 * n_rows * k * d, "bytes": chosen + 4 * n_rows * d},
        (on(pallas_sparse.gather_rows), decode_xla),
        (index, weight, table),
    )
    yield (
        "products",
        {"flop": 2 * n_rows * k * d, "bytes": chosen + 4 * n_rows * d},
        (on(pallas_sparse.sampled_products), products_xla),
        (index, weight, rows, table),
    )
    yield (
        "scatter",  # onto zeros, as a gradient begins; rows stay in the cache, every latent is written
        {"flop": 2 * n_rows * k * d, "bytes": 4 * (n * d + n_rows * d) + 8 * n_rows * k},
        tuple(partial(onto_zeros, f) for f in (on(pallas_sparse.scatter_rows), scatter_xla)),
        (index, weight, rows),
    )


def make_inputs(shapes, whole_numbers: bool) -> list[jax.Array]:
    inputs = []
    for key, (kind, shape) in zip(jax.random.split(jax.random.key(0), len(shapes)), shapes, strict=True):
        if isinstance(kind, tuple):
            inputs.append(jax.random.randint(key, shape, 0, kind[1]))
        elif whole_numbers:
            inputs.append(jax.random.randint(key, shape, -2, 3).astype(kind))
        else:
            inputs.append(jax.random.normal(key, shape, kind))
    return inputs


def check(size: Size, interpret: bool) -> None:
    """Kernel and XLA give the same bits where arithmetic is exact."""
    for name, _, (kernel, by_xla), args in ops(size, interpret):
        inputs = make_inputs(args, whole_numbers=True)
        for ours, theirs in zip(
            jax.tree.leaves(jax.jit(kernel)(*inputs)), jax.tree.leaves(jax.jit(by_xla)(*inputs)), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs, err_msg=f"{name} at {size}")


def measured_rates(repeats: int) -> tuple[float, float]:
    """FLOP/s of a bf16 product and bytes/s of a copy, both of sizes that no launch cost shows in."""
    side, n = 8192, 2**28
    square = jnp.ones((side, side), jnp.bfloat16)
    product = partial(jnp.matmul, preferred_element_type=jnp.float32)
    numbers = jnp.ones(n, jnp.float32)
    return (
        2 * side**3 / seconds(product, (square, square), repeats),
        8 * n / seconds(lambda x: x + 1, (numbers,), repeats),
    )


def seconds(function: Callable[..., object], inputs, repeats: int) -> float:
    """Median time of a call, of runs of ten queued together: waiting for each would time the host."""
    function = jax.jit(function)
    jax.block_until_ready(function(*inputs))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(10):
            result = function(*inputs)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / 10)
    return statistics.median(times)


def report(config: Benchmark, results: list[dict], flops: float, bandwidth: float) -> None:
    device = jax.devices()[0].device_kind
    table = Table(title=f"{device}: {flops / 1e12:.0f} TFLOP/s, {bandwidth / 1e9:.0f} GB/s measured; milliseconds")
    for column in (
        "op",
        "d",
        "n",
        "k",
        "rows",
        "GFLOP",
        "MB",
        "floor",
        "kernel",
        "XLA",
        "kernel / floor",
        "XLA / kernel",
    ):
        table.add_column(column, justify="left" if column == "op" else "right")
    for r in results:
        rows = r["block_rows"] if r["op"] == "encode" else r["n_rows"]
        floor, kernel, by_xla = (r[f"{name}_seconds"] * 1e3 for name in ("floor", "kernel", "xla"))
        sizes = [str(v) for v in (r["op"], r["d"], r["n"], r["k"], rows)]
        work = [f"{r['flop'] / 1e9:.1f}", f"{r['bytes'] / 1e6:.0f}"]
        times = [f"{v:.3f}" for v in (floor, kernel, by_xla)]
        table.add_row(*sizes, *work, *times, f"{kernel / floor:.2f}", f"{by_xla / kernel:.2f}")
    plain_console().print(table)
    if config.out:
        record = {"device": device, "jax": jax.__version__, "flops": flops, "bandwidth": bandwidth, "results": results}
        config.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
