"""Gemma: Llama with a scaled embedding, norms that multiply by 1 + w, and GELU."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sae_jax.lm.families import llama
from sae_jax.lm.llama_like import config_of, rotary, sizes
from sae_jax.lm.spec import Attention, Spec, UnsupportedError


def gemma_sizes(config: Mapping[str, Any], family: str, defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fields of the Spec that the Gemmas share; arguments as `llama_like.sizes`."""
    if config.get("use_bidirectional_attention"):
        raise UnsupportedError(
            "Gemma with use_bidirectional_attention=true is not implemented; it must attend to what is past"
        )
    own = {"head_dim": 256, "tie_word_embeddings": True, "hidden_act": "gelu_new"} | dict(defaults or {})
    fields = sizes(config, family, own) | {"norm_offset": 1.0, "scaled_embedding": True}
    # Early releases state the exact GELU and mean the other one, as the library reads them, too.
    return fields | ({"activation": "gelu_new"} if fields["activation"] == "gelu" else {})


def _read_spec(config: Mapping[str, Any]) -> Spec:
    return Spec(**gemma_sizes(config, "gemma"), attention=(Attention(rotary(config)),))


FAMILY = dataclasses.replace(
    llama.FAMILY, architecture="GemmaForCausalLM", read_spec=_read_spec, write_config=config_of
)
