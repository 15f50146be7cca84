"""What every file of evaluation/metrics/ promises, and reconstruction and sparsity against plain numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import lm
from sae_jax.evaluation import base
from sae_jax.evaluation.base import Subject
from sae_jax.evaluation.batches import Candidate, filled_up, of_text
from sae_jax.evaluation.evaluate import Measured, Settings, accumulate, finish, on_rows
from sae_jax.evaluation.metrics import by_place
from sae_jax.evaluation.text import HeldOut
from sae_jax.saes import init, topk
from sae_jax.types import Sites, UserError, Widths
from tests.lm.tiny import SPEC, random_model

D, F, K = SPEC.d_model, 32, 4
HOOK = lm.Hook(1, "resid_post")
SITES = Sites.one(str(HOOK))
EVALUATORS = base.evaluators()
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def rows():
    # A mean far from the origin: where uncentred and centred measures part, and where rounding bites.
    return np.float32(RNG.standard_normal((1000, D)) + 50)


@pytest.fixture(scope="module")
def sae(rows):
    return topk.Config(n_latents=F, k=K, dtype="float32").init(jax.random.key(0), init.sample_statistics(rows, "none"))


@pytest.fixture(scope="module")
def subject(sae, rows):
    return Subject(sae, {"first": 3, "second": D - 3}, rows.mean(0, dtype=np.float64), {"dead_fraction": 0.25})


@pytest.fixture(scope="module")
def text_batches(sae, subject):
    """Four batches of text, the last one short, some positions of special tokens."""
    sequences = RNG.integers(0, SPEC.n_vocab, (11, 8)).astype(np.int32)
    is_text = ~np.isin(sequences, [0, 1])
    text = HeldOut("text", random_model(SPEC), (HOOK,), (HOOK,), sequences, is_text, None)
    candidate = Candidate(sae, SITES, Widths.one(D), activations=None)  # pyrefly: ignore
    n, batches = of_text({"": candidate}, {"": subject}, {SITES: text}, batch_tokens=24, shard=(0, 1))
    assert n == 4
    return [{"": with_sinks(batch[""])} for batch in batches]


def with_sinks(batch):
    is_sink_N = jnp.arange(batch.y.shape[0]) % 5 == 0
    return dataclasses.replace(batch, text=dataclasses.replace(batch.text, is_sink=is_sink_N))


def sums_of(subject, batches):
    return accumulate({"": subject}, batches)[""]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("name", EVALUATORS)
def test_parts_add_up_to_the_whole_in_any_order(name, subject, text_batches):
    whole, backwards = sums_of(subject, text_batches)[name], sums_of(subject, text_batches[::-1])[name]
    first, second = (sums_of(subject, half)[name] for half in (text_batches[:1], text_batches[1:]))
    assert_same(base.add(first, second), whole)
    assert_same(backwards, whole)
    assert_same(base.add({}, whole), whole)  # a worker without a batch adds nothing
    assert_same(base.add(whole, {}), whole)


@pytest.mark.parametrize("name", EVALUATORS)
def test_metrics_are_described_and_finite(name, subject, text_batches):
    evaluator = EVALUATORS[name](subject)
    metrics = list(evaluator.metrics(sums_of(subject, text_batches)[name]))
    assert [metric.name for metric in metrics] == list(evaluator.METRICS)
    for metric in metrics:
        leaves = jax.tree.leaves(metric.value)
        assert leaves
        assert np.isfinite(leaves).all(), metric
        described = evaluator.METRICS[metric.name]
        assert not described.in_table or (metric.interval is None) == bool(described.no_interval), metric.name
        if isinstance(metric.value, dict) and metric.interval:
            assert metric.interval.keys() <= metric.value.keys()
            pairs = [(metric.value[place], each) for place, each in metric.interval.items()]
        else:
            pairs = [(metric.value, metric.interval)] if metric.interval else []
        for value, (low, high) in pairs:
            assert low <= value <= high  # a k is the same on all rows


@pytest.mark.parametrize("name", EVALUATORS)
def test_rows_that_are_left_out_count_nowhere(name, sae, subject, rows):
    if EVALUATORS[name].NEEDS_TEXT:
        pytest.skip("needs text")
    keep = np.arange(1000) % 3 > 0
    whole = filled_up(sae, rows[keep], rows[keep], 1000)
    huge = jnp.asarray(np.where(keep[:, None], rows, 1e4).astype(np.float32))
    masked = dataclasses.replace(whole, x=huge, y=huge, keep=jnp.asarray(keep))
    a, b = (
        {m.name: m.value for m in EVALUATORS[name](subject).metrics(sums_of(subject, [{"": batch}])[name])}
        for batch in (masked, whole)
    )
    assert a.keys() == b.keys()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3), a, b)


def test_nine_of_ten_intervals_cover_the_ratio_of_all_sequences():
    """Rows of a sequence are alike: were they taken to vary by themselves, intervals would be far too narrow."""
    rng, n_draws, n_sequences, context = np.random.default_rng(0), 300, 40, 16
    covered = {context: 0, None: 0}
    for _ in range(n_draws):
        level = np.repeat(rng.exponential(1.0, n_sequences), context)
        values = np.stack([0.3 * level * rng.uniform(0.5, 1.5, len(level)), level + rng.uniform(0, 1, len(level))], 1)
        keep = rng.random(len(level)) < 0.9
        for unit in covered:
            sums = base.by_unit(jnp.asarray(values, jnp.float32), jnp.asarray(keep), unit)
            value = sums["sums_Q"][0] / sums["sums_Q"][1]
            low, high = base.interval(sums, value, (1, 0), (0, 1))
            covered[unit] += low < 0.3 / 1.5 < high
    assert 0.84 < covered[context] / n_draws < 0.95
    assert covered[None] / n_draws < 0.6


def test_no_metric_has_two_evaluators():
    names = [name for evaluator in EVALUATORS.values() for name in evaluator.METRICS]
    assert len(names) == len(set(names)) == len(base.descriptions())


def test_shares_are_of_the_same_rows_wherever_they_lie(rows, sae, subject, tmp_path, capsys):
    def share(i, path, content):
        about = {"data": path, "data_content": content}
        block = [{"": filled_up(sae, rows[i * 300 :][:300], rows[i * 300 :][:300], 300)}]
        return finish(tmp_path, Measured(subject, about, sums_of(subject, block)), Settings(600, 300), (i, 2))

    assert share(0, "there", "x") is None
    assert share(1, "there", "y") is None
    assert "was measured with another data_content and does not count" in capsys.readouterr().err
    assert share(1, "here", "x")["n_rows"] == 600


def test_metrics_are_ratios_of_sums_over_all_rows(rows, sae, subject):
    blocks = [{"": filled_up(sae, rows[i : i + 300], rows[i : i + 300], 300)} for i in range(0, 1000, 300)]
    got = Measured(subject, {"data": "set"}, sums_of(subject, blocks)).to_json()
    x, x_hat = np.float64(rows), np.float64(sae(rows))
    values = np.asarray(sae.encode(rows).values)
    error = ((x - x_hat) ** 2).sum()
    assert got["data"] == "set"
    assert got["fvu"] == pytest.approx(error / ((x - x.mean(0)) ** 2).sum(), rel=1e-4)
    for name, part in {"first": slice(0, 3), "second": slice(3, D)}.items():
        of_source = ((x - x_hat)[:, part] ** 2).sum() / ((x - x.mean(0))[:, part] ** 2).sum()
        assert got["fvu_by_source"][name] == pytest.approx(of_source, rel=1e-4)
    assert got["nmse_uncentered"] == pytest.approx(error / (x**2).sum(), rel=1e-4)
    assert got["l0"] == pytest.approx((values > 0).sum(1).mean())
    cosine = (x * x_hat).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(x_hat, axis=1)
    assert got["cosine"] == pytest.approx(cosine.mean(), rel=1e-4)
    assert got["gamma"] == pytest.approx((x_hat**2).sum() / (x * x_hat).sum(), rel=1e-4)
    assert got["n_rows"] == sum(got["l0_histogram"]) == 1000
    dense = np.zeros((1000, F), bool)
    np.put_along_axis(dense, np.asarray(sae.encode(rows).indices), values > 0, 1)
    assert got["silent_fraction"] == pytest.approx((~dense.any(0)).mean())
    assert got["dead_fraction"] == 0.25
    assert sum(got["density_histogram"]["counts"]) == dense.any(0).sum()


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
def test_projections_are_of_rows_as_the_decoder_makes_them(rows, norm):
    x = rows[:60] * np.linspace(1, 3, 60, dtype=np.float32)[:, None]  # fewer than are taken of a batch
    config = topk.Config(n_latents=F, k=K, dtype="float32", input_norm=norm)
    sae = config.init(jax.random.key(0), init.sample_statistics(x, norm))
    got = on_rows(sae, x)["decoder_projection"]
    y, w = np.float64(x), np.float64(sae.w_dec)
    if norm == "layer_norm":
        y = (y - y.mean(1, keepdims=True)) / (y.std(1, ddof=1, keepdims=True) + 1e-5)
    z = (y - np.float64(sae.b_dec)) @ (w / np.linalg.norm(w, axis=1, keepdims=True)).T
    taken = np.arange(64) * 60 // 64  # of 4096 rows, of which 60 count
    size = np.sqrt(((y - y.mean(0)) ** 2).sum(1).mean())
    assert got == pytest.approx(-np.sort(-z, axis=1)[taken, F // 4].mean() / size, rel=1e-3)


def test_rows_in_memory_are_cut_into_blocks(rows, sae):
    whole, cut = on_rows(sae, rows), on_rows(sae, rows, block_rows=300)
    assert whole["l0_histogram"] == cut["l0_histogram"]
    assert whole["fvu"] == pytest.approx(cut["fvu"], rel=1e-4)
    assert "fvu_by_source" not in whole
    assert "ce_clean" not in whole
    with pytest.raises(UserError, match="no row to measure on"):
        on_rows(sae, rows[:0])


def test_an_interval_covers_the_truth_nine_times_in_ten():
    rng, n = np.random.default_rng(1), 40
    covered = 0
    for _ in range(500):
        length_N = rng.integers(20, 100, n).astype(float)
        loss_N = length_N * (3 + rng.normal(0, 0.5, n))  # 3 a token
        q_NQ = np.stack([length_N, loss_N], axis=1)
        value, interval = base.ratio(q_NQ.sum(0), q_NQ.T @ q_NQ, n, np.array([0.0, 1.0]), np.array([1.0, 0.0]))
        assert value == pytest.approx(loss_N.sum() / length_N.sum())
        covered += interval[0] < 3 < interval[1]
    assert 0.86 < covered / 500 < 0.94
    assert base.ratio(q_NQ[0], np.outer(q_NQ[0], q_NQ[0]), 1, np.array([0.0, 1.0]), np.array([1.0, 0.0]))[1] is None


def test_what_people_print_is_readable(rows, sae, subject, text_batches):
    model = random_model(SPEC)
    text = HeldOut("text", model, (HOOK,), (HOOK,), np.zeros((2, 8), np.int32), np.zeros((2, 8), bool), None)
    assert "gpt2, 4 layers, d_model=16" in repr(model)
    assert "text: 2 sequences of 8 tokens, resid_post.1 of LanguageModel" in repr(text)
    shown = repr(Measured(subject, {}, sums_of(subject, text_batches)))
    assert shown.count("\n") < 24
    assert "loss recovered" in shown


def test_rows_far_above_the_median_are_reported_with_and_without(sae, subject, text_batches):
    """Against plain numpy; a batch without any reports nothing."""
    evaluator = EVALUATORS["sinks"](subject)
    batches = [batch[""] for batch in text_batches]
    sums = {}
    for batch in batches:
        sums = base.add(sums, evaluator.measure(batch))
    found = {metric.name: metric.value for metric in evaluator.metrics(sums)}
    y, y_hat, text, sink = (
        np.concatenate([np.asarray(part(batch), np.float64) for batch in batches])
        for part in (lambda b: b.y, lambda b: b.y_hat, lambda b: b.text.is_text, lambda b: b.text.is_sink)
    )
    assert found["n_sinks"] == (text * sink).sum()
    for name, rows in (("fvu_without_sinks", (text == 1) & (sink == 0)), ("fvu_with_sinks", text == 1)):
        expected = ((y - y_hat)[rows] ** 2).sum() / ((y[rows] - y[rows].mean(0)) ** 2).sum()
        np.testing.assert_allclose(found[name], expected, rtol=1e-3)
    nothing = dataclasses.replace(batches[0].text, is_sink=jnp.zeros(batches[0].y.shape[0], bool))
    sums = base.add({}, evaluator.measure(dataclasses.replace(batches[0], text=nothing)))
    assert [*evaluator.metrics(sums)] == []


def test_parts_of_the_rows_have_the_fvu_of_those_rows(subject, text_batches):
    found = Measured(subject, {}, sums_of(subject, text_batches)).to_json()
    error, offset, position, multiple = (np.zeros(0) for _ in range(4))
    for batch in (part[""] for part in text_batches):
        keep, y = np.asarray(batch.keep), np.float64(batch.y)
        norm = np.linalg.norm(y, axis=1)
        error = np.append(error, ((y - np.float64(batch.y_hat)) ** 2).sum(1)[keep])
        offset = np.append(offset, ((y - subject.mean) ** 2).sum(1)[keep])
        position = np.append(position, (np.arange(len(keep)) % 8)[keep])
        multiple = np.append(multiple, (norm / np.median(norm[keep]))[keep])
    for name, low, high in (("0", 0, 0), ("1", 1, 1), ("2 to 3", 2, 3), ("4 to 7", 4, 7)):
        rows = (low <= position) & (position <= high)
        assert found["fvu_by_position"][name] == pytest.approx(error[rows].sum() / offset[rows].sum(), rel=1e-4)
    edges = dict(zip(by_place.NORM_BINS, zip((0, *by_place.NORM_EDGES), (*by_place.NORM_EDGES, np.inf))))  # noqa: B905
    assert len(found["fvu_by_norm"]) >= 2
    for name, value in found["fvu_by_norm"].items():
        rows = (edges[name][0] <= multiple) & (multiple < edges[name][1])
        assert value == pytest.approx(error[rows].sum() / offset[rows].sum(), rel=1e-4), name
