"""Every format: a sample in its real layout is recognised and computes what it did; ours goes out and comes back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import sae_jax
from sae_jax import UserError, interchange
from tests.interchange import samples
from tests.test_artifact import forms

GEMMA_3 = "google/gemma-3-1b-pt"


@pytest.fixture(autouse=True)
def _one_device(one_device):
    pass


@pytest.mark.parametrize("name", samples.SAMPLES)
def test_a_sample_computes_what_it_did(name: str, tmp_path: Path) -> None:
    sample = samples.SAMPLES[name](tmp_path / "theirs")
    record = sae_jax.import_dictionary(sample.path, tmp_path / "ours", k=sample.k)
    assert record.origin is not None
    assert record.origin.format == sample.format
    assert record.origin.place == str(sample.path)
    d = sae_jax.load(tmp_path / "ours")
    assert d.record == record
    x = samples.rows(d.w_enc.shape[1])
    z, y = sample.forward(x)
    code = np.asarray(d.encode(x).to_dense(d.w_enc.shape[0]))
    np.testing.assert_array_equal(code > 0, z > 0)
    np.testing.assert_allclose(code, z, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "encodes", "reconstructs", "model"),
    [
        ("saelens_topk", "resid_pre.6", "resid_pre.6", "gpt2"),
        ("saelens_before_6", "mlp_out.3", "mlp_out.3", "gpt2"),
        ("sparsify_autoencoder", "resid_post.6", "resid_post.6", None),
        ("gemma_scope", "resid_post.20", "resid_post.20", "google/gemma-2-2b"),
        ("gemma_scope_embedding", "resid_pre.0", "resid_pre.0", "google/gemma-2-2b"),
        ("gemma_scope_transcoder", "mlp_in.3", "mlp_out.3", "google/gemma-2-2b"),
        ("gemma_scope_2", "resid_post.9", "resid_post.9", "google/gemma-3-4b-it"),
        ("gemma_scope_2_affine", "mlp_in.13", "mlp_out.13", GEMMA_3),
        ("gemma_scope_2_clt", ("mlp_in.0", "mlp_in.1", "mlp_in.2"), ("mlp_out.0", "mlp_out.1", "mlp_out.2"), GEMMA_3),
        ("dictionary_learning_topk", "resid_post.3", "resid_post.3", "EleutherAI/pythia-70m"),
        ("openai_topk", "resid_post.6", "resid_post.6", "gpt2"),
        ("openai_relu_tied", "mlp_act.6", "mlp_act.6", "gpt2"),
        ("qwen_scope", "resid_post.7", "resid_post.7", "Qwen/Qwen3-1.7B-Base"),
        ("llama_scope", "resid_post.19", "resid_post.19", None),
        ("mwhanna", "mlp_in.11", "mlp_out.11", None),
    ],
)
def test_the_record_says_where_rows_come_from(
    name: str, encodes: str | tuple[str, ...], reconstructs: str | tuple[str, ...], model: str | None, tmp_path: Path
) -> None:
    sample = samples.SAMPLES[name](tmp_path / "theirs")
    record = sae_jax.import_dictionary(sample.path, tmp_path / "ours")
    for sources, hooks in ((record.encodes, encodes), (record.reconstructs, reconstructs)):
        assert tuple(source.hook for source in sources) == ((hooks,) if isinstance(hooks, str) else hooks)
    assert {source.model for source in record.encodes + record.reconstructs} == {model}


WRITTEN = [name for name, module in interchange.known_formats().items() if hasattr(module, "write")]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dictionary of every variant, saved."""
    folder = tmp_path_factory.mktemp("ours")
    for name, sae in forms().items():
        sae_jax.save(sae, folder / name)
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("format", WRITTEN)
def test_ours_goes_out_and_comes_back(format: str, ours: dict[str, Path], tmp_path: Path) -> None:
    x, held = np.random.default_rng(1).standard_normal((30, 8)).astype(np.float32), 0
    for name, path in ours.items():
        out = tmp_path / f"{name}-out"
        try:
            sae_jax.export(path, format, out)
        except UserError:
            assert not out.exists()
            continue
        held += 1
        sae_jax.import_dictionary(out, tmp_path / f"{name}-back", format)
        there, back = sae_jax.load(path), sae_jax.load(tmp_path / f"{name}-back")
        np.testing.assert_allclose(back(x), there(x), rtol=1e-5, atol=1e-6, err_msg=name)
        codes = [np.asarray(d.encode(x).to_dense(64)) for d in (there, back)]
        np.testing.assert_allclose(codes[1], codes[0], rtol=1e-5, atol=1e-6, err_msg=name)
    assert held >= 2 or format == "circuit_tracer"  # which takes MLPs alone: test_circuit_tracer.py


