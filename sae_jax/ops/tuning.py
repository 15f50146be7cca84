"""How the ops cut their work on each back end: one table of constants, set by measurement, open to a recipe.

The ops read `current()` while they are traced. Nothing here changes what they compute, only in which pieces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace

import jax

from sae_jax.types import UsageError

MIB = 2**20


@dataclass(frozen=True)
class Tuning:
    """What may differ between back ends."""

    block_bytes: int  # pre-activations alive at a time, f32[block_rows, tile of latents]
    block_rows: int  # rows of one encoder product
    latent_major: bool  # pre-activations as [F, B]: group maxima run over contiguous rows
    in_stages: bool  # select among group maxima first; where the back end's own top-k is no full sort it is the better
    exchange_bytes: int  # rows f32[B, D] that are gathered or summed over latent shards at a time
    pair_bytes: int  # dictionary rows f32[P, D] that a compacted code gathers at a time
    kernels: bool = False  # hand-written kernels instead of XLA's


# cpu: a block of 64 rows stays in cache, and the product writes [F, 64] a third faster than [64, F].
# gpu, tpu: compiled for, never timed: large blocks, lax.top_k on a TPU is no sort while width / k is above 80.
TABLE = {
    "cpu": Tuning(64 * MIB, 64, latent_major=True, in_stages=True, exchange_bytes=64 * MIB, pair_bytes=4 * MIB),
    "gpu": Tuning(256 * MIB, 1024, latent_major=False, in_stages=True, exchange_bytes=256 * MIB, pair_bytes=64 * MIB),
    "tpu": Tuning(256 * MIB, 1024, latent_major=False, in_stages=False, exchange_bytes=256 * MIB, pair_bytes=64 * MIB),
}
MIN_TILE = 1024  # latents


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


_chosen: ContextVar[Tuning | None] = ContextVar("tuning", default=None)


def current() -> Tuning:
    """What the op that is being traced goes by."""
    chosen = _chosen.get()
    return TABLE[jax.default_backend()] if chosen is None else chosen


@contextlib.contextmanager
def using(tuning: Tuning) -> Iterator[None]:
    """Trace with these constants. A function that was jitted before keeps those it was traced with."""
    token = _chosen.set(tuning)
    try:
        yield
    finally:
        _chosen.reset(token)
