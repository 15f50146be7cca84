"""How good a language model can the package carry in three megabytes, trained on a laptop?

Question: is a GPT-2 of about a million parameters, trained on the Python standard library's own source, good
enough to give readable latents, and cheap enough that anybody can make it again?
Guess: about 1.4 bits a byte on held-out files after a thousand steps, in under half an hour on two cores.
Command: python experiments/train_bundled_lm.py --out sae_jax/assets/bundled_lm
Cost: 17 minutes on two shared cores, 0.4 s a step (10 minutes) when they are idle.
Answer: yes. 1.283 bits a byte on held-out files after 1,500 steps (JAX 0.10.2, Python 3.11.7); 2.6 MB in all.

Recipe: byte-level BPE of 2,048 tokens; 4 layers, d_model 128, 4 heads, context 128, tied head; batches of 32
sequences at random places; Muon (Jordan et al. 2024, as optax.contrib.muon) for the six matrices of a block,
Adam for the rest; warm-up then cosine to 2 %; gradient norm clipped at 1. The folder written has
transformers' layout, with the held-out text (`heldout.jsonl`) and where it all came from (`README.md`).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
import tyro
from tokenizers import decoders, models, pre_tokenizers, trainers

from sae_jax.activations.text import stdlib_files
from sae_jax.lm import weights
from sae_jax.lm.model import LanguageModel
from sae_jax.lm.params import init
from sae_jax.lm.run import run
from sae_jax.lm.spec import Spec
from sae_jax.lm.tokenizer import Tokenizer, read_tokenizer
from sae_jax.ops.predictions import cross_entropy

SEPARATOR = "<|endoftext|>"
MATRICES = ("q.w", "k.w", "v.w", "o.w", "up.w", "down.w")
log = logging.getLogger("train_bundled_lm")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train; the defaults made the bundled model."""

    out: Path = Path("build/bundled_lm")
    """Folder to write."""
    steps: int = 1500
    """Optimiser steps."""
    batch: int = 32
    """Sequences a step, of one context each."""
    muon_lr: float = 0.02
    """Peak learning rate of the block matrices."""
    adam_lr: float = 3e-3
    """Peak learning rate of everything else."""
    vocabulary: int = 2048
    """Tokens of the byte-level BPE."""
    d_model: int = 128
    """Width of the residual stream; a multiple of 4."""
    smoke: bool = False
    """Five steps of a model a quarter as wide, on a fiftieth of the text: does it run?"""


