"""Dictionaries on disk: every variant comes back to the bit; what is not one is refused in a line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae_jax
from sae_jax import UsageError, UserError, artifact
from sae_jax.artifact import Dictionary
from sae_jax.saes import base, init
from sae_jax.saes.base import AbstractSae
from sae_jax.storage import digests
from sae_jax.types import Widths
from tests.saes.test_contract import configured

D = 8
OTHER_FORMS = {
    "topk-layer_norm": ("topk", {"input_norm": "layer_norm"}),
    "transcoder-skip": ("transcoder", {"skip": True}),
    "jumprelu-tanh": ("jumprelu", {"penalty": "tanh"}),
    "crosscoder-batch_topk": ("crosscoder", {"activation": "batch_topk"}),
}


def trained(variant: str, **settings) -> AbstractSae:
    """A dictionary away from its initialisation, as users load it."""
    config = configured(variant, k=4, **settings)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((64, D)).astype(np.float32)
    widths = Widths((4, 4), (4, 4)) if variant == "crosscoder" else Widths.one(D)
    sample = init.sample_statistics(rows, config.input_norm, widths=widths)
    sae = jax.jit(config.init)(jax.random.key(0), sample)
    shaken = jax.tree.map(lambda w: w + jnp.asarray(0.1 * rng.standard_normal(w.shape), jnp.float32), sae)
    return shaken.constrained().folded(sample.scale)


def forms() -> dict[str, AbstractSae]:
    return {name: trained(name) for name in base.variants()} | {
        name: trained(variant, **settings) for name, (variant, settings) in OTHER_FORMS.items()
    }


def test_every_variant_comes_back_to_the_bit(tmp_path: Path) -> None:
    rows = np.random.default_rng(1).standard_normal((5, D)).astype(np.float32)
    for name, sae in forms().items():
        sae_jax.save(sae, tmp_path / name)
        d = sae_jax.load(tmp_path / name)
        assert d.sae.config == sae.config, name
        assert jax.tree.structure(d.sae) == jax.tree.structure(sae), name
        for ours, theirs in zip(jax.tree.leaves(d.sae), jax.tree.leaves(sae), strict=True):
            assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes(), name
        np.testing.assert_array_equal(d(rows), sae(rows), err_msg=name)
        if sae.config.UNIT_DECODER:
            np.testing.assert_allclose(np.linalg.norm(d.w_dec, axis=1), 1, rtol=1e-5, err_msg=name)
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == [artifact.RECORD, artifact.ARRAYS]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    sae_jax.save(trained("topk"), tmp_path / "d")
    return tmp_path / "d"


def edited(path: Path, **changes) -> None:
    content = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            del content[key]
        else:
            content[key] = value
    unsealed = {key: value for key, value in content.items() if key not in (digests.SEAL, "arrays")}
    path.write_text(json.dumps({**digests.sealed(unsealed), "arrays": content["arrays"]}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "schema 2, and this program reads 1; update sae_jax"),
        ({"schema": 0}, "schema 0, and this program reads 1; write it again"),
        ({"kind": "run"}, "not a dictionary record"),
        ({"steps": None}, "missing required field `steps`"),
        ({"mood": 1}, "unknown field mood"),
        ({"steps": "many"}, "Expected `int`, got `str`"),
        ({"data": {"content": "x"}}, "field data.path is missing"),
        ({"variant": "nothing"}, "sae.variant='nothing' does not exist"),
        ({"sae": {"variant": "topk", "kk": 3}}, "unknown key 'kk'; did you mean k?"),
        (
            {"sae": {"variant": "topk", "n_latents": 17, "k": 4}},
            r"is F32\[64.*, the record beside it says F32\[17",
        ),
    ],
    ids=str,
)
def test_a_record_that_is_not_of_this_schema_is_refused(saved: Path, changes: dict, message: str) -> None:
    edited(saved / artifact.RECORD, **changes)
    with pytest.raises(UserError, match=message.replace("?", r"\?")) as caught:
        sae_jax.load(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("n_bytes", [0, 5, 100, -4])
def test_truncated_arrays_are_refused(saved: Path, n_bytes: int) -> None:
    arrays = saved / artifact.ARRAYS
    arrays.write_bytes(arrays.read_bytes()[:n_bytes])
    with pytest.raises(UserError, match=r"dictionary\.safetensors: cannot be read .*restore the file") as caught:
        sae_jax.load(saved)
    assert "\n" not in str(caught.value)


def test_what_is_there_is_not_overwritten(saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(UsageError, match="exists and is not empty"):
        sae_jax.save(trained("topk"), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["d"]


def test_decoder_rows_of_another_norm_are_refused(tmp_path: Path) -> None:
    sae = trained("topk")
    with pytest.raises(UsageError, match="norms up to 1 away from 1"):
        sae_jax.save(sae.replace(w_dec=2 * sae.w_dec), tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_a_record_of_another_dictionary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the record is of a topk with other settings"):
        sae_jax.save(trained("relu"), tmp_path / "d", record=artifact.record_of(trained("topk")))


def test_a_dictionary_of_before_a_setting_came_is_written_again(tmp_path: Path) -> None:
    """A run that lacks a setting of today has its default."""
    sae = trained("topk")
    record = artifact.record_of(sae)
    older = dataclasses.replace(record, sae={name: value for name, value in record.sae.items() if name != "multi_topk"})
    sae_jax.save(sae, tmp_path / "d", record=older)
    assert sae_jax.load(tmp_path / "d").sae.config == sae.config


def test_a_dictionary_reads_well_and_hands_out_its_arrays() -> None:
    sae = trained("topk")
    d = Dictionary(sae, artifact.record_of(sae))
    assert repr(d).splitlines() == ["Dictionary: topk, 64 latents, k=4", "  encodes      x (d=8)"]
    assert d.w_dec is sae.w_dec
    assert "array(" not in repr(sae)
    code = d.encode(np.ones((3, D), np.float32))
    np.testing.assert_allclose(code.to_dense(64) @ d.w_dec + d.b_dec[None], d.decode(code), rtol=1e-5, atol=1e-6)
    with pytest.raises(AttributeError):
        d.w_gate  # noqa: B018


def test_a_code_of_a_wider_dictionary_is_refused() -> None:
    """Else the last row would be taken for the latents that are not there."""
    sae = trained("topk")
    d = Dictionary(sae, artifact.record_of(sae))
    code = d.encode(np.ones((3, D), np.float32))
    for latent in (64, -1):
        with pytest.raises(UserError, match=f"latent {latent} is outside 0 to 63"):
            d.decode(code.replace(indices=code.indices.at[1, 2].set(latent)))
    np.testing.assert_array_equal(jax.jit(d.decode)(code), d.decode(code))
    beyond = jax.jit(d.decode)(code.replace(indices=code.indices.at[1, 2].set(64)))
    assert np.isnan(beyond[1]).all()  # a traced call cannot refuse
    np.testing.assert_array_equal(beyond[0], d.decode(code)[0])
    with pytest.raises(UserError, match="latents are float32; they must be whole numbers from 0 to 63"):
        d.decode(code.replace(indices=code.indices.astype(np.float32)))
    with pytest.raises(UserError, match=r"latent \d+ is outside 0 to 3; give n_latents of the dictionary"):
        code.to_dense(4)


def test_rows_of_which_a_part_would_be_lost_are_refused() -> None:
    sae, rows = trained("topk"), np.ones((3, D), np.float32)
    for call in (sae.encode, sae):
        with pytest.raises(UsageError, match="x are a masked array"):
            call(np.ma.masked_array(rows, mask=rows > 0))
        with pytest.raises(UsageError, match="x is complex64; give real numbers"):
            call(rows.astype(np.complex64))


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a run, config\.json is missing"):
        sae_jax.load(tmp_path / "nowhere")


def test_any_flipped_bit_of_a_dictionary_is_refused_by_name(saved: Path) -> None:
    rng = np.random.default_rng(0)
    for name in (artifact.ARRAYS, artifact.RECORD):
        kept = (saved / name).read_bytes()
        for bit in rng.integers(8 * len(kept), size=60):
            changed = bytearray(kept)
            changed[bit // 8] ^= 1 << bit % 8
            (saved / name).write_bytes(changed)
            with pytest.raises((UserError, UsageError), match=r"d/dictionary\.(json|safetensors)"):
                sae_jax.load(saved)
        (saved / name).write_bytes(kept)
    sae_jax.load(saved)
