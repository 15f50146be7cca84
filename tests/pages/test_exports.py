"""Files for other programs' pages: every number is that of the table, and hostile text stays text."""

from __future__ import annotations

import gzip
import json
import zlib

import numpy as np
import pytest

from sae_jax.pages import export, latents
from sae_jax.pages.exports import circuit_tracer
from sae_jax.types import UsageError
from tests.pages import test_dashboard as shown
from tests.pages.exported import FORMATS, LAYER, TITLE, record, write

FAR, DEAD = shown.FAR, shown.DEAD


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    return {name: (folder / name, write(folder / name, name)) for name in FORMATS}


def lines(path):
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    return [json.loads(line) for line in data.decode().splitlines()]


def check_examples(examples, exported, latent):
    """Rows of (tokens, values, peak): as many as are shown, each with the values of the table."""
    table, sequences, *_ = shown.inputs()
    (described,) = latents.describe(exported.site.subject, np.array([latent]))
    contexts = described.contexts
    assert len(examples) == len(contexts.seq) > 20
    for (tokens, values, peak), seq, pos in zip(examples, contexts.seq, contexts.pos, strict=True):
        first = max(pos - latents.BEFORE, 0)
        assert tokens == [exported.tokens[i] for i in sequences[seq, first : pos + latents.AFTER + 1]]
        expected = table.windows(latent, np.array([seq]), np.array([first]), len(tokens))[0]
        np.testing.assert_allclose(values, expected, rtol=1e-5)
        assert peak == pos - first
        assert values[peak] > 0


def test_saedashboard_has_the_values_of_the_table(written):
    folder, exported = written["saedashboard"]
    batches = [json.loads((folder / f"batch-{i}.json").read_text()) for i in range(3)]
    assert not (folder / "batch-3.json").exists()
    assert {(b["model_id"], b["layer"]) for b in batches} == {("model-1", LAYER)}
    assert batches[0]["sae_set"] == "a-script-dictionary-xff"
    features = [feature for batch in batches for feature in batch["features"]]
    assert [feature["feature_index"] for feature in features] == list(range(shown.F))
    table, _, w_dec, unembed = shown.inputs()
    feature = features[FAR]
    assert feature["frac_nonzero"] == pytest.approx(table.density[FAR])
    assert sum(feature["freq_hist_data_bar_heights"]) == table.counts[FAR]
    assert len(feature["freq_hist_data_bar_values"]) == len(feature["freq_hist_data_bar_heights"])
    effect = (w_dec[FAR] @ unembed)[: len(shown.TOKENS)]
    effect -= effect.mean()
    assert feature["pos_str"][0] == exported.tokens[effect.argmax()]
    assert feature["pos_values"][0] == pytest.approx(effect.max(), rel=1e-4)
    assert feature["neg_str"][0] == exported.tokens[effect.argmin()]
    assert feature["neg_values"][0] == pytest.approx(effect.min(), rel=1e-4)
    rows = feature["activations"]
    check_examples([(row["tokens"], row["values"], row["qualifying_token_index"]) for row in rows], exported, FAR)
    strongest = [row for row in rows if row["bin_contains"] == -1]
    assert len(strongest) == min(20, shown.N_SEQ)
    for row in rows[len(strongest) :]:
        assert row["bin_min"] < row["values"][row["qualifying_token_index"]] <= row["bin_max"] * (1 + 1e-6)
    shares = {row["bin_min"]: row["bin_contains"] for row in rows if row["bin_contains"] != -1}
    assert sum(shares.values()) == pytest.approx(1)
    assert features[DEAD]["activations"] == features[DEAD]["freq_hist_data_bar_heights"] == []
    assert features[DEAD]["frac_nonzero"] == 0


def test_neuronpedia_has_rows_of_its_tables(written):
    folder, exported = written["neuronpedia"]
    source = f"{LAYER}-a-script-dictionary-xff"
    place = folder / "model-1" / source
    (about,) = lines(place / "source.jsonl")
    (sourceset,) = lines(place / "sourceset.jsonl")
    (release,) = lines(place / "release.jsonl")
    (model,) = lines(place / "model.jsonl")
    assert (about["id"], about["modelId"], about["setName"]) == (source, "model-1", sourceset["name"])
    assert (sourceset["releaseName"], sourceset["modelId"]) == (release["name"], model["id"])
    assert about["dataset"] == "base=text.txt"  # without the author's folders
    features = lines(place / "features" / "batch-0.jsonl.gz")
    assert [feature["index"] for feature in features] == [str(i) for i in range(shown.F)]
    assert {(feature["modelId"], feature["layer"]) for feature in features} == {("model-1", source)}
    table = shown.inputs()[0]
    assert features[FAR]["maxActApprox"] == pytest.approx(table.of_latent(FAR)[1].max(), rel=1e-5)
    assert features[7]["topkCosSimIndices"][0] == 3  # made nearly parallel
    rows = lines(place / "activations" / "batch-0.jsonl.gz")
    assert len({row["id"] for row in rows}) == len(rows)
    far = [row for row in rows if row["index"] == str(FAR)]
    check_examples([(row["tokens"], row["values"], row["qualifyingTokenIndex"]) for row in far], exported, FAR)
    for row in far:
        assert (row["maxValue"], row["minValue"]) == (max(row["values"]), min(row["values"]))
        assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"]
    (label,) = lines(place / "explanations" / "batch-0.jsonl.gz")
    assert (label["index"], label["description"]) == (str(FAR), "<b>cats</b>")