def test_a_dictionary_says_where_it_came_from(tmp_path: Path) -> None:
    sample = samples.gemma_scope(tmp_path / "theirs")
    sae_jax.import_dictionary(sample.path, tmp_path / "ours")
    d = sae_jax.load(tmp_path / "ours")
    assert repr(d).splitlines() == [
        "Dictionary: jumprelu, 24 latents",
        "  encodes      resid_post.20 of google/gemma-2-2b (d=8)",
        f"  imported     {sample.path} (gemma_scope); decoder rows keep their norms",
    ]
    d.save(tmp_path / "again")  # rows of other norms, which the record allows
    assert sae_jax.load(tmp_path / "again").record.origin == d.record.origin


def test_a_value_of_exactly_the_threshold_is_not_active(tmp_path: Path) -> None:
    w = samples.numbers()
    w["threshold"] = np.random.default_rng(0).uniform(0.01, 30, samples.N).astype(np.float32)
    w["W_enc"][:], w["b_enc"] = 0, w["threshold"].copy()
    samples._saelens(tmp_path / "at", "jumprelu", samples._of(w, *samples.PLAIN, "threshold"))
    w["b_enc"] = np.nextafter(w["b_enc"] * np.float32(1 + 1e-6), np.float32(np.inf))
    samples._saelens(tmp_path / "above", "jumprelu", samples._of(w, *samples.PLAIN, "threshold"))
    for name, n_active in (("at", 0), ("above", samples.N)):
        sae_jax.import_dictionary(tmp_path / name, tmp_path / f"{name}-ours")
        code = sae_jax.load(tmp_path / f"{name}-ours").encode(samples.rows())
        assert (np.asarray(code.values) > 0).sum(1).tolist() == [n_active] * len(samples.rows())


