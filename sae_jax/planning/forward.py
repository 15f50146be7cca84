"""What a pass of a language model takes in a harvest, which runs it up to the last hook and computes no logits.

Work is that of the products. Attention computes the scores of all pairs of positions of a sequence and masks those that
a query does not see, so that a window saves nothing. Parameters are those of the whole model, which lies on the devices
whatever part of it runs.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from sae_jax import lm, storage
from sae_jax import mesh as meshes
from sae_jax.activations.forward import activations_at
from sae_jax.activations.rows import DTYPES, row_bytes
from sae_jax.lm import params
from sae_jax.lm.block import query_block
from sae_jax.lm.hooks import POINTS

NORM_BYTES = 4  # f32, one for each row of a hook


def block_flop(spec: lm.Spec, context: int, points: Collection[str] = ("resid_post",)) -> int:
    """FLOP a token of the products that one block needs for these points of it, in sequences of `context` tokens."""
    d_attn, d_kv = spec.n_heads * spec.d_head, spec.n_kv * spec.d_head
    # Where both parts read the same stream, the MLP does not wait for attention.
    of_attention = [point for point in points if not (spec.parallel and point.startswith("mlp"))]
    return (
        _reaches(of_attention, "attn_z") * (2 * spec.d_model * (d_attn + 2 * d_kv) + 4 * context * d_attn)
        + _reaches(of_attention, "attn_raw") * 2 * d_attn * spec.d_model
        + _reaches(points, "mlp_act") * (1 + spec.gated) * 2 * spec.d_model * spec.d_mlp
        + _reaches(points, "mlp_raw") * 2 * spec.d_mlp * spec.d_model
    )


def _reaches(points: Collection[str], first: str) -> bool:
    """Whether one of these is at `first` or behind it."""
    return any(POINTS.index(point) >= POINTS.index(first) for point in points)


@dataclass(frozen=True)
class ForwardPass:
    """One model, the hooks that are stored, and a batch on the devices of one worker."""

    spec: lm.Spec
    hooks: tuple[lm.Hook, ...]
    context: int  # tokens of a sequence
    n_sequences: int  # of a batch, on all devices
    n_devices: int
    split: int  # devices of a copy
    dtype: str  # of the rows
    precision: Literal["float32", "bfloat16"]  # of parameters and products

    @property
    def n_tokens(self) -> int:
        """Of a batch, on all devices."""
        return self.n_sequences * self.context

    @property
    def token_flop(self) -> int:
        """Of all devices of a copy."""
        last = max(hook.layer for hook in self.hooks)
        points = [hook.point for hook in self.hooks if hook.layer == last]
        return last * block_flop(self.spec, self.context) + block_flop(self.spec, self.context, points)

    @property
    def flop(self) -> int:
        """Of a batch, on one device. What `split` cannot split is work of each device and counts once."""
        return self.n_tokens * self.token_flop // self.n_devices

    @property
    def model_bytes(self) -> int:
        """All parameters, on one device."""
        return sum(jax.tree.leaves(self._shard_bytes()))

    @property
    def unread_bytes(self) -> int:
        """Parameters on one device that are behind the last block, of which the program knows nothing."""
        return sum(n for name, n in self._shard_bytes().items() if name.partition(".")[0] in ("norm", "unembed"))

    @property
    def read_bytes(self) -> int:
        """Parameters that a batch reads on one device: those of the layers that run."""
        n_layers = 1 + max(hook.layer for hook in self.hooks)
        return sum(self._shard_bytes()["layers"].values()) * n_layers // self.spec.n_layers

    @property
    def working_bytes(self) -> int:
        """An estimate of what a batch needs on one device beside parameters and results.

        Scores of a block of queries and their softmax, or the wide arrays of the MLP, whichever is more, and three
        arrays as wide as the stream. Compiled for an H100, nine models and sizes took 0.62 to 0.97 times this and the
        results; a TPU may copy a parameter to another layout besides.
        """
        spec, size = self.spec, DTYPES[self.precision].itemsize
        n_heads, d_mlp = (n // self.split if n % self.split == 0 else n for n in (spec.n_heads, spec.d_mlp))
        n_tokens = self.n_tokens * self.split // self.n_devices
        n_scores = n_tokens * n_heads * query_block(4 * n_tokens * n_heads * self.context, self.context)
        return max(n_scores * (4 + size), n_tokens * 2 * size * d_mlp) + n_tokens * 3 * size * spec.d_model

    @property
    def row_bytes(self) -> int:
        """Of a token, in all sources."""
        return sum(row_bytes(width, self.dtype) for width in self.widths)

    @property
    def result_bytes(self) -> int:
        """Rows and norms of a batch, on one device."""
        n_tokens = self.n_tokens * self.split // self.n_devices
        return n_tokens * (self.row_bytes + NORM_BYTES * len(self.hooks))

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the hooks."""
        return tuple(lm.hook_width(self.spec, hook) for hook in self.hooks)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ForwardPass:
        """The inverse of `to_json`."""
        return storage.as_type(values, cls, "the pass of a harvest")

    def lower(self, mesh: Mesh | AbstractMesh) -> jax.stages.Lowered:
        """The pass of a batch as a harvest runs it on this mesh (mesh.lm_mesh), of shapes alone."""
        parameters = jax.tree.map(
            lambda p, place: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=place),
            *(params.abstract(self.spec, self.precision), params.shardings(self.spec, mesh)),
        )
        rows = meshes.sharding(mesh, meshes.lm_rows(mesh))
        ids_BT = jax.ShapeDtypeStruct((self.n_sequences, self.context), jnp.int32, sharding=rows)
        return activations_at.trace(lm.LanguageModel(parameters, self.spec), ids_BT, self.hooks, self.dtype).lower()

    def _shard_bytes(self) -> dict[str, Any]:
        """Bytes of each parameter on one device."""
        mesh = meshes.abstract_lm_mesh(self.split, self.n_devices)
        return jax.tree.map(
            lambda p, place: math.prod(place.shard_shape(p.shape)) * p.dtype.itemsize,
            *(params.abstract(self.spec, self.precision), params.shardings(self.spec, mesh)),
        )
