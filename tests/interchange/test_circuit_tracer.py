"""Transcoders of all layers, and cross-layer transcoders, for circuit-tracer: its layout, and what it cannot hold."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import sae_jax
from sae_jax import UsageError, UserError
from sae_jax.artifact import Dictionary, record_of
from sae_jax.record import SourceRecord
from sae_jax.saes import crosscoder, transcoder
from sae_jax.types import Widths
from tests.interchange import samples

D, N, L = 6, 10, 3


@pytest.fixture(autouse=True)
def _one_device(one_device):
    pass


def side(point: str, layers, model="someone/model@main") -> tuple[SourceRecord, ...]:
    return tuple(SourceRecord(f"{point}.{i}", D, f"{point}.{i}", model) for i in layers)


def a_transcoder(layer: int, n: int = N, reads: str = "mlp_in", **settings) -> Dictionary:
    rng = np.random.default_rng(layer)
    config = transcoder.Config(n_latents=n, k=3, dtype="float32", **{"activation": "relu", **settings})
    numbers = {"w_enc": (n, D), "b_enc": (n,), "w_dec": (n, D), "b_dec": (D,), "w_skip": (D, D), "log_threshold": (n,)}
    arrays = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in numbers.items()}
    arrays["w_skip"] = arrays["w_skip"] if config.skip else None
    arrays["log_threshold"] = arrays["log_threshold"] if config.activation == "jumprelu" else None
    sae = transcoder.Transcoder(**arrays, config=config)
    return named(sae, side(reads, [layer]), side("mlp_out", [layer]))


def named(sae, encodes, reconstructs) -> Dictionary:
    return Dictionary(sae, dataclasses.replace(record_of(sae), encodes=encodes, reconstructs=reconstructs))


def a_clt(n_latents: int = L * N, layers=range(L), **settings) -> Dictionary:
    """A cross-layer transcoder whose rows are 0 where its mask says so."""
    rng = np.random.default_rng(3)
    widths = Widths((D,) * L, (D,) * L)
    config = crosscoder.Config(n_latents=n_latents, k=3, dtype="float32", **{"mask": "weakly_causal", **settings})
    of_latent = np.minimum(np.arange(n_latents) // (n_latents // L), L - 1)[:, None]
    of_source = np.repeat(np.arange(L), D)[None]
    w_enc = rng.standard_normal((n_latents, L * D)) * (of_source == of_latent)
    w_dec = rng.standard_normal((n_latents, L * D)) * (of_source >= of_latent)
    vectors = [rng.standard_normal(n) for n in (n_latents, L * D)]
    arrays = [jnp.asarray(a, jnp.float32) for a in (w_enc, vectors[0], w_dec, vectors[1], 0.4)]
    sae = crosscoder.Crosscoder(*arrays, config=config, widths=widths)
    return named(sae, side("mlp_in", layers), side("mlp_out", layers))


def test_a_set_lands_in_its_layout_and_comes_back(tmp_path: Path) -> None:
    """Given in any order; W_skip is applied as x W_skip^T."""
    members = [a_transcoder(i, skip=True) for i in range(L)]
    sae_jax.export([members[2], members[0], members[1]], "circuit_tracer", tmp_path / "set")
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        *("config.yaml", "layer_0.safetensors", "layer_1.safetensors", "layer_2.safetensors")
    ]
    assert yaml.safe_load((tmp_path / "set" / "config.yaml").read_text()) == {
        "model_name": "someone/model",
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
        "scan": None,
    }
    x = np.random.default_rng(9).standard_normal((7, D))
    for i, d in enumerate(members):
        w = {name: a.astype(np.float64) for name, a in load_file(tmp_path / "set" / f"layer_{i}.safetensors").items()}
        assert w["W_enc"].shape == w["W_dec"].shape == (N, D)
        y = np.maximum(x @ w["W_enc"].T + w["b_enc"], 0) @ w["W_dec"] + w["b_dec"] + x @ w["W_skip"].T
        np.testing.assert_allclose(d(x), y, rtol=1e-5, atol=1e-5)
    record = sae_jax.import_dictionary(tmp_path / "set", tmp_path / "back")
    assert [source.hook for source in record.encodes] == ["mlp_in.0", "mlp_in.1", "mlp_in.2"]
    for i, d in enumerate(members):
        back = sae_jax.load(tmp_path / "back" / f"layer_{i}")
        np.testing.assert_allclose(back(x), d(x), rtol=1e-6, atol=1e-6)
        assert back.record.reconstructs == (SourceRecord(f"mlp_out.{i}", D, f"mlp_out.{i}", "someone/model"),)


def test_thresholds_of_a_set(tmp_path: Path) -> None:
    members = [a_transcoder(i, activation="jumprelu") for i in range(2)]
    sae_jax.export(members, "circuit_tracer", tmp_path / "set")
    x = np.random.default_rng(9).standard_normal((7, D))
    for i, d in enumerate(members):
        w = load_file(tmp_path / "set" / f"layer_{i}.safetensors")
        pre = x @ w["W_enc"].T.astype(np.float64) + w["b_enc"]
        y = np.where(pre > w["activation_function.threshold"], pre, 0) @ w["W_dec"] + w["b_dec"]
        np.testing.assert_allclose(d(x), y, rtol=1e-5, atol=1e-5)


def test_a_selection_of_k_needs_thresholds_first(tmp_path: Path) -> None:
    members = [a_transcoder(i, activation="topk") for i in range(2)]
    with pytest.raises(UsageError, match="knows thresholds and no selection of k latents; give --calibrate"):
        sae_jax.export(members, "circuit_tracer", tmp_path / "set")
    x = np.random.default_rng(9).standard_normal((64, D)).astype(np.float32)
    sae_jax.export(members, "circuit_tracer", tmp_path / "set", calibrate=x)
    w = load_file(tmp_path / "set" / "layer_1.safetensors")
    pre = x @ w["W_enc"].T + w["b_enc"]
    assert (pre > w["activation_function.threshold"]).sum(1).mean() == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("activation", ["relu", "batch_topk"])
def test_a_cross_layer_transcoder_lands_in_its_layout_and_comes_back(tmp_path: Path, activation: str) -> None:
    d = a_clt(activation=activation)
    sae_jax.export(d, "circuit_tracer", tmp_path / "clt")
    x = np.random.default_rng(9).standard_normal((7, L * D))
    y, codes = np.zeros((7, L * D)), []
    for i in range(L):
        enc = {n: a.astype(np.float64) for n, a in load_file(tmp_path / "clt" / f"W_enc_{i}.safetensors").items()}
        w_dec = load_file(tmp_path / "clt" / f"W_dec_{i}.safetensors")[f"W_dec_{i}"].astype(np.float64)
        assert w_dec.shape == (N, L - i, D)  # the last layer is there, too
        assert (f"threshold_{i}" in enc) == (activation == "batch_topk")
        pre = x[:, i * D : (i + 1) * D] @ enc[f"W_enc_{i}"].T + enc[f"b_enc_{i}"]
        codes.append(np.where(pre > enc.get(f"threshold_{i}", 0), pre, 0))
        y[:, i * D : (i + 1) * D] += enc[f"b_dec_{i}"]
        for j in range(L - i):
            y[:, (i + j) * D : (i + j + 1) * D] += codes[-1] @ w_dec[:, j]
    np.testing.assert_allclose(d(x), y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d.encode(x).to_dense(L * N), np.concatenate(codes, 1), rtol=1e-5, atol=1e-5)
    sae_jax.import_dictionary(tmp_path / "clt", tmp_path / "back")
    back = sae_jax.load(tmp_path / "back")
    assert back.config.mask == "weakly_causal"
    assert back.config.activation == {"relu": "relu", "batch_topk": "jumprelu"}[activation]
    np.testing.assert_allclose(back(x), d(x), rtol=1e-5, atol=1e-5)
    for name in ("w_enc", "w_dec"):
        np.testing.assert_array_equal(getattr(back, name), getattr(d, name))
    sae_jax.export(back, "circuit_tracer", tmp_path / "again")
    for path in (tmp_path / "clt").glob("W_dec_*"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: a_clt(mask="acausal"), "its latents read one layer and write that and later ones, not mask=acausal"),
        (lambda: a_clt(n_latents=L * N + 1), "as many latents for each of the 3 layers; train with sae.n_latents=30"),
        (lambda: a_clt(layers=(1, 2, 3)), "needs every layer of the model, from 0 on and once each; these are 1, 2, 3"),
        (lambda: a_clt(layers=(1, 0, 2)), "these are 1, 0, 2"),
        (lambda: a_transcoder(1), "these are 1"),
        (lambda: [a_transcoder(0), a_transcoder(0)], "these are 0, 0"),
        (lambda: [a_transcoder(0), a_transcoder(1, n=N + 2)], "one width for all layers, and these are 10 latents"),
        (lambda: a_transcoder(0, reads="resid_post"), "replaces MLPs, from mlp_in or resid_mid to .*, not resid_post"),
        (lambda: a_transcoder(0, input_norm="layer_norm"), "no norm of each vector, such as input_norm=layer_norm"),
        (lambda: named(a_transcoder(0).sae, *[(SourceRecord("x", D),)] * 2), "to know the layer, and 'x' names none"),
    ],
)
def test_what_it_cannot_hold_is_named(tmp_path: Path, make, message) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        sae_jax.export(make(), "circuit_tracer", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_one_dictionary_is_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="saelens takes one dictionary, not 2; export each of them by itself"):
        sae_jax.export([a_transcoder(0), a_transcoder(1)], "saelens", tmp_path / "out")
    with pytest.raises(UsageError, match="sae_jax takes one dictionary, not 0"):
        sae_jax.export([], "sae_jax", tmp_path / "out")


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    clt = samples.circuit_tracer_jumprelu_clt(tmp_path / "clt").path
    save_file({"W_dec_1": np.zeros((samples.N, 2, samples.D), np.float32)}, clt / "W_dec_1.safetensors")
    with pytest.raises(UserError, match=r"W_dec_1 has shape \[24, 2, 8\], where \[24, 1, 8\] is needed"):
        sae_jax.import_dictionary(clt, tmp_path / "out")
    (clt / "W_dec_1.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no W_dec_1.safetensors; get it, too"):
        sae_jax.import_dictionary(clt, tmp_path / "out")
    sae_jax.export([a_transcoder(0), a_transcoder(1), a_transcoder(2)], "circuit_tracer", tmp_path / "set")
    (tmp_path / "set" / "layer_2.safetensors").rename(tmp_path / "set" / "layer_3.safetensors")
    with pytest.raises(UserError, match="has layers 0, 1, 3, which are not all from 0 on; get the others"):
        sae_jax.import_dictionary(tmp_path / "set", tmp_path / "out")
    (tmp_path / "set" / "config.yaml").write_text("- a\n- b")
    (tmp_path / "set" / "layer_3.safetensors").unlink()
    with pytest.raises(UserError, match=r"config.yaml: Expected `object`, got `array`"):
        sae_jax.import_dictionary(tmp_path / "set", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_thresholds_are_not_trained() -> None:
    rows = {f"{point}.{i}": np.zeros((64, D), np.float32) + i for point in ("a", "b") for i in range(2)}
    rows = {name: a + np.random.default_rng(0).standard_normal(a.shape).astype(np.float32) for name, a in rows.items()}
    with pytest.raises(UsageError, match=r"sae.activation=jumprelu is of imported crosscoders alone"):
        sae_jax.train(rows, variant="crosscoder", site=("a.0", "a.1"), activation="jumprelu", steps=1, n_latents=32)