def test_a_folder_of_no_known_format_is_refused_with_a_list(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.bin").write_text("x")
    with pytest.raises(UserError, match=r"of no known format \(.*saelens.*\); it has model\.bin"):
        sae_jax.import_dictionary(tmp_path / "a", tmp_path / "out")
    with pytest.raises(UserError, match="no such file or folder"):
        sae_jax.import_dictionary(tmp_path / "b", tmp_path / "out")
    with pytest.raises(UserError, match=r"there is no format 'sealens'; there are .*saelens"):
        sae_jax.import_dictionary(tmp_path / "a", tmp_path / "out", "sealens")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_weights_of_other_types_are_read_as_they_are(dtype: str, tmp_path: Path) -> None:
    w = {name: array.astype(dtype) for name, array in samples._of(samples.numbers(), *samples.PLAIN).items()}
    samples._saelens(tmp_path / "st", "topk", w, k=4)
    content = {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T, "encoder.bias": w["b_enc"]}
    content |= {"b_dec": w["b_dec"], **samples._selection()}
    samples._dictionary_learning(tmp_path / "pt", "AutoEncoderTopK", content, lambda x: (x, x))
    for path in ("st", "pt/resid_post_layer_3/trainer_0"):
        record = sae_jax.import_dictionary(tmp_path / path, tmp_path / path[:2] / "ours")
        d = sae_jax.load(tmp_path / path[:2] / "ours")
        for name, array in (
            ("w_enc", w["W_enc"].T),
            ("w_dec", w["W_dec"]),
            ("b_enc", w["b_enc"]),
            ("b_dec", w["b_dec"]),
        ):
            np.testing.assert_array_equal(getattr(d, name), array.astype(np.float32), err_msg=name)
        assert record.origin is not None
        said = " ".join(record.origin.changes)
        assert ("w_enc were float64" in said or "w_dec, w_enc were float64" in said) == (dtype == "float64")


def test_in_the_hand_as_on_the_disk(ours: dict[str, Path], tmp_path: Path) -> None:
    sae_jax.export(ours["topk"], "saelens", tmp_path / "a")
    sae_jax.export(sae_jax.load(ours["topk"]), "saelens", tmp_path / "b")
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_selection_of_k_becomes_thresholds_where_rows_are_given(ours: dict[str, Path], tmp_path: Path) -> None:
    x = np.random.default_rng(2).standard_normal((400, 8)).astype(np.float32)
    for name in ("topk", "transcoder"):
        with pytest.raises(UserError, match="knows thresholds and no selection of k latents; give --calibrate SET"):
            sae_jax.export(ours[name], "gemma_scope", tmp_path / f"{name}-no")
        sae_jax.export(ours[name], "gemma_scope", tmp_path / name, calibrate=x)
        sae_jax.import_dictionary(tmp_path / name, tmp_path / f"{name}-back")
        active = np.asarray(sae_jax.load(tmp_path / f"{name}-back").encode(x).values) > 0
        assert active.sum(1).mean() == pytest.approx(4, abs=0.02)  # k on average, and not in every row
        assert len({*active.sum(1)}) > 1
    sae_jax.write_activations(tmp_path / "set", x)
    record = sae_jax.load(ours["topk"]).record
    sae_jax.export(ours["topk"], "gemma_scope", tmp_path / "by-set", calibrate=_named(tmp_path / "set", x, record))
    assert (tmp_path / "by-set" / "params.npz").exists()
    with pytest.raises(UserError, match="has no selection that needs thresholds; leave --calibrate out"):
        sae_jax.export(ours["relu"], "gemma_scope", tmp_path / "relu", calibrate=x)


@pytest.mark.parametrize("kind", ["tied", "dictionary_learning"])
def test_a_selection_over_a_batch_without_a_threshold_takes_one_from_rows(kind: str, tmp_path: Path) -> None:
    """What the rows would select as one batch is what each of them selects by itself."""
    w, x = samples.f64(samples.numbers()), samples.rows()
    n_active, pre = len(x) * samples.K, x @ w["W_enc"] + w["b_enc"]
    arrays = {name: array.astype(np.float32) for name, array in w.items()}
    if kind == "tied":
        content = {"W": arrays["W_enc"], "b_enc": arrays["b_enc"], "b_dec": arrays["b_dec"]}
        samples.write_torch(tmp_path / "theirs" / "r1.pt", content)
        path, w["W_dec"] = tmp_path / "theirs", w["W_enc"].T
    else:
        pre -= w["b_dec"] @ w["W_enc"]
        content = {**samples._linear(arrays), "b_dec": arrays["b_dec"], **samples._selection()}
        path = samples._dictionary_learning(tmp_path, "BatchTopKSAE", content, lambda x: (x, x)).path
    k = samples.K if kind == "tied" else None
    with pytest.raises(UserError, match=r"has no threshold for rows by themselves; give --calibrate SET"):
        sae_jax.import_dictionary(path, tmp_path / "ours", k=k)
    with pytest.raises(UserError, match=r"rows to calibrate with have shape .40, 3.; the dictionary encodes rows of 8"):
        sae_jax.import_dictionary(path, tmp_path / "ours", k=k, calibrate=x[:, :3])
    record = sae_jax.import_dictionary(path, tmp_path / "ours", k=k, calibrate=x)
    assert record.origin is not None
    assert "no threshold was stored" in record.origin.changes[-1]
    z = np.where(pre >= np.sort(pre.ravel())[-n_active], pre, 0)
    d = sae_jax.load(tmp_path / "ours")
    np.testing.assert_allclose(d.encode(x).to_dense(samples.N), z, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d(x), z @ w["W_dec"] + w["b_dec"], rtol=1e-5, atol=1e-5)
    sae_jax.write_activations(tmp_path / "set", x, dtype="float32")
    sae_jax.import_dictionary(path, tmp_path / "by-set", k=k, calibrate=tmp_path / "set")
    np.testing.assert_array_equal(sae_jax.load(tmp_path / "by-set")(x), d(x))


def test_nothing_is_calibrated_that_is_whole(tmp_path: Path) -> None:
    sample = samples.saelens_topk(tmp_path / "theirs")
    with pytest.raises(UserError, match="nothing is to be calibrated; leave --calibrate out"):
        sae_jax.import_dictionary(sample.path, tmp_path / "ours", calibrate=samples.rows())


def _named(path: Path, x: np.ndarray, record: sae_jax.Record) -> Path:
    """A set whose source is called as the dictionary's."""
    named = path.with_name("named")
    sae_jax.write_activations(named, {record.encodes[0].name: x})
    return named


def test_what_a_format_cannot_hold_is_refused_by_name(ours: dict[str, Path], tmp_path: Path) -> None:
    for name, format, message in (
        ("crosscoder", "saelens", "saelens cannot hold this crosscoder"),
        ("relu", "sparsify", "sparsify cannot hold this relu: it knows a selection of k latents a row alone"),
        ("topk-layer_norm", "gemma_scope", "give --calibrate SET"),
        ("topk-layer_norm", "dictionary_learning", "it has no input_norm=layer_norm"),
        ("transcoder", "dictionary_learning", "it has autoencoders of one source alone"),
        ("transcoder", "saelens_and_sparsify", "SAELens has no transcoder that selects k latents"),
        (
            "topk",
            "openai",
            "openai is read and not written; written are circuit_tracer, dictionary_learning",
        ),
    ):
        with pytest.raises(UserError, match=message):
            sae_jax.export(ours[name], format, tmp_path / "out")
    assert not (tmp_path / "out").exists()
