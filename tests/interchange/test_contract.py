"""Every format: a sample in its real layout is recognised and computes what it did; ours goes out and comes back."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

import sae_jax
from sae_jax import UserError, interchange
from tests.interchange import samples
from tests.test_artifact import forms


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
    assert held >= 2


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
    with pytest.raises(UserError, match="there is no format 'sealens'; did you mean saelens"):
        sae_jax.import_dictionary(tmp_path / "a", tmp_path / "out", "sealens")
    assert not (tmp_path / "out").exists()


def test_in_the_hand_as_on_the_disk(ours: dict[str, Path], tmp_path: Path) -> None:
    sae_jax.export(ours["topk"], "saelens", tmp_path / "a")
    sae_jax.export(sae_jax.load(ours["topk"]), "saelens", tmp_path / "b")
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert jax.devices()
