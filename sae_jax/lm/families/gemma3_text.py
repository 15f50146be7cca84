"""Gemma 3, text alone: Gemma 2 without caps, with a norm of each head's queries and keys, five windowed layers to one,
and rotary positions of their own for each kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sae_jax.lm.families import gemma, gemma2
from sae_jax.lm.llama_like import FULL, SLIDING, layers_of_two_kinds, rope_parameters, rotary
from sae_jax.lm.spec import Attention, Rotary, Spec, UnsupportedError


def read_spec(config: Mapping[str, Any]) -> Spec:
    """The Spec of a config.json."""
    if (cap := config.get("attn_logit_softcapping")) is not None:  # stated by none, and ignored by the library
        raise UnsupportedError(f"Gemma 3 with attn_logit_softcapping={cap} is not implemented; it must be null")
    pattern = config.get("sliding_window_pattern", 6)
    types = config.get("layer_types") or [
        SLIDING if (layer + 1) % pattern else FULL for layer in range(config["num_hidden_layers"])
    ]
    full, sliding = _rotary_of_both(config)
    return Spec(
        **gemma.gemma_sizes(config, "gemma3_text", {"max_position_embeddings": 131_072}),
        **layers_of_two_kinds(types, Attention(full), Attention(sliding, config.get("sliding_window", 4096))),
        qk_norm=True,
        post_norms=True,
        query_scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
        logit_cap=config.get("final_logit_softcapping"),
    )


def _rotary_of_both(config: Mapping[str, Any]) -> tuple[Rotary, Rotary]:
    """Of layers that see everything, and of those with a window, whose positions are never stretched."""
    if config.get("rope_parameters") is None:  # before transformers 5
        return rotary(config, theta=1_000_000.0), Rotary(float(config.get("rope_local_base_freq", 10_000.0)))
    return rotary(config, FULL, 1_000_000.0), rotary(config, SLIDING, 10_000.0)


def _write_config(spec: Spec) -> dict[str, Any]:
    windowed = {kind.window is not None: kind.rotary or Rotary() for kind in spec.attention}
    both = {FULL: windowed.get(False, Rotary(1_000_000.0)), SLIDING: windowed.get(True, Rotary())}
    return gemma2.write_config(spec) | {
        "rope_parameters": {layer_type: rope_parameters(turns) for layer_type, turns in both.items()}
    }


FAMILY = dataclasses.replace(
    gemma2.FAMILY,
    architecture="Gemma3ForCausalLM",
    read_spec=read_spec,
    write_config=_write_config,
    prefixes=("model.language_model.", "language_model.model.", "language_model.", "model."),  # with vision, or without
)
