"""Runs that begin with the weights of a dictionary: the same one in other units, or a refusal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae_jax
from sae_jax.artifact import Dictionary, record_of
from sae_jax.saes import base, crosscoder, jumprelu, topk
from sae_jax.saes.init import sample_statistics
from sae_jax.saes.normalise import Scale
from sae_jax.training import start
from sae_jax.training.state import initial_weights
from sae_jax.types import Widths
from tests.saes.test_contract import WIDTHS, D, F, configured

ROWS = np.float32(np.random.default_rng(0).standard_normal((256, D)) @ np.diag(np.linspace(0.5, 2, D)) + 0.3)
SETTINGS = {"n_latents": 32, "k": 4, "dtype": "float32", "batch_size": 64, "dead_after_tokens": 1000, "decay": 0.0}


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(autouse=True)
def _as_users_have_it():
    with jax.numpy_dtype_promotion("standard"):  # optax
        yield


def shaken(config: base.SaeConfig, *scales: float) -> base.AbstractSae:
    """A dictionary as users load it: random, of rows that were scaled, with a threshold where there is one."""
    sae = initial_weights(config, "float32", jax.random.key(0), sample_statistics(ROWS, "none", widths=WIDTHS))
    rng = np.random.default_rng(1)
    sae = jax.tree.map(lambda w: w * np.float32(rng.uniform(0.5, 1.5, w.shape)), sae)
    if hasattr(config, "mask"):
        sae = dataclasses.replace(sae, w_dec=sae.w_dec * rng.uniform(0.5, 1.5, D).astype(np.float32)[None])
    if "threshold" in {field.name for field in dataclasses.fields(sae)}:
        sae = dataclasses.replace(sae, threshold=jnp.float32(0.2))
    return sae.constrained().folded(scale_of(*scales))


def scale_of(first: float, second: float | None = None) -> Scale:
    scale = jnp.asarray(np.repeat(np.float32([first, second or first]), D // 2))
    return Scale(scale, scale)


@pytest.mark.parametrize("variant", base.variants())
def test_training_begins_with_the_very_dictionary_whatever_the_scale_of_its_set(variant: str) -> None:
    config = configured(variant)
    d = shaken(config, 3.0)
    for factor in (3.0, 0.7):
        begun = start._in_units_of(d, scale_of(factor), "d")
        for name in begun.unit_rows:
            np.testing.assert_allclose(np.linalg.norm(getattr(begun, name), axis=1), 1, atol=1e-5)
        again = begun.constrained().folded(scale_of(factor))
        if factor == 3.0 or variant != "crosscoder":  # whose codes are in the units of a set
            for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(d), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-6)
        np.testing.assert_allclose(again(ROWS[:8]), d(ROWS[:8]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "batch_topk"])
def test_sources_with_scales_of_their_own(activation: str, capsys) -> None:
    """Rows of one length in the old units have many in the new ones: the function stays, unless latents are ranked."""
    config = crosscoder.Config(n_latents=F, k=4, activation=activation, dtype="float32")
    d = shaken(config, 3.0, 0.5)
    begun = start._in_units_of(d, scale_of(3.0, 0.5), "d").constrained().folded(scale_of(3.0, 0.5))
    for ours, theirs in zip(jax.tree.leaves(begun), jax.tree.leaves(d), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-6)
    assert "norms" not in capsys.readouterr().err
    other = start._in_units_of(d, scale_of(1.0, 2.0), "crooked").constrained().folded(scale_of(1.0, 2.0))
    said = capsys.readouterr().err
    if activation == "relu":
        np.testing.assert_allclose(other(ROWS), d(ROWS), rtol=1e-4, atol=1e-4)
        assert "norms" not in said
    else:
        assert "--init-from=crooked: its decoder rows have norms from" in " ".join(said.split())


def test_rows_of_other_norms_are_the_same_dictionary_where_latents_have_thresholds_and_said_where_not(capsys) -> None:
    norms = np.float32(np.linspace(0.5, 2, F))[:, None]
    exact = shaken(configured("jumprelu"), 1.0)
    long = dataclasses.replace(exact, w_enc=exact.w_enc / norms, w_dec=exact.w_dec * norms)
    long = dataclasses.replace(
        long, b_enc=exact.b_enc / norms[:, 0], log_threshold=exact.log_threshold - np.log(norms[:, 0])
    )
    begun = start._in_units_of(long, scale_of(2.0), "long").constrained().folded(scale_of(2.0))
    np.testing.assert_allclose(begun(ROWS), long(ROWS), rtol=1e-4, atol=1e-4)
    assert capsys.readouterr().err == ""
    ranked = shaken(configured("topk"), 1.0)
    ranked = dataclasses.replace(ranked, w_dec=ranked.w_dec * norms)
    begun = start._in_units_of(ranked, scale_of(2.0), "ranked")
    np.testing.assert_allclose(np.linalg.norm(begun.w_dec, axis=1), 1, atol=1e-5)
    said = " ".join(capsys.readouterr().err.split())
    assert "--init-from=ranked: its decoder rows have norms from 0.5 to 2, and training keeps them at one" in said


def test_a_run_begins_there_and_its_record_says_so(tmp_path: Path, capsys) -> None:
    d = sae_jax.train(ROWS, steps=20, lr=1e-2, **SETTINGS)
    d.save(tmp_path / "d")
    again = sae_jax.train(5 * ROWS, steps=1, lr=1e-12, init_from=tmp_path / "d", out=tmp_path / "run", **SETTINGS)
    for ours, theirs in zip(jax.tree.leaves(again.sae), jax.tree.leaves(d.sae), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert again.record.origin is not None
    assert (again.record.origin.place, again.record.origin.changes) == (str(tmp_path / "d"), ("trained further",))
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    assert content["init_from"] == str(tmp_path / "d")
    tuned = sae_jax.train(ROWS, steps=20, lr=1e-2, init_from=tmp_path / "d", **SETTINGS)
    assert ((ROWS - tuned(ROWS)) ** 2).sum() < ((ROWS - d(ROWS)) ** 2).sum()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"variant": "jumprelu", "k": None}, "it has sae.variant=topk, and this run jumprelu; they must be the same"),
        ({"n_latents": 64}, "it has sae.n_latents=32, and this run 64"),
        ({"input_norm": "layer_norm"}, "it has sae.input_norm=dataset_sqrt_d, and this run layer_norm"),
        ({"init_from": "nothing"}, "nothing: not a run"),
        ({"init_from": "hf:alone"}, "is no place on the hub"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path, changed, message) -> None:
    d = topk.Config(n_latents=32, k=4)
    sae = initial_weights(d, "float32", jax.random.key(0), sample_statistics(ROWS, "none"))
    Dictionary(sae, record_of(sae)).save(tmp_path / "d")
    settings = {"init_from": tmp_path / "d", "steps": 2, "lr": 1e-3, **SETTINGS, **changed}
    with pytest.raises(sae_jax.UserError, match=message) as caught:
        sae_jax.train(ROWS, out=tmp_path / "run", **{n: v for n, v in settings.items() if v is not None})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_another_width_and_what_is_computed_otherwise(tmp_path: Path) -> None:
    sae = initial_weights(topk.Config(n_latents=32, k=4), "float32", jax.random.key(0), sample_statistics(ROWS, "none"))
    Dictionary(sae, record_of(sae)).save(tmp_path / "d")
    with pytest.raises(sae_jax.UsageError, match=f"it has widths={D}, and this run {D - 1}"):
        sae_jax.train(ROWS[:, 1:], steps=2, lr=1e-3, init_from=tmp_path / "d", **SETTINGS)
    config = jumprelu.Config(n_latents=32, pre_bias=True)
    sae = initial_weights(config, "float32", jax.random.key(0), sample_statistics(ROWS, "none"))
    Dictionary(sae, record_of(sae)).save(tmp_path / "j")
    settings = {name: value for name, value in SETTINGS.items() if name != "k"}
    with pytest.raises(sae_jax.UsageError, match=r"it has sae.pre_bias=True, and this run False"):
        sae_jax.train(ROWS, variant="jumprelu", steps=2, lr=1e-3, init_from=tmp_path / "j", **settings)
    with pytest.raises(sae_jax.UsageError, match="the runs of a sweep begin with random weights; use train"):
        sae_jax.sweep(ROWS, out=tmp_path / "s", grid={"k": [2]}, init_from=tmp_path / "d", **{**SETTINGS, "steps": 2})


def test_the_widths_of_sources_count() -> None:
    assert start._told(record_of(shaken(crosscoder.Config(n_latents=F, k=4), 1.0))) == "+".join(
        map(str, Widths(*WIDTHS).x)
    )
