"""Mistral: Llama with a window of attention in every layer, or in none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sae_jax.lm.families import llama
from sae_jax.lm.llama_like import config_of, rotary, sizes, window
from sae_jax.lm.spec import Attention, Spec, UnsupportedError


def _read_spec(config: Mapping[str, Any]) -> Spec:
    if config.get("layer_types") is not None:
        raise UnsupportedError("Mistral with layer_types is not implemented; it must be left out")
    # The library's own default is a window of 4,096; what states null has none.
    attention = Attention(rotary(config), config.get("sliding_window", 4096))
    return Spec(**sizes(config, "mistral"), attention=(attention,))


def _write_config(spec: Spec) -> dict[str, Any]:
    return config_of(spec) | {"sliding_window": window(spec)}


FAMILY = dataclasses.replace(
    llama.FAMILY, architecture="MistralForCausalLM", read_spec=_read_spec, write_config=_write_config
)
