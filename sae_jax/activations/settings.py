"""Settings of a harvest: which activations of which model on which text."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from sae_jax.activations.fields import COLUMN, Fields
from sae_jax.activations.rows import DTYPES
from sae_jax.types import UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class HarvestConfig:
    """Which activations of which model on which text."""

    model: tuple[str, ...] = ("bundled",)
    """`bundled`, a local Hugging Face folder, or hub-id[@revision]; several, with one tokenizer, as name=reference;
    +random:SEED after one: with random weights, as a baseline"""
    text: str = "stdlib"
    """`stdlib`, a file, folder or glob (files in order of name), or hf:dataset[@revision][:split]"""
    text_column: str = COLUMN
    """field of JSON records, or column of a table or hub dataset, that holds the text"""
    text_template: str | None = None
    """instead of text_column: several fields as one text, as '{title}\\n{text}' (\\n is the end of a line)"""
    chat: str | None = None
    """for conversations (text_column holds a list of messages with "role" and "content"), as the model's chat template
    writes them: a role, such as assistant, whose tokens rows are made of, or `all`"""
    shuffle: bool = False
    """documents of `text` in an order by seed: files are shuffled, and documents in a buffer of 10,000"""
    skip_unreadable: bool = False
    """of several files leave out those that are damaged, instead of refusing the text; they are named and counted"""
    heldout: str | None = None
    """text that evaluation uses, in the same notation; never put it into `text`"""
    hooks: tuple[str, ...] = ("resid_post.2",)
    """where in the model, as point.layer; all are stored with the same rows. Points of a block: resid_pre, attn_in,
    attn_z, attn_raw, attn_out, resid_mid, mlp_in, mlp_act, mlp_raw, mlp_out, resid_post. `sae-jax hooks MODEL` says
    which a model has; layers count from 0. With backend=torch also the name of a module, such as model.layers.5.mlp"""
    context: int = 128
    """tokens of a sequence"""
    sequence: Literal["packed", "document"] = "packed"
    """packed: documents are joined and cut into sequences; document: each is a sequence of its own, cut at `context`
    or filled up with padding, which no row is made of"""
    tokens: int = 0
    """tokens to run; 0 = all of the text"""
    dtype: str = "bfloat16"
    """of the stored rows: bfloat16, float16, float32, or int8 with a scale for each row"""
    max_norm_multiple: float | Literal["auto"] | None = "auto"
    """leave out rows whose norm exceeds this multiple of the shard's median (attention sinks); auto: 10 if the first
    sequences have such rows, none if not"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of the model's parameters and products"""
    backend: Literal["jax", "torch"] = "jax"
    """what runs the model; torch (pip install 'sae_jax[torch]') runs every causal model of transformers"""
    split: int = 1
    """devices that each copy of a model is split over; 1 = it lies whole on each"""
    batch_tokens: int = 4096
    """tokens of one forward pass"""
    seed: int = 0
    """of the order of rows inside a shard, and of documents with harvest.shuffle"""

    def __post_init__(self) -> None:
        self.models()  # refuses names that are not
        self.fields()
        if not self.hooks:
            raise UsageError("harvest.hooks is empty; name at least one hook, such as resid_post.2")
        if self.context < 2:
            raise UsageError(f"harvest.context={self.context} must be at least 2")
        if self.tokens < 0 or 0 < self.tokens < self.context:
            raise UsageError(f"harvest.tokens={self.tokens} must be 0 or at least harvest.context={self.context}")
        if self.batch_tokens < self.context:
            raise UsageError(
                f"harvest.batch_tokens={self.batch_tokens} must be at least harvest.context={self.context}"
            )
        if self.dtype not in DTYPES:
            raise UsageError(f"harvest.dtype={self.dtype!r}: use one of {', '.join(DTYPES)}")
        multiple = self.max_norm_multiple
        if not (multiple is None or multiple == "auto" or 1 < multiple < math.inf):
            raise UsageError(f"harvest.max_norm_multiple={multiple} must be above 1 and finite, auto or none")
        if self.split < 1:
            raise UsageError(f"harvest.split={self.split} must be at least 1")
        if self.backend == "torch" and self.split > 1:
            raise UsageError(f"harvest.split={self.split}: harvest.backend=torch runs a model whole; use 1")

    def fields(self) -> Fields:
        """What of a record of the text is the document. Raises UsageError for a template that names no field."""
        if self.text_template is None:
            return Fields(self.text_column, is_chat=self.chat is not None)
        if self.chat is not None:
            raise UsageError(
                "harvest.text_template makes texts, and harvest.chat reads messages; leave out one of them"
            )
        if self.text_column != COLUMN:
            raise UsageError(
                f"harvest.text_column={self.text_column!r} and harvest.text_template={self.text_template!r} both say "
                f"what the text is; leave out one of them"
            )
        return Fields(template=self.text_template.replace(r"\n", "\n").replace(r"\t", "\t"))

    def models(self) -> dict[str, str]:
        """{name: reference}; a single model has the name "". Raises UsageError."""
        if len(self.model) == 1:
            return {"": self.model[0]}
        named = [text.partition("=") for text in self.model]
        models = {name: reference for name, _, reference in named if _NAME.fullmatch(name) and reference}
        if len(models) < len(named) or not models:
            raise UsageError(
                f"harvest.model={' '.join(self.model)!r}: give one model, or several as name=reference, names "
                f"that differ, of letters, digits, '_' and '-'"
            )
        return models
