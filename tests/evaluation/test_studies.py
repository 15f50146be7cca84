"""What every file of evaluation/studies/ promises, the record of studies, and those that few lines check."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from sae_jax import lm
from sae_jax.evaluation import baselines, suites
from sae_jax.evaluation.base import Metric, Subject
from sae_jax.evaluation.batches import Candidate
from sae_jax.evaluation.evaluate import Measured, descriptions, table_rows
from sae_jax.evaluation.studies import importance, refinement
from sae_jax.evaluation.study import Case, studies
from sae_jax.evaluation.text import HeldOut
from sae_jax.saes import init, topk
from sae_jax.types import Code, Sites, UsageError, UserError, Widths

HOOK = lm.Hook(1, "resid_post")
CONTEXT = 24
STUDIES = studies()
SMALL = {
    "ablation_sparsity": {"n_sequences": 6, "n_tokens": 2, "n_positions": 4},
    "n2g": {"n_latents": 4, "n_examples": 3, "longest": 5},
    "probe_loss": {"n_sequences": 24, "n_train": 80, "n_test": 40},
    "side_effects": {"scales": (0.0, 4.0), "n_latents": 3, "n_sequences": 4, "n_steered": 3},
    "sparse_probing": {"n_sequences": 24, "n_train": 80, "n_test": 40},
    "spurious": {"n_sequences": 24, "n_train": 80, "n_test": 40},
    "hedging": {"n_new": 4, "n_rows": 500, "n_steps": 8, "batch_size": 64},
    "importance": {"n_sequences": 6},
    "refinement": {"n_rows": 100},
}


@pytest.fixture(scope="module")
def text():
    model = lm.load("bundled")
    line = "def area(width, height):\n    return width * height  # the larger of both, in metres\n"
    ids = np.array(lm.tokenizer("bundled").encode([line * 40])[0], np.int32)[: 24 * CONTEXT]
    sequences = ids.reshape(-1, CONTEXT).copy()
    sequences[:, 0] = lm.tokenizer("bundled").separator_id
    is_text = np.arange(CONTEXT)[None].repeat(len(sequences), 0) > 0
    return HeldOut("text", model, (HOOK,), (HOOK,), sequences, is_text, None)


@pytest.fixture(scope="module")
def cases(text):
    rows = text.rows()
    config = topk.Config(n_latents=64, k=4, dtype="float32", input_norm="none")
    sae = config.init(jax.random.key(0), init.sample_statistics(rows, "none"))
    return {"topk": Case.of(sae, text, None), "dense": Case.of(baselines.pca(rows), text, None)}


def small(name):
    return STUDIES[name](**SMALL.get(name, {}))


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("kind", ["topk", "dense"])
def test_a_study_describes_what_it_yields_and_repeats_itself(name, kind, cases):
    study = small(name)
    found = list(study.metrics(cases[kind]))
    assert {metric.name for metric in found} <= set(study.METRICS)
    assert study.SUITE in ("openai", "probing", "causal")
    json.dumps([(metric.value, metric.interval) for metric in found])
    for metric in found:
        described = study.METRICS[metric.name]
        parts = {"": metric.value} if not isinstance(metric.value, dict) else metric.value
        intervals = {"": metric.interval} if not isinstance(metric.value, dict) else metric.interval or {}
        if described.in_table:
            lacks = [place for place in parts if intervals.get(place) is None]
            assert len(lacks) == (len(parts) if described.no_interval else 0), metric.name
        for place, (low, high) in {place: each for place, each in intervals.items() if each}.items():
            assert low - 1e-9 <= parts[place] <= high + 1e-9, metric.name
    if kind == "topk":
        assert repr(list(study.metrics(cases[kind]))) == repr(found)


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("n_sequences", [1, 3])
def test_of_hardly_any_text_a_study_says_less_or_is_refused(name, n_sequences, cases):
    case = cases["topk"]
    few = dataclasses.replace(case.text, sequences=case.text.sequences[:n_sequences], text=case.text.text[:n_sequences])
    nothing = dataclasses.replace(few, text=np.zeros_like(few.text))
    for text in (few, nothing):
        try:
            found = list(small(name).metrics(dataclasses.replace(case, text=text)))
        except UsageError:
            continue
        assert {metric.name for metric in found} <= set(STUDIES[name].METRICS)
        json.dumps([(metric.value, metric.interval) for metric in found])


def test_no_two_metrics_share_a_name_and_order_is_by_suite():
    names = [name for kind in STUDIES.values() for name in kind.METRICS]
    assert len(set(names)) == len(names)
    assert set(names) <= set(descriptions())
    assert [kind.ORDER for kind in STUDIES.values()] == sorted(kind.ORDER for kind in STUDIES.values())


def measured_of(case):
    sums = {"": {"rows": np.float64(1)}}
    return Measured(
        Subject(case.subject.sae, {str(HOOK): case.subject.sae.w_dec.shape[1]}, np.zeros(1)), {}, sums, case
    )


@pytest.fixture
def counted(monkeypatch):
    """The cheapest study, which says how often it was made."""
    calls = []

    def metrics(self, case):
        calls.append(case.seed)
        yield Metric("duplicate_fraction", 0.25, (0.2, 0.3))

    monkeypatch.setattr(STUDIES["duplicates"], "metrics", metrics)
    return calls


def test_a_study_on_record_is_not_made_again_but_for_another_seed_or_dictionary(cases, counted, tmp_path):
    kinds = [STUDIES["duplicates"]]
    measured, folders = {"a": measured_of(cases["topk"])}, {"a": tmp_path}
    first, missing = suites.run(measured, folders, kinds)
    again, _ = suites.run(measured, folders, kinds)
    assert (len(counted), missing) == (1, {"a": []})
    assert first["a"].studied == again["a"].studied
    assert again["a"].to_json()["duplicate_fraction"] == 0.25
    assert tuple(again["a"].to_json()["intervals"]["duplicate_fraction"]) == (0.2, 0.3)
    suites.run(measured, folders, kinds, seed=1)
    assert counted == [0, 1]
    suites.run({"a": measured_of(cases["dense"])}, folders, kinds, seed=1)
    assert len(counted) == 3
    path = tmp_path / "evaluation" / "duplicates.json"
    path.write_text(path.read_text().replace("0.25", "0.75"))
    with pytest.raises(UserError, match=r"duplicates.json: not what was written"):
        suites.run(measured, folders, kinds)


def test_workers_divide_the_studies_and_the_last_finds_them_all(cases, counted, tmp_path):
    kinds = [STUDIES["duplicates"]]
    measured = {name: measured_of(cases[kind]) for name, kind in (("a", "topk"), ("b", "dense"))}
    folders = {name: tmp_path / name for name in measured}
    _, missing = suites.run(measured, folders, kinds, shard=(0, 2))
    assert (missing, len(counted)) == ({"a": [], "b": ["duplicates"]}, 1)
    found, missing = suites.run(measured, folders, kinds, shard=(1, 2))
    assert (missing, len(counted)) == ({"a": [], "b": []}, 2)
    assert all(one.studied for one in found.values())


def test_a_dictionary_that_a_study_refuses_is_said_and_the_others_go_on(cases, monkeypatch, tmp_path):
    def refuse(self, case):
        raise UsageError("it is too wide")

    monkeypatch.setattr(STUDIES["importance"], "metrics", refuse)
    kinds = [STUDIES["importance"], STUDIES["duplicates"]]
    found, _ = suites.run({"a": measured_of(cases["topk"])}, {"a": tmp_path}, kinds)
    document = found["a"].to_json()
    assert document["left_out"] == {"importance": "it is too wide"}
    assert "duplicate_fraction" in document


def test_other_files_of_the_same_name_are_other_tasks_and_what_was_refused_is_tried_again(cases, monkeypatch, tmp_path):
    calls = []

    def metrics(self, case):
        calls.append(self.tasks)
        if len(calls) == 1:
            raise UsageError("a file lacks a column")
        return [Metric("probe_loss", 0.5)]

    monkeypatch.setattr(STUDIES["probe_loss"], "metrics", metrics)
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "a.csv").write_text("prompt,target\nx,1\n")

    def run():
        kinds, measured = [STUDIES["probe_loss"]], {"a": measured_of(cases["topk"])}
        return suites.run(measured, {"a": tmp_path}, kinds, tasks=str(folder))[0]["a"].to_json()

    assert run()["left_out"] == {"probe_loss": "a file lacks a column"}
    assert run()["probe_loss"] == run()["probe_loss"] == 0.5
    assert calls == [str(folder)] * 2
    (folder / "a.csv").write_text("prompt,target\ny,1\n")
    run()
    assert len(calls) == 3


def test_studies_without_text_and_suites_that_are_not_there_are_refused(cases):
    no_text = dataclasses.replace(measured_of(cases["topk"]), case=None)
    with pytest.raises(UsageError, match="a: its set names no held-out text"):
        suites.run({"a": no_text}, {"a": None}, suites.chosen(["openai"]))
    with pytest.raises(UsageError, match="suite 'opena' does not exist; choose core, openai, probing, causal, all"):
        suites.chosen(["opena"])
    assert suites.chosen(["core"]) == []
    assert suites.chosen(["all"]) == list(STUDIES.values())


def test_dictionaries_of_a_site_are_compared_and_each_says_how_much_of_it_the_other_has(cases):
    measured = {name: measured_of(case) for name, case in cases.items()}
    twin = suites.compared({"a": measured["topk"], "b": measured["topk"], "c": measured["dense"]})
    (metric,) = twin["a"].studied
    assert metric.value["b"] == pytest.approx(1, abs=1e-5)
    assert metric.value["c"] < 0.99
    rows = {row[0]: row[1:3] for row in table_rows([one.to_json() for one in twin.values()])}
    assert rows["MMCS of b"] == ("1.0000", "")


def test_baselines_stand_at_the_site_with_as_many_active_latents(cases, text):
    class Set:
        """Rows of the text as a set."""

        n_chunks = 1
        path = "set"
        spec = dataclasses.make_dataclass("Spec", ["chunk_rows"])(10**6)

        def read_chunk(self, source, chunk):
            return text.rows()

    sae = cases["topk"].subject.sae
    candidate = Candidate(sae, Sites.one("resid_post.1"), Widths.one(sae.w_dec.shape[1]), Set())  # pyrefly: ignore
    made = baselines.of_site(candidate, text, ("identity", "pca", "random", "neurons"))
    assert {one.sae.config.k for one in made.values()} == {4}
    assert made["random"].sae.w_dec.shape == sae.w_dec.shape
    neurons = made["neurons"]
    acts = lm.run(text.model, jnp.asarray(text.sequences), capture=[(1, "mlp_act")], logits=False).acts[(1, "mlp_act")]
    rows = np.asarray(acts)[text.text]
    assert str(neurons.hook) == "mlp_act.1"
    np.testing.assert_allclose(neurons.mean, rows.mean(0), atol=1e-5)
    with pytest.raises(UsageError, match="this one reads a and writes b; leave --baselines out"):
        baselines.of_site(dataclasses.replace(candidate, sites=Sites(("a",), ("b",))), text, ("pca",))
    with pytest.raises(UsageError, match="baseline 'pcs' does not exist; choose identity, pca, ica, random, neurons"):
        baselines.choose(["pcs"])


def test_refined_values_are_the_least_squares_of_the_same_latents_not_below_0(cases):
    case = cases["topk"]
    sae, rows = case.subject.sae, case.text.rows()[:20]
    code = sae.encode(rows)
    refined = np.asarray(refinement._refine(sae, code, jnp.asarray(rows)))
    for row, indices, values, found in zip(rows, code.indices, code.values, refined, strict=True):
        active = np.asarray(values) > 0
        directions = np.asarray(sae.w_dec, np.float64)[np.asarray(indices)[active]]
        expected, _ = scipy.optimize.nnls(directions.T, np.float64(row - np.asarray(sae.b_dec)))
        np.testing.assert_allclose(found[active], expected, atol=2e-3 * np.abs(expected).max())
        assert (found[~active] == 0).all()


def test_fvu_by_k_is_that_of_the_dictionary_at_its_k_and_refined_codes_beat_them_all(cases):
    case = cases["topk"]
    found = {metric.name: metric.value for metric in small("refinement").metrics(case)}
    rows = case.text.rows()[:100]
    fvu = ((rows - np.asarray(case.subject.sae(rows))) ** 2).sum() / ((rows - rows.mean(0)) ** 2).sum()
    by_k = found["fvu_by_k"]
    assert by_k["4"] == pytest.approx(fvu, rel=1e-4)
    assert list(by_k) == ["1", "2", "4", "8", "16"]
    assert found["fvu_refined"] < min(by_k.values())


def test_uniformity_is_1_where_all_matter_and_1_over_k_where_one_does():
    code = Code(jnp.zeros((4, 4), jnp.int32), jnp.array([[1.0, 1, 1, 1], [1, 1, 1, 1], [2, 1, 0, 0], [0, 0, 0, 0]]))
    along = jnp.array([[1.0, -1, 1, -1], [1, 0, 0, 0], [1, 2, 5, 5], [1, 1, 1, 1]])
    np.testing.assert_allclose(importance.uniformity(code, along), [1, 0.25, 1, 0], atol=1e-6)
    rng = np.random.default_rng(0)
    values, slopes = rng.random((50, 6)), rng.standard_normal((50, 6))
    p = np.abs(values * slopes) / np.abs(values * slopes).sum(1, keepdims=True)
    expected = np.exp(-(p * np.log(p)).sum(1)) / 6
    found = importance.uniformity(Code(jnp.zeros((50, 6), jnp.int32), jnp.float32(values)), jnp.float32(slopes))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_gradients_are_those_of_the_loss_along_a_change_of_the_activations(text):
    ids = jnp.asarray(text.sequences[:2])
    g = importance._gradients(text.model, ids, jnp.ones_like(ids, bool), (HOOK,))
    direction = jnp.asarray(np.random.default_rng(0).standard_normal(g.shape), jnp.float32)

    def loss(size):
        edits = lm.intervene.edits({HOOK: lm.intervene.add(size * direction)})
        return lm.cross_entropy(lm.run(text.model, ids, edits=edits).logits, ids).sum()

    expected = (loss(1e-2) - loss(-1e-2)) / 2e-2
    assert float((g * direction).sum()) == pytest.approx(float(expected), rel=0.02)


def test_a_dictionary_that_writes_elsewhere_is_refused_where_that_has_no_meaning(cases, text):
    sae = cases["topk"].subject.sae
    elsewhere = dataclasses.replace(text, reconstructed=(lm.Hook(1, "mlp_out"),))
    for name in ("importance", "refinement"):
        with pytest.raises(UsageError, match="the dictionary writes elsewhere than it reads"):
            list(small(name).metrics(Case.of(sae, elsewhere, None)))


def test_a_study_at_a_size_of_its_own_takes_the_place_of_its_kind_and_is_another_on_record(cases, tmp_path):
    small_one = refinement.Study(n_rows=50)
    kinds = suites.chosen(["openai"], [small_one])
    assert [kind is small_one for kind in kinds] == [kind is refinement.Study for kind in suites.chosen(["openai"])]
    assert suites.chosen(["core"], [small_one]) == [small_one]
    with pytest.raises(UsageError, match="studies has one kind twice; give each once"):
        suites.chosen(["core"], [small_one, refinement.Study()])
    with pytest.raises(UsageError, match=f"{__name__} is no study of sae_jax.evaluation.studies"):
        suites.chosen(["core"], [type("Own", (refinement.Study,), {"__module__": __name__})()])
    measured, folders = {"a": measured_of(cases["topk"])}, {"a": tmp_path}
    found = {}
    for n_rows in (50, 100):
        studied, _ = suites.run(measured, folders, [refinement.Study(n_rows=n_rows)])
        found[n_rows] = studied["a"].to_json()["refinement_change"]
        record = json.loads((tmp_path / "evaluation" / "refinement.json").read_text())
        assert record["about"]["sizes"] == {"n_rows": n_rows}
    assert found[50] != found[100]
