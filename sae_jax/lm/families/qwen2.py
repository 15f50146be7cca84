"""Qwen 2 and 2.5: Llama with biases of queries, keys and values, and, if asked, a window in the later layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sae_jax.lm.families import llama
from sae_jax.lm.llama_like import (
    FULL,
    SLIDING,
    config_of,
    layer_types,
    layers_of_two_kinds,
    rotary,
    sizes,
    window,
)
from sae_jax.lm.spec import Attention, Spec


def _read_spec(config: Mapping[str, Any]) -> Spec:
    biases: dict[str, Any] = {"qkv_bias": True, "out_bias": False, "mlp_bias": False}
    return Spec(**sizes(config, "qwen2") | biases | attention(config))


def attention(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the Spec: the kinds of layers there are."""
    width = config.get("sliding_window", 4096) if config.get("use_sliding_window", False) else None
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", 28)
        windowed = [width is not None and layer >= first for layer in range(config["num_hidden_layers"])]
        types = [SLIDING if each else FULL for each in windowed]
    turns = rotary(config)
    return layers_of_two_kinds(types, Attention(turns), Attention(turns, width))


def write_config(spec: Spec) -> dict[str, Any]:
    """The config.json of Qwen 2 and 3."""
    windows = {"use_sliding_window": window(spec) is not None, "sliding_window": window(spec)}
    return config_of(spec) | windows | {"layer_types": layer_types(spec)}


FAMILY = dataclasses.replace(
    llama.FAMILY, architecture="Qwen2ForCausalLM", read_spec=_read_spec, write_config=write_config
)
