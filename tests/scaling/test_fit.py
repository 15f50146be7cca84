"""Laws fitted to points: what was planted is found, intervals hold what they promise, doubts are named."""

import json

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from sae_jax.scaling import fit, forms, frontier
from sae_jax.scaling.forms import UnfitError
from tests.oracles import scaling as oracle

# What 0.1 % of noise on the published grid may move each coefficient by.
TOLERANCE = {"alpha": 0.012, "beta_k": 0.003, "beta_n": 0.0015, "gamma": 0.0003, "zeta": 0.009, "eta": 0.0018}
N_N, K_N = (axis.ravel() for axis in np.meshgrid(2.0 ** np.arange(11, 25), 2.0 ** np.arange(4, 10)))
JOINT_N = oracle.joint(N_N, K_N)


@pytest.fixture
def few_draws(monkeypatch):
    """For tests that need intervals to be there, not to be good."""
    monkeypatch.setattr(fit, "N_DRAWS", 40)


def noisy(y_N: np.ndarray, size: float, seed: int) -> np.ndarray:
    return y_N * np.exp(size * np.random.default_rng(seed).standard_normal(y_N.shape))


def test_the_published_joint_law_is_found(few_draws):
    law = fit.joint(N_N, K_N, JOINT_N)
    assert law.coefficients == pytest.approx(oracle.PUBLISHED, abs=1e-3)
    assert law.warnings == ()
    np.testing.assert_allclose(law.predict(N_N, K_N), JOINT_N, rtol=1e-6)


def test_noise_moves_the_joint_law_little(few_draws):
    law = fit.joint(N_N, K_N, noisy(JOINT_N, 1e-3, 0))
    for name, value in oracle.PUBLISHED.items():
        assert law.coefficients[name] == pytest.approx(value, abs=TOLERANCE[name])
        low, high = law.interval[name]
        assert low < law.coefficients[name] < high
    assert law.rmse_log == pytest.approx(1e-3, rel=0.3)


@pytest.mark.long
def test_intervals_of_the_joint_law_cover_the_truth(monkeypatch):
    """0.78 to 0.98 is what chance leaves of 0.9 in 60 trials, at 3 and 2 standard errors."""
    monkeypatch.setattr(fit, "N_DRAWS", 100)
    trials = [fit.joint(N_N, K_N, noisy(JOINT_N, 1e-3, seed)).interval for seed in range(60)]
    for name, value in oracle.PUBLISHED.items():
        covered = np.mean([found[name][0] <= value <= found[name][1] for found in trials])
        assert 0.78 <= covered <= 0.98, name


def test_intervals_of_few_points_are_wide_enough(monkeypatch):
    """Five points, two coefficients: without Student's correction 90 % intervals would hold the truth in 80 %."""
    monkeypatch.setattr(fit, "N_DRAWS", 100)
    x_N = 2.0 ** np.arange(8, 13)
    found = [fit.decay(x_N, noisy(2 * x_N**-0.3, 0.02, seed)).interval["exponent"] for seed in range(80)]
    assert 0.82 <= np.mean([low <= 0.3 <= high for low, high in found]) <= 0.97


@pytest.mark.parametrize(("first", "last"), [(-6, 1), (13, 19)])
def test_the_published_law_of_compute_is_found(few_draws, first, last):
    flops_N = np.logspace(first, last, 12)
    loss_N = oracle.compute(flops_N)
    law = fit.decay_constant(flops_N, loss_N)
    assert law.coefficients == pytest.approx({"constant": 0.09, "coefficient": 0.056, "exponent": 0.084}, rel=0.02)
    assert law.chance == 1.0


def test_six_points_that_bend_need_a_constant(few_draws):
    n_N = 2.0 ** np.arange(8, 14)
    fvu_N = noisy(0.068 + 2.5 * n_N**-0.51, 0.005, 0)
    law = fit.decay_constant(n_N, fvu_N)
    assert law.chance > 0.95
    assert law.interval["constant"][0] < 0.068 < law.interval["constant"][1]


