"""Models in llama.cpp's files (.gguf): the config.json, tensors and tokenizer.json that one would stand for.

The `gguf` package reads and dequantises. What the converter to this format changed is undone here: rows of q and k of
Llama are in another order there, Gemma's norms have 1 added to their weights, and of Llama 3's positions only the
resulting factors are stored.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sae_jax.lm.block import frequencies
from sae_jax.lm.family import family
from sae_jax.lm.spec import Rotary
from sae_jax.storage import one_line
from sae_jax.types import UserError

MODEL_TYPES = {  # architecture there -> ours
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
_KEYS = {  # metadata, after the architecture -> config.json
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_FREQUENCIES = "rope_freqs.weight"
_NORMAL, _CONTROL, _USER = 1, 3, 4  # types of tokens there
# How texts are parted before they are tokenised, by the name that the file gives: regular expressions in turn.
_DIGIT, _DIGITS = r"\p{N}", r"\p{N}{1,3}"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PARTED_BY = {"llama-bpe": _WORDS % _DIGITS, "qwen2": _WORDS % _DIGIT, "gpt-2": None, "default": None, "smollm": None}


@functools.lru_cache(maxsize=2)
def _open(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError(f"{path} needs the gguf package; install sae_jax[gguf]") from None
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # the package raises whatever the bytes lead it to
        raise UserError(f"{path}: cannot be read ({one_line(error)}); get the file again") from None
    architecture = _value(reader, "general.architecture")
    if architecture not in MODEL_TYPES:
        raise UserError(
            f"{path} holds a {architecture!r}, which is not supported in this format; supported: "
            f"{', '.join(MODEL_TYPES)}. Get the model as safetensors"
        )
    return reader


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def config(path: Path) -> dict[str, Any]:
    """What the config.json of the model would say."""
    reader = _open(path)
    architecture = _value(reader, "general.architecture")
    model_type = MODEL_TYPES[architecture]
    stated = {ours: _value(reader, f"{architecture}.{key}") for key, ours in _KEYS.items()}
    config = {ours: value for ours, value in stated.items() if value is not None}
    if isinstance(config.get("num_key_value_heads"), list):
        raise UserError(f"{path} has layers with different numbers of heads, which is not implemented")
    shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}
    config |= {"model_type": model_type, "vocab_size": shapes["token_embd.weight"][0]}
    config["tie_word_embeddings"] = "output.weight" not in shapes
    # Numbers are stored in single precision: 1e-5 is meant where 9.99999975e-06 stands.
    config = {key: float(f"{value:.7g}") if isinstance(value, float) else value for key, value in config.items()}
    for key in ("bos", "eos"):
        if (number := _value(reader, f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{key}_token_id"] = number
    if "head_dim" in config and "gemma" in model_type:
        # Not stored: the width of a head, but for the largest models, for which it is that of one head of d_model.
        large = (model_type, config["num_hidden_layers"]) in (("gemma2", 46), ("gemma3_text", 62))
        width = config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]
        config["query_pre_attn_scalar"] = width
    scaling = _value(reader, f"{architecture}.rope.scaling.type")
    if scaling not in (None, "none"):
        factor = _value(reader, f"{architecture}.rope.scaling.factor")
        config["rope_scaling"] = {"rope_type": scaling, "factor": factor}
    if _FREQUENCIES in shapes:
        config["rope_scaling"] = _llama3(path, config)
    return config


def _llama3(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of Llama 3's positions, from the factors that they give. Raises UserError if these do not."""
    _, view = _raw(path)[_FREQUENCIES]
    factors, theta = view().astype(np.float64), config["rope_theta"]
    n = 2 * len(factors)
    settings = {"factor": float(f"{factors.max():.5g}"), **_LLAMA3}
    stretched = Rotary(theta, "llama3", settings["factor"], 1.0, 4.0, _LLAMA3["original_max_position_embeddings"])
    if not np.allclose(frequencies(Rotary(theta), n) / frequencies(stretched, n), factors, rtol=1e-4):
        raise UserError(f"{path} has {_FREQUENCIES} of positions that are not Llama 3's; get the model as safetensors")
    return {"rope_type": "llama3", **settings}


def tensors(path: Path) -> dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]:
    """{name in a Hugging Face checkpoint: (shape, what dequantises it)}, f32, as that checkpoint has them."""
    import gguf

    settings, raw = config(path), _raw(path)
    model_type, n_layers = settings["model_type"], settings["num_hidden_layers"]
    architecture = next(key for key, value in MODEL_TYPES.items() if value == model_type)
    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    name_map = gguf.get_tensor_name_map(arch, n_layers)
    names = {}
    for place in family(model_type).stored.values():
        for layer in range(n_layers):
            ours = place.name.format(layer=layer)
            if (theirs := name_map.get_name(ours, try_suffixes=(".weight", ".bias"))) in raw:
                names[theirs] = ours
    found = {}
    for theirs, (shape, view) in raw.items():
        if theirs == _FREQUENCIES:
            continue
        # What has no name among ours still says which layer it is of, and is refused like any other of a layer.
        ours = names.get(theirs, re.sub(r"^blk\.", "model.layers.", theirs))
        if model_type == "llama" and (part := re.search(r"\.([qk])_proj\.", ours)):
            n_heads = settings["num_attention_heads" if part[1] == "q" else "num_key_value_heads"]
            view = functools.partial(_in_halves, view, n_heads)
        elif "gemma" in model_type and ours.endswith("norm.weight"):
            view = functools.partial(_less_one, view)
        found[ours] = (shape, view)
    return found


