"""What latents do to the next token, against runs that are edited by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import lm
from sae_jax.evaluation import baselines, effects
from sae_jax.saes import topk
from sae_jax.types import UsageError, UserError
from tests.evaluation import in_model
from tests.lm.tiny import jit_run

HOOK = lm.Hook(1, "resid_post")
TEXT = "def area(width, height):\n    return width"


@pytest.fixture(scope="module")
def case():
    return in_model.case(HOOK, topk.Config(n_latents=64, k=4, dtype="float32", input_norm="layer_norm"))


@jax.jit
def log_probs(model, ids, edit_BTX):
    edits = lm.intervene.edits({HOOK: lm.intervene.add(edit_BTX)})
    return jax.nn.log_softmax(lm.run(model, ids, edits=edits).logits)


def parts(sae, x):
    """(latents, what each slot adds to the reconstruction, what is not reconstructed), by hand."""
    code, scale = sae.encode(x), (x.std(-1, ddof=1) + 1e-5)[..., None]
    added = np.asarray(code.values)[..., None] * scale[..., None] * np.asarray(sae.w_dec)[np.asarray(code.indices)]
    return np.asarray(code.indices), added, x - np.asarray(sae(x))


def activations(model, ids):
    return np.asarray(jit_run(model, jnp.asarray(ids), capture=(HOOK,)).acts[HOOK])


def test_attributions_are_slopes_and_ablations_are_runs_without_the_latent(case):
    subject = case.subject
    ids = subject.ids(TEXT)
    said, other = effects.attribute(subject, ids, [7, 300], n=3)
    assert (said.token, other.token) == (7, 300)
    latents, added, left = parts(subject.sae, activations(subject.model, ids[None])[0])
    added[0], left[0] = 0, 0  # the token that begins the text has no code

    def log_p(edit):
        return float(log_probs(subject.model, ids[None], jnp.asarray(edit[None], jnp.float32))[0, -1, 300])

    def slope(edit):
        return (log_p(0.02 * edit) - log_p(-0.02 * edit)) / 0.04

    assert other.log_prob == pytest.approx(log_p(0 * left), abs=1e-4)
    for share in other.latents:
        of_latent = (added * (latents == share.latent)[..., None]).sum(1)
        assert share.attribution == pytest.approx(slope(of_latent), rel=0.02, abs=2e-3)
        assert share.ablated == pytest.approx(log_p(0 * left) - log_p(-of_latent), rel=1e-3, abs=1e-4)
        assert latents[share.position].tolist().count(share.latent) == 1
    sizes = [-abs(share.attribution) for share in other.latents]
    assert sizes == sorted(sizes)
    assert other.error == pytest.approx(slope(left), rel=0.02, abs=2e-3)
    everything = sum(share.attribution for share in other.latents) + other.others
    assert everything == pytest.approx(slope(added.sum(1)), rel=0.02, abs=2e-3)


def test_the_likeliest_token_is_attributed_if_none_is_named(case):
    ids = case.subject.ids(TEXT)
    (found,) = effects.attribute(case.subject, ids)
    logits = jit_run(case.subject.model, jnp.asarray(ids[None]), capture=(HOOK,)).logits
    assert found.token == int(logits[0, -1].argmax())
    dense = dataclasses.replace(case.subject, sae=baselines.identity(case.text.rows()))
    (of_basis,) = effects.attribute(dense, ids, n=5)
    assert len(of_basis.latents) == 5
    assert of_basis.error == pytest.approx(0, abs=1e-3), "a basis reconstructs everything"


def test_the_effect_of_a_latent_is_the_mean_over_tokens_where_it_is_active(case):
    value = 30.0
    model, sae, ids = case.subject.model, case.subject.sae, case.text.sequences
    x = activations(model, ids)
    latents, added, _ = parts(sae, x)
    latent = int(np.bincount(latents.reshape(-1)).argmax())
    found = effects.on_tokens(case, latent, value, max_tokens=6)
    scale = (x.std(-1, ddof=1) + 1e-5)[..., None]
    changes = []
    for s, t in np.argwhere((latents == latent).any(-1))[:6]:
        edit = np.zeros_like(x[s])
        of_latent = added[s, t][latents[s, t] == latent].sum(0)
        edit[t] = value * scale[s, t] * np.asarray(sae.w_dec[latent]) - of_latent
        both = [log_probs(model, ids[s][None], jnp.asarray(e[None]))[0, t] for e in (edit, 0 * edit)]
        changes.append(both[0] - both[1])
    assert found.n_tokens == 6
    np.testing.assert_allclose(found.change, np.mean(changes, axis=0), atol=2e-4)
    want = lm.logit_effect(model, HOOK, sae.w_dec[latent][None])[0]
    np.testing.assert_allclose(found.direct, want, rtol=1e-4, atol=1e-5)


def test_partial_ablation_takes_no_more_than_it_needs(case):
    eye = jnp.eye(3)
    config = topk.Config(n_latents=3, k=1, dtype="float32", input_norm="none")
    sae = topk.TopK(eye, jnp.array([0.0, 0.0, -0.5]), eye, jnp.zeros(3), config)
    x = np.array([[3.0, 2.0, 0.0], [3.0, -1.0, 0.0], [3.0, -1.0, 1.5]], np.float32)
    np.testing.assert_allclose(effects.until_inactive(sae, x, 0), [1, 3, 2], rtol=1e-5)
    skewed = dataclasses.replace(sae, w_enc=jnp.array([[0.5, 0.5, 0], [0, 1, 0], [0, 0, 1]]), b_enc=jnp.zeros(3))
    np.testing.assert_allclose(effects.until_inactive(skewed, x[1:2], 0), [2], rtol=1e-5)
    turned = dataclasses.replace(sae, w_dec=-eye)
    np.testing.assert_allclose(effects.until_inactive(turned, x[1:2], 0), [3], err_msg="nothing makes it inactive")
    identity = baselines.identity(case.text.rows())
    basis = dataclasses.replace(case, subject=dataclasses.replace(case.subject, sae=identity))
    whole, part = (effects.on_tokens(basis, 5, value, max_tokens=4) for value in (0.0, None))
    np.testing.assert_allclose(part.change, whole.change, atol=1e-4)
    gain, lose = whole.most(3)
    assert whole.change[gain[0]] == whole.change.max()
    assert whole.change[lose[0]] == whole.change.min()


def test_what_has_no_effect_to_measure_is_refused(case):
    with pytest.raises(UsageError, match="latent 64 does not exist; choose 0 to 63"):
        effects.on_tokens(case, 64)
    with pytest.raises(UserError, match="token id 99999"):
        effects.attribute(case.subject, case.subject.ids(TEXT), [99999])
    silent = dataclasses.replace(case.subject, sae=dataclasses.replace(case.subject.sae, b_enc=jnp.full(64, -1e6)))
    with pytest.raises(UserError, match="latent 3 is active nowhere in 2 sequences of text; use more"):
        effects.on_tokens(dataclasses.replace(case, subject=silent), 3, n_sequences=2)
    (found,) = effects.attribute(silent, case.subject.ids(TEXT))
    assert not found.latents