def test_a_law_without_a_constant_is_preferred_where_there_is_none(few_draws):
    x_N = np.logspace(13, 17, 12)
    loss_N = noisy(50 * x_N**-0.2, 0.01, 1)
    law = fit.decay_constant(x_N, loss_N)
    assert law.chance < 0.5
    assert law.coefficients["constant"] == 0.0
    assert law.coefficients["exponent"] == pytest.approx(fit.decay(x_N, loss_N).coefficients["exponent"], rel=1e-3)
    assert law.interval["constant"][0] == 0.0


def test_points_over_one_decade_do_not_say_whether_there_is_a_constant():
    """Of a law with one, intervals hold both: a least-squares fit without one would give a third of the exponent."""
    x_N = np.logspace(0, 1, 12)
    law = fit.decay_constant(x_N, noisy(oracle.compute(x_N), 0.005, 0))
    assert law.chance > 0.05
    assert law.interval["exponent"][0] < 0.084 < law.interval["exponent"][1]
    assert law.interval["constant"][0] < 0.09 < law.interval["constant"][1]


def test_outliers_are_named_and_do_not_count():
    widths, ks = (axis.ravel() for axis in np.meshgrid(2.0 ** np.arange(8, 14), 2.0 ** np.arange(2, 6)))
    clean_N = noisy(oracle.joint(widths, ks), 0.005, 1)
    spoilt_N = clean_N * np.where(np.isin(np.arange(24), (3, 12)), 1.15, 1.0)
    law, without = fit.joint(widths, ks, spoilt_N), np.delete(np.arange(24), (3, 12))
    assert law.outliers == (3, 12)
    assert f"n={widths[3]:g}, k={ks[3]:g} is an outlier, +14% off the law, and does not count" in law.warnings
    same = fit.joint(widths[without], ks[without], clean_N[without])
    assert law.coefficients == pytest.approx(same.coefficients, abs=0.02)
    assert law.rmse_log == pytest.approx(same.rmse_log, rel=0.1)


def test_noise_that_grows_is_seen_and_weighted():
    """The narrow widths, a tenth as noisy, lead."""
    n_N = 2.0 ** np.arange(6, 18)
    size_N = 0.003 * 10 ** np.linspace(0, 1, 12)
    trials = [
        fit.growth(n_N, n_N**0.5 * np.exp(size_N * np.random.default_rng(i).standard_normal(12))) for i in range(8)
    ]
    assert 2 < np.median([law.noise_growth for law in trials]) < 25
    plain = [np.polyfit(np.log(n_N), np.log(law.predict(n_N)), 1)[0] for law in trials]
    even = [fit.growth(n_N, n_N**0.5 * np.exp(0.03 * np.random.default_rng(i).standard_normal(12))) for i in range(8)]
    assert np.std(plain) < 0.5 * np.std([law.coefficients["exponent"] for law in even])


def test_the_smallest_that_fall_off_the_trend_are_counted():
    x_N = np.logspace(-6, 1, 12)
    off_N = np.where(np.arange(12) < 2, 1.1, 1.0)
    found = [fit.n_smallest_off(x_N, noisy(oracle.compute(x_N), 0.005, i) * off_N) for i in range(8)]
    clean = [fit.n_smallest_off(x_N, noisy(oracle.compute(x_N), 0.005, i)) for i in range(24)]
    assert np.median(found) == 2
    assert sum(map(bool, clean)) <= 2


def test_a_y_that_was_seen_at_coarse_marks_may_be_anything_between_them():
    """Rounded up to a million, n^0.6 from 0.3 to 2.4 M looks half as steep."""
    n_N = 2.0 ** np.arange(8, 14)
    seen_N = np.ceil(3e5 * (n_N / 256) ** 0.6 / 1e6) * 1e6
    as_seen, between = fit.growth(n_N, seen_N), fit.growth(n_N, seen_N, seen_N - 1e6)
    assert as_seen.interval["exponent"][1] < 0.6
    assert between.interval["exponent"][0] < 0.6 < between.interval["exponent"][1]


def test_a_coefficient_that_may_be_nought_is_called_so(few_draws):
    n_N, k_N = (axis.ravel() for axis in np.meshgrid(2.0 ** np.arange(8, 14), 2.0 ** np.arange(2, 6)))
    loss_N = noisy(oracle.joint(n_N, k_N, {**oracle.PUBLISHED, "gamma": 0.0, "beta_n": -0.3}), 0.01, 2)
    assert any(doubt.startswith("gamma may be 0") for doubt in fit.joint(n_N, k_N, loss_N).warnings)


