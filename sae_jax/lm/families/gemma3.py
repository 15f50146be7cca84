"""Gemma 3 with vision, of which the language model alone is read, as a `gemma3_text`: its config is a part of it.

What belongs to images is named as not used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sae_jax.lm.families import gemma3_text
from sae_jax.lm.spec import Spec

# The library's own, which the published files leave out.
_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
}


def _read_spec(config: Mapping[str, Any]) -> Spec:
    return gemma3_text.read_spec(_DEFAULTS | config["text_config"])


FAMILY = dataclasses.replace(gemma3_text.FAMILY, read_spec=_read_spec)
