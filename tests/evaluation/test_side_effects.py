"""What steering costs on any text, against runs that are edited by hand."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import lm
from sae_jax.evaluation import baselines, steering
from sae_jax.evaluation.studies.side_effects import Study
from sae_jax.saes import topk
from tests.evaluation import in_model
from tests.lm.tiny import jit_run

HOOK = lm.Hook(2, "resid_post")
SMALL = Study(scales=(0.0, 4.0), n_latents=3, n_sequences=4, n_steered=3)


def measured(case):
    return {metric.name: metric.value for metric in SMALL.metrics(case)}


@jax.jit
def steered(model, ids, is_text, sae, latents, values):
    args = {"sae": sae, "latents": latents, "values": values.astype(np.float32), "keep": jnp.ones((1, 24), bool)}
    edit = partial(steering._clamped, args={**args, "rows": [sae.w_dec[latents]]}, at=0)
    return lm.run(model, ids, edits=lm.intervene.edits({HOOK: edit}, is_text)).logits


def test_costs_are_those_of_a_model_steered_by_hand():
    case = in_model.case(HOOK, topk.Config(n_latents=64, k=4, dtype="float32", input_norm="layer_norm"))
    ids, sae = case.text.sequences[:3].copy(), case.subject.sae
    case.text.text[1, 5:9] = False  # as of special tokens: they are not steered, and no predictions from and of them
    found = measured(case)
    assert set(found) == set(Study.METRICS)
    is_text = case.text.text
    clean = jit_run(case.subject.model, jnp.asarray(case.text.sequences), capture=(HOOK,))
    code = sae.encode(np.asarray(clean.acts[HOOK])[is_text])
    indices, values = np.asarray(code.indices), np.asarray(code.values)
    for told in found["steering_by_latent"]:
        of_latent = values[indices == told["latent"]]
        assert told["density"] == pytest.approx((of_latent > 0).sum() / is_text.sum())
        assert told["largest"] == pytest.approx(of_latent.max(), rel=1e-5)
    counted = is_text[:3, :-1] & is_text[:3, 1:]
    for scale in ("0", "4"):
        value = float(scale) * told["largest"]
        logits = steered(case.subject.model, ids, is_text[:3], sae, np.array([told["latent"]]), np.array([value]))
        lost = np.asarray(lm.cross_entropy(logits, ids) - lm.cross_entropy(clean.logits[:3], ids))[counted].mean()
        assert told["ce"][scale] == pytest.approx(lost, rel=1e-3, abs=1e-5)
        kl = np.asarray(lm.kl_divergence(clean.logits[:3], logits))[:, :-1][counted].mean()
        assert told["kl"][scale] == pytest.approx(kl, rel=1e-3, abs=1e-5)
        for quantity in ("ce", "kl"):
            each = [told[quantity][scale] for told in found["steering_by_latent"]]
            assert found[f"steering_{quantity}"][scale] == pytest.approx(np.mean(each))
    assert found["steering_kl_random"]["4"] > found["steering_kl_random"]["0"] > 0


def test_latents_are_drawn_over_the_range_of_densities():
    case = in_model.case(HOOK)
    densities = [told["density"] for told in measured(case)["steering_by_latent"]]
    assert densities == sorted(densities)
    assert densities[0] < densities[-1]
    assert measured(case) == measured(case)


def test_bases_and_silent_dictionaries_are_taken():
    case = in_model.case(HOOK)
    basis = dataclasses.replace(case.subject, sae=baselines.pca(case.text.rows()))
    assert len(measured(dataclasses.replace(case, subject=basis))["steering_by_latent"]) == 3
    silent = dataclasses.replace(case.subject, sae=dataclasses.replace(case.subject.sae, b_enc=jnp.full(64, -1e6)))
    assert measured(dataclasses.replace(case, subject=silent)) == {}
