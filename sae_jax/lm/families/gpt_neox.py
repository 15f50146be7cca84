"""GPT-NeoX and Pythia: attention and MLP side by side, rotary positions on a part of each head, and q, k and v of each
head in turn in one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sae_jax.lm.family import Family, Stored
from sae_jax.lm.llama_like import activation, head_width, rope_parameters, rotary
from sae_jax.lm.spec import Attention, Rotary, Spec


def _read_spec(config: Mapping[str, Any]) -> Spec:
    d_head = head_width(config["hidden_size"], config["num_attention_heads"])
    stated = config.get("rope_parameters") or {}
    share = stated.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
    bias = bool(config.get("attention_bias", True))
    return Spec(
        family="gpt_neox",
        n_layers=config["num_hidden_layers"],
        d_model=config["hidden_size"],
        n_heads=config["num_attention_heads"],
        d_head=d_head,
        d_mlp=config["intermediate_size"],
        n_vocab=config["vocab_size"],
        n_context=config["max_position_embeddings"],
        activation=activation(config.get("hidden_act", "gelu")),  # type: ignore[arg-type]
        norm_eps=float(config.get("layer_norm_eps", 1e-5)),
        positions="rotary",
        qkv_bias=bias,
        out_bias=bias,
        tied=config.get("tie_word_embeddings", False),
        parallel=config.get("use_parallel_residual", True),
        d_rotary=int(d_head * share),
        attention=(Attention(rotary(config, theta=config.get("rotary_emb_base", 10_000.0))),),
    )


def _write_config(spec: Spec) -> dict[str, Any]:
    assert spec.d_rotary is not None
    turns = rope_parameters(spec.attention[0].rotary or Rotary())
    return {
        "num_hidden_layers": spec.n_layers,
        "hidden_size": spec.d_model,
        "num_attention_heads": spec.n_heads,
        "intermediate_size": spec.d_mlp,
        "vocab_size": spec.n_vocab,
        "max_position_embeddings": spec.n_context,
        "hidden_act": spec.activation,
        "layer_norm_eps": spec.norm_eps,
        "attention_bias": spec.qkv_bias,
        "tie_word_embeddings": spec.tied,
        "use_parallel_residual": spec.parallel,
        "rope_parameters": turns | {"partial_rotary_factor": spec.d_rotary / spec.d_head},
    }


def _of_layer(name: str, module: str, part: int | None = None, *, matrix: bool = True) -> dict[str, Stored]:
    """Weight and bias of a module that every layer has; `part`: of its q, k and v."""
    path, parts = f"gpt_neox.layers.{{layer}}.{module}", (0, 1, False) if part is None else (part, 3, True)
    return {
        f"{name}.w": Stored(f"{path}.weight", matrix, *parts),
        f"{name}.b": Stored(f"{path}.bias", False, *parts),
    }


FAMILY = Family(
    architecture="GPTNeoXForCausalLM",
    read_spec=_read_spec,
    write_config=_write_config,
    prefixes=("gpt_neox.",),
    stored={
        "embed": Stored("gpt_neox.embed_in.weight"),
        "norm.w": Stored("gpt_neox.final_layer_norm.weight"),
        "norm.b": Stored("gpt_neox.final_layer_norm.bias"),
        "unembed": Stored("embed_out.weight"),
        **_of_layer("norm1", "input_layernorm", matrix=False),
        **_of_layer("q", "attention.query_key_value", 0),
        **_of_layer("k", "attention.query_key_value", 1),
        **_of_layer("v", "attention.query_key_value", 2),
        **_of_layer("o", "attention.dense"),
        **_of_layer("norm2", "post_attention_layernorm", matrix=False),
        **_of_layer("up", "mlp.dense_h_to_4h"),
        **_of_layer("down", "mlp.dense_4h_to_h"),
    },
    modules={
        "resid_pre": "gpt_neox.layers.{layer} (input)",
        "attn_in": "gpt_neox.layers.{layer}.input_layernorm",
        "attn_z": "gpt_neox.layers.{layer}.attention.dense (input)",
        "attn_out": "gpt_neox.layers.{layer}.attention",
        "resid_mid": "gpt_neox.layers.{layer}.post_attention_layernorm (input)",
        "mlp_in": "gpt_neox.layers.{layer}.post_attention_layernorm",
        "mlp_act": "gpt_neox.layers.{layer}.mlp.dense_4h_to_h (input)",
        "mlp_out": "gpt_neox.layers.{layer}.mlp",
        "resid_post": "gpt_neox.layers.{layer}",
    },
    renamed={"lm_head.weight": "embed_out.weight"},
    buffers=(
        "layers.{layer}.attention.bias",
        "layers.{layer}.attention.masked_bias",
        "layers.{layer}.attention.rotary_emb.inv_freq",
    ),
)
