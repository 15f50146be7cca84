"""Selection and gradients of the engine over the whole mesh, against float64 on the host (dense.py).

Rows, encoder and biases are small whole numbers, so that every product is exact in bfloat16 and in any order of sums:
the selection must then be the reference's to the last latent, and there are ties to be broken.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from sae_jax import mesh as meshes
from sae_jax.ops import encode, tuning
from sae_jax.saes import topk
from sae_jax.saes.base import Batch, Constants, Context, Counters, Hyperparameters
from sae_jax.saes.normalise import Scale
from sae_jax.selftest import dense
from sae_jax.selftest.checks import Figures, LeftOutError, MismatchError, Where, check, place
from sae_jax.training import optim
from sae_jax.types import Code

D, K, K_AUX = 32, 8, 8
AUX = 32.0  # weight of AuxK, so large that its gradients are as large as the others
ROWS = 8  # of a device
LATENTS = 512  # of a device, of a selection: it goes in stages
TRAINED = 32, 1024  # of a gradient: of a device, and on few devices of all
DEAD_AFTER = 100
TOLERANCE = 1e-4  # of gradients, as a share of the largest


def selection(where: Where) -> Figures:
    """The largest k of each row, with products in float32 and in bfloat16: each row's latents and values."""
    n_rows, n_latents = ROWS * where.mesh.size, LATENTS * where.mesh.size
    x_BD, w_FD, b_F, b_D = _whole_numbers(0, (n_rows, D), (n_latents, D), (n_latents,), (D,))
    roles = (meshes.ROWS, meshes.DICT, meshes.DICT, meshes.REPLICATED)
    x, w, b, b_pre = (place(where.mesh, role, each) for role, each in zip(roles, (x_BD, w_FD, b_F, b_D), strict=True))
    codes: dict[str, Code] = {}
    for dtype in (jnp.float32, jnp.bfloat16):

        def code_of(x: jax.Array, w: jax.Array, b: jax.Array, b_pre: jax.Array, dtype=dtype) -> Code:
            code, _ = encode.encode_topk(x, w, b, b_pre, K, jnp.dtype(dtype))
            return jax.tree.map(lambda each: jax.sharding.reshard(each, P((meshes.DATA, *meshes.LATENT))), code)

        codes[jnp.dtype(dtype).name] = meshes.in_order(tuning.jit(code_of)(x, w, b, b_pre))
    for name, code in codes.items():
        for indices, values in zip(code.indices.addressable_shards, code.values.addressable_shards, strict=True):
            first = indices.index[0].start or 0
            should = dense.encode(x_BD[indices.index[0]] - b_D, w_FD, b_F, K)
            for i, of_row in enumerate(zip(np.asarray(indices.data), np.asarray(values.data), strict=True)):
                in_row = should.rows == i
                seen, expected = _pairs(*of_row), _pairs(should.latents[in_row], should.values[in_row])
                if seen != expected:
                    raise MismatchError(
                        f"row {first + i} with {name} products has {_shown(seen, expected)}", _shown(expected, seen)
                    )
    return {"rows": n_rows, "latents": n_latents, "k": K}


def gradients(where: Where) -> Figures:
    """The loss of TopK with AuxK, half of the latents silent, and its gradient for every weight."""
    of_device, of_all = TRAINED
    n_rows, n_latents = ROWS * where.mesh.size, max(of_device, -(-of_all // where.mesh.size)) * where.mesh.size
    x_BD, w_enc, b_enc, b_dec = _whole_numbers(1, (n_rows, D), (n_latents, D), (n_latents,), (D,))
    w_dec = np.random.default_rng(2).standard_normal((n_latents, D), np.float32)
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    weights = {"w_enc": w_enc, "b_enc": b_enc, "w_dec": w_dec, "b_dec": b_dec}
    silent_F = np.arange(n_latents) % 2 == 0

    config = topk.Config(n_latents=n_latents, k=K, k_aux=K_AUX, aux_coefficient=AUX, aux_rows="all", dtype="float32")
    roles = dict.fromkeys(weights, meshes.DICT) | {"b_dec": meshes.REPLICATED}
    sae = topk.TopK(**{name: place(where.mesh, roles[name], w) for name, w in weights.items()}, config=config)
    loss_scale, zero, ones_D = 0.25, jnp.float32(0), jnp.ones(D)
    hparams = Hyperparameters(jnp.int32(0), jnp.int32(1), zero, zero, zero, jnp.int32(DEAD_AFTER), {})
    context = Context(
        step=jnp.int32(0),
        key=jax.random.key(0),
        counters=Counters(place(where.mesh, meshes.DICT, (silent_F * (DEAD_AFTER + 1)).astype(np.int32))),
        constants=Constants(jnp.float32(loss_scale), Scale(ones_D, ones_D)),
        hparams=hparams,
    )

    def objective(sae: topk.TopK, x_BD: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
        loss, outcome = sae.objective(Batch(x_BD, x_BD), context)
        return loss, outcome.metrics["aux_loss"]

    def learnt(sae: topk.TopK, x_BD: jax.Array, context: Context) -> tuple[tuple[jax.Array, jax.Array], Any]:
        """And the gradient as the optimiser takes it: that of rows of norm 1 lies along their sphere."""
        value, found = jax.value_and_grad(objective, has_aux=True)(sae, x_BD, context)
        return value, optim.along_sphere(found, sae)[0]

    x = place(where.mesh, meshes.ROWS, x_BD)
    (loss, aux_loss), found = tuning.jit(learnt)(sae, x, context)
    expected_loss, expected = dense.objective(x_BD, weights, K, K_AUX, AUX, loss_scale, silent_F)
    if not float(aux_loss) > 0:
        raise MismatchError(f"the loss of AuxK is {float(aux_loss)}", "above 0 with half of the latents silent")
    check("loss", loss, np.asarray(expected_loss), TOLERANCE)
    for name, gradient in expected.items():
        check(f"gradient of {name}", getattr(found, name), gradient, TOLERANCE)
    return {"rows": n_rows, "latents": n_latents, "tolerance": TOLERANCE}


def kernels(where: Where) -> Figures:
    """Selection and gradients once more, with the hand-written kernels of `engine.kernels`."""
    if where.platform != "gpu":
        raise LeftOutError(f"the kernels are for GPUs, and this runs on a {where.platform}")
    with tuning.using(replace(where.engine, kernels=True).on("gpu")):
        return {**selection(where), **gradients(where)}


def _whole_numbers(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    """f32 arrays of -2 ... 2, the same on every process."""
    rng = np.random.default_rng(seed)
    return [rng.integers(-2, 3, shape).astype(np.float32) for shape in shapes]


def _pairs(index_K: np.ndarray, values_K: np.ndarray) -> dict[int, float]:
    """{latent: value} of the active slots; a latent in two slots has neither's value."""
    active = [(int(i), float(v)) for i, v in zip(index_K, values_K, strict=True) if v != 0]
    pairs = dict(active)
    return pairs if len(pairs) == len(active) else {i: float("nan") for i in pairs}


def _shown(pairs: dict[int, float], other: dict[int, float]) -> str:
    """What of them is not in the other, and how many there are."""
    own = [f"{latent}: {value:g}" for latent, value in sorted(pairs.items()) if other.get(latent) != value]
    return f"{len(pairs)} latents" + (f", of which {', '.join(own[:4])}" if own else "")
