"""Patching by features in a model built so that known latents carry its task."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import lm
from sae_jax.evaluation import patching
from sae_jax.lm.params import abstract
from sae_jax.saes import relu
from sae_jax.types import UsageError
from tests.lm import tiny
from tests.oracles import gpt2

SPEC = lm.Spec(family="gpt2", n_layers=2, d_model=16, n_heads=1, d_head=16, d_mlp=4, n_vocab=15, n_context=8)
HOOK = lm.Hook(0, "resid_post")
BEGIN, MARY, JOHN, STORE, PARK, SAID = range(6)  # tokens, and the latents that stand for them
TOKENS = np.linalg.qr(np.eye(16) - 1 / 16)[0][:, :15].T.astype(np.float32)  # centred: norms only scale them


@pytest.fixture(scope="module")
def model():
    """Attends to all tokens alike, and says the name among them. Its first layer does nothing, nor does any MLP."""
    params = jax.tree.map(lambda array: jnp.zeros(array.shape), abstract(SPEC))
    layers = params["layers"]
    params["embed"] = jnp.asarray(TOKENS)
    for norm in (params["norm.w"], layers["norm1.w"], layers["norm2.w"]):
        assert not norm.any()
    params["norm.w"], layers["norm1.w"], layers["norm2.w"] = (
        jnp.ones_like(w) for w in (params["norm.w"], layers["norm1.w"], layers["norm2.w"])
    )
    names = TOKENS[[MARY, JOHN]]
    layers["v.w"] = layers["v.w"].at[1].set(names.T @ names)
    layers["o.w"] = layers["o.w"].at[1].set(3 * jnp.eye(16))
    return lm.LanguageModel(params, SPEC, reference="built")


@pytest.fixture(scope="module")
def sae():
    """A latent for each token."""
    config = relu.Config(n_latents=15, dtype="float32", input_norm="none")
    return relu.Relu(jnp.asarray(TOKENS), jnp.full(15, -1e-3), jnp.asarray(TOKENS), jnp.zeros(16), config)


@pytest.fixture(scope="module")
def pair(model):
    prompt, other = ([BEGIN, name, place, SAID] for name, place in ((MARY, STORE), (JOHN, PARK)))
    return patching.pair(model, HOOK, HOOK, np.array(prompt), np.array(other))


def test_the_planted_latents_are_found_and_patching_them_is_all_it_takes(model, sae, pair):
    assert lm.run(model, pair.site.ids).logits[0, -1].argmax() == MARY, "the model does its task"
    features = patching.of_latents(sae, pair)
    assert features.ids.tolist() == [MARY, JOHN, STORE, PARK]
    for order in (patching.by_attribution(pair, features), patching.pruned(pair, features)):
        assert set(order[:2]) == {0, 1}
        curve = patching.curve(pair, features, order)
        assert curve.kl[0] > 0.3
        assert curve.kl[0] > curve.kl[1] > 0.01
        np.testing.assert_allclose(curve.kl[2:], 0, atol=1e-5)
        np.testing.assert_allclose(curve.norm, 0.999 * np.sqrt(np.arange(5)), rtol=1e-3)


def test_of_many_features_the_first_by_attribution_are_pruned_and_followed(sae, pair):
    features = patching.of_latents(sae, pair)
    by_attribution = patching.by_attribution(pair, features)
    order = patching.pruned(pair, features, most=3)
    assert set(order[:2]) == {0, 1}
    assert set(order[:3]) == set(by_attribution[:3])
    assert order[3] == by_attribution[3]
    assert patching.pruned(pair, features, most=9).tolist() == patching.pruned(pair, features).tolist()
    whole = patching.curve(pair, features, order)
    for part, all_of_it in zip(patching.curve(pair, features, order, longest=2), whole, strict=True):
        assert part.tolist() == all_of_it[:3].tolist()
    assert patching.all_patched(pair, features) == pytest.approx(whole.kl[-1], abs=1e-6)


def test_directions_that_mix_the_planted_ones_take_more_patches(pair):
    mixed = np.linalg.qr(np.random.default_rng(0).standard_normal((15, 15)))[0] @ TOKENS
    features = patching.of_directions(mixed, pair)
    curve = patching.curve(pair, features, patching.pruned(pair, features))
    assert (curve.kl[:4] > 1e-3).all()
    assert curve.kl[-1] == pytest.approx(0, abs=1e-5), "a whole basis patches everything"
    assert curve.norm[-1] == pytest.approx(2, rel=1e-5)


def test_pruned_together_each_is_as_if_alone(model, sae, pair):
    other = patching.pair(model, HOOK, HOOK, *(np.array([BEGIN, n, p, SAID]) for n, p in ((JOHN, PARK), (MARY, PARK))))
    parts = [(each, patching.of_latents(sae, each)) for each in (pair, other)]
    parts.append((other, patching.of_directions(np.eye(16), other)))
    for part, order in zip(parts, patching.pruned_together(parts), strict=True):
        assert order.tolist() == patching.pruned(*part).tolist()
    longer = patching.pair(model, HOOK, HOOK, *2 * [np.arange(5)])
    with pytest.raises(UsageError, match="pairs of 4 and 5 tokens are not pruned together; fill them up"):
        patching.pruned_together([parts[0], (longer, patching.of_latents(sae, longer))])


@pytest.mark.long
def test_slopes_pruning_and_curves_are_those_of_a_loop_in_float64():
    rng, built, hook, at = np.random.default_rng(0), tiny.random_model(tiny.SPEC), lm.Hook(1, "attn_z"), 5
    prompt, other = (rng.integers(0, tiny.SPEC.n_vocab, 8) for _ in range(2))
    pair = patching.pair(built, hook, hook, prompt, other, at)
    directions = np.linalg.qr(rng.standard_normal((16, 16)))[0][:6]
    features = patching.of_directions(directions, pair)
    params, change = jax.tree.map(np.asarray, built.params), np.asarray(features.change, np.float64)
    assert not change[at + 1 :].any()

    def predictions(ids, edit=0.0):
        edits = {hook: lambda x: x + np.reshape(edit + np.zeros((8, 16)), x.shape)}
        logits = gpt2.forward(params, ids[None], tiny.SPEC.n_heads, edits=edits)[0][0, at]
        return logits - np.log(np.exp(logits).sum())

    target = predictions(other)

    def edit(patched):
        return change[:, patched] @ directions[patched]

    def kl(edit):
        return (np.exp(target) * (target - predictions(prompt, edit))).sum()

    slopes = [(kl(1e-5 * edit([j])) - kl(-1e-5 * edit([j]))) / 2e-5 for j in range(6)]
    np.testing.assert_allclose(patching._slopes(pair, features), slopes, rtol=1e-3, atol=1e-5)
    kept, given_up = list(range(6)), []
    for threshold in patching.THRESHOLDS:
        for j in np.argsort(slopes)[::-1]:
            if j in kept:
                fewer = [i for i in kept if i != j]
                if kl(edit(fewer)) - kl(edit(kept)) < threshold * kl(0.0):
                    kept, given_up = fewer, [j, *given_up]
    order = [*sorted(kept, key=lambda j: slopes[j]), *given_up]
    assert patching.pruned(pair, features).tolist() == order
    curve = patching.curve(pair, features, np.array(order))
    np.testing.assert_allclose(curve.kl, [kl(edit(order[:n])) for n in range(7)], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(curve.norm, [np.linalg.norm(edit(order[:n])) for n in range(7)], rtol=1e-4, atol=1e-6)


def test_what_fills_up_prompts_and_codes_does_not_count(model, sae, pair):
    prompt, other = (np.array([BEGIN, name, place, SAID, 7, 8]) for name, place in ((MARY, STORE), (JOHN, PARK)))
    other[4] = 9
    filled = patching.pair(model, HOOK, HOOK, prompt, other, at=3)
    features, expected = patching.of_latents(sae, filled), patching.of_latents(sae, pair)
    assert features.ids.tolist() == expected.ids.tolist()
    order = patching.pruned(pair, expected)
    for got, want in zip(patching.curve(filled, features, order), patching.curve(pair, expected, order), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_curves_of_different_lengths_have_a_mean():
    short, long = (patching.Curve(*2 * [np.arange(n, dtype=float)]) for n in (2, 4))
    np.testing.assert_array_equal(patching.mean([short, long]).kl, [0, 1, 1.5, 2])


def test_prompts_that_do_not_match_are_refused(model):
    with pytest.raises(UsageError, match="have 3 and 2 tokens; patching needs equally many"):
        patching.pair(model, HOOK, HOOK, np.arange(3), np.arange(2))
    with pytest.raises(UsageError, match="at=3 is no position of prompts of 3 tokens; use 0 to 2"):
        patching.pair(model, HOOK, HOOK, np.arange(3), np.arange(3), at=3)
