"""Decoder language models as pure functions: load, read and edit any activation, generate; no torch."""

from sae_jax.lm.generate import generate
from sae_jax.lm.hole import Hole, cut_open, later_hooks
from sae_jax.lm.hooks import POINTS, Hook, check_hook, hook_width, parse_hook
from sae_jax.lm.logits import cross_entropy, logit_effect
from sae_jax.lm.model import LanguageModel, load, locate, place, tokenizer
from sae_jax.lm.run import Cache, Output, empty_cache, run
from sae_jax.lm.spec import Spec
from sae_jax.lm.tokenizer import Tokenizer

__all__ = [
    "POINTS",
    "Cache",
    "Hole",
    "Hook",
    "LanguageModel",
    "Output",
    "Spec",
    "Tokenizer",
    "check_hook",
    "cross_entropy",
    "cut_open",
    "empty_cache",
    "generate",
    "hook_width",
    "later_hooks",
    "load",
    "locate",
    "logit_effect",
    "parse_hook",
    "place",
    "run",
    "tokenizer",
]
