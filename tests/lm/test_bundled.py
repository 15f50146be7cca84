"""The model that ships: the numbers it gives, its size, and how well it knows text it never saw."""

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.activations.tokens import sequences
from sae_jax.lm import cross_entropy, load, run, tokenizer
from sae_jax.lm.model import BUNDLED
from tests.golden.make_bundled_lm import GOLDEN, numbers


def test_numbers_are_those_on_record():
    made = numbers()
    with np.load(GOLDEN) as golden:
        assert set(golden) == set(made)
        for name, values in made.items():
            np.testing.assert_allclose(values, golden[name], atol=1e-4, err_msg=name)


def test_it_predicts_held_out_text_at_less_than_one_and_a_half_bits_a_byte():
    model, vocabulary = load("bundled"), tokenizer("bundled")
    ids_BT = jnp.asarray(list(sequences("heldout", vocabulary, 128, stop=32)))
    nll = jax.jit(lambda model, ids_BT: cross_entropy(run(model, ids_BT).logits, ids_BT))(model, ids_BT)
    n_bytes = sum(len(vocabulary.decode(row[1:]).encode()) for row in np.asarray(ids_BT))
    assert float(nll.sum()) / np.log(2) / n_bytes < 1.45


def test_it_is_small_and_says_where_it_is_from():
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < 3_000_000
    origin = (BUNDLED / "README.md").read_text(encoding="utf-8")
    assert "Python Software Foundation" in origin
    assert "experiments/train_bundled_lm.py" in origin
