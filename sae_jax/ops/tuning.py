"""How the ops cut their work on each back end: one table of constants, set by measurement, open to a recipe.

The ops read `current()` while they are traced. Nothing here changes what they compute, only in which pieces. Whatever
is jitted around them is jitted by `jit` below, which makes the engine part of the key under which programs are kept.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax

from sae_jax.types import UsageError

MIB = 2**20
ALL = 2**31


@dataclass(frozen=True)
class Tuning:
    """What may differ between back ends."""

    block_bytes: int  # pre-activations alive at a time, f32[block_rows, tile of latents]
    block_rows: int  # rows of one encoder product
    latent_major: bool  # pre-activations as [F, B]: group maxima run over contiguous rows
    in_stages: bool  # select among group maxima first; where the back end's own top-k is no full sort it is the better
    exchange_bytes: int  # rows f32[B, D] that are gathered or summed over latent shards at a time
    pair_bytes: int  # dictionary rows f32[P, D] that a compacted code gathers at a time
    # Loops as long as there are pairs: a TPU does not ask the host for it, and compiles each scatter for a long time.
    open_loops: bool = False
    decoded_slots: int = 1  # of a code, whose rows one step of the loop that decodes adds up
    scattered_slots: int = 1  # whose rows one scatter-add, or one product with the rows of the batch, takes
    kernels: bool = False  # hand-written kernels instead of XLA's


# cpu: a block of 64 rows stays in cache, and the product writes [F, 64] a third faster than [64, F].
# gpu: timed on an H200. Its compiler fuses the rows of all slots or pairs into a scatter-add or a product, and those of
# 16 into a sum; a CPU's would write them out first. Blocks of 4096 rows are no faster.
# tpu: compiled for, never timed: large blocks, lax.top_k on a TPU is no sort while width / k is above 80.
TABLE = {
    "cpu": Tuning(64 * MIB, 64, latent_major=True, in_stages=True, exchange_bytes=64 * MIB, pair_bytes=4 * MIB),
    "gpu": Tuning(
        *(1024 * MIB, 2048),
        latent_major=False,
        in_stages=True,
        exchange_bytes=256 * MIB,
        pair_bytes=ALL,
        decoded_slots=16,
        scattered_slots=ALL,
    ),
    "tpu": Tuning(
        256 * MIB,
        1024,
        latent_major=False,
        in_stages=False,
        exchange_bytes=256 * MIB,
        pair_bytes=64 * MIB,
        open_loops=True,
    ),
}
MIN_TILE = 1024  # latents
CPUINFO = Path("/proc/cpuinfo")  # on Linux


def gpu_flags() -> str:
    """What XLA_FLAGS must hold for programs of NVIDIA GPUs; empty if nothing.

    jaxlib 0.10.2 to 0.11.0 makes a compare-and-swap loop of each atomic addition of a float32, as in the scatter of a
    bias's gradient, which is hundreds of times slower where many rows have a latent in common (openxla/xla #46225).
    """
    version = tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:3])
    slow = (0, 10, 2) <= version <= (0, 11, 0)
    return "--xla_backend_extra_options=-nvptx-allow-ftz-atomics" if slow else ""


def product_dtype(platform: str) -> Literal["bfloat16", "float32"]:
    """The faster type for the inputs of large products: bfloat16, but on a CPU that has no units for it.

    There it is emulated: at d=768, 32,768 latents, 2,048 rows a step took 1.7 s in bfloat16 and 1.2 s in float32 on an
    AMD Zen 3. Where Linux does not tell what a CPU has, it is taken to have none.
    """
    if platform != "cpu":
        return "bfloat16"
    try:
        flags = set(CPUINFO.read_text().split())
    except OSError:
        flags = set()
    return "bfloat16" if flags & {"avx512_bf16", "amx_bf16"} else "float32"


@dataclass(frozen=True)
class EngineConfig:
    """What a recipe may say about the pieces; by default the table of the back end holds."""

    block_mib: int | None = None
    """pre-activations alive at a time, in MiB"""
    block_rows: int | None = None
    """rows of one encoder product"""
    exchange_mib: int | None = None
    """activations gathered over the dictionary's shards at a time, in MiB"""
    kernels: bool = False
    """hand-written GPU kernels instead of the compiler's"""

    def __post_init__(self) -> None:
        for name in ("block_mib", "block_rows", "exchange_mib"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**31:
                raise UsageError(f"engine.{name}={value} must be at least 1; leave it out for the back end's own")

    def on(self, platform: str) -> Tuning:
        """The table's row for a platform ("cpu", "gpu", "tpu") with what is given here instead.

        Raises UsageError for what cannot work there.
        """
        if self.kernels and platform != "gpu":
            raise UsageError(f"engine.kernels=true needs a GPU, but this runs on a {platform}; leave it out")
        row = TABLE[platform]
        tuning = replace(
            row,
            block_bytes=row.block_bytes if self.block_mib is None else self.block_mib * MIB,
            block_rows=self.block_rows or row.block_rows,
            exchange_bytes=row.exchange_bytes if self.exchange_mib is None else self.exchange_mib * MIB,
            kernels=self.kernels,
        )
        if tuning.block_bytes < 4 * MIN_TILE * tuning.block_rows:
            least = -(-4 * MIN_TILE * tuning.block_rows // MIB)
            raise UsageError(
                f"engine.block_mib={tuning.block_bytes // MIB} holds less than {MIN_TILE} latents of "
                f"engine.block_rows={tuning.block_rows} rows; use at least {least}"
            )
        return tuning


_engine: ContextVar[Tuning | None] = ContextVar("engine", default=None)


def current() -> Tuning:
    """What the op that is being traced goes by: the engine it was jitted with, else the back end's own."""
    engine = _engine.get()
    return TABLE[jax.default_backend()] if engine is None else engine


@contextlib.contextmanager
def using(engine: Tuning) -> Iterator[None]:
    """Trace with these constants, and call with them what `jit` below has jitted."""
    token = _engine.set(engine)
    try:
        yield
    finally:
        _engine.reset(token)


class Jitted:
    """A jitted function that calls ops. The engine in use is a static argument: another engine is another program."""

    def __init__(self, function: Callable[..., Any], static_argnames: tuple[str, ...] = (), **options: Any) -> None:
        """`options` are those of `jax.jit`."""

        def with_engine(*args: Any, engine: Tuning, **kwargs: Any) -> Any:
            with using(engine):
                return function(*args, **kwargs)

        with_engine.__name__ = function.__name__  # in profiles and HLO
        self.__doc__ = function.__doc__
        self._jitted = jax.jit(with_engine, static_argnames=(*static_argnames, "engine"), **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        return self._jitted(*args, engine=current(), **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """See `jax.jit(f).trace`."""
        return self._jitted.trace(*args, engine=current(), **kwargs)

    @property
    def n_programs(self) -> int:
        """How many have been compiled so far."""
        return self._jitted._cache_size()  # pyrefly: ignore[missing-attribute]


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`jax.jit` for what calls ops, see `Jitted`; `static_argnames` are passed by keyword."""
    return partial(Jitted, **options) if function is None else Jitted(function, **options)