def main(config: Config) -> None:
    """Tokenizer, model, held-out text and their README, written to `config.out`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    steps, d_model = (5, 32) if config.smoke else (config.steps, config.d_model)
    train_texts = [text for _, text in stdlib_files(held_out=False)]
    heldout = list(stdlib_files(held_out=True))
    if config.smoke:
        train_texts, heldout = train_texts[::50], heldout[:1]
    heldout_texts = [text for _, text in heldout]

    config.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(config.out, train_texts, config.vocabulary)
    tokenizer = read_tokenizer(config.out)
    spec = Spec(
        family="gpt2",
        n_layers=4,
        d_model=d_model,
        n_heads=4,
        d_head=d_model // 4,
        d_mlp=4 * d_model,
        n_vocab=tokenizer.size,
        n_context=128,
    )
    stream, heldout_stream = (pack(tokenizer, texts) for texts in (train_texts, heldout_texts))
    heldout_bytes = sum(len(text.encode()) for text in heldout_texts)
    bytes_per_token = heldout_bytes / len(heldout_stream)
    log.info("%.2fM training tokens, %.2f held-out bytes a token", len(stream) / 1e6, bytes_per_token)

    params = init(spec, jax.random.key(0))
    log.info("%.2fM parameters", sum(p.size for p in jax.tree.leaves(params)) / 1e6)
    params = train(spec, params, stream, steps, config)
    separator = {"bos_token_id": tokenizer.separator_id, "eos_token_id": tokenizer.separator_id}
    weights.save(config.out, spec, params, dtype=np.float16, settings=separator)

    # The saved float16 model is what users get, so it is what is scored.
    saved = weights.read_params(config.out, spec)
    bits_per_byte = heldout_nats(spec, saved, heldout_stream) / np.log(2) / bytes_per_token
    log.info("held-out bits per byte: %.4f", bits_per_byte)
    lines = (json.dumps({"name": name, "text": text}) for name, text in heldout)
    (config.out / "heldout.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (config.out / "README.md").write_text(readme(steps, bits_per_byte, heldout), encoding="utf-8")


def write_tokenizer(out: Path, texts: list[str], vocabulary: int) -> None:
    """Train a byte-level BPE on `texts` and save it as transformers reads it; the separator gets id 0."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SEPARATOR,
        "eos_token": SEPARATOR,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 128,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def pack(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts as one stream of ids, a separator before each."""
    return np.concatenate([np.array([tokenizer.separator_id, *ids], np.int32) for ids in tokenizer.encode(texts)])


def train(spec: Spec, params: dict, stream: np.ndarray, steps: int, config: Config) -> dict:
    """Parameters after `steps` steps."""
    optimizer = make_optimizer(steps, config)
    ids_N = jnp.asarray(stream)
    offset_T = jnp.arange(spec.n_context, dtype=jnp.int32)

    def loss(params, ids_BT):
        return cross_entropy(run(LanguageModel(params, spec), ids_BT).logits, ids_BT).mean()

    @jax.jit
    def chunk(params, state, keys):
        def step(carry, key):
            params, state = carry
            first_B = jax.random.randint(key, (config.batch,), 0, len(stream) - spec.n_context)
            nats, gradient = jax.value_and_grad(loss)(params, ids_N[first_B[:, None] + offset_T])
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), nats

        (params, state), nats_S = jax.lax.scan(step, (params, state), keys)
        return params, state, nats_S.mean()

    state, begun = optimizer.init(params), time.monotonic()
    keys = jax.random.split(jax.random.key(1), steps)
    for done in range(0, steps, 25):
        params, state, nats = chunk(params, state, keys[done : done + 25])
        seconds = time.monotonic() - begun
        log.info("step %d: %.3f nats a token, %.0f s", min(done + 25, steps), float(nats), seconds)
    return params


def make_optimizer(steps: int, config: Config) -> optax.GradientTransformation:
    """Muon for the stacked (layer, in, out) matrices, Adam for the rest."""

    def schedule(peak):
        return optax.warmup_cosine_decay_schedule(0.0, peak, min(100, steps // 10), steps, peak * 0.02)

    def group(params):
        return jax.tree.map_with_path(lambda path, _: "muon" if path[-1].key in MATRICES else "adam", params)

    def axes(params):
        matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))
        return jax.tree.map(lambda p: matrix if p.ndim == 3 else None, params)

    muon = optax.contrib.muon(schedule(config.muon_lr), weight_decay=0.01, muon_weight_dimension_numbers=axes)
    adam = optax.adamw(schedule(config.adam_lr), b2=0.98, weight_decay=0.0)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.partition({"muon": muon, "adam": adam}, group))


def heldout_nats(spec: Spec, params: dict, stream: np.ndarray) -> float:
    """Mean nats a token over contexts that overlap by one token, so that every token but the first counts."""
    score = jax.jit(lambda params, ids_BT: cross_entropy(run(LanguageModel(params, spec), ids_BT).logits, ids_BT))
    stride = spec.n_context - 1
    n_rows = (len(stream) - 1) // stride
    rows = np.stack([stream[i * stride : i * stride + spec.n_context] for i in range(n_rows)])
    total = sum(float(score(params, part).sum()) for part in np.array_split(rows, -(-n_rows // 64)))
    return total / (n_rows * stride)


def readme(steps: int, bits_per_byte: float, heldout: list[tuple[str, str]]) -> str:
    """Origin, licence and score of the folder."""
    return f"""# The bundled language model

A GPT-2-architecture model of about a million parameters that this project trained itself, so that everything
can be tried and tested without a network. It knows the look of Python source and nothing else.

- Made by: `python experiments/train_bundled_lm.py --out sae_jax/assets/bundled_lm`, {steps} steps
- Text: source and licence files of the standard library of Python {platform.python_version()}, no tests.
- Score: {bits_per_byte:.3f} bits per byte on held-out files.
- `heldout.jsonl`: the {len(heldout)} files never trained on: {", ".join(name for name, _ in heldout)}.
- Licence: the model, the tokenizer and their configuration are under this project's licence. The held-out
  files are part of Python, copyright the Python Software Foundation, under the PSF License Agreement
  (https://docs.python.org/3/license.html); some carry a further notice at their head.
"""


if __name__ == "__main__":
    main(tyro.cli(Config))