def _raw(path: Path) -> dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]:
    """{name there: (shape, what dequantises it)}."""
    from gguf import quants

    def view(tensor: Any) -> np.ndarray:
        try:
            return quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError:
            raise UserError(
                f"{path} has {tensor.name!r} as {tensor.tensor_type.name}, which the gguf package cannot read; get the "
                f"model in another quantisation"
            ) from None

    return {
        tensor.name: (tuple(int(n) for n in reversed(tensor.shape)), functools.partial(view, tensor))
        for tensor in _open(path).tensors
    }


def _in_halves(view: Callable[[], np.ndarray], n_heads: int) -> np.ndarray:
    """Rows of q or k with the numbers that rotate together half a head apart; they are neighbours there."""
    rows = view()
    return rows.reshape(n_heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _less_one(view: Callable[[], np.ndarray]) -> np.ndarray:
    return view() - np.float32(1)


def tokenizer(path: Path) -> tuple[dict[str, Any], str | None, str | None, list[str], bool | None]:
    """(what the tokenizer.json would hold, beginning token, end token, special tokens, is every sequence begun)."""
    reader = _open(path)
    tokens, types = (_value(reader, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    kind, parted = (_value(reader, f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind == "gpt2" and (parted or "default") in _PARTED_BY:
        merges = [merge.split(" ", 1) for merge in _value(reader, "tokenizer.ggml.merges")]
        model = {"merges": merges, "byte_fallback": False}
        state = _byte_level(parted or "default")
    elif kind == "llama":
        model = {"merges": _merges(tokens, _value(reader, "tokenizer.ggml.scores")), "byte_fallback": True}
        state = _sentence_pieces(bool(_value(reader, "tokenizer.ggml.add_space_prefix") in (None, True)))
    else:
        raise UserError(
            f"{path} has a tokenizer of kind {kind} {parted}, which is not read from this format; put the model's "
            f"tokenizer.json beside it"
        )
    special = [token for token, its in zip(tokens, types, strict=True) if its == _CONTROL]
    added = [i for i, its in enumerate(types) if its in (_CONTROL, _USER)]
    unknown = _value(reader, "tokenizer.ggml.unknown_token_id")
    state["model"] = {
        "type": "BPE",
        "vocab": {token: i for i, token in enumerate(tokens)},
        "unk_token": tokens[unknown] if unknown is not None and kind == "llama" else None,
        "fuse_unk": kind == "llama",
        **model,
    }
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    state["added_tokens"] = [{"id": i, "content": tokens[i], "special": types[i] == _CONTROL, **flags} for i in added]
    ends = [_value(reader, f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos")]
    bos, eos = (None if end is None else tokens[end] for end in ends)
    state |= {"version": "1.0", "truncation": None, "padding": None, "post_processor": None}
    begins = _value(reader, "tokenizer.ggml.add_bos_token")
    # Where it is not said, llama.cpp begins with one for SentencePiece and Llama 3, and with none for others.
    by_default = kind == "llama" or parted == "llama-bpe"
    return state, bos, eos, special, by_default if begins is None else bool(begins)


def chat_template(path: Path) -> tuple[str | None, dict[str, str]]:
    """(the chat template that the file has, if it has one, what that may call bos_token and the like)."""
    reader = _open(path)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    numbers = {ours: _value(reader, f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in names.items()}
    tokens = _value(reader, "tokenizer.ggml.tokens") or []
    return _value(reader, "tokenizer.chat_template"), {
        f"{name}_token": tokens[number]
        for name, number in numbers.items()
        if number is not None and number < len(tokens)
    }


def _byte_level(parted: str) -> dict[str, Any]:
    """Parts of a tokenizer.json of byte-level BPE."""
    bytes_of = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    pattern = _PARTED_BY[parted]
    if pattern is None:
        first = [{"type": "Digits", "individual_digits": True}] if parted == "smollm" else []
        parts = [*first, bytes_of | {"use_regex": True}]
    else:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        parts = [split, bytes_of]
    return {
        "normalizer": {"type": "NFC"} if parted == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": parts},
        "decoder": bytes_of | {"use_regex": True},
    }


def _sentence_pieces(space_first: bool) -> dict[str, Any]:
    """Parts of a tokenizer.json of SentencePiece's BPE, which writes spaces as U+2581."""
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    first = [{"type": "Prepend", "prepend": "\u2581"}] if space_first else []
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if space_first else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*first, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def _merges(tokens: list[str], scores: list[float]) -> list[list[str]]:
    """Which pairs of pieces make a piece, those of the best score first: SentencePiece stores only the scores."""
    place = {token: i for i, token in enumerate(tokens)}
    found = [
        (-scores[i], place[token[:cut]], place[token[cut:]], token[:cut], token[cut:])
        for i, token in enumerate(tokens)
        for cut in range(1, len(token))
        if token[:cut] in place and token[cut:] in place
    ]
    return [[left, right] for *_, left, right in sorted(found)]
