import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax import mesh as meshes
from sae_jax.lm import Hook, LanguageModel, cross_entropy, generate, place, points, run
from sae_jax.lm.logits import logit_effect
from sae_jax.types import UsageError, UserError
from tests.hlo import rounded_products
from tests.lm.tiny import SPEC, jit_run, random_model
from tests.oracles import gpt2

EFFECT_ND = jnp.ones((3, SPEC.d_mlp))
EVERYWHERE = [Hook(layer, point) for layer in range(SPEC.n_layers) for point in points(SPEC)]


def oracle(model, ids_BT, edits=None):
    params = jax.tree.map(np.asarray, model.params)
    return gpt2.forward(params, np.asarray(ids_BT), model.spec.n_heads, model.spec.activation, edits=edits)


def test_products_in_float32_are_not_left_to_the_back_end(ids_BT):
    """A GPU or TPU would round their factors to fewer bits by default."""

    def loss(model):
        out = run(model, ids_BT)
        return cross_entropy(out.logits, ids_BT).mean() + logit_effect(model, Hook(0, "mlp_act"), EFFECT_ND).sum()

    model = random_model(SPEC)
    assert not rounded_products(jax.jit(jax.grad(loss, allow_int=True)).lower(model).as_text())


@pytest.mark.parametrize(
    "change",
    [
        {},
        *({"n_layers": 1, "activation": name} for name in ("gelu", "relu", "silu")),
        *({"n_layers": 1, name: False} for name in ("qkv_bias", "out_bias", "mlp_bias")),
    ],
)
def test_logits_and_every_point_agree_with_the_oracle(change, ids_BT):
    model = random_model(dataclasses.replace(SPEC, **change))
    everywhere = tuple(hook for hook in EVERYWHERE if hook.layer < model.spec.n_layers)
    logits, acts = oracle(model, ids_BT)
    out = jit_run(model, ids_BT, everywhere)
    assert set(out.acts) == set(acts)
    for hook in everywhere:
        np.testing.assert_allclose(out.acts[hook], acts[hook], atol=2e-5, err_msg=str(hook))
    np.testing.assert_allclose(out.logits, logits, atol=2e-5)


def test_an_untied_head_is_its_own_matrix(ids_BT):
    model = random_model(dataclasses.replace(SPEC, n_layers=1, tied=False))
    np.testing.assert_allclose(jit_run(model, ids_BT).logits, oracle(model, ids_BT)[0], atol=2e-5)


def test_scanned_layers_equal_single_ones(model, ids_BT):
    scanned = jit_run(model, ids_BT)
    single = jit_run(model, ids_BT, capture=tuple(EVERYWHERE))
    mixed = jit_run(model, ids_BT, capture=((2, "mlp_out"),))
    np.testing.assert_allclose(scanned.logits, single.logits, atol=1e-5)
    np.testing.assert_allclose(scanned.logits, mixed.logits, atol=1e-5)


@pytest.mark.parametrize("options", [(("logits", False),), (("stop_at", 2),)])
def test_early_exit_gives_the_same_activation_and_reads_no_later_layer(model, ids_BT, options):
    hook = Hook(1, "resid_post")
    cut = jax.tree.map(lambda p: p.at[2:].set(jnp.nan), model.params["layers"])
    out = jit_run(model.replace(params={**model.params, "layers": cut}), ids_BT, (hook,), options)
    assert out.logits is None
    np.testing.assert_allclose(out.acts[hook], jit_run(model, ids_BT, (hook,)).acts[hook], atol=1e-5)


def test_logits_of_one_position_are_those_of_all(model, ids_BT):
    every = run(model, ids_BT).logits
    one = run(model, ids_BT, logits_at=jnp.int32(3)).logits
    np.testing.assert_allclose(one, every[:, 3:4], rtol=1e-5, atol=1e-5)


def test_edits_replace_what_follows(model, ids_BT):
    hooks = [Hook(1, point) for point in points(SPEC)]
    # Another factor at each, so that one applied in the place of another shows.
    edits = {hook: functools.partial(operator.mul, 0.5 + 0.1 * i) for i, hook in enumerate(hooks)}
    expected, acts = oracle(model, ids_BT, edits=edits)
    out = jax.jit(lambda model, ids_BT: run(model, ids_BT, edits=edits, capture=hooks))(model, ids_BT)
    np.testing.assert_allclose(out.logits, expected, atol=2e-5)
    for hook in hooks:
        np.testing.assert_allclose(out.acts[hook], acts[hook], atol=2e-5, err_msg=str(hook))