def test_a_lucky_point_does_not_lead_the_frontier():
    """Nor does one that went wrong trail it; and a surface of points without either takes none away."""
    n_N, tokens_N = (axis.ravel() for axis in np.meshgrid(2.0 ** np.arange(6, 13), 2.0 ** np.arange(12, 23, 2)))
    clean_N = noisy(oracle.trained(n_N, tokens_N), 0.005, 0)
    smooth_N, is_believed_N = frontier.smooth(n_N, tokens_N, clean_N)
    assert is_believed_N.all()
    np.testing.assert_allclose(smooth_N, oracle.trained(n_N, tokens_N), rtol=0.06)
    lucky_N = clean_N * np.where(np.isin(np.arange(42), (10, 30)), 0.85, 1.0)
    assert np.flatnonzero(~frontier.smooth(n_N, tokens_N, lucky_N)[1]).tolist() == [10, 30]


@settings(max_examples=25)
@given(
    exponent=st.floats(-2, 2).filter(lambda value: abs(value) > 0.01),
    ln_coefficient=st.floats(-20, 20),
    start=st.floats(-5, 30),
    n=st.integers(3, 12),
)
def test_power_laws_are_found_at_any_scale(exponent, ln_coefficient, start, n):
    x_N = np.exp(np.linspace(start, start + 6, n))
    y_N = np.exp(ln_coefficient + exponent * np.log(x_N))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "N_DRAWS", 4)
        rising, falling = fit.growth(x_N, y_N), fit.decay(x_N, y_N)
    assert rising.coefficients["exponent"] == pytest.approx(exponent, abs=1e-8)
    assert falling.coefficients["exponent"] == pytest.approx(-exponent, abs=1e-8)
    assert np.log(rising.coefficients["coefficient"]) == pytest.approx(ln_coefficient, abs=1e-5)


def test_the_largest_width_left_out_is_predicted(few_draws):
    """The law fitted without it, and the next smaller one's error carried forward, by hand."""
    n_N, k_N = (axis.ravel() for axis in np.meshgrid(2.0 ** np.arange(8, 14), 2.0 ** np.arange(2, 6)))
    loss_N = oracle.joint(n_N, k_N)
    law = fit.joint(n_N, k_N, loss_N)
    largest, next_one = loss_N[n_N == 2.0**13], loss_N[n_N == 2.0**12]
    assert law.carried == pytest.approx(np.mean(next_one / largest - 1))
    assert law.largest_out == pytest.approx(0, abs=1e-6)


def test_what_the_points_do_not_determine_is_named(few_draws):
    """At k = 16 to 512 and n = 2^11 to 2^13 the floor cannot be told from the rest."""
    keep = N_N <= 2**13
    doubts = fit.joint(N_N[keep], K_N[keep], noisy(JOINT_N[keep], 0.02, 3)).warnings
    assert any("zeta is not determined" in doubt and "wider autoencoders" in doubt for doubt in doubts)


@pytest.mark.parametrize(
    ("keep", "reason"),
    [
        (N_N <= 2**12, "2 distinct n, and 3 are needed"),
        (K_N == 16, "1 distinct k, and 2 are needed"),
        (N_N == K_N * 128, "the points lie on one line"),
        ((N_N <= 2**13) & (K_N <= 32) & ((N_N > 2**11) | (K_N == 16)), "5 points for 6 coefficients"),
    ],
)
def test_what_cannot_be_fitted_says_what_is_missing(keep, reason):
    with pytest.raises(UnfitError, match=reason):
        fit.joint(N_N[keep], K_N[keep], JOINT_N[keep])


def test_as_many_points_as_coefficients_have_no_intervals():
    x_N = np.array([1.0, 2.0, 4.0])
    law = fit.decay_constant(x_N, 0.1 + 1 / x_N)
    assert law.coefficients == pytest.approx({"constant": 0.1, "coefficient": 1.0, "exponent": 1.0}, rel=1e-3)
    assert law.interval == {}
    assert "no intervals" in law.warnings[0]


