"""How long a training step takes on this machine, beside the least that `sae-jax plan` would state for it."""

from __future__ import annotations

import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import mesh as meshes
from sae_jax.ops import tuning
from sae_jax.planning import analytic, targets
from sae_jax.saes import topk
from sae_jax.saes.base import Batch
from sae_jax.saes.init import sample_statistics
from sae_jax.selftest.checks import Figures, MismatchError, Where, make
from sae_jax.training.settings import TrainConfig, hyperparameters
from sae_jax.training.state import abstract, initial
from sae_jax.training.step import Step
from sae_jax.types import Widths

D, K = 768, 32
OF_DEVICE = {"cpu": (512, 64)}  # latents and rows
OF_ACCELERATOR = (65_536, 8192)
WARM, TIMED = 2, 5


def step_time(where: Where) -> Figures:
    """Seconds of a step of TopK, of several queued together; and the floor where the data sheet is known."""
    mesh, kind = where.mesh, where.mesh.devices.flat[0].device_kind
    n_latents, n_rows = (n * mesh.size for n in OF_DEVICE.get(where.platform, OF_ACCELERATOR))
    sae, train = topk.Config(n_latents=n_latents, k=K), TrainConfig(steps=100, batch_size=n_rows)
    sample = sample_statistics(np.asarray(_rows(0, 256), np.float32), sae.input_norm)
    where_at_rest = jax.tree.map(lambda leaf: leaf.sharding, abstract(sae, train, Widths.one(D), mesh))

    def born(sample):
        return jax.tree.map(jax.sharding.reshard, initial(sae, train, sample), where_at_rest)

    state, step, hparams = tuning.jit(born)(sample), Step(sae, train), hyperparameters(train, sae)
    x = make(mesh, meshes.ROWS, (n_rows, D), lambda index: _rows(*_range(index[0], n_rows)))
    metrics, seconds = {}, 0.0
    for n in (WARM, TIMED):
        began = time.perf_counter()
        for _ in range(n):
            state, metrics = step(state, hparams, Batch(x))
            meshes.in_order(state)
        jax.block_until_ready(state)
        seconds = (time.perf_counter() - began) / n
    if not math.isfinite(loss := float(metrics["loss"])):
        raise MismatchError(f"the loss after {WARM + TIMED} steps is {loss}", "a finite number")
    figures: Figures = {"latents": n_latents, "rows": n_rows, "step_seconds": seconds}
    if target := targets.of_devices(kind, mesh.size):
        of_device = analytic.step(sae, train, Widths.one(D), meshes.abstract_mesh(where.mesh_config, mesh.size))
        figures |= {"floor_seconds": analytic.floor_seconds(of_device, target)}
        figures |= {"times_the_floor": round(seconds / figures["floor_seconds"], 2)}
    return figures


def _range(rows: slice, n_rows: int) -> tuple[int, int]:
    first, last, _ = rows.indices(n_rows)
    return first, last - first


def _rows(first: int, n: int) -> np.ndarray:
    """bf16[n, D]: the same whichever process makes them."""
    return np.random.default_rng(first).standard_normal((n, D), np.float32).astype(jnp.bfloat16)
