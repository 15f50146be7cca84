"""Llama 2 and 3, and what has their shape, such as SmolLM2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sae_jax.lm.family import Family
from sae_jax.lm.llama_like import MODULES, config_of, rotary, sizes, stored
from sae_jax.lm.spec import Attention, Spec


def _read_spec(config: Mapping[str, Any]) -> Spec:
    return Spec(**sizes(config, "llama"), attention=(Attention(rotary(config)),))


FAMILY = Family(
    architecture="LlamaForCausalLM",
    read_spec=_read_spec,
    write_config=config_of,
    prefixes=("model.",),
    stored=stored(),
    modules=MODULES,
    buffers=("layers.{layer}.self_attn.rotary_emb.inv_freq",),
)
