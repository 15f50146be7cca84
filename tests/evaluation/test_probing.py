"""Studies that probe: on planted classifiers and hierarchies whose scores are known, and against the definitions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from sae_jax.evaluation import baselines, examples, probes, study, tasks
from sae_jax.evaluation.studies import absorption, probe_loss, sparse_probing, spurious
from sae_jax.evaluation.tasks import Split
from sae_jax.saes import relu
from tests.evaluation import cases
from tests.oracles import probing as oracle

pytestmark = pytest.mark.usefixtures("one_device")

SMALL = {
    "probe_loss": probe_loss.Study(n_sequences=32, n_train=120, n_test=60),
    "sparse_probing": sparse_probing.Study(n_sequences=32, n_train=120, n_test=60),
    "spurious": spurious.Study(n_sequences=40, n_train=120, n_test=60),
    "absorption": absorption.Study(),
}


@pytest.fixture(scope="module", params=["topk", "layer_norm", "dense"])
def case(request):
    """Of a code of few latents, of rows that are normalised one by one, and of a code that half of them are in."""
    if request.param == "dense":
        return cases.case(make=baselines.identity)
    return cases.case(norm="layer_norm" if request.param == "layer_norm" else "none")


@pytest.fixture
def few_tasks(monkeypatch):
    """Some of those that held-out text gives: each takes time."""
    of_tokens, of_passages = tasks.TextProperties.of_tokens, tasks.TextProperties.of_passages
    kept = {name for pair in tasks.CROSSED[2:4] for name in pair} | {"passage has a digit"}

    def only_kept(labels):
        return {name: label for name, label in labels.items() if name in kept}

    monkeypatch.setattr(tasks.TextProperties, "of_tokens", lambda self: only_kept(of_tokens(self)))
    monkeypatch.setattr(tasks.TextProperties, "of_passages", lambda self, *n: only_kept(of_passages(self, *n)))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.usefixtures("few_tasks")
def test_metrics_are_described_and_finite(case, name):
    found = list(SMALL[name].metrics(case))
    described = study.studies()[name].METRICS
    assert {metric.name for metric in found} <= {*described}
    assert [m.name for m in found] == [each for each in described if each in {m.name for m in found}]
    if name != "absorption":  # TEXT has too few words for it
        assert {m.name for m in found} == {*described}
    for metric in found:
        leaves = jax.tree.leaves(metric.value)
        assert leaves
        assert np.isfinite([leaf for leaf in leaves if not isinstance(leaf, str)]).all(), metric
        parts = metric.value if isinstance(metric.interval, dict) else {"": metric.value}
        intervals = metric.interval if isinstance(metric.interval, dict) else {"": metric.interval}
        for place, (low, high) in {place: each for place, each in intervals.items() if each}.items():
            assert low <= parts[place] <= high
        assert described[metric.name].in_table == (not metric.name.endswith(("_by_task", "_by_letter")))


@pytest.mark.usefixtures("few_tasks")
def test_a_study_finds_the_same_again():
    first, second = ([*SMALL["probe_loss"].metrics(cases.case())] for _ in range(2))
    assert first == second


def test_the_latent_that_says_it_is_found(monkeypatch):
    """Latent 5 reads a direction that the model was made to write where white space follows, shifted and scaled."""

    def make(rows):
        directions = np.random.default_rng(1).standard_normal((24, rows.shape[1]))
        directions[5] = np.eye(rows.shape[1])[3] * 0.01
        bias = jnp.full(24, -100.0).at[5].set(7)
        return relu.Relu(*(jnp.asarray(w, jnp.float32) for w in (directions, bias, directions)), jnp.ones(16), CONFIG)

    case = cases.case(make=make)
    strings = np.array(case.subject.tokenizer.tokens(range(2048)), object)

    def read(model, ids, hooks, dtype):
        is_space = np.array([[not s.strip() for s in strings[np.append(row[1:], 1)]] for row in np.asarray(ids)])
        acts = np.random.default_rng(0).standard_normal((*ids.shape, 16))
        acts[..., 3] = 1000 + np.where(is_space, 5, -5) + np.random.default_rng(2).standard_normal(ids.shape)
        return {str(hook): jnp.asarray(acts, jnp.float32) for hook in hooks}, np.ones((*ids.shape, 1), np.float32)

    monkeypatch.setattr(examples, "read_hooks", read)
    name, of_tokens = "next token is white space", tasks.TextProperties.of_tokens
    monkeypatch.setattr(tasks.TextProperties, "of_tokens", lambda self: {name: of_tokens(self)[name]})
    found = {m.name: m.value for m in SMALL["probe_loss"].metrics(case)}
    task = found["probe_loss_by_task"][name]
    assert task["latent"] == 5
    assert task["probe_loss"] < 0.05 < 0.6 < task["probe_loss_base"]
    assert task["probe_loss_channels"] == pytest.approx(task["probe_loss"], abs=1e-3), "it is a channel, and active"


CONFIG = relu.Config(n_latents=24, dtype="float32", input_norm="none")


def sparse(codes):
    return scipy.sparse.csr_matrix(np.asarray(codes, np.float32))


def all_of(n):
    return Split(np.arange(0, n, 2), np.zeros(n // 2), np.arange(1, n, 2), np.zeros(n // 2))


def test_scr_of_a_planted_classifier():
    """Where both labels agree the spurious one is never wrong, the target's trace is in one case of ten.

    Latents 0 and 1 say the spurious label, 2 and 3 the trace. Without the first two the classifier is as good as the
    trace, which is what a balanced one goes by; without any it says one thing of all.
    """
    n = 800
    target, other = np.arange(n) // 2 % 2 == 1, np.arange(n) // 4 % 2 == 1
    trace = np.where(np.arange(n) // 8 % 10 == 0, ~target, target)
    codes = np.stack([other, ~other, trace, ~trace], 1)
    w_dec = np.array([[2.0, 0, 0], [-2, 0, 0], [0, 1, 0], [0, -1, 0]])
    y = codes @ w_dec + [0, 0, 3]
    biased = np.flatnonzero((target == other) & (np.arange(n) % 2 == 0))
    score = spurious.removal(y, sparse(codes), w_dec, target, other, all_of(n), biased, (2,))
    assert score == pytest.approx([1.0])
    in_error = y + np.random.default_rng(0).standard_normal(3) * 0  # what the codes do not explain stays
    silent = spurious.removal(in_error, sparse(0 * codes), w_dec, target, other, all_of(n), biased, (2,))
    assert silent == pytest.approx([0.0])
    same = spurious.removal(y[:, :1], sparse(codes), w_dec[:, :1], target, other, all_of(n), biased, (2,))
    assert same == pytest.approx([0.0]), "no classifier can be better: there is no headroom"


def test_tpp_of_planted_classes():
    """A latent and a direction each: without it a class is not told, and the others are as they were."""
    label = np.arange(600) // 2 % 3
    codes = np.eye(3)[label]
    w_dec = np.eye(4)[:3]
    y = codes @ w_dec + np.array([0, 0, 0, 2.0])
    split = Split(np.arange(0, 600, 2), label[::2], np.arange(1, 600, 2), label[1::2])
    scores = spurious.perturbation(y, sparse(codes), w_dec, split, 3, (1,))
    np.testing.assert_allclose(scores, 0.5)
    mixed = np.stack([codes.sum(1), codes @ [0, 1, 2], codes @ [1, 0, 1]], 1)
    assert spurious.perturbation(y, sparse(mixed), w_dec, split, 3, (3,)).max() < 0.5


def test_scr_and_tpp_are_as_defined():
    rng = np.random.default_rng(3)
    n, n_latents, width = 240, 12, 6
    target, other, label = rng.random(n) < 0.5, rng.random(n) < 0.5, np.arange(n) // 2 % 3
    codes = np.maximum(rng.standard_normal((n, n_latents)) + np.outer(target, rng.standard_normal(n_latents)), 0)
    codes += np.outer(other, np.maximum(rng.standard_normal(n_latents), 0)) + (label[:, None] == np.arange(12) % 3)
    codes, w_dec = np.float32(codes), np.float32(rng.standard_normal((n_latents, width)))
    y = codes @ w_dec + 0.3 * rng.standard_normal((n, width))
    split, biased = all_of(n), np.flatnonzero(target == other)[:60]
    train, test = split.train, split.test

    def fitted(rows, labels):
        probe = probes.fit(y[rows], labels)
        return probe.weight, probe.bias

    three = fitted(biased, target[biased]), fitted(train, target[train]), fitted(train, other[train])
    ns = (1, 3, 12)
    got = spurious.removal(y, sparse(codes), w_dec, target, other, split, biased, ns)
    tested = y[test], codes[test], target[test]
    expected = [oracle.scr(*three, (codes[train], other[train]), tested, w_dec, k) for k in ns]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert len(set(expected)) > 1

    split = Split(train, label[train], test, label[test])
    chosen = [spurious._one_against_rest(label[train] == c, label[test] == c) for c in range(3)]
    trained = [(train[i], label[train][i] == c) for c, (i, _) in enumerate(chosen)]
    tested = [(y[test][j], codes[test][j], label[test][j] == c) for c, (_, j) in enumerate(chosen)]
    got = spurious.perturbation(y, sparse(codes), w_dec, split, 3, ns)
    of_classes = [fitted(rows, labels) for rows, labels in trained]
    with_codes = [(codes[rows], labels) for rows, labels in trained]
    expected = np.transpose([oracle.tpp(of_classes, with_codes, tested, w_dec, k) for k in ns])
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_absorption_is_as_defined():
    rng = np.random.default_rng(4)
    n, n_latents, width = 300, 10, 8
    codes = np.float32(np.maximum(rng.standard_normal((n, n_latents)) + 0.2, 0))
    w_dec = np.float32(rng.standard_normal((n_latents, width)))
    x = codes @ w_dec + 0.2 * rng.standard_normal((n, width))
    direction, main = w_dec[0] + w_dec[1] + rng.standard_normal(width), np.array([0, 4])
    codes[::3, main] = 0
    settings = absorption.Study(min_cosine=0.15, min_share=0.3, max_absorbing=2)
    got = settings.absorbed(sparse(codes), x, w_dec, direction, main)
    fractions, full = zip(
        *(
            (
                oracle.absorption_fraction(code, row, w_dec, direction, {0, 4}, 0.15, 0.3, 2),
                oracle.is_full(code, row, w_dec, direction, {0, 4}, 0.025, 0.4),
            )
            for code, row in zip(codes.astype(float), x, strict=True)
        ),
        strict=True,
    )
    np.testing.assert_allclose(got.share, fractions, atol=1e-5)
    np.testing.assert_array_equal(got.full, full)
    assert 0 < got.full.sum() < n
    assert len({*np.round(got.share, 6)}) > 20
    whole = [
        oracle.absorption_fraction(code, row, w_dec, direction, {0, 4}, -2, -np.inf, n_latents)
        for code, row in zip(codes.astype(float), x, strict=True)
    ]
    positive = x @ direction > 0
    np.testing.assert_allclose(got.without_thresholds[positive], np.array(whole)[positive], atol=1e-5)


def test_absorption_of_a_planted_hierarchy():
    """A parent (direction 0) with two children; the latent of the second child says the parent, too."""
    w_dec = np.float32([[1, 0, 0], [0, 1, 0], [1, 0, 2]])
    words = np.float32([[1, 0, 0], [1, 1, 0], [1, 0, 2], [1, 0, 2]])
    codes = np.float32([[1, 0, 0], [1, 1, 0], [0, 0, 1], [0.25, 0, 0.75]])
    got = absorption.Study().absorbed(sparse(codes), words, w_dec, np.array([3.0, 0, 0]), np.array([0]))
    np.testing.assert_allclose(got.share, [0, 0, 1, 0.75])
    np.testing.assert_array_equal(got.full, [False, False, True, False])
    far = dataclasses.replace(absorption.Study(), min_cosine=0.5, min_full_cosine=0.5)
    got = far.absorbed(sparse(codes), words, w_dec, np.array([3.0, 0, 0]), np.array([0]))
    np.testing.assert_allclose(got.share, 0)
    np.testing.assert_allclose(got.without_thresholds, [0, 0, 1, 0.75])
    assert not got.full.any()


RESTS = "ad ub od im ap en ir ot un et ab ed ip on ut ag ell ill oll ull"
WORDS = [first + rest for first in "sc" for rest in RESTS.split()]


def test_first_letters_of_words_in_a_text(monkeypatch):
    """Activations are a direction for the letter and one for the word. Of `absorbed` the word's latent says both."""
    n, width = len(WORDS), 2 + len(WORDS)
    absorbed = {i for i in range(n) if i % 4 == 0}
    enc, dec, bias = np.zeros((width, width)), np.eye(width), np.zeros(width)
    for i, word in enumerate(WORDS):
        letter = "sc".index(word[0])
        enc[2 + i, 2 + i] = 1
        if i in absorbed:
            enc[letter, 2 + i], dec[2 + i, letter] = -1, 1
        enc[letter, letter] = 1

    def make(rows):
        weights = (jnp.asarray(w, jnp.float32) for w in (enc, bias, dec))
        config = relu.Config(n_latents=width, dtype="float32", input_norm="none")
        return relu.Relu(*weights, jnp.zeros(width), config)

    case = cases.case(make=make)
    ids = 1 + np.random.default_rng(0).integers(0, n, (40, 64)).astype(np.int32)

    def read(model, ids, hooks, dtype):
        acts = np.zeros((*ids.shape, width), np.float32)
        for i, word in enumerate(WORDS):
            acts[ids == 1 + i, 2 + i] = 1
            acts[ids == 1 + i, "sc".index(word[0])] = 1
        return {str(hook): jnp.asarray(acts) for hook in hooks}, np.ones((*ids.shape, 1), np.float32)

    class Tokens:
        def tokens(self, numbers):
            return [" " + WORDS[i - 1] for i in numbers]

    monkeypatch.setattr(examples, "read_hooks", read)
    text = dataclasses.replace(case.text, sequences=ids, text=np.ones(ids.shape, bool))
    case = dataclasses.replace(case, text=text, subject=dataclasses.replace(case.subject, tokenizer=Tokens()))
    found = {m.name: m.value for m in absorption.Study().metrics(case)}
    assert found["letter_probe_f1"] == 1
    by_letter = found["letter_absorption_by_letter"]
    assert {letter: each["latents"] for letter, each in by_letter.items()} == {"s": [0], "c": [1]}
    tested = absorption._test_words(np.array(WORDS))
    share = np.mean([np.mean([WORDS.index(w) in absorbed for w in tested if w[0] == letter]) for letter in "sc"])
    assert 0 < share < 1
    assert found["letter_absorption"] == pytest.approx(share)
    assert found["letter_absorption_full"] == pytest.approx(share)
    assert found["letter_splits"] == 1

    monkeypatch.setattr(
        examples, "read_hooks", lambda *args: (jax.tree.map(jnp.zeros_like, read(*args)[0]), read(*args)[1])
    )
    found = {m.name: m.value for m in absorption.Study().metrics(case)}
    assert set(found) == {"letter_probe_f1", "letter_absorption_by_letter"}, "nothing tells the letters"
