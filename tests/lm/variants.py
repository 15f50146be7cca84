"""Small models of every family and of every setting that changes what they compute, as Hugging Face folders.

The tensors of a variant follow from their names, so that golden numbers need no weights beside them.
"""

import json
import zlib

import numpy as np
from safetensors.numpy import save_file

_GPT2 = {"model_type": "gpt2", "n_layer": 3, "n_embd": 32, "n_head": 4, "n_positions": 64, "vocab_size": 48}
_LLAMA = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 56,
    "vocab_size": 48,
    "max_position_embeddings": 64,
}
_NEOX = {"model_type": "gpt_neox", **_LLAMA}
del _NEOX["num_key_value_heads"]
_GEMMA = _LLAMA | {"head_dim": 16}
_SHORT = {"query_pre_attn_scalar": 24, "sliding_window": 8}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
_LOCAL = {"rope_type": "default", "rope_theta": 10_000.0}

CONFIGS = {
    "gpt2": _GPT2,
    "gpt2-relu": _GPT2 | {"activation_function": "relu", "n_inner": 40},
    "neox": _NEOX,
    "neox-serial": _NEOX | {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new"},
    "neox-half-rotary": _NEOX | {"rotary_pct": 0.5, "rotary_emb_base": 5_000.0, "tie_word_embeddings": True},
    "llama": {"model_type": "llama", **_LLAMA},
    "llama-all-heads": {"model_type": "llama", **_LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama-biased": {"model_type": "llama", **_LLAMA, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "llama-wide-heads": {"model_type": "llama", **_LLAMA, "head_dim": 12, "num_key_value_heads": 1},
    "llama3": {"model_type": "llama", **_LLAMA, "rope_parameters": _LLAMA3},
    "llama-linear": {"model_type": "llama", **_LLAMA, "rope_parameters": _LINEAR, "rms_norm_eps": 1e-3},
    "mistral": {"model_type": "mistral", **_LLAMA, "sliding_window": 8},
    "mistral-no-window": {"model_type": "mistral", **_LLAMA, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", **_LLAMA},
    "qwen2-windows": {
        "model_type": "qwen2",
        **_LLAMA,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", **_LLAMA, "head_dim": 16},
    "qwen3-biased": {
        "model_type": "qwen3",
        **_LLAMA,
        "head_dim": 8,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "gemma": {"model_type": "gemma", **_GEMMA},
    "gemma-one-kv": {"model_type": "gemma", **_GEMMA, "num_key_value_heads": 1, "hidden_act": "gelu"},
    "gemma2": {"model_type": "gemma2", **_GEMMA, **_SHORT},
    "gemma2-tight": {
        "model_type": "gemma2",
        **_GEMMA,
        **_SHORT,
        "sliding_window": 4,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma2-no-caps": {
        "model_type": "gemma2",
        **_GEMMA,
        **_SHORT,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    "gemma3": {"model_type": "gemma3_text", **_GEMMA, **_SHORT, "num_hidden_layers": 7},
    "gemma3-stretched": {
        "model_type": "gemma3_text",
        **_GEMMA,
        **_SHORT,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "rope_parameters": {"full_attention": _LINEAR | {"rope_theta": 1e6}, "sliding_attention": _LOCAL},
        "final_logit_softcapping": 5.0,
    },
}

# The same models as configs said it before transformers 5.
OLDER = {
    "llama3": {
        "model_type": "llama",
        **_LLAMA,
        "rope_theta": 10_000.0,
        "rope_scaling": {key: value for key, value in _LLAMA3.items() if key != "rope_theta"},
    },
    "llama-linear": {
        "model_type": "llama",
        **_LLAMA,
        "rope_theta": 10_000.0,
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "rms_norm_eps": 1e-3,
    },
    "gemma": {"model_type": "gemma", **_GEMMA, "hidden_act": "gelu"},
    "gemma3": {
        "model_type": "gemma3_text",
        **_GEMMA,
        **_SHORT,
        "num_hidden_layers": 7,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
    },
}


def tensor(name, shape, norm):
    """f32, always the same for a name and shape; norms' weights are near `norm`, matrices keep sizes about."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    scale = 0.2 if len(shape) == 1 else 1.5 / np.sqrt(shape[-1])
    offset = norm if len(shape) == 1 and name.endswith("weight") else 0.0
    return (offset + scale * rng.standard_normal(shape)).astype(np.float32)


def write_folder(folder, config, shapes):
    """A Hugging Face folder of this config, with `tensor` of these {name: shape}."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    norm = 0.0 if "gemma" in config["model_type"] else 1.0  # Gemma's multiply by 1 + w
    tensors = {name: tensor(name, tuple(shape), norm) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def ids_of(config):
    """i64[2, 20]: longer than every window."""
    return np.random.default_rng(0).integers(1, config["vocab_size"], (2, 20))