def test_gradient_through_a_replaced_activation_agrees_with_finite_differences(model, ids_BT):
    hook = Hook(1, "resid_post")
    value, direction = np.random.default_rng(2).normal(size=(2, *ids_BT.shape, SPEC.d_model))

    def loss(value):
        return cross_entropy(run(model, ids_BT, edits={hook: lambda _: value}).logits, ids_BT).mean()

    def oracle_loss(value):
        logits, _ = oracle(model, ids_BT, edits={hook: lambda _: value})
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -np.mean(np.take_along_axis(log_p[:, :-1], np.asarray(ids_BT)[:, 1:, None], -1))

    step = 1e-5
    slope = (oracle_loss(value + step * direction) - oracle_loss(value - step * direction)) / (2 * step)
    gradient = jax.jit(jax.grad(loss))(jnp.asarray(value, jnp.float32))
    assert np.sum(gradient * direction) == pytest.approx(slope, abs=1e-5)


def test_half_precision_keeps_its_dtype_and_stays_close(model, ids_BT):
    hook = Hook(3, "resid_post")
    exact = jit_run(model, ids_BT, (hook,))
    half = jit_run(jax.tree.map(lambda p: p.astype(jnp.bfloat16), model), ids_BT, (hook,))
    assert half.acts[hook].dtype == jnp.bfloat16
    assert half.logits.dtype == jnp.float32
    error = jnp.linalg.norm(half.acts[hook].astype(jnp.float32) - exact.acts[hook])
    assert error < 0.03 * jnp.linalg.norm(exact.acts[hook])  # bf16 rounds by 2^-9 a step, some 20 steps deep


@pytest.mark.parametrize("split", [P("data"), P(("latent", "data"))])
def test_an_explicit_mesh_splits_rows_and_changes_no_number(model, split):
    hook = Hook(1, "attn_z")
    ids_BT = jax.random.randint(jax.random.key(1), (8, 9), 0, SPEC.n_vocab)

    def loss(delta, model, ids_BT):
        out = run(model, ids_BT, edits={(2, "resid_post"): lambda v: v + delta}, capture=[hook])
        return cross_entropy(out.logits, ids_BT).mean(), out

    evaluate = jax.jit(jax.value_and_grad(loss, has_aux=True))
    delta_BTD = jnp.full((8, 9, SPEC.d_model), 0.1)
    expected = evaluate(delta_BTD, model, ids_BT)
    mesh = jax.make_mesh((2, 4), ("data", "latent"))
    with jax.set_mesh(mesh):
        got = evaluate(
            *jax.device_put(
                (delta_BTD, model, ids_BT), tuple(NamedSharding(mesh, spec) for spec in (split, P(), split))
            )
        )
    assert got[0][1].acts[hook].sharding.spec == P(*split, *[None] * (4 - len(split)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)


def test_a_model_is_split_over_the_devices_of_a_copy_where_heads_stay_whole(model, ids_BT):
    mesh = meshes.lm_mesh(2, jax.devices()[:4])
    split = place(model, mesh)
    assert split.params["layers"]["q.w"].sharding.spec == P(None, None, "model")
    assert split.params["layers"]["down.w"].sharding.spec == P(None, "model", None)
    assert split.params["embed"].sharding.spec == P(None, None)  # 23 rows
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(jit_run(split, ids_BT).logits, oracle(model, ids_BT)[0], atol=2e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capture": [(4, "resid_post")]}, r"resid_post\.4.*layers 0 to 3"),
        ({"edits": {(0, "resid"): lambda v: v}}, r"resid\.0.*resid_mid"),
        ({"capture": [(2, "mlp_act")], "stop_at": 2}, r"stop_at=2.*mlp_act\.2.*use 3"),
        ({"stop_at": 5}, r"stop_at=5.*0 to 4"),
        ({"edits": {(0, "mlp_out"): lambda v: v[0]}}, r"mlp_out\.0.*float32\[9, 16\].*float32\[3, 9, 16\]"),
        ({"edits": {(0, "mlp_out"): lambda v: v.astype(jnp.bfloat16)}}, r"bfloat16"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(model, ids_BT, options, message):
    with pytest.raises(UsageError, match=message):
        run(model, ids_BT, **options)


def test_a_sequence_longer_than_the_context_is_refused(model):
    with pytest.raises(UsageError, match=r"13 positions.*12"):
        run(model, jnp.zeros((1, 13), jnp.int32))


def test_a_model_is_an_argument_of_jit():
    leaves = jax.tree.leaves(LanguageModel({"embed": jnp.zeros(3)}, SPEC, "name", "digest", "path"))
    assert len(leaves) == 1


@pytest.mark.parametrize("outside", [-1, SPEC.n_vocab])
def test_ids_beyond_the_embedding_are_refused(model, ids_BT, outside):
    """Else the row of another token would be read for them."""
    ids_BT = ids_BT.at[1, 2].set(outside)
    with pytest.raises(UserError, match=f"token id {outside} is outside 0 to 22; the embedding has 23 rows"):
        run(model, ids_BT)
    with pytest.raises(UserError, match=f"token id {outside}"):
        generate(model, ids_BT, 2, jax.random.key(0))
