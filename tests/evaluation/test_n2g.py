"""N2G: patterns of latents whose rule is known, the trie against a search of all patterns, and the study in a model."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_jax import lm
from sae_jax.evaluation import n2g, prompts
from sae_jax.evaluation.n2g import WILDCARD, Example, Trie, make_patterns
from sae_jax.evaluation.studies.n2g import Study
from sae_jax.evaluation.study import Case
from sae_jax.evaluation.text import HeldOut
from sae_jax.saes import init, relu, topk
from tests.oracles import n2g as oracle

FIRST, NEUTRAL = 0, 1
HOOK = lm.Hook(0, "resid_pre")


def by_rule(rule):
    """Texts run by a rule of their tokens, without the first."""
    return lambda texts, latents: np.array([rule(text.tolist()[1:]) for text in texts], np.float32)


@pytest.mark.parametrize(
    ("rule", "pattern"),
    [
        (lambda t: 2.0 * (t[-1] == 7), (7,)),
        (lambda t: 2.0 * (t[-3:-2] == [3] and t[-1] == 7), (3, WILDCARD, 7)),
        (lambda t: 2.0 * (t[-1] == 7 and t[-2:-1] in ([5], [6], [NEUTRAL])), (WILDCARD, 7)),  # whatever: a token
        (lambda t: 2.0 * (t == [4]), (FIRST, 4)),
        # What keeps exactly half of the value counts as kept by an ending, and as lost by a replaced token.
        (lambda t: (2.0 if t[-2:-1] == [5] else 1.0) * (t[-1] == 7), (7,)),
        (lambda t: (2.0 if t[-3:-2] == [3] else 0.9) * (t[-1] == 7) if t[-2:-1] == [5] else 0.0, (3, 5, 7)),
        (lambda t: 2.0 * (9 in t), None),  # five tokens before the end, and a pattern has at most four
        (lambda t: 3.0, (WILDCARD,)),
    ],
)
def test_a_pattern_has_what_the_latent_needs(rule, pattern):
    text = np.array([FIRST, 4] if pattern == (FIRST, 4) else [FIRST, 9, 8, 3, 5, 7], np.int32)
    activation = by_rule(rule)
    value = float(activation([text], [0])[0])
    assert value == max(value, 2)
    # Another example, and another latent, come before it in every batch.
    other = Example(np.array([FIRST, 2, 2], np.int32), 1, 1.0)

    def both(texts, latents):
        return np.where(np.array(latents) == 0, activation(texts, latents), [float(t[-1] == 2) for t in texts])

    assert make_patterns([other, Example(text, 0, value)], both, FIRST, NEUTRAL, 4) == [(2,), pattern]


@given(st.data())
def test_the_trie_finds_what_a_search_of_all_patterns_finds(data):
    tokens = st.integers(0, 2)
    pattern = st.lists(st.integers(WILDCARD, 2), min_size=1, max_size=4).map(tuple)
    patterns = data.draw(st.lists(pattern, max_size=6))
    text = data.draw(st.lists(tokens, min_size=1, max_size=12))
    values = [float(i + 1) for i in range(len(patterns))]
    trie = Trie()
    for p, value in zip(patterns, values, strict=True):
        trie.add(p, value)
    want = [oracle.predict(patterns, values, text, at) for at in range(len(text))]
    assert trie.predict(np.array(text)).tolist() == want


@pytest.fixture(scope="module")
def model():
    return lm.load("bundled")


TOKENS = (10, 50, 300)


@partial(jax.jit, static_argnames="hook")
def _acts(model, ids_BT, hook):
    return lm.run(model, ids_BT, capture=[hook], logits=False).acts[hook]


def codes(subject, texts):
    """f32[N, 24, F] of texts; what comes after the end of one means nothing."""
    ids_NT = np.zeros((-(-len(texts) // 64) * 64, 24), np.int32)
    for ids_T, text in zip(ids_NT, texts, strict=False):
        ids_T[: len(text)] = text
    blocks = [_acts(subject.model, ids_NT[i : i + 64], subject.encoded[0]) for i in range(0, len(ids_NT), 64)]
    z_NTF = [np.asarray(subject.sae.encode(x).to_dense(subject.sae.b_enc.shape[0])) for x in blocks]
    return np.concatenate(z_NTF)[: len(texts)]


@pytest.fixture(scope="module")
def planted(model):
    """Latent i fires on the i-th of TOKENS, whatever stands around it and wherever; the last one never."""
    embed_VD, position_TD = (np.asarray(model.params[name], np.float64) for name in ("embed", "positions"))
    x_NX = (embed_VD[:, None] + position_TD[None, :24]).reshape(-1, embed_VD.shape[1])
    token_N = np.repeat(np.arange(len(embed_VD)), 24)
    cov_DD = np.cov(x_NX.T) + 1e-3 * np.eye(x_NX.shape[1])
    w_FD = np.linalg.solve(cov_DD, (embed_VD[list(TOKENS)] - embed_VD.mean(0)).T).T
    score_NF = x_NX @ w_FD.T
    on = [score_NF[token_N == t, i].min() for i, t in enumerate(TOKENS)]
    off = [score_NF[token_N != t, i].max() for i, t in enumerate(TOKENS)]
    assert (np.array(on) > np.array(off)).all()
    b_F = -(np.array(on) + np.array(off)) / 2
    config = relu.Config(n_latents=4, dtype="float32", input_norm="none")
    sae = config.init(jax.random.key(0), init.sample_statistics(np.float32(x_NX[:64]), "none"))
    w_FD, b_F = np.concatenate([w_FD, np.zeros_like(w_FD[:1])]), np.append(b_F, -1.0)
    sae = dataclasses.replace(
        sae, w_enc=jnp.asarray(w_FD, jnp.float32), b_enc=jnp.asarray(b_F, jnp.float32), b_dec=jnp.zeros_like(sae.b_dec)
    )
    return subject(model, sae)


def subject(model, sae, hook=HOOK):
    tokenizer = lm.tokenizer("bundled")
    return prompts.Subject(sae, model, tokenizer, (hook,), (hook,), tokenizer.separator_id)


def case(subject, n=12, n_pos=20):
    """Random tokens, some of which are those that latents fire on."""
    rng = np.random.default_rng(0)
    ids_QT = rng.choice([*TOKENS, *range(400, 440)], (n, n_pos)).astype(np.int32)
    ids_QT[:, 7] = subject.tokenizer.separator_id
    is_text_QT = ids_QT != subject.tokenizer.separator_id
    text = HeldOut("random", subject.model, subject.encoded, subject.reconstructed, ids_QT, is_text_QT, None)
    return Case(subject, text)


def test_latents_that_detect_tokens_are_told_by_unigrams(planted):
    metrics = {m.name: m for m in Study(n_examples=3).metrics(case(planted))}
    assert set(metrics) == set(Study.METRICS)
    for name in ("n2g_precision", "n2g_recall", "n2g_f1"):
        assert metrics[name].value == 1
        assert metrics[name].interval == (1, 1)
    assert metrics["n2g_too_long"].value == 0


def test_a_latent_that_needs_more_than_its_last_token_is_told_less_well(model, planted):
    """The same study of a dictionary at random after a layer of the model, by a search of all patterns."""
    hook = lm.Hook(1, "resid_post")
    config = topk.Config(n_latents=64, k=4, dtype="float32", input_norm="none")
    x = np.random.default_rng(0).standard_normal((64, model.spec.d_model)).astype(np.float32)
    other = case(subject(model, config.init(jax.random.key(0), init.sample_statistics(x, "none")), hook))
    study = Study(n_latents=4, n_examples=3, longest=5)
    metrics = {m.name: m.value for m in study.metrics(other)}
    assert 0 < metrics["n2g_recall"] < 1
    assert metrics == {m.name: m.value for m in study.metrics(other)}, "a study is deterministic"
    precision, recall = _by_hand(other, study)
    assert (metrics["n2g_precision"], metrics["n2g_recall"]) == pytest.approx((precision, recall))


def _by_hand(case, study):
    """Precision and recall of the latents that the study draws, text by text."""
    ids_QT, is_row_QT = case.text.sequences, case.text.text
    first = case.subject.first
    z_QTF = codes(case.subject, ids_QT)[:, : ids_QT.shape[1]] * is_row_QT[..., None]
    active = np.flatnonzero((z_QTF[:6] > 0).any((0, 1)) & (z_QTF[6:] > 0).any((0, 1)))
    latents = np.sort(np.random.default_rng(0).choice(active, study.n_latents, replace=False))
    counts = np.bincount(ids_QT[:6][is_row_QT[:6]])
    precisions, recalls = [], []
    for latent in latents:
        strongest = sorted(range(6), key=lambda q: -z_QTF[q, :, latent].max())[: study.n_examples]
        examples = [
            Example(np.append(first, ids_QT[q, : z_QTF[q, :, latent].argmax() + 1]), latent, z_QTF[q, :, latent].max())
            for q in strongest
            if z_QTF[q, :, latent].max() > 0
        ]

        def one_by_one(texts, latents):
            z_NTF = codes(case.subject, texts) if texts else []
            return np.array([z_TF[len(text) - 1, f] for z_TF, text, f in zip(z_NTF, texts, latents, strict=True)])

        made = make_patterns(examples, one_by_one, first, int(counts.argmax()), study.longest)
        patterns = [p for p in made if p is not None]
        both = fits = 0
        for q in range(6, 12):
            text = [first, *ids_QT[q].tolist()]
            for t in range(ids_QT.shape[1]):
                fit = is_row_QT[q, t] and oracle.predict(patterns, [1.0] * len(patterns), text, t + 1) > 0
                fits += fit
                both += fit and z_QTF[q, t, latent] > 0
        precisions += [both / fits] if fits else []
        recalls.append(both / (z_QTF[6:, :, latent] > 0).sum())
    return np.mean(precisions), np.mean(recalls)


def test_texts_of_all_lengths_run_as_they_do_alone(planted, monkeypatch):
    monkeypatch.setattr(n2g, "BATCH", 4)
    rng = np.random.default_rng(1)
    texts = [np.append(rng.integers(400, 440, n - 1), 50).astype(np.int32) for n in (1, 2, 9, 17, 3, 8, 2, 1, 2)]
    latents = [1, 0, 1, 1, 1, 3, 1, 1, 2]
    values = n2g.in_model(planted)(texts, latents)
    for text, latent, value, z_TF in zip(texts, latents, values, codes(planted, texts), strict=True):
        assert value == pytest.approx(z_TF[len(text) - 1, latent], rel=1e-4, abs=1e-3)
        assert (value > 0) == (latent == 1)


def test_a_dictionary_that_never_fires_has_no_metrics(planted):
    silent = dataclasses.replace(planted.sae, b_enc=planted.sae.b_enc - 1e6)
    assert list(Study().metrics(case(dataclasses.replace(planted, sae=silent)))) == []
    assert list(Study().metrics(case(planted, n=1))) == [], "of one sequence no half can be kept apart"
