"""What a decoder language model is made of: its sizes and kinds, and the shapes of its parameters.

`Spec` is the whole difference between two models of one family, and what `block.py` branches on. A family
that needs a new kind of norm, position or MLP adds a field here together with the branch that reads it.

Axis key, besides the one in types.py: L layers, H heads, d width of a head, M width of the MLP, C context.
"""

from __future__ import annotations

import dataclasses

from sae_jax.types import UserError

ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu")


@dataclasses.dataclass(frozen=True)
class Spec:
    """Sizes and kinds of one decoder with learned positions, LayerNorm before each half, and a plain MLP.

    Raises UserError for an activation function the block does not implement.
    """

    family: str
    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    n_vocab: int
    n_context: int  # positions there are embeddings for, hence the longest sequence
    activation: str = "gelu_new"
    norm_eps: float = 1e-5
    tied: bool = True  # the unembedding is the embedding

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f"activation function {self.activation!r} is not implemented; implemented: {', '.join(ACTIVATIONS)}"
            )


def shapes(spec: Spec) -> dict:
    """Shapes of the parameter tree; matrices are (in, out), layers are stacked on axis 0 under `layers`."""
    n_layers, d_model, d_mlp, d_attn = spec.n_layers, spec.d_model, spec.d_mlp, spec.n_heads * spec.d_head
    layer = {
        "norm1.w": (d_model,),
        "norm1.b": (d_model,),
        "q.w": (d_model, d_attn),
        "q.b": (d_attn,),
        "k.w": (d_model, d_attn),
        "k.b": (d_attn,),
        "v.w": (d_model, d_attn),
        "v.b": (d_attn,),
        "o.w": (d_attn, d_model),
        "o.b": (d_model,),
        "norm2.w": (d_model,),
        "norm2.b": (d_model,),
        "up.w": (d_model, d_mlp),
        "up.b": (d_mlp,),
        "down.w": (d_mlp, d_model),
        "down.b": (d_model,),
    }
    top = {
        "embed": (spec.n_vocab, d_model),
        "positions": (spec.n_context, d_model),
        "norm.w": (d_model,),
        "norm.b": (d_model,),
    }
    if not spec.tied:
        top["unembed"] = (spec.n_vocab, d_model)
    return {**top, "layers": {name: (n_layers, *shape) for name, shape in layer.items()}}
