"""Changes at hooks against a float64 model with the same changes made by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import lm
from sae_jax import mesh as meshes
from sae_jax.lm import Hook, generate, intervene
from sae_jax.types import Code, UsageError, UserError
from tests.lm.tiny import SPEC
from tests.oracles import gpt2

D, F = SPEC.d_model, 24
HOOKS = [Hook(1, "attn_z"), Hook(1, "resid_mid"), Hook(2, "mlp_out")]
RNG = np.random.default_rng(7)
W_ENC, W_DEC, B_DEC = (RNG.normal(size=shape).astype(np.float32) for shape in ((F, D), (F, D), (D,)))


def oracle(model, ids, edits):
    params = jax.tree.map(np.asarray, model.params)
    return gpt2.forward(params, np.asarray(ids), SPEC.n_heads, edits=edits)[0]


@functools.partial(jax.jit, static_argnames="make")
def logits_with(model, ids_BT, make, values, keep_BT=None):
    return lm.run(model, ids_BT, edits=intervene.edits(make(values), keep_BT)).logits


def encode(x_BTD):
    """A ReLU dictionary, with every latent in a slot of its own."""
    z_BTF = jax.nn.relu(x_BTD @ W_ENC.T)
    return Code(jnp.broadcast_to(jnp.arange(F), z_BTF.shape), z_BTF)


def decode(code):
    return (code.values[..., None] * jnp.asarray(W_DEC)[code.indices]).sum(-2) + B_DEC[None, None]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["replace", "add"])
def test_values_are_put_in_or_added_at_the_positions_that_are_kept(model, ids_BT, kind, masked):
    keep = RNG.random(ids_BT.shape) < 0.6 if masked else np.ones(ids_BT.shape, bool)
    values = {hook: RNG.normal(size=(*ids_BT.shape, D)).astype(np.float32) for hook in HOOKS}

    def by_hand(hook, x):
        v = values[hook].reshape(x.shape)
        where = keep.reshape(*keep.shape, *[1] * (x.ndim - 2))
        return np.where(where, v if kind == "replace" else x + v, x)

    expected = oracle(model, ids_BT, {hook: functools.partial(by_hand, hook) for hook in HOOKS})
    got = logits_with(model, ids_BT, make_all, (kind == "add", values), keep if masked else None)
    np.testing.assert_allclose(got, expected, atol=2e-5)


def make_all(arguments):
    is_add, values = arguments
    return {
        hook: lambda x, v=v: jnp.where(is_add, intervene.add(v)(x), intervene.replace(v)(x))
        for hook, v in values.items()
    }


@pytest.mark.parametrize("keep_error", [True, False])
@pytest.mark.parametrize("values", [None, (0.7, 5.0)])
def test_latents_are_clamped_or_ablated_with_and_without_the_error(model, ids_BT, keep_error, values):
    hook, latents = HOOKS[1], np.array([3, 20])

    def by_hand(x):
        z = np.maximum(x @ W_ENC.T.astype(np.float64), 0)
        error = x - (z @ W_DEC + B_DEC)
        z[..., latents] = 0 if values is None else values
        return z @ W_DEC + B_DEC + (error if keep_error else 0)

    def make(values):
        if values is None:
            return {hook: intervene.ablate(encode, decode, jnp.asarray(latents), keep_error)}
        return {hook: intervene.clamp(encode, decode, jnp.asarray(latents), values, keep_error)}

    got = logits_with(model, ids_BT, make, None if values is None else jnp.asarray(values))
    np.testing.assert_allclose(got, oracle(model, ids_BT, {hook: by_hand}), atol=1e-4)


@pytest.mark.parametrize(
    ("latents", "said"),
    [
        ([3, 3], "one is there twice"),
        ([-1], "latent -1 is outside"),
        ([3.7], "latents are float32; they must be whole"),
    ],
)
def test_latents_that_cannot_be_clamped_are_refused(model, ids_BT, latents, said):
    """Two values of one latent would be added, -1 and 3.7 be taken for others."""
    change = intervene.ablate(encode, decode, jnp.asarray(latents))
    with pytest.raises((UserError, UsageError), match=said):
        lm.run(model, ids_BT, edits=intervene.edits({HOOKS[1]: change}))


def test_gradients_reach_what_is_put_in(model, ids_BT):
    hook, direction = HOOKS[1], RNG.normal(size=D)

    def make(value_D):
        return {hook: intervene.add(value_D)}

    def by_hand(value_D):
        return oracle(model, ids_BT, {hook: lambda x: x + value_D})

    weights = RNG.normal(size=by_hand(np.zeros(D)).shape)
    gradient = jax.grad(lambda v: (logits_with(model, ids_BT, make, v) * weights.astype(np.float32)).sum())(jnp.ones(D))
    step = 1e-5 * direction
    slope = ((by_hand(1 + step) - by_hand(1 - step)) * weights).sum() / 2
    assert np.sum(gradient * step) == pytest.approx(slope, rel=1e-3)


def test_rows_of_several_hooks_are_put_in_together(model, ids_BT):
    hooks = (HOOKS[2], HOOKS[0])  # side by side in another order than the model computes them
    keep = RNG.random(ids_BT.shape) < 0.6
    out = jax.jit(lambda model, ids_BT: lm.run(model, ids_BT, capture=hooks))(model, ids_BT)
    site = lm.ReplacedSite(model, ids_BT, jnp.asarray(keep), dict(out.acts), out.logits, (), hooks)
    with_rows = jax.jit(lambda site, rows: site.with_rows(rows)[0])
    np.testing.assert_allclose(with_rows(site, site.rows), out.logits, atol=1e-5)
    rows = RNG.normal(size=site.rows.shape).astype(np.float32)

    def by_hand(first, x):
        part = rows[:, first : first + D].reshape(x.shape)
        return np.where(keep.reshape(*keep.shape, *[1] * (x.ndim - 2)), part, x)

    expected = oracle(model, ids_BT, {hook: functools.partial(by_hand, i * D) for i, hook in enumerate(hooks)})
    np.testing.assert_allclose(with_rows(site, rows), expected, atol=2e-5)


def test_a_mesh_changes_no_number(model):
    ids_BT = jax.random.randint(jax.random.key(1), (8, 9), 0, SPEC.n_vocab)
    keep_BT = jnp.asarray(RNG.random(ids_BT.shape) < 0.6)
    expected = logits_with(model, ids_BT, make_mixed, jnp.ones(D), keep_BT)
    mesh = meshes.make_mesh(meshes.MeshConfig(data=2))
    with jax.set_mesh(mesh):
        split = [jax.device_put(a, meshes.sharding(mesh, meshes.ROWS)) for a in (ids_BT, keep_BT)]
        got = logits_with(lm.place(model, mesh), split[0], make_mixed, jnp.ones(D), split[1])
    np.testing.assert_allclose(got, expected, atol=1e-5)


def make_mixed(value_D):
    return {
        HOOKS[0]: intervene.replace(0.0),
        HOOKS[1]: intervene.clamp(encode, decode, jnp.array([1, 2]), jnp.array([4.0, 0.0])),
        HOOKS[2]: intervene.add(value_D),
    }


def test_text_is_generated_with_a_clamped_latent(model, ids_BT):
    hook, n_prompt = Hook(1, "attn_z"), 5

    def steer(x_BTX, value):
        return intervene.clamp(encode, decode, jnp.array([3]), value[None])(x_BTX)

    again = jax.jit(
        lambda ids, value: lm.run(model, ids, edits=intervene.edits({hook: lambda x: steer(x, value)})).logits
    )
    expected = np.array(ids_BT)
    for t in range(n_prompt, expected.shape[1]):
        expected[:, t] = again(expected, jnp.float32(9.0))[:, t - 1].argmax(axis=-1)
    new = {"edits": {hook: steer}, "edit_args": jnp.float32(9.0)}
    got = generate(model, ids_BT[:, :n_prompt], expected.shape[1] - n_prompt, jax.random.key(0), **new)
    np.testing.assert_array_equal(got, expected)
