"""What a command sets and says where there is a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from sae_jax.ops import tuning
from sae_jax.progress import console


def set_gpu_flags() -> None:
    """Add what programs of NVIDIA GPUs need to XLA_FLAGS, which JAX reads when it starts its devices."""
    flags, needed = os.environ.get("XLA_FLAGS", ""), tuning.gpu_flags()
    has_gpu = any(next(Path("/dev").glob(pattern), None) for pattern in ("nvidia[0-9]*", "dxg"))
    if has_gpu and needed not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {needed}".strip()


def warn_of_idle_gpu() -> None:
    """One line if there is a GPU that JAX does not use."""
    if jax.default_backend() == "cpu" and Path("/dev/nvidia0").exists() and not os.environ.get("JAX_PLATFORMS"):
        console.print("warning: this machine has a GPU but JAX runs on the CPU; pip install 'sae_jax[cuda13]'")
