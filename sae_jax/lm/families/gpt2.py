"""GPT-2, and models of its architecture. Linear layers are stored as (in, out); q, k and v share one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sae_jax.lm.family import Family, Stored
from sae_jax.lm.llama_like import activation
from sae_jax.lm.spec import Spec, UnsupportedError
from sae_jax.types import UserError

_NEEDED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def _read_spec(config: Mapping[str, Any]) -> Spec:
    for key, needed in _NEEDED.items():
        if config.get(key, needed) != needed:
            raise UnsupportedError(f"GPT-2 with {key}={config[key]} is not implemented; it must be {needed}")
    d_model = config["n_embd"]
    if d_model % config["n_head"]:
        raise UserError(f"n_head={config['n_head']} does not divide n_embd={d_model}; the config.json is damaged")
    return Spec(
        family="gpt2",
        n_layers=config["n_layer"],
        d_model=d_model,
        n_heads=config["n_head"],
        d_head=d_model // config["n_head"],
        d_mlp=config.get("n_inner") or 4 * d_model,
        n_vocab=config["vocab_size"],
        n_context=config["n_positions"],
        # The library's own defaults: a config.json may leave out what equals them.
        activation=activation(config.get("activation_function", "gelu_new")),  # type: ignore[arg-type]
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        tied=config.get("tie_word_embeddings", True),
    )


def _write_config(spec: Spec) -> dict[str, Any]:
    return {
        "n_layer": spec.n_layers,
        "n_embd": spec.d_model,
        "n_head": spec.n_heads,
        "n_inner": spec.d_mlp,
        "vocab_size": spec.n_vocab,
        "n_positions": spec.n_context,
        "activation_function": spec.activation,
        "layer_norm_epsilon": spec.norm_eps,
        "tie_word_embeddings": spec.tied,
    }


def _of_layer(name: str, module: str, part: int = 0, n_parts: int = 1) -> dict[str, Stored]:
    """Weight and bias of a module that every layer has."""
    path = f"transformer.h.{{layer}}.{module}"
    return {
        f"{name}.w": Stored(f"{path}.weight", False, part, n_parts),
        f"{name}.b": Stored(f"{path}.bias", False, part, n_parts),
    }


FAMILY = Family(
    architecture="GPT2LMHeadModel",
    read_spec=_read_spec,
    write_config=_write_config,
    prefixes=("transformer.",),
    stored={
        "embed": Stored("transformer.wte.weight"),
        "positions": Stored("transformer.wpe.weight"),
        "norm.w": Stored("transformer.ln_f.weight"),
        "norm.b": Stored("transformer.ln_f.bias"),
        "unembed": Stored("lm_head.weight"),
        **_of_layer("norm1", "ln_1"),
        **_of_layer("q", "attn.c_attn", 0, 3),
        **_of_layer("k", "attn.c_attn", 1, 3),
        **_of_layer("v", "attn.c_attn", 2, 3),
        **_of_layer("o", "attn.c_proj"),
        **_of_layer("norm2", "ln_2"),
        **_of_layer("up", "mlp.c_fc"),
        **_of_layer("down", "mlp.c_proj"),
    },
    modules={
        "resid_pre": "transformer.h.{layer} (input)",
        "attn_in": "transformer.h.{layer}.ln_1",
        "attn_z": "transformer.h.{layer}.attn.c_proj (input)",
        "attn_out": "transformer.h.{layer}.attn",
        "resid_mid": "transformer.h.{layer}.ln_2 (input)",
        "mlp_in": "transformer.h.{layer}.ln_2",
        "mlp_act": "transformer.h.{layer}.mlp.c_proj (input)",
        "mlp_out": "transformer.h.{layer}.mlp",
        "resid_post": "transformer.h.{layer}",
    },
    buffers=("h.{layer}.attn.bias", "h.{layer}.attn.masked_bias"),
)
