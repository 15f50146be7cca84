"""What the families that follow Llama share: the keys of config.json, the names of tensors and of modules.

A family's file says what it has beyond this. A config.json may leave out what equals its library's default, and may be
of before or after transformers 5, which moved all about rotary positions into `rope_parameters`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sae_jax.lm.family import Stored
from sae_jax.lm.spec import Attention, Rotary, Spec, UnsupportedError
from sae_jax.types import UserError

SLIDING, FULL = "sliding_attention", "full_attention"  # kinds of layers, as `layer_types` calls them
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_new", "swish": "silu"}  # by other names


def sizes(config: Mapping[str, Any], family: str, defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fields of the Spec that are read in the same way in all of these families.

    Args:
        config: the config.json.
        family: its model_type.
        defaults: of keys that it may leave out, where they differ from Llama's.
    """
    config = dict[str, Any](rms_norm_eps=1e-6, tie_word_embeddings=False) | dict(defaults or {}) | dict(config)
    n_heads, d_model = config["num_attention_heads"], config["hidden_size"]
    n_kv_heads = config.get("num_key_value_heads") or n_heads
    d_head = config.get("head_dim") or head_width(d_model, n_heads)
    if n_heads % n_kv_heads:
        raise UserError(
            f"num_key_value_heads={n_kv_heads} does not divide num_attention_heads={n_heads}; the config.json is "
            f"damaged"
        )
    return {
        "family": family,
        "n_layers": config["num_hidden_layers"],
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "d_head": d_head,
        "d_mlp": config["intermediate_size"],
        "n_vocab": config["vocab_size"],
        "n_context": config["max_position_embeddings"],
        "activation": activation(config.get("hidden_activation") or config.get("hidden_act") or "silu"),
        "norm": "rms_norm",
        "norm_eps": float(config["rms_norm_eps"]),
        "positions": "rotary",
        "qkv_bias": bool(config.get("attention_bias", False)),
        "out_bias": bool(config.get("attention_bias", False)),
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "gated": True,
        "tied": config["tie_word_embeddings"],
    }


def config_of(spec: Spec) -> dict[str, Any]:
    """The config.json of a family that has no more than `sizes` reads, and one kind of layers."""
    return {
        "num_hidden_layers": spec.n_layers,
        "hidden_size": spec.d_model,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv,
        "head_dim": spec.d_head,
        "intermediate_size": spec.d_mlp,
        "vocab_size": spec.n_vocab,
        "max_position_embeddings": spec.n_context,
        "hidden_act": spec.activation,
        "rms_norm_eps": spec.norm_eps,
        "attention_bias": spec.qkv_bias,
        "mlp_bias": spec.mlp_bias,
        "tie_word_embeddings": spec.tied,
        "rope_parameters": rope_parameters(spec.attention[0].rotary or Rotary()),
    }


def head_width(d_model: int, n_heads: int) -> int:
    """d_model / n_heads. Raises UserError if it is no whole number."""
    if d_model % n_heads:
        raise UserError(
            f"num_attention_heads={n_heads} does not divide hidden_size={d_model}; the config.json is damaged"
        )
    return d_model // n_heads


def activation(name: str) -> str:
    """A function of the MLP by the name that Spec has for it."""
    return _ACTIVATIONS.get(name, name)


def rotary(config: Mapping[str, Any], layer_type: str | None = None, theta: float = 10_000.0) -> Rotary:
    """Rotary positions of a config.json, or of one of its kinds of layers.

    Args:
        config: the config.json.
        layer_type: the kind, where each has its own.
        theta: if none is stated.
    """
    stated = config.get("rope_parameters")
    if stated is None:  # before transformers 5
        stated = config.get("rope_scaling") or {}
        theta = config.get("rope_theta") or theta
    elif layer_type is not None and layer_type in stated:
        stated = stated[layer_type] or {}
    kind = stated.get("rope_type") or stated.get("type") or "default"
    settings: dict[str, Any] = {"theta": float(stated.get("rope_theta") or theta), "kind": kind}
    if kind in ("linear", "llama3"):
        settings["factor"] = float(stated["factor"])
    if kind == "llama3":
        settings |= {key: float(stated[key]) for key in ("low_freq_factor", "high_freq_factor")}
        settings["original_context"] = (
            stated.get("original_max_position_embeddings") or config["max_position_embeddings"]
        )
    return Rotary(**settings)


