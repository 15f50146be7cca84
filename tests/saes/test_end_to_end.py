"""The end-to-end autoencoder against its float64 oracle and a numpy model, and what it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import lm
from sae_jax import mesh as meshes
from sae_jax.saes import base, end_to_end, init, losses, normalise
from sae_jax.types import UsageError
from tests.meshes import MESHES
from tests.oracles import end_to_end as oracle
from tests.oracles import gpt2
from tests.saes import in_model
from tests.saes.contexts import context_of
from tests.saes.in_model import SPEC

D, F = SPEC.d_model, 48
NAMES = ("w_enc", "b_enc", "w_dec", "b_dec")
SETTINGS = [
    {"l1_coefficient": 2.0},
    {"l1_coefficient": 2.0, "downstream": 0.3},
    {"k": 5, "downstream": 0.3},
    {"objective": "local", "l1_coefficient": 2.0},
]


def make(**settings) -> end_to_end.EndToEnd:
    """Away from the initialisation, so that a missed bias or norm would show."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape) for shape in ((F, D), (F,), (F, D), (D,))]
    w_enc, b_enc, w_dec, b_dec = (jnp.asarray(0.4 * array, jnp.float32) for array in arrays)
    config = end_to_end.Config(**{"n_latents": F, "sparsity_warmup": 0.0, "dtype": "float32", **settings})
    return end_to_end.EndToEnd(w_enc, b_enc, w_dec, b_dec, config)


def value_and_gradient(sae, batch, silent=None):
    return _value_and_gradient(sae, batch, jnp.zeros(F, jnp.int32) if silent is None else silent)


@jax.jit
def _value_and_gradient(sae, batch, silent):
    def objective(sae):
        scale, coefficients = normalise.Scale(jnp.ones(D), jnp.ones(D)), sae.config.coefficients
        context = context_of(silent, jnp.int32(100), jnp.float32(0.7), scale, {}, coefficients)
        return sae.replace(config=sae.config.program).objective(batch, context)

    return jax.value_and_grad(objective, has_aux=True)(sae)


def expected(sae, batch, weights=None) -> oracle.Result:
    weights = weights or {name: np.asarray(getattr(sae, name), np.float64) for name in NAMES}
    site, config = batch.model, sae.config
    ids, params = np.asarray(site.ids), jax.tree.map(np.asarray, site.model.params)
    (hook,) = site.hooks
    hooks = lm.later_hooks(site.model, hook)

    def model(rows_BD):
        edits = {hook: lambda _: rows_BD.reshape(site.acts[hook].shape)}
        logits, acts = gpt2.forward(params, ids, SPEC.n_heads, edits=edits)
        return logits.reshape(-1, SPEC.n_vocab), [acts[hook].reshape(-1, D) for hook in hooks]

    keep = np.asarray(site.keep).ravel()
    local = config.objective == "local"
    x = np.asarray(batch.x, np.float64)
    return oracle.objective(x, keep, **weights, model=model, **_terms(config), local=local)


def _terms(config):
    return {"k": config.k, "coefficient": config.l1_coefficient, "beta": config.downstream}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_objective_is_the_oracle_and_gradients_its_finite_differences(settings):
    sae, batch = make(**settings), in_model.random_batch()
    (loss, outcome), gradients = value_and_gradient(sae, batch)
    want, keep = expected(sae, batch), np.asarray(batch.model.keep).ravel()
    np.testing.assert_allclose(loss, want.loss, rtol=1e-5)
    np.testing.assert_allclose(outcome.y_hat[keep], want.x_hat_BD[keep], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outcome.l0, (want.z_BF[keep] > 0).sum(1).mean(), rtol=1e-6)
    np.testing.assert_array_equal(outcome.counters.silent == 0, (want.z_BF[keep] > 1e-3).any(0))
    x = np.asarray(batch.x)[keep]
    fvu = ((want.x_hat_BD[keep] - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    np.testing.assert_allclose(losses.batch_fvu(outcome.y, outcome.y_hat), fvu, rtol=1e-4)
    weights = {name: np.asarray(getattr(sae, name), np.float64) for name in NAMES}
    rng = np.random.default_rng(2)
    for name, value in weights.items():
        step = 1e-6 * rng.standard_normal(value.shape)
        up, down = (expected(sae, batch, {**weights, name: value + sign * step}).loss for sign in (1, -1))
        np.testing.assert_allclose((np.asarray(getattr(gradients, name)) * step).sum(), (up - down) / 2, rtol=1e-3)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_every_mesh_agrees(shape):
    """Of ReLU; with k the contract sees to it."""
    sae, batch = make(**SETTINGS[1]), in_model.random_batch()
    (loss, outcome), want = value_and_gradient(sae, batch)
    mesh = meshes.make_mesh(meshes.MeshConfig(*shape))
    with jax.set_mesh(mesh):
        place = lambda a, role: jax.device_put(a, meshes.sharding(mesh, role))  # noqa: E731
        roles = end_to_end.EndToEnd(meshes.DICT, meshes.DICT, meshes.DICT, meshes.REPLICATED, sae.config)
        split = jax.tree.map(place, sae, roles)
        model = place(batch.model.model, meshes.REPLICATED)
        batch = jax.tree.map(lambda a: place(a, meshes.ROWS), batch.replace(model=batch.model.replace(model=None)))
        batch = batch.replace(model=batch.model.replace(model=model))
        (got_loss, got_outcome), got = value_and_gradient(split, batch, place(jnp.zeros(F, jnp.int32), meshes.DICT))
        assert jax.tree.map(jax.typeof, got) == jax.tree.map(jax.typeof, split)
    np.testing.assert_allclose(got_loss, loss, rtol=1e-5)
    np.testing.assert_allclose(got_outcome.l0, outcome.l0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), got, want)


def test_one_sequence_makes_a_batch():
    """An axis of size 1, of which JAX by itself forgets how it lies on a mesh."""
    rows_BD = jax.random.normal(jax.random.key(0), (in_model.CONTEXT, D))
    sae = make(**SETTINGS[2])
    roles = end_to_end.EndToEnd(meshes.DICT, meshes.DICT, meshes.DICT, meshes.REPLICATED, sae.config)
    mesh = meshes.make_mesh(meshes.MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        place = lambda a, role: jax.device_put(a, meshes.sharding(mesh, role))  # noqa: E731
        batch = jax.jit(in_model.in_model)(in_model.MODEL, place(rows_BD, meshes.ROWS))
        sae = jax.tree.map(place, sae, roles)
        (loss, _), _ = value_and_gradient(sae, batch, place(jnp.zeros(F, jnp.int32), meshes.DICT))
    assert jnp.isfinite(loss)


@pytest.mark.parametrize("hook", [in_model.HOOK, lm.Hook(0, "attn_z"), lm.Hook(1, "resid_post")], ids=str)
def test_rows_put_back_cost_nothing(hook):
    """The identity has an end-to-end loss of 0, and no later layer notices it."""
    site = in_model.random_batch(hook=hook).model
    logits, later = jax.jit(lambda site: site.with_rows(site.rows))(site)
    np.testing.assert_allclose(lm.kl_divergence(site.logits, logits), 0, atol=1e-6)
    assert len(later) == SPEC.n_layers - hook.layer - (hook.point == "resid_post")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), later, site.later)
    logits, _ = jax.jit(lambda site: site.with_rows(site.rows**2))(site)
    assert lm.kl_divergence(site.logits, logits).sum() > 1e-3


