"""What a decoder is made of: sizes, and the kind of norm, position, bias and activation function, as data.

A family's config.json becomes a Spec, which decides which parameters there are (params.py) and what a block computes
with them (block.py). A new kind is one more value here, with its branch in these two files.

Axis key, besides the one in types.py: L layers, H heads, G heads that share keys and values, d width of a head, M width
of the MLP, C context.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args, get_type_hints

from sae_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Positions as rotations of queries and keys: pair i of n turns by theta^(-i/n) a position, divided by `factor`.

    `linear` divides every frequency. `llama3` divides those that turn less than `low_freq_factor` times in
    `original_context` positions, leaves those that turn more than `high_freq_factor` times, and goes from one to the
    other in between.

    Sources: Su et al. 2021, arXiv 2104.09864, section 3.2.2; Chen et al. 2023, arXiv 2306.15595, eq. 4 (linear);
    Llama 3.1's model card and the config keys of transformers (llama3).
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0


@dataclasses.dataclass(frozen=True)
class Attention:
    """How the layers of one kind attend."""

    rotary: Rotary | None = None
    window: int | None = None  # each position sees this many, itself included; None: all before it


class UnsupportedError(UserError):
    """A model that is in order as far as is known, but has what is implemented in torch alone."""

    def __init__(self, problem: str, in_gguf: bool = False) -> None:
        """`problem`: what is not supported. `in_gguf`: in a .gguf file, which the torch back end does not read."""
        self.problem = problem
        super().__init__(
            f"{problem}. harvest.backend=torch runs any causal model of transformers"
            f"{', from safetensors and not from .gguf: get the model as these' * in_gguf}; or compute the activations "
            f"yourself and write them with sae_jax.write_activations"
        )


@dataclasses.dataclass(frozen=True)
class Spec:
    """Sizes and kinds of one decoder.

    Raises UnsupportedError for a kind that is not implemented.
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
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"  # before attention, the MLP and the unembedding
    norm_eps: float = 1e-5
    positions: Literal["learned", "rotary"] = "learned"
    qkv_bias: bool = True
    out_bias: bool = True  # of attention's output
    mlp_bias: bool = True
    tied: bool = True  # the unembedding is the embedding
    n_kv_heads: int | None = None  # of keys and values, each of which serves as many heads; None: n_heads
    norm_offset: float = 0.0  # an RMSNorm multiplies by its weight and this
    qk_norm: bool = False  # each head's queries and keys are normalised
    post_norms: bool = False  # outputs of attention and MLP are normalised before they join the stream
    parallel: bool = False  # the MLP reads the stream that attention reads
    gated: bool = False  # the MLP multiplies act(x W_gate) by x W_up
    d_rotary: int | None = None  # the first numbers of a head, which rotate; None: all of them
    attention: tuple[Attention, ...] = (Attention(),)  # the kinds of layers there are
    kind_of_layer: tuple[int, ...] | None = None  # place in `attention` of each layer; None: all are of the first kind
    query_scale: float | None = None  # of the product of query and key; None: d_head^-1/2
    attn_cap: float | None = None  # c: scores become c tanh(score / c)
    logit_cap: float | None = None  # likewise of logits
    scaled_embedding: bool = False  # rows of the embedding are multiplied by d_model^1/2

    def __post_init__(self) -> None:
        kinds: dict[str, Any] = get_type_hints(type(self))
        names = {"activation": "activation function", "norm": "norm", "positions": "kind of positions"}
        for field, name in names.items():
            value, implemented = getattr(self, field), get_args(kinds[field])
            if value not in implemented:
                raise UnsupportedError(f"{name} {value!r} is not implemented; implemented: {', '.join(implemented)}")
        for kind in self.attention:
            rotary_kinds = get_args(get_type_hints(Rotary)["kind"])
            if kind.rotary is not None and kind.rotary.kind not in rotary_kinds:
                raise UnsupportedError(
                    f"rotary positions of kind {kind.rotary.kind!r} are not implemented; implemented: "
                    f"{', '.join(rotary_kinds)}"
                )

    @property
    def n_kv(self) -> int:
        """Heads of keys and values."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def layer_kinds(self) -> tuple[int, ...]:
        """The place in `attention` of each layer's kind."""
        return (0,) * self.n_layers if self.kind_of_layer is None else self.kind_of_layer
