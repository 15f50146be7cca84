"""Families of models as data: how a Hugging Face config and its tensor names map to ours.

A new family is one more entry of FAMILIES, with whatever fields of Spec and branches of block.py it needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from sae_jax.lm.spec import Spec
from sae_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Family:
    """How one `model_type` is read and written."""

    architecture: str  # class name that Hugging Face configs state
    read_spec: Callable[[Mapping[str, Any]], Spec]  # config.json -> Spec
    write_config: Callable[[Spec], dict[str, Any]]  # the inverse
    prefix: str  # what full checkpoints put before every name but the head's; base checkpoints leave it out
    layer_list: str  # the name that the layer number follows
    top: dict[str, str]  # tensor name -> ours
    layer: dict[str, tuple[str, ...]]  # module name -> ours; several share the tensor in equal parts of its last axis


def family_of(config: Mapping[str, Any], reference: str) -> Family:
    """The family of a parsed config.json; UserError naming `reference` if its model_type has none."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(
            f"model {reference!r} has model_type {model_type!r}, which is not supported; "
            f"supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def _read_gpt2(config: Mapping[str, Any]) -> Spec:
    unsupported = {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }
    for key, needed in unsupported.items():
        if config.get(key, needed) != needed:
            raise UserError(f"GPT-2 with {key}={config[key]} is not implemented; it must be {needed}")
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
        activation=config.get("activation_function", "gelu_new"),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        tied=config.get("tie_word_embeddings", True),
    )


def _write_gpt2(spec: Spec) -> dict[str, Any]:
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


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        read_spec=_read_gpt2,
        write_config=_write_gpt2,
        prefix="transformer.",
        layer_list="h",
        top={
            "wte.weight": "embed",
            "wpe.weight": "positions",
            "ln_f.weight": "norm.w",
            "ln_f.bias": "norm.b",
            "lm_head.weight": "unembed",
        },
        layer={
            "ln_1": ("norm1",),
            "attn.c_attn": ("q", "k", "v"),
            "attn.c_proj": ("o",),
            "ln_2": ("norm2",),
            "mlp.c_fc": ("up",),
            "mlp.c_proj": ("down",),
        },
    ),
}