@pytest.mark.parametrize("settings", SETTINGS[1:3], ids=str)
def test_positions_left_out_count_nowhere(settings):
    """What a dictionary would make of them has no part in anything, however large they are."""
    sae, batch = make(**settings), in_model.random_batch()
    left_out = ~np.asarray(batch.model.keep).ravel()
    assert 0 < left_out.sum() < len(left_out)
    huge = jnp.where(left_out[:, None], 1e4, batch.x)
    want, got = (value_and_gradient(sae, batch.replace(x=rows, y=rows)) for rows in (batch.x, huge))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize(("k", "n_latents"), [(0, 64), (4, 64), (0, 8)])
def test_initialisation(k, n_latents):
    rows = np.random.default_rng(0).standard_normal((500, D)) + 3
    config = end_to_end.Config(n_latents=n_latents, k=k, target_l0=8.0, dtype="float32")
    sae = jax.jit(config.init)(jax.random.key(0), init.sample_statistics(rows, "none"))
    w = np.asarray(sae.w_dec if n_latents >= D else sae.w_dec.T)
    np.testing.assert_allclose(w.T @ w, np.eye(min(D, n_latents)), atol=1e-4)
    np.testing.assert_allclose(init.unit_rows(sae.w_enc), init.unit_rows(sae.w_dec), atol=1e-5)  # transposed
    unit = np.random.default_rng(1).standard_normal((4096, D))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    b_dec = np.asarray(sae.b_dec)
    response = np.linalg.norm(np.asarray(sae(unit + b_dec)) - b_dec, axis=1).mean()
    np.testing.assert_allclose(response, 1, rtol=0.05)


@pytest.mark.parametrize("k", [0, 5])
def test_scaled_rows_reach_the_model_in_its_units_and_fold(k):
    sae, batch = make(k=k, l1_coefficient=1.5, input_norm="dataset_rms"), in_model.random_batch(left_out=0)
    scale = normalise.Scale(jnp.full(D, 0.25), jnp.full(D, 0.25))
    context = context_of(jnp.zeros(F, jnp.int32), jnp.int32(9), jnp.float32(1), scale, {}, sae.config.coefficients)
    x, y, _ = normalise.normalise_pair(batch.x, None, "dataset_rms", scale)
    rows = base.Batch(x, y, batch.model)
    _, outcome = jax.jit(lambda: sae.objective(rows, context))()
    folded = sae.folded(scale)
    raw = folded(batch.x)
    np.testing.assert_allclose(raw, outcome.y_hat / 0.25, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(folded.decode(folded.encode(batch.x)), raw, rtol=1e-4, atol=1e-4)
    logits, _ = jax.jit(lambda site, raw: site.with_rows(raw))(batch.model, raw)
    kl = lm.kl_divergence(batch.model.logits, logits).mean()
    np.testing.assert_allclose(outcome.metrics["kl"], kl, rtol=1e-3)
    np.testing.assert_allclose(jnp.linalg.norm(folded.w_dec, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 100}, r"sae.k=100 .* sae.n_latents=48"),
        ({"k": -1}, "sae.k=-1"),
        ({"l1_coefficient": -1.0}, "sae.l1_coefficient=-1"),
        ({"downstream": float("inf")}, "sae.downstream=inf"),
        ({"input_norm": "layer_norm"}, "sae.input_norm=layer_norm"),
        ({"objective": "local", "downstream": 1.0}, "sae.downstream=1.0 needs"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        end_to_end.Config(**{"n_latents": F, **settings})
