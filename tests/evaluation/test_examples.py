"""Means over the tokens of an example, against plain numpy."""

import dataclasses

import numpy as np
import pytest

from sae_jax import UsageError, lm
from sae_jax.activations.forward import read_hooks
from sae_jax.evaluation import examples
from tests.evaluation import cases

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module", params=["none", "layer_norm"])
def case(request):
    return cases.case(norm=request.param, max_norm=1.1)


def test_examples_are_means_over_what_a_set_would_hold(case):
    ids, text = case.text.sequences, case.text.text
    thirds = np.arange(cases.WIDTH)[None] // 22 + 3 * np.arange(40)[:, None]
    tokens = np.full(ids.shape, -1)
    tokens[35, 5], tokens[0, 0], tokens[39, 63] = 1, 0, 2  # in no order; the first is a special token
    by_third, single = examples.of_sequences(case, ids, text, [thirds, tokens], "test")

    size = examples.BLOCK_TOKENS // cases.WIDTH
    filled = np.pad(ids, ((0, 2 * size - 40), (0, 0)))
    read = [read_hooks(case.subject.model, filled[i : i + size], (cases.HOOK,), "float32") for i in (0, size)]
    x = np.concatenate([acts[str(cases.HOOK)] for acts, _ in read])[:40]
    norms = [np.asarray(norms) for _, norms in read]
    kept = [case.text.keep(text[i : i + size], each[: 40 - i]) for i, each in ((0, norms[0]), (size, norms[1]))]
    keep, sae = np.concatenate(kept), case.subject.sae
    assert 0 < keep.sum() < text.sum(), "the text has sinks, which count nowhere"
    x_hat, offset = np.asarray(sae(x)), np.broadcast_to(np.asarray(sae.b_dec), x.shape)
    if sae.config.input_norm == "layer_norm":
        mean, std = x.mean(-1, keepdims=True), x.std(-1, ddof=1, keepdims=True)
        offset = std * offset + mean
    for example in range(120):
        rows = keep & (thirds == example)
        np.testing.assert_allclose(by_third.x[example], x[rows].mean(0), rtol=1e-4, atol=1e-5)
        if sae.config.input_norm == "layer_norm":
            normed = ((x - mean) / std)[rows].mean(0)
            np.testing.assert_allclose(by_third.normed[example], normed, rtol=1e-3, atol=1e-4)
        made = by_third.code[[example]].toarray()[0] @ np.asarray(sae.w_dec)
        np.testing.assert_allclose(made + offset[rows].mean(0), x_hat[rows].mean(0), rtol=1e-3, atol=1e-3)
    assert (by_third.normed is by_third.x) == (sae.config.input_norm == "none")
    assert by_third.y is by_third.x
    np.testing.assert_array_equal(single.n_rows, [0, keep[35, 5], keep[39, 63]])
    np.testing.assert_allclose(single.x[1], x[35, 5] * keep[35, 5], rtol=1e-4, atol=1e-5)
    assert single.code[[0]].nnz == 0


def test_a_text_is_the_same_alone_and_among_others():
    case = cases.case()
    texts = ["x", cases.TEXT, "return width * height"]
    together = examples.of_texts(case, texts, "test")
    for i, text in enumerate(texts):
        alone = examples.of_texts(case, [text], "test")
        assert together.n_rows[i] == min(len(case.subject.tokenizer.encode([text])[0]), cases.WIDTH - 1)
        np.testing.assert_allclose(together.x[i], alone.x[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="test: text 1 is empty; leave it out"):
        examples.of_texts(case, ["x", ""], "test")


def test_a_dictionary_of_several_hooks_is_refused(case):
    several = dataclasses.replace(case.subject, encoded=(cases.HOOK, lm.Hook(2, "resid_post")))
    with pytest.raises(UsageError, match="reads or writes 2 hooks, and probes are of one; measure an autoencoder"):
        examples.check(several)
