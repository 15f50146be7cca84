"""Matryoshka autoencoder: every prefix of the dictionary has to reconstruct, so that early latents stay general.

    z = keep_{B k}(ReLU(W_enc (x - b_dec) + b_enc))       x_hat_g = sum_{i < m_g} z_i W_dec[i] + b_dec,  m_G = n
    loss = 1/G sum_g s * mean((x - x_hat_g)^2) + aux_coefficient * L_aux

One selection over all n latents, BatchTopK's; s, L_aux (of the full reconstruction) and unit rows as in saes/topk.py,
the threshold as in saes/batch_topk.py. All prefixes weigh 1/G, so the loss is of one size whatever G is. A decoder row
is gathered once: latents between two sizes form a group, whose sum is added to the prefix before, and in the backward
pass a pair (row, latent) needs the errors of its prefix and of those after it, summed. The sums of all groups
exist at once, [B, G, D], and so do their gradients.

Prefixes are those of the latents' numbers, at fixed fractions; or with random_prefixes G they change every step, G - 1
sizes m = n^u, u uniform in (0, 1), and n, in the order of the mean square of activations (a running mean over about
100 batches), which stands for the permutation by it of the source. Early latents of fixed prefixes lie on the first
shards of a split dictionary, which then do more of the work; random ones are spread evenly.

Source: Bussmann et al. 2025, "Learning multi-level features with Matryoshka sparse autoencoders", arXiv 2503.17547.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct

from sae_jax import mesh
from sae_jax.ops import sparse, topk
from sae_jax.saes import batch_topk, init, losses
from sae_jax.saes.base import Adam, Batch, Context, Outcome
from sae_jax.saes.init import Sample
from sae_jax.types import Code, UsageError

MEMORY = 0.99  # decay of the mean square of activations


@dataclass(frozen=True)
class Config(batch_topk.ThresholdConfig):
    """Matryoshka BatchTopK with AuxK."""

    variant: Literal["matryoshka"] = "matryoshka"
    prefixes: tuple[float, ...] = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0)
    """sizes of the prefixes as fractions of n_latents; the last is 1"""
    random_prefixes: int = 0
    """this many prefixes of sizes drawn every step instead; 0 = the fixed ones"""
    ADAM: ClassVar[Adam] = batch_topk.Config.ADAM
    BY_PAIRS: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.random_prefixes < 0 or self.random_prefixes == 1:
            raise UsageError(f"sae.random_prefixes={self.random_prefixes} must be at least 2; 0 takes sae.prefixes")
        sizes = self.sizes
        if len(sizes) < 2 or self.prefixes[-1] != 1 or sizes[0] < 1 or list(sizes) != sorted({*sizes}):
            raise UsageError(
                f"sae.prefixes={self.prefixes} of sae.n_latents={self.n_latents} must be two or more fractions "
                f"that grow by a latent at least and end at 1"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """The fixed prefixes in latents."""
        return tuple(round(share * self.n_latents) for share in self.prefixes)

    def init(self, key: jax.Array, sample: Sample, dtype: Any = jnp.float32) -> Matryoshka:
        """See KConfig.weights."""
        weights = self.weights(key, sample.median.shape[0], dtype)
        return Matryoshka(**weights, b_dec=sample.median, threshold=jnp.zeros(()), config=self)

    def initial_counters(self, sample: Sample) -> dict[str, jax.Array]:
        """Mean squares of activations, where they order the latents."""
        return {"mean_square": init.zeros((self.n_latents,), mesh.DICT)} if self.random_prefixes else {}


@struct.dataclass(repr=False)
class Matryoshka(batch_topk.Thresholded):
    """A Matryoshka autoencoder; frozen, so training makes a new one each step."""

    w_enc: jax.Array  # f32[F@(latent,data), D]
    b_enc: jax.Array  # f32[F@(latent,data)]
    w_dec: jax.Array  # f32[F@(latent,data), D], unit rows
    b_dec: jax.Array  # f32[D]
    threshold: jax.Array  # f32[], not learnt but set
    config: Config = struct.field(pytree_node=False)

    def objective(self, batch: Batch, context: Context) -> tuple[jax.Array, Outcome]:
        """See AbstractSae and the head of this file."""
        config = self.config
        code, w_enc, selection = batch_topk.select(self, batch.x, self.b_dec)
        group_BK = self._group(code, context)
        n_groups = config.random_prefixes or len(config.prefixes)
        filling = batch_topk.filling(batch.x, config.k)
        parts_BGY, w_dec = sparse.decode_parts(code, group_BK, self.w_dec, n_groups, config.product_dtype, filling)
        y_hat_BY, loss = jnp.broadcast_to(self.b_dec[None], batch.y.shape), jnp.float32(0)
        for group in range(n_groups):
            y_hat_BY = y_hat_BY + parts_BGY[:, group]
            loss = loss + context.constants.loss_scale * ((batch.y - y_hat_BY) ** 2).mean() / n_groups
        encoder = w_enc, self.b_enc, self.b_dec
        loss, outcome = losses.with_auxk(loss, batch, y_hat_BY, code, encoder, w_dec, config, context)
        if config.random_prefixes:
            squares_F = sparse.summed(replace(code, values=code.values**2), config.n_latents, filling) / len(batch.x)
            mean_F = MEMORY * context.counters.extra["mean_square"] + (1 - MEMORY) * squares_F
            outcome = replace(outcome, counters=replace(outcome.counters, extra={"mean_square": mean_F}))
        return loss, batch_topk.with_threshold(outcome, self.threshold, selection, context.step, config)

    def _group(self, code: Code, context: Context) -> jax.Array:
        """Which prefix is the first to hold the latent of each slot, i32[B, K]."""
        n = self.config.n_latents
        if not self.config.random_prefixes:
            return _count(code.indices >= size for size in self.config.sizes[:-1])
        u_G = jnp.sort(jax.random.uniform(context.key, (self.config.random_prefixes - 1,)))
        # Of latents with one mean square, as all have at the first step, all are in a prefix that holds one of them.
        size_G = jnp.clip(jnp.ceil(n**u_G).astype(jnp.int32), 1, n)
        least_G = topk.largest_of(context.counters.extra["mean_square"], size_G)
        square_BK = sparse.looked_up(code, context.counters.extra["mean_square"])
        return _count(square_BK < least for least in least_G)


def _count(true_BK: Iterable[jax.Array]) -> jax.Array:
    """How many hold, i32[B, K]."""
    return jnp.stack([each_BK.astype(jnp.int32) for each_BK in true_BK]).sum(0)
