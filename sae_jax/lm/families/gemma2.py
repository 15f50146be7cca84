"""Gemma 2: Gemma with post-norms, capped scores and logits, and a window in every second layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sae_jax.lm.families import gemma
from sae_jax.lm.llama_like import (
    FULL,
    MODULES_WITH_POST_NORMS,
    SLIDING,
    config_of,
    layer_types,
    layers_of_two_kinds,
    rotary,
    stored,
    window,
)
from sae_jax.lm.spec import Attention, Spec


def _read_spec(config: Mapping[str, Any]) -> Spec:
    types = config.get("layer_types") or [
        SLIDING if (layer + 1) % 2 else FULL for layer in range(config["num_hidden_layers"])
    ]
    turns = rotary(config)
    return Spec(
        **gemma.gemma_sizes(config, "gemma2"),
        **layers_of_two_kinds(types, Attention(turns), Attention(turns, config.get("sliding_window", 4096))),
        post_norms=True,
        query_scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
        attn_cap=config.get("attn_logit_softcapping", 50.0),
        logit_cap=config.get("final_logit_softcapping", 30.0),
    )


def write_config(spec: Spec) -> dict[str, Any]:
    """The config.json; of Gemma 3 all but its rotary positions."""
    assert spec.query_scale is not None
    config = config_of(spec)
    return config | {
        "hidden_activation": config.pop("hidden_act"),
        "layer_types": layer_types(spec),
        "sliding_window": window(spec),
        "query_pre_attn_scalar": spec.query_scale**-2,
        "attn_logit_softcapping": spec.attn_cap,
        "final_logit_softcapping": spec.logit_cap,
    }


FAMILY = dataclasses.replace(
    gemma.FAMILY,
    architecture="Gemma2ForCausalLM",
    read_spec=_read_spec,
    write_config=write_config,
    stored=stored("pre_feedforward_layernorm"),
    modules=MODULES_WITH_POST_NORMS,
)
