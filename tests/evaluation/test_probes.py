"""Probes against scikit-learn and plain numpy."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, log_loss, roc_auc_score

from sae_jax.evaluation import probes

RNG = np.random.default_rng(0)
N = 300
Y = RNG.random(N) < 0.3


def features():
    """One feature a column, of every kind that codes have."""
    shift = np.where(Y, 1.0, 0.0)
    columns = {
        "none": RNG.standard_normal(N),
        "good": RNG.standard_normal(N) + 2 * shift,
        "far from the origin": 500 + RNG.standard_normal(N) + shift,
        "tiny": 1e-6 * (RNG.standard_normal(N) - shift),
        "heavy tails": RNG.standard_cauchy(N) + shift,
        "sparse": (RNG.random(N) < 0.02 + 0.1 * shift) * RNG.exponential(size=N),
        "rare, and true where active": (RNG.random(N) < 0.05) * shift,
        "an outlier": np.append(RNG.standard_normal(N - 1) + shift[1:], 1e3),
    }
    return {name: column.astype(np.float32) for name, column in columns.items()}


def test_newton_equals_scikit_learn_without_a_penalty():
    columns = features()
    got = probes.newton(np.stack([*columns.values()], 1), np.float32(Y), np.ones(N, np.float32))
    for i, (name, column) in enumerate(columns.items()):
        z = ((column - column.mean()) / column.std(dtype=np.float64))[:, None]
        model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000).fit(z, Y)
        expected = log_loss(Y, model.predict_proba(z)[:, 1])
        assert got.loss[i] == pytest.approx(expected, abs=1e-4), name
        logit = np.float64(got.weight[i]) * column + np.float64(got.bias[i])
        assert probes.cross_entropy(logit, Y) == pytest.approx(expected, abs=2e-4), name


def test_a_constant_feature_says_the_base_rate_and_classes_that_separate_end_at_the_bound():
    columns = np.stack([np.full(N, 7.3), np.zeros(N), np.where(Y, 1.0, -1.0), np.linspace(0, 1, N) ** 8], 1)
    got = probes.newton(np.float32(columns), np.float32(Y), np.ones(N, np.float32))
    np.testing.assert_allclose(got.loss[:2], probes.entropy(Y), atol=1e-6)
    np.testing.assert_array_equal(got.weight[:2], 0)
    assert got.loss[2] < 1e-5
    assert np.abs(got.weight[2]) * columns[:, 2].std() <= probes.MAX_WEIGHT * 1.001
    assert np.isfinite(got.loss).all()
    separated = np.float32(np.sort(RNG.random(N)))[:, None]
    last = probes.newton(separated, np.float32(np.arange(N) > 40), np.ones(N, np.float32))
    assert 0 < last.loss[0] < 0.02
    assert abs(last.weight[0]) * separated.std() == pytest.approx(probes.MAX_WEIGHT, rel=1e-3)


def test_examples_that_fill_up_count_nowhere():
    x = np.stack([*features().values()], 1)
    whole = probes.newton(x, np.float32(Y), np.ones(N, np.float32))
    filled = probes.newton(
        np.pad(x, ((0, 50), (0, 0)), constant_values=9), np.float32(np.pad(Y, (0, 50))), np.float32(np.arange(350) < N)
    )
    np.testing.assert_allclose(filled.loss, whole.loss, atol=1e-5)


def test_the_best_direction_is_found_in_any_block_and_scaling_changes_nothing(monkeypatch):
    y, y_test = RNG.random(500) < 0.5, RNG.random(400) < 0.5
    planted = RNG.standard_normal(8)
    planted /= np.linalg.norm(planted)
    x, test = (
        RNG.standard_normal((len(label), 8)) + 2 * np.where(label, 1, -1)[:, None] * planted for label in (y, y_test)
    )
    directions = np.float32(RNG.standard_normal((40, 8)))
    directions[33] = planted
    best = probes.best_direction(np.float32(x), y, np.float32(test), y_test, directions)
    assert best.index == 33
    logit = LogisticRegression(C=np.inf).fit(x @ planted[:, None], y).decision_function(test @ planted[:, None])
    assert best.test_loss == pytest.approx(log_loss(y_test, 1 / (1 + np.exp(-logit))), abs=1e-3)
    monkeypatch.setattr(probes, "BLOCK_VALUES", 512 * 7)
    scaled = probes.best_direction(np.float32(x), y, np.float32(test), y_test, directions * 37)
    assert scaled == pytest.approx(best, abs=1e-4)


def test_a_probe_of_several_features_equals_scikit_learn():
    x = RNG.standard_normal((200, 5)) * [1, 10, 0.1, 1, 0] + [0, 3, 50, 0, 4]
    y = x[:, 0] + 0.1 * x[:, 1] + RNG.standard_normal(200) > 0
    got = probes.fit(x, y, l2=2.0)
    scaled = (x[:, :4] - x[:, :4].mean(0)) / x[:, :4].std(0)
    expected = LogisticRegression(C=0.5, tol=1e-10).fit(scaled, y)
    np.testing.assert_allclose(got.weight[:4] * x[:, :4].std(0), expected.coef_[0], atol=1e-3)
    np.testing.assert_allclose(got.logits(x), expected.decision_function(scaled), atol=1e-3)
    assert got.weight[4] == 0


def test_scores_equal_scikit_learn():
    score = RNG.integers(-3, 4, N).astype(float)
    assert probes.auc(score, Y) == pytest.approx(roc_auc_score(Y, score))
    assert probes.f1(score, Y) == pytest.approx(f1_score(Y, score > 0))
    assert probes.accuracy(score, Y) == pytest.approx(((score > 0) == Y).mean())
    assert probes.f1(np.full(N, -1.0), Y) == 0