def rope_parameters(rotary: Rotary) -> dict[str, Any]:
    """The inverse of `rotary`."""
    settings: dict[str, Any] = {"rope_type": rotary.kind, "rope_theta": rotary.theta}
    if rotary.kind in ("linear", "llama3"):
        settings["factor"] = rotary.factor
    if rotary.kind == "llama3":
        settings |= {"low_freq_factor": rotary.low_freq_factor, "high_freq_factor": rotary.high_freq_factor}
        settings["original_max_position_embeddings"] = rotary.original_context
    return settings


def layers_of_two_kinds(layer_types: Sequence[str], full: Attention, sliding: Attention) -> dict[str, Any]:
    """Fields of the Spec of a model whose layers are of these types."""
    if unknown := {*layer_types} - {SLIDING, FULL}:
        raise UnsupportedError(
            f"layer_types has {min(unknown)!r}, which is not implemented; implemented: {SLIDING}, {FULL}"
        )
    if len({*layer_types}) == 1:
        return {"attention": (sliding if layer_types[0] == SLIDING else full,)}
    kinds = tuple(int(layer_type == SLIDING) for layer_type in layer_types)
    return {"attention": (full, sliding), "kind_of_layer": kinds}


def layer_types(spec: Spec) -> list[str]:
    """The inverse of `layers_of_two_kinds`."""
    return [FULL if spec.attention[kind].window is None else SLIDING for kind in spec.layer_kinds]


def window(spec: Spec) -> int | None:
    """Of the layers that have one."""
    return next((kind.window for kind in spec.attention if kind.window is not None), None)


def stored(second_norm: str = "post_attention_layernorm") -> dict[str, Stored]:
    """Where a checkpoint holds parameters.

    `second_norm`: the module of the norm before the MLP. Llama calls it after the attention that it follows, Gemma 2
    and 3 have a norm of attention's output by that name.
    """

    def of_layer(name: str, module: str, *, matrix: bool = True) -> dict[str, Stored]:
        path = f"model.layers.{{layer}}.{module}"
        return {f"{name}.w": Stored(f"{path}.weight", transposed=matrix), f"{name}.b": Stored(f"{path}.bias")}

    return {
        "embed": Stored("model.embed_tokens.weight"),
        "norm.w": Stored("model.norm.weight"),
        "unembed": Stored("lm_head.weight"),
        **of_layer("norm1", "input_layernorm", matrix=False),
        **{k: v for name in "qkvo" for k, v in of_layer(name, f"self_attn.{name}_proj").items()},
        **of_layer("q_norm", "self_attn.q_norm", matrix=False),
        **of_layer("k_norm", "self_attn.k_norm", matrix=False),
        **of_layer("attn_norm", "post_attention_layernorm", matrix=False),
        **of_layer("norm2", second_norm, matrix=False),
        **{k: v for name in ("gate", "up", "down") for k, v in of_layer(name, f"mlp.{name}_proj").items()},
        **of_layer("mlp_norm", "post_feedforward_layernorm", matrix=False),
    }


MODULES = {
    "resid_pre": "model.layers.{layer} (input)",
    "attn_in": "model.layers.{layer}.input_layernorm",
    "attn_z": "model.layers.{layer}.self_attn.o_proj (input)",
    "attn_out": "model.layers.{layer}.self_attn",
    "resid_mid": "model.layers.{layer}.post_attention_layernorm (input)",
    "mlp_in": "model.layers.{layer}.post_attention_layernorm",
    "mlp_act": "model.layers.{layer}.mlp.down_proj (input)",
    "mlp_out": "model.layers.{layer}.mlp",
    "resid_post": "model.layers.{layer}",
}
MODULES_WITH_POST_NORMS = MODULES | {
    "attn_raw": "model.layers.{layer}.self_attn",
    "attn_out": "model.layers.{layer}.post_attention_layernorm",
    "resid_mid": "model.layers.{layer}.pre_feedforward_layernorm (input)",
    "mlp_in": "model.layers.{layer}.pre_feedforward_layernorm",
    "mlp_raw": "model.layers.{layer}.mlp",
    "mlp_out": "model.layers.{layer}.post_feedforward_layernorm",
}