@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    points=st.lists(
        st.tuples(st.integers(1, 2**24), st.integers(1, 512), st.floats(1e-6, 1e3)),
        min_size=6,
        max_size=24,
        unique=True,
    )
)
def test_any_points_are_fitted_or_refused(points):
    """Whatever the errors are: finite coefficients and intervals, or the reason."""
    n_N, k_N, loss_N = np.array(points, np.float64).T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "N_DRAWS", 4)
        for make in (lambda: fit.joint(n_N, k_N, loss_N), lambda: fit.decay_constant(n_N, loss_N)):
            try:
                law = make()
            except UnfitError:
                continue
            order_one = [
                law.coefficients[forms.FORMS[law.form].coefficients[i]] for i in forms.FORMS[law.form].order_one
            ]
            assert np.abs(order_one).max() < 30 or not law.interval
            assert np.isfinite([*law.coefficients.values(), *law.interval.get("exponent", ())]).all()
        fit.n_smallest_off(n_N, loss_N)


def test_a_step_gives_finite_numbers(few_draws):
    """One bad budget and then no progress: the exponent is as large as one likes, and so is the error at one FLOP."""
    law = fit.decay_constant(np.logspace(13, 17, 8), np.array([0.9, *noisy(np.full(7, 0.5), 0.01, 0)]))
    assert np.isfinite(list(law.coefficients.values())).all()
    assert np.isfinite(list(law.interval.values())).all()
    assert any("exponent is not determined" in doubt for doubt in law.warnings)
    assert law.predict(1e17) == pytest.approx(0.5, rel=0.02)


def test_a_law_comes_back_from_json(few_draws):
    law = fit.decay_constant(np.logspace(0, 4, 9), noisy(oracle.compute(np.logspace(0, 4, 9)), 0.01, 3))
    again = fit.Law.from_json(json.loads(json.dumps(law.to_json())), law.draws.tolist())
    np.testing.assert_allclose(again.predict(1e6), law.predict(1e6))
    np.testing.assert_allclose(again.draw(1e6), law.draw(1e6))
    assert again.interval == law.interval
    low, high = fit.ends(law.draw(1e6))
    assert low < law.predict(1e6) < high


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(1, 1e6), st.floats(0.01, 1)), min_size=1, max_size=40))
def test_no_cheaper_point_beats_the_frontier(points):
    flops_N, loss_N = np.array(points).T
    on = frontier.frontier(flops_N, loss_N)
    assert len(on) > 0
    for i in on:
        assert loss_N[flops_N < flops_N[i]].min(initial=np.inf) > loss_N[i]
        assert loss_N[flops_N == flops_N[i]].min() == loss_N[i]
    assert np.all(np.diff(np.log(flops_N[on])) >= np.log(frontier.SPACING) - 1e-9)


def test_a_valley_is_where_the_parabola_is_least():
    lr_N = np.array([8e-3, 1e-3, 2e-3, 4e-3, 5e-4])  # in any order
    found = frontier.valley(lr_N, 0.2 * np.exp(0.1 * np.log(lr_N / 2.5e-3) ** 2))
    assert found.x == pytest.approx(2.5e-3)
    assert found.loss == pytest.approx(0.2)
    assert not found.at_edge


@pytest.mark.parametrize("best", [1e-9, 1.0])
def test_a_valley_beyond_the_grid_is_at_its_edge(best):
    lr_N = np.logspace(-4, -2, 5)
    found = frontier.valley(lr_N, np.exp(np.log(lr_N / best) ** 2))
    assert found.at_edge
    assert found.x == pytest.approx(lr_N[0] if best < 1e-4 else lr_N[-1])


def test_budgets_find_the_best_width():
    n_N, tokens_N = (axis.ravel() for axis in np.meshgrid(2.0 ** np.arange(6, 14), 2.0 ** np.arange(10, 24)))
    flops_N = 12 * 64 * n_N * tokens_N
    found = frontier.budgets(n_N, flops_N, oracle.trained(n_N, tokens_N))
    inner = [budget for budget in found if not budget.best.at_edge]
    assert len(inner) >= 8
    for budget in inner:
        assert budget.best.x == pytest.approx(oracle.best_width(budget.flops / (12 * 64)), rel=0.15)
    edges = [budget for budget in found if budget.best.at_edge]
    assert edges[0].best.x == 2**6
