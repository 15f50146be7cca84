"""What a decoder is made of: sizes, and the kind of norm, position, bias and activation function, as data.

A family's config.json becomes a Spec, which decides which parameters there are (params.py) and what a block computes
with them (block.py). A new kind is one more value here, with its branch in these two files.

Axis key, besides the one in types.py: L layers, H heads, d width of a head, M width of the MLP, C context.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args, get_type_hints

from sae_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Spec:
    """Sizes and kinds of one decoder.

    Raises UserError for a kind that is not implemented.
    """

    family: str
    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    n_vocab: int
    n_context: int  # the longest sequence
    activation: Literal["gelu_new", "gelu", "relu", "silu"] = "gelu_new"
    norm: Literal["layer_norm"] = "layer_norm"  # before attention, before the MLP and before the unembedding
    norm_eps: float = 1e-5
    positions: Literal["learned"] = "learned"
    qkv_bias: bool = True
    out_bias: bool = True  # of attention's output
    mlp_bias: bool = True
    tied: bool = True  # the unembedding is the embedding

    def __post_init__(self) -> None:
        kinds: dict[str, Any] = get_type_hints(type(self))
        names = {"activation": "activation function", "norm": "norm", "positions": "kind of positions"}
        for field, name in names.items():
            value, implemented = getattr(self, field), get_args(kinds[field])
            if value not in implemented:
                raise UserError(f"{name} {value!r} is not implemented; implemented: {', '.join(implemented)}")
