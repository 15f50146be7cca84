"""The parameters of a language model as one tree that says everything about each of them.

`parameters(spec)` gives for every tensor its axes and shape, how it starts, and where checkpoints hold it. Abstract
shapes, random initialisation and placement on a mesh (here), loading and saving (weights.py) all follow from it.

    {"embed": ArrayInfo, "norm.w": ArrayInfo, ..., "layers": {"q.w": ArrayInfo, ...}}

Matrices are (in, out). Layers are stacked: axis 0 of everything under "layers" is the layer.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from sae_jax import mesh as meshes
from sae_jax.lm.family import Stored, family
from sae_jax.lm.spec import Spec

Start = Literal["normal", "writes_to_stream", "ones", "zeros"]


@dataclasses.dataclass(frozen=True)
class ArrayInfo:
    """One parameter."""

    axes: tuple[str, ...]  # by name; mesh.LM_SPLIT says which are split
    shape: tuple[int, ...]
    start: Start  # see `init`
    stored: Stored


def parameters(spec: Spec) -> dict[str, Any]:
    """{name: ArrayInfo, "layers": {name: ArrayInfo}}: all parameters that a model of this spec has."""
    stored = family(spec.family).stored
    sizes = {
        "layer": spec.n_layers,
        "model": spec.d_model,
        "heads": spec.n_heads * spec.d_head,
        "kv_heads": spec.n_kv * spec.d_head,
        "head": spec.d_head,
        "mlp": spec.d_mlp,
        "vocab": spec.n_vocab,
        "position": spec.n_context,
    }

    def array(name: str, axes: tuple[str, ...], start: Start = "normal") -> dict[str, ArrayInfo]:
        return {name: ArrayInfo(axes, tuple(sizes[axis] for axis in axes), start, stored[name])}

    def norm(name: str, *axes: str) -> dict[str, ArrayInfo]:
        weight = array(f"{name}.w", axes, "zeros" if spec.norm_offset else "ones")
        return weight | (array(f"{name}.b", axes, "zeros") if spec.norm == "layer_norm" else {})

    def linear(name: str, axis_in: str, axis_out: str, bias: bool, start: Start = "normal") -> dict[str, ArrayInfo]:
        weight = array(f"{name}.w", ("layer", axis_in, axis_out), start)
        return weight | (array(f"{name}.b", ("layer", axis_out), "zeros") if bias else {})

    layers = {
        **norm("norm1", "layer", "model"),
        **linear("q", "model", "heads", spec.qkv_bias),
        **linear("k", "model", "kv_heads", spec.qkv_bias),
        **linear("v", "model", "kv_heads", spec.qkv_bias),
        **(norm("q_norm", "layer", "head") | norm("k_norm", "layer", "head") if spec.qk_norm else {}),
        **linear("o", "heads", "model", spec.out_bias, "writes_to_stream"),
        **(norm("attn_norm", "layer", "model") if spec.post_norms else {}),
        **norm("norm2", "layer", "model"),
        **(linear("gate", "model", "mlp", spec.mlp_bias) if spec.gated else {}),
        **linear("up", "model", "mlp", spec.mlp_bias),
        **linear("down", "mlp", "model", spec.mlp_bias, "writes_to_stream"),
        **(norm("mlp_norm", "layer", "model") if spec.post_norms else {}),
    }
    return {
        **array("embed", ("vocab", "model")),
        **(array("positions", ("position", "model")) if spec.positions == "learned" else {}),
        **norm("norm", "model"),
        **({} if spec.tied else array("unembed", ("vocab", "model"))),
        "layers": layers,
    }


def abstract(spec: Spec, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """Shapes in the place of the parameters."""
    return jax.tree.map(lambda info: jax.ShapeDtypeStruct(info.shape, dtype), parameters(spec))


def init(spec: Spec, key: jax.Array) -> dict[str, Any]:
    """Random f32 parameters: normal with deviation 0.02, smaller by sqrt(2L) for what writes to the residual stream.

    Norms multiply by 1 and biases are 0.

    Source: Radford et al. 2019 (GPT-2), section 2.3.
    """
    infos, structure = jax.tree.flatten(parameters(spec))

    def start(number: int, info: ArrayInfo) -> jax.Array:
        if info.start in ("ones", "zeros"):
            return jnp.full(info.shape, float(info.start == "ones"))
        deviation = 0.02 / (2 * spec.n_layers) ** 0.5 if info.start == "writes_to_stream" else 0.02
        return deviation * jax.random.normal(jax.random.fold_in(key, number), info.shape)

    return jax.tree.unflatten(structure, [start(number, info) for number, info in enumerate(infos)])


def shardings(spec: Spec, mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """Where each parameter lies on a mesh (mesh.lm_role)."""
    units = {"heads": spec.n_heads, "kv_heads": spec.n_kv, "mlp": spec.d_mlp, "vocab": spec.n_vocab}
    return jax.tree.map(lambda info: meshes.sharding(mesh, meshes.lm_role(mesh, info.axes, units)), parameters(spec))
