"""Qwen 3, dense: Qwen 2 without its biases, with a norm of each head's queries and keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sae_jax.lm.families import llama, qwen2
from sae_jax.lm.llama_like import sizes
from sae_jax.lm.spec import Spec


def _read_spec(config: Mapping[str, Any]) -> Spec:
    return Spec(**sizes(config, "qwen3", {"head_dim": 128}) | qwen2.attention(config), qk_norm=True)


FAMILY = dataclasses.replace(
    llama.FAMILY, architecture="Qwen3ForCausalLM", read_spec=_read_spec, write_config=qwen2.write_config
)
