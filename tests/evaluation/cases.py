"""A dictionary in a small random model, with text of the bundled tokenizer: what studies are given."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from sae_jax import lm
from sae_jax.activations.forward import read_hooks
from sae_jax.evaluation import prompts, study
from sae_jax.evaluation.examples import BLOCK_TOKENS
from sae_jax.evaluation.text import HeldOut
from sae_jax.saes import topk
from tests.lm.tiny import SPEC, random_model

HOOK = lm.Hook(1, "resid_post")
WIDTH = 64  # of sequences
TEXT = '''
def area(width, height):
    """The area of a rectangle; what if width is None?"""
    if width is None or height < 0:
        raise ValueError("no such Rectangle: %d" % width)
    return width * height

class Square(Shape):
    total = [1, 22, 333]
    def __init__(self, side, name="square"):
        self.side, self.name = side, name
    for number in range(10):
        print(number, total[number], "is the answer")
'''


def sequences(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(i32[n, WIDTH], bool[n, WIDTH]): a separator, and lines of TEXT in an order of chance."""
    tokenizer, rng = lm.tokenizer("bundled"), np.random.default_rng(seed)
    lines = TEXT.strip("\n").splitlines(keepends=True)
    ids = tokenizer.encode(["".join(rng.permutation(lines)) + "".join(rng.permutation(lines)) for _ in range(n)])
    ids_ST = np.array([[tokenizer.separator_id, *row][:WIDTH] for row in ids], np.int32)
    return ids_ST, ~np.isin(ids_ST, tokenizer.special_ids)


def case(n: int = 40, norm: str = "none", make=None, max_norm: float | None = None) -> study.Case:
    """A TopK dictionary of random rows, or what `make` makes of activations."""
    model = random_model(dataclasses.replace(SPEC, n_vocab=2048, n_context=WIDTH))
    tokenizer, hooks = lm.tokenizer("bundled"), (HOOK,)
    ids_ST, text_ST = sequences(n)
    text = HeldOut("text", model, hooks, hooks, ids_ST, text_ST, max_norm)
    if make is None:
        rng, config = np.random.default_rng(0), topk.Config(n_latents=48, k=4, dtype="float32", input_norm=norm)
        w_enc, b_enc, w_dec, b_dec = (
            jnp.asarray(rng.standard_normal(shape), jnp.float32)
            for shape in ((48, SPEC.d_model), 48, (48, SPEC.d_model), SPEC.d_model)
        )
        sae = topk.TopK(w_enc, b_enc, w_dec, b_dec, config)
    else:
        whole = np.resize(ids_ST, (BLOCK_TOKENS // WIDTH, WIDTH))  # of the shape that examples are made in
        acts, _ = read_hooks(model, whole, hooks, "float32")
        sae = make(np.asarray(acts[str(HOOK)])[:, 1:].reshape(-1, SPEC.d_model))
    return study.Case(prompts.Subject(sae, model, tokenizer, hooks, hooks, tokenizer.separator_id), text)