def test_circuit_tracer_has_each_latent_by_itself_and_packed(written):
    folder, exported = written["circuit-tracer"]
    single = json.loads((folder / "latents" / f"{circuit_tracer.paired(LAYER, FAR)}.json").read_text())
    index = json.loads(gzip.decompress((folder / "features" / "index.json.gz").read_bytes()))
    part = index[str(LAYER)]
    offsets = part["offsets"]
    data = (folder / "features" / part["filename"]).read_bytes()
    assert len(offsets) == shown.F + 1
    assert offsets[-1] == len(data)
    record = data[offsets[FAR] : offsets[FAR + 1]]
    assert int.from_bytes(record[:4], "little") == len(record) - 4
    assert json.loads(zlib.decompress(record[4:])) == single
    table = shown.inputs()[0]
    values = table.of_latent(FAR)[1]
    assert single["index"] == FAR
    assert single["act_max"] == pytest.approx(values.max(), rel=1e-5)
    assert single["activation_frequency"] == pytest.approx(table.density[FAR])
    assert sum(single["histogram"]) == len(values)
    assert len(single["quantile_values"]) == 100
    assert single["quantile_values"][49] == pytest.approx(np.median(values), rel=1e-5)
    examples = [example for group in single["examples_quantiles"] for example in group["examples"]]
    signs = str.maketrans({"\n": "⏎", "\t": "→"})
    plain = [(example["tokens"], example["tokens_acts_list"], example["train_token_ind"]) for example in examples]
    check_examples(plain, _with(exported, [token.translate(signs) for token in exported.tokens]), FAR)
    dead = json.loads((folder / "latents" / f"{circuit_tracer.paired(LAYER, DEAD)}.json").read_text())
    assert dead["examples_quantiles"] == []


def _with(exported, tokens):
    return export.Exported(shown.made(title=TITLE, token_strings=tokens), exported.record)


def test_numbers_of_latents_pair_and_unpair():
    pairs = [(i, n) for i in (0, 1, 2, 25, 126) for n in (0, 1, 999, 2**24, 2**40)]
    assert [circuit_tracer.unpaired(circuit_tracer.paired(*pair)) for pair in pairs] == pairs
    assert len({circuit_tracer.paired(*pair) for pair in pairs}) == len(pairs)


def test_layers_that_are_exported_one_after_the_other_make_a_set(tmp_path):
    for layer in (0, 1, 0):
        write(tmp_path / "set", "circuit-tracer", record(layer))
    index = json.loads(gzip.decompress((tmp_path / "set" / "features" / "index.json.gz").read_bytes()))
    assert [*index] == ["0", "1"]
    assert len([*(tmp_path / "set" / "latents").glob("*.json")]) == 2 * shown.F
    files = [(tmp_path / "set" / "features" / part["filename"]).read_bytes() for part in index.values()]
    assert files[0] == files[1]


def test_latents_of_a_cross_layer_transcoder_are_those_of_the_layers_they_read(tmp_path):
    write(tmp_path / "clt", "circuit-tracer", record(0, n_layers=2, mask="weakly_causal"))
    index = json.loads(gzip.decompress((tmp_path / "clt" / "features" / "index.json.gz").read_bytes()))
    assert [len(index[layer]["offsets"]) - 1 for layer in ("0", "1")] == [shown.F // 2] * 2
    second = json.loads((tmp_path / "clt" / "latents" / f"{circuit_tracer.paired(1, 3)}.json").read_text())
    assert second["index"] == 3


@pytest.mark.parametrize("format", FORMATS)
def test_no_byte_of_a_file_is_one_that_utf8_or_a_database_cannot_hold(format, written):
    folder, exported = written[format]
    assert r"\xe2\x80" in exported.tokens  # as bytes that are no character by themselves are written
    for path in folder.rglob("*.json*"):
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for line in data.decode("ascii").splitlines() if path.suffix != ".json" else [data.decode("ascii")]:
            text = json.dumps(json.loads(line), ensure_ascii=False)
            text.encode()  # no lone surrogate
            assert "\\u0000" not in text
            assert "/home/someone" not in text


def test_latents_that_are_not_shown_leave_others_in_their_places(tmp_path):
    write(tmp_path / "some", "circuit-tracer", latents=np.array([2, FAR]))
    part = json.loads(gzip.decompress((tmp_path / "some" / "features" / "index.json.gz").read_bytes()))[str(LAYER)]
    data, offsets = (tmp_path / "some" / "features" / part["filename"]).read_bytes(), part["offsets"]
    for n in (2, FAR):
        assert json.loads(zlib.decompress(data[offsets[n] + 4 : offsets[n + 1]]))["index"] == n
    assert offsets[5] == offsets[6]


def test_what_has_no_place_is_refused(tmp_path):
    for format in ("neuronpedia", "saedashboard"):
        with pytest.raises(UsageError, match="not one layer"):
            write(tmp_path / "out", format, record(0, n_layers=2))
    with pytest.raises(UsageError, match="choose site, circuit-tracer, neuronpedia, saedashboard"):
        write(tmp_path / "out", "html")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="is not an export"):
        write(tmp_path / "mine", "saedashboard")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    assert not (tmp_path / "out").exists()
