"""TopK with AuxK against its float64 oracle, and what its initialisation promises."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import mesh as meshes
from sae_jax.saes import base, init, losses, normalise, topk
from sae_jax.types import Code, UsageError
from tests.meshes import MESHES
from tests.oracles import topk as oracle
from tests.saes.contexts import context_of, with_silent
from tests.saes.oracle_checks import learnt

B, D, F, K, K_AUX, WINDOW = 16, 8, 48, 4, 6, 100


def make(seed: int = 0, **settings) -> topk.TopK:
    """A TopK away from its initialisation, so that a missed bias or norm would show."""
    rng = np.random.default_rng(seed)
    config = topk.Config(n_latents=F, k=K, k_aux=K_AUX, dtype="float32", **settings)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in ((F, D), (F,), (F, D), (D,))]
    w_enc, b_enc, w_dec, b_dec = map(jnp.asarray, arrays)
    return topk.TopK(w_enc, 0.3 * b_enc, init.unit_rows(w_dec), b_dec, config)


def statistics(n_dead: int) -> base.Context:
    silent = np.zeros(F, np.int32)
    silent[np.random.default_rng(1).permutation(F)[:n_dead]] = WINDOW + 1
    return context_of(
        jnp.asarray(silent), jnp.int32(WINDOW), jnp.float32(0.7), normalise.Scale(jnp.ones(D), jnp.ones(D))
    )


def rows(seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((B, D)).astype(np.float32)


def value_and_gradient(sae, x, stats):
    def objective(sae):
        return sae.objective(base.Batch(x, x), stats)

    return jax.jit(learnt(objective))(sae)


def expected(sae, x, stats) -> oracle.Result:
    weights = [np.asarray(w, np.float64) for w in (sae.w_enc, sae.b_enc, sae.w_dec, sae.b_dec)]
    silent = np.asarray(stats.counters.silent)
    return oracle.objective(
        np.float64(x),
        *weights,
        K,
        float(stats.constants.loss_scale),
        silent,
        WINDOW,
        sae.config.aux_coefficient,
        K_AUX,
        sae.config.multi_topk,
    )


@pytest.mark.parametrize(
    ("n_dead", "multi_topk"), [(0, 0.0), (3, 0.0), (K_AUX, 0.0), (30, 0.0), (F, 0.0), (0, 0.125), (30, 0.125)]
)
def test_objective_and_gradients_are_the_oracle(n_dead, multi_topk):
    sae, stats, x = make(multi_topk=multi_topk), statistics(n_dead), rows()
    (loss, outcome), gradients = value_and_gradient(sae, x, stats)
    want = expected(sae, x, stats)
    np.testing.assert_allclose(loss, want.loss, rtol=1e-5)
    np.testing.assert_allclose(outcome.metrics["aux_loss"], want.aux_loss, rtol=1e-5)
    np.testing.assert_allclose(outcome.y_hat, want.x_hat_BD, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(outcome.counters.silent, want.silent_F)
    for name, gradient in want.gradients.items():
        np.testing.assert_allclose(getattr(gradients, name), gradient, rtol=1e-4, atol=1e-6, err_msg=name)


def test_with_all_rows_the_objective_is_the_oracle_for_any_batch():
    """Of 512 rows a sample would be 128."""
    x = np.random.default_rng(5).standard_normal((512, D)).astype(np.float32)
    for aux_rows, is_oracle in (("all", True), ("sampled", False)):
        sae, stats = make(aux_rows=aux_rows), statistics(F)
        _, gradients = value_and_gradient(sae, x, stats)
        want = expected(sae, x, stats).gradients["w_enc"]
        assert np.allclose(gradients.w_enc, want, rtol=1e-3, atol=1e-6) == is_oracle


def test_the_oracle_gradients_are_finite_differences():
    sae, x = make(aux_coefficient=0.0), rows()
    weights = {name: np.asarray(getattr(sae, name), np.float64) for name in ("w_enc", "b_enc", "w_dec", "b_dec")}

    def loss(weights):
        return oracle.objective(np.float64(x), *weights.values(), K, 0.7, np.zeros(F), WINDOW, 0.0, K_AUX)

    gradients = loss(weights).gradients
    rng = np.random.default_rng(2)
    for name, value in weights.items():
        step = 1e-6 * rng.standard_normal(value.shape)
        if name == "w_dec":  # the oracle's gradient has no component along the rows: neither may the step
            step -= (step * value).sum(1, keepdims=True) * value
        up, down = (loss({**weights, name: value + sign * step}).loss for sign in (1, -1))
        np.testing.assert_allclose((up - down) / 2, (gradients[name] * step).sum(), rtol=1e-4, err_msg=name)


def test_dead_latents_learn_from_the_error():
    """The bug most trainers had: AuxK must reach the encoder rows of dead latents, not only their decoder."""
    sae = make()
    # Latents whose bias keeps them from ever winning, and who are long dead.
    buried = jnp.arange(F) % 5 == 0
    sae = sae.replace(b_enc=jnp.where(buried, -50.0, sae.b_enc))
    stats = with_silent(statistics(0), jnp.where(buried, WINDOW + 1, 0))
    raised = sae.replace(b_enc=jnp.where(buried, 0.0, sae.b_enc))  # so that ReLU lets them through
    _, gradients = value_and_gradient(raised, rows(), stats)
    moved = np.abs(np.asarray(gradients.w_enc)).sum(1) > 0
    assert moved[np.asarray(buried)].mean() > 0.5


def test_a_perfect_reconstruction_has_no_auxiliary_loss_and_no_nan():
    assert losses.auxiliary_weight(jnp.zeros((B, D)), 1 / 32) == 0


def test_counters_count_tokens_and_saturate():
    context = statistics(0)
    never = jnp.zeros(F, bool)
    for n_batches in range(1, 20):
        context = context.replace(counters=context.count(never, B))
        assert int(context.counters.silent[0]) == min(n_batches * B, WINDOW + 1)
        assert bool(context.dead[0]) == (n_batches * B > WINDOW)
    assert int(context.count(~never, B).silent[0]) == 0


@pytest.mark.parametrize("d_model", [8, 32])
def test_initialisation(d_model):
    sample = np.random.default_rng(0).standard_normal((500, d_model)) * 3 + 7
    config = topk.Config(n_latents=256, k=8, dtype="float32")
    sae = jax.jit(config.init)(jax.random.key(0), init.sample_statistics(sample, "none"))
    np.testing.assert_allclose(jnp.linalg.norm(sae.w_dec, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(init.unit_rows(sae.w_enc), sae.w_dec, atol=1e-5)  # transposed
    np.testing.assert_allclose(sae.b_dec, init.geometric_median(sample), rtol=1e-5)
    unit = np.random.default_rng(1).standard_normal((4096, d_model))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    b_dec = np.asarray(sae.b_dec)
    response = np.linalg.norm(np.asarray(sae(unit + b_dec)) - b_dec, axis=1).mean()
    np.testing.assert_allclose(response, 1, rtol=0.05)


def test_geometric_median_minimises_the_summed_distance():
    rng = np.random.default_rng(0)
    points = rng.standard_normal((200, 3)) * [1, 5, 0.1]
    points[:20] += 100  # outliers drag the mean, not the median
    median = init.geometric_median(points)
    best = np.linalg.norm(points - median, axis=1).sum()
    for offset in 1e-2 * rng.standard_normal((50, 3)):
        assert np.linalg.norm(points - median - offset, axis=1).sum() >= best
    assert init.geometric_median(np.ones((5, 3))) == pytest.approx(np.ones(3))  # every row at the guess


@pytest.mark.parametrize("kind", ["layer_norm", "unit_norm", "vector_sqrt_d"])
def test_input_norms_follow_their_formulas_and_are_undone(kind):
    x = rows() * 4 + 2
    got, mean, scale = (np.asarray(a) for a in normalise.normalise(jnp.asarray(x), kind))
    centred = x if kind == "vector_sqrt_d" else x - x.mean(1, keepdims=True)
    size = {
        "layer_norm": centred.std(1, ddof=1, keepdims=True) + 1e-5,
        "unit_norm": np.linalg.norm(centred, axis=1, keepdims=True),
        "vector_sqrt_d": np.linalg.norm(x, axis=1, keepdims=True) / D**0.5,
    }[kind]
    np.testing.assert_allclose(got, centred / size, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got * scale + mean, x, rtol=1e-5, atol=1e-5)
    sae = make(input_norm=kind)
    code = sae.encode(x)
    np.testing.assert_allclose(sae(x), np.asarray(sae.decode(code)) * scale + mean, rtol=1e-4, atol=1e-4)


def test_public_calls_take_any_shape_and_any_array_library():
    sae, x = make(), rows()
    code = sae.encode(x.reshape(2, 8, D))
    assert code.indices.shape == code.values.shape == (2, 8, K)
    assert (np.diff(code.values, axis=-1) <= 0).all()
    np.testing.assert_allclose(sae.decode(code), sae(x.reshape(2, 8, D)), rtol=1e-6)
    np.testing.assert_array_equal(sae.encode(jnp.asarray(x[0])).indices, code.indices[0, 0])

    class Foreign:  # what a torch tensor offers
        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **kwargs):
            return self.array.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    np.testing.assert_array_equal(sae.encode(Foreign(x)).indices, sae.encode(x).indices)
    assert isinstance(sae.encode(x), Code)
    nothing = sae.encode(x[:0])
    assert nothing.values.shape == (0, K)
    assert sae.decode(nothing).shape == sae(x[:0]).shape == (0, D)
    with pytest.raises(UsageError, match="d_model=8"):
        sae.encode(x[:, :5])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 100}, r"sae.k=100 .* sae.n_latents=48"),
        ({"k": 0}, "sae.k=0"),
        ({"n_latents": 0}, "sae.n_latents=0"),
        ({"aux_coefficient": -1.0}, "sae.aux_coefficient=-1"),
        ({"multi_topk": float("inf")}, "sae.multi_topk=inf"),
        ({"k_start": 3, "k_steps": 5}, "sae.k_start=3 must be above sae.k=4"),
        ({"k_start": 8}, "sae.k_steps=0: give both"),
        ({"k_start": 8, "k_steps": 5, "multi_topk": 0.1}, "sae.k_start=8 does not go with"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        topk.Config(**{"n_latents": F, "k": K, **settings})


def test_bfloat16_products_keep_float32_everywhere_else():
    sae, x = make(), rows()
    rounded = sae.replace(config=topk.Config(n_latents=F, k=K, k_aux=K_AUX, dtype="bfloat16"))
    (_, outcome), gradients = value_and_gradient(rounded, x, statistics(5))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradients))
    (_, exact), _ = value_and_gradient(sae, x, statistics(5))
    assert abs(float(losses.batch_fvu(x, outcome.y_hat) - losses.batch_fvu(x, exact.y_hat))) < 0.02


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_one_step_gradients_agree_on_every_mesh(shape):
    sae, x, stats = make(multi_topk=0.125), rows(), statistics(10)
    (loss, _), want = value_and_gradient(sae, x, stats)
    mesh = meshes.make_mesh(meshes.MeshConfig(*shape))
    with jax.set_mesh(mesh):
        roles = topk.TopK(meshes.DICT, meshes.DICT, meshes.DICT, meshes.REPLICATED, sae.config)
        place = lambda a, role: jax.device_put(a, meshes.sharding(mesh, role))  # noqa: E731
        split = jax.tree.map(place, sae, roles)
        stats = with_silent(stats, place(stats.counters.silent, meshes.DICT))
        (got_loss, _), got = value_and_gradient(split, place(x, meshes.ROWS), stats)
        assert jax.typeof(got.w_enc) == jax.typeof(split.w_enc)
    np.testing.assert_allclose(got_loss, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize("shape", [None, (2, 4)], ids=str)
def test_k_falls_on_its_schedule_in_one_program(shape):
    """From 20 at step 0 to K = 4 at step 8: at each step what a TopK of that k would do."""
    x, stats, sae = rows(), statistics(10), make(k_start=20, k_steps=8)
    mesh = None if shape is None else meshes.make_mesh(meshes.MeshConfig(*shape))
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        place = lambda a, role: a if mesh is None else jax.device_put(a, meshes.sharding(mesh, role))  # noqa: E731
        roles = topk.TopK(meshes.DICT, meshes.DICT, meshes.DICT, meshes.REPLICATED, sae.config)
        split, split_stats = (
            jax.tree.map(place, sae, roles),
            with_silent(stats, place(stats.counters.silent, meshes.DICT)),
        )
        batch = base.Batch(*(place(x, meshes.ROWS),) * 2)

        @jax.jit
        def both(sae, t):
            return learnt(lambda sae: sae.objective(batch, split_stats.replace(step=t, key=jax.random.key(0))))(sae)

        for step, k in ((0, 20), (1, 18), (7, 6), (8, 4), (1000, 4)):
            (loss, outcome), gradients = both(split, jnp.int32(step))
            weights = [np.asarray(w, np.float64) for w in (sae.w_enc, sae.b_enc, sae.w_dec, sae.b_dec)]
            silent = np.asarray(stats.counters.silent)
            want = oracle.objective(np.float64(x), *weights, k, 0.7, silent, WINDOW, 1 / 32, K_AUX)
            assert int(outcome.metrics["k"]) == k
            np.testing.assert_allclose(outcome.l0, (want.z_BF > 0).sum(1).mean(), rtol=1e-6)
            np.testing.assert_allclose(loss, want.loss, rtol=1e-5)
            for name, gradient in want.gradients.items():
                np.testing.assert_allclose(getattr(gradients, name), gradient, rtol=1e-4, atol=1e-5, err_msg=name)
    assert both._cache_size() == 1


@pytest.mark.parametrize("per_latent", [False, True])
def test_thresholds_in_place_of_the_selection(per_latent):
    """k active latents a row on average; with a threshold each, every latent is active as often as it was."""
    sae = make()
    x = np.random.default_rng(6).standard_normal((400, D)).astype(np.float32)
    jump, code = sae.to_jumprelu(x, per_latent), sae.encode(x)
    got = jump.encode(x)
    active = np.asarray(got.values) > 0
    assert active.sum(1).mean() == pytest.approx(K, abs=1 / 400)
    assert (np.bincount(active.sum(1)) > 0).sum() > 1  # no longer the same in every row
    if per_latent:
        times = [np.bincount(np.asarray(c.indices)[np.asarray(c.values) > 0], minlength=F) for c in (got, code)]
        np.testing.assert_array_equal(*times)
    else:
        assert float(np.ptp(jump.log_threshold)) == 0
