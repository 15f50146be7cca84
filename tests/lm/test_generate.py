import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.lm import NO_TOKEN, empty_cache, generate, run, stream
from sae_jax.types import UsageError
from tests.lm.tiny import jit_run


def test_a_cache_changes_no_logit(model, ids_BT):
    whole = jit_run(model, ids_BT)
    first = jit_run(model, ids_BT[:, :4], cache=empty_cache(model, ids_BT, ids_BT.shape[1]))
    # A captured layer is traced singly and must find its place in the cache all the same.
    rest = jit_run(model, ids_BT[:, 4:], ((2, "mlp_out"),), cache=first.cache)
    logits = jnp.concatenate([first.logits, rest.logits], axis=1)
    np.testing.assert_allclose(logits, whole.logits, atol=1e-5)


@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_greedy_text_equals_running_everything_again(model, ids_BT, strength):
    hook, n_prompt = (1, "resid_post"), 5
    direction_D = jax.random.normal(jax.random.key(5), (model.spec.d_model,))

    def steer(act_BTD, strength):
        return act_BTD + strength * direction_D[None, None, :]

    again = jax.jit(lambda ids_BT: run(model, ids_BT, edits={hook: lambda v: steer(v, strength)}).logits)
    expected = np.array(ids_BT)
    for t in range(n_prompt, expected.shape[1]):  # what still stands at t and later is invisible before t
        expected[:, t] = again(expected)[:, t - 1].argmax(axis=-1)
    new = {"edits": {hook: steer}, "edit_args": jnp.float32(strength)} if strength else {}
    got = generate(model, ids_BT[:, :n_prompt], expected.shape[1] - n_prompt, jax.random.key(0), **new)
    np.testing.assert_array_equal(got, expected)


def test_another_strength_compiles_nothing(model, ids_BT):
    traces = []

    def steer(act_BTD, strength):
        traces.append(strength)
        return act_BTD * strength

    for strength in (1.0, 2.0, 3.0):
        key = jax.random.key(0)
        generate(model, ids_BT, 2, key, edits={(0, "mlp_out"): steer}, edit_args=jnp.float32(strength))
        if strength == 1.0:
            n_traces = len(traces)
    assert len(traces) == n_traces


def test_samples_follow_the_key_and_the_temperature(model, ids_BT):
    def draw(seed, temperature):
        return np.asarray(generate(model, ids_BT[:, :4], 8, jax.random.key(seed), temperature=temperature))

    np.testing.assert_array_equal(draw(0, 1.0), draw(0, 1.0))
    assert (draw(0, 1.0) != draw(1, 1.0)).any()
    np.testing.assert_array_equal(draw(0, 1e-6), draw(0, 0.0))


def test_generation_runs_on_an_explicit_mesh(model):
    ids_BT = jax.random.randint(jax.random.key(1), (8, 5), 0, model.spec.n_vocab)
    expected = generate(model, ids_BT, 4, jax.random.key(0))
    mesh = jax.make_mesh((2, 4), ("data", "latent"))
    with jax.set_mesh(mesh):
        split = jax.device_put(ids_BT, jax.NamedSharding(mesh, jax.P("data")))
        np.testing.assert_array_equal(generate(model, split, 4, jax.random.key(0)), expected)


@pytest.mark.parametrize(
    ("n_new", "options", "message"),
    [
        (4, {}, "9 prompt tokens and n_new=4.*context of 12.*1 to 3"),
        (0, {}, "n_new=0"),
        (2, {"temperature": -1.0}, "temperature=-1.0"),
        (2, {"temperature": float("nan")}, "temperature=nan"),
        (2, {"edits": {(9, "resid_post"): lambda v, _: v}}, r"resid_post\.9"),
    ],
)
def test_what_cannot_be_generated_is_refused(model, ids_BT, n_new, options, message):
    with pytest.raises(UsageError, match=message):
        generate(model, ids_BT, n_new, jax.random.key(0), **options)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_a_stream_of_filled_up_prompts_is_what_generate_writes(model, ids_BT, block):
    n_prompt, key = 3, jax.random.key(3)
    expected = generate(model, ids_BT[:, :n_prompt], 5, key, temperature=1.0)[:, n_prompt:]
    filled_BT = ids_BT[:, :8].at[:, n_prompt:].set(7)  # others after the prompt, which nothing may see
    options = {"temperature": 1.0, "n_prompt": n_prompt, "n_slots": 12, "block": block}
    blocks = list(stream(model, filled_BT, 5, key, **options))
    assert [new.shape[1] for new in blocks] == {1: [1] * 5, 2: [1, 2, 2], 4: [1, 4]}[block]
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), expected)


def test_logits_that_are_no_numbers_give_no_token(model, ids_BT):
    new = {"edits": {(1, "resid_post"): lambda x, _: x.at[1].set(jnp.nan)}}
    got = np.asarray(generate(model, ids_BT[:3, :4], 3, jax.random.key(0), **new))[:, 4:]
    assert (got[1] == NO_TOKEN).all()
    assert (got[[0, 2]] >= 0).all()
