"""Decoder language models as pure functions: load, read and edit any activation, generate; no torch but where asked."""

from sae_jax.lm import intervene
from sae_jax.lm.generate import NO_TOKEN, generate, stream
from sae_jax.lm.hooks import POINTS, READ_BY_BLOCK, Hook, check_hook, hook_width, names_elsewhere, parse_hook, points
from sae_jax.lm.intervene import ReplacedSite, later_hooks, replaced_site
from sae_jax.lm.logits import logit_effect
from sae_jax.lm.model import LanguageModel, digest, load, locate, place, read_spec, resolve, tokenizer
from sae_jax.lm.redrawn import moved
from sae_jax.lm.run import Cache, Output, check_ids, empty_cache, run
from sae_jax.lm.spec import Spec, UnsupportedError
from sae_jax.lm.tokenizer import Tokenizer
from sae_jax.lm.torch_model import TorchModel, TorchSite, load_torch
from sae_jax.ops.predictions import cross_entropy, kl_divergence

__all__ = [
    "NO_TOKEN",
    "POINTS",
    "READ_BY_BLOCK",
    "Cache",
    "Hook",
    "LanguageModel",
    "Output",
    "ReplacedSite",
    "Spec",
    "Tokenizer",
    "TorchModel",
    "TorchSite",
    "UnsupportedError",
    "check_hook",
    "check_ids",
    "cross_entropy",
    "digest",
    "empty_cache",
    "generate",
    "hook_width",
    "intervene",
    "kl_divergence",
    "later_hooks",
    "load",
    "load_torch",
    "locate",
    "logit_effect",
    "moved",
    "names_elsewhere",
    "parse_hook",
    "place",
    "points",
    "read_spec",
    "replaced_site",
    "resolve",
    "run",
    "stream",
    "tokenizer",
]
