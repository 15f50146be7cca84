"""BatchTopK and Matryoshka against their float64 oracle; the threshold; what a row on its own gets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import mesh as meshes
from sae_jax.ops import encode
from sae_jax.saes import base, batch_topk, init, matryoshka, normalise
from sae_jax.training.settings import TrainConfig, hyperparameters
from sae_jax.training.state import initial
from sae_jax.training.step import Step
from sae_jax.types import UsageError
from tests.oracles import batch_topk as oracle
from tests.saes.contexts import context_of, with_silent
from tests.saes.oracle_checks import learnt

B, D, F, K, K_AUX, WINDOW = 16, 8, 64, 3, 6, 100
NAMES = ("w_enc", "b_enc", "w_dec", "b_dec")
KINDS = {"batch_topk": {}, "matryoshka": {}, "random": {"random_prefixes": 4}}


def make(kind: str = "batch_topk", **settings):
    """Away from its initialisation; rows of very different norms, so that some need the wider search."""
    rng = np.random.default_rng(0)
    module = batch_topk if kind == "batch_topk" else matryoshka
    config = module.Config(**{"n_latents": F, "k": K, "k_aux": K_AUX, "dtype": "float32", **KINDS[kind], **settings})
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in ((F, D), (F,), (F, D), (D,))]
    w_enc, b_enc, w_dec, b_dec = map(jnp.asarray, arrays)
    struct = batch_topk.BatchTopK if kind == "batch_topk" else matryoshka.Matryoshka
    return struct(w_enc, 0.3 * b_enc, init.unit_rows(w_dec), b_dec, jnp.float32(0.5), config)


def rows(seed: int = 5, spread: float = 9) -> np.ndarray:
    """Most are small, three large."""
    scale_B = np.where(np.arange(B) < B - 3, np.linspace(0.1, 1, B), spread)
    return np.float32(np.random.default_rng(seed).standard_normal((B, D)) * scale_B[:, None])


def statistics(kind: str = "batch_topk") -> base.Context:
    rng = np.random.default_rng(1)
    silent = np.zeros(F, np.int32)
    silent[rng.permutation(F)[:10]] = WINDOW + 1
    ones = normalise.Scale(jnp.ones(D), jnp.ones(D))
    own = {"mean_square": jnp.asarray(rng.permutation(F).astype(np.float32))} if kind == "random" else {}
    return context_of(jnp.asarray(silent), jnp.int32(WINDOW), jnp.float32(0.7), ones, own)


def value_and_gradient(sae, x, stats, step=0):
    def objective(sae):
        return sae.objective(base.Batch(x, x), stats.replace(step=jnp.int32(step), key=jax.random.key(3)))

    return jax.jit(learnt(objective))(sae)


def prefixes(kind: str, stats: base.Context) -> np.ndarray | None:
    """bool[G, F]: which latents each prefix holds."""
    if kind == "batch_topk":
        return None
    if kind == "matryoshka":
        return np.arange(F) < np.array([2, 6, 14, 30, 64])[:, None]
    drawn = np.sort(np.asarray(jax.random.uniform(jax.random.key(3), (3,)), np.float64))
    sizes = [*np.ceil(F**drawn), F]
    rank_F = np.argsort(np.argsort(-np.asarray(stats.counters.extra["mean_square"])))
    return rank_F < np.array(sizes)[:, None]


def expected(kind, sae, x, stats) -> oracle.Result:
    weights = [np.asarray(getattr(sae, name), np.float64) for name in NAMES]
    silent, masks = np.asarray(stats.counters.silent), prefixes(kind, stats)
    return oracle.objective(np.float64(x), *weights, K, 0.7, silent, WINDOW, 1 / 32, K_AUX, masks)


def on_mesh(shape, sae, x, stats):
    mesh = meshes.make_mesh(meshes.MeshConfig(*shape))
    with jax.set_mesh(mesh):
        place = lambda a, role: jax.device_put(a, meshes.sharding(mesh, role))  # noqa: E731
        by_latent = {name: place(getattr(sae, name), meshes.DICT) for name in NAMES[:3]}
        replicated = {name: place(getattr(sae, name), meshes.REPLICATED) for name in ("b_dec", "threshold")}
        own = {name: place(array, meshes.DICT) for name, array in stats.counters.extra.items()}
        stats = with_silent(stats, place(stats.counters.silent, meshes.DICT), own)
        split = sae.replace(**by_latent, **replicated)
        result = value_and_gradient(split, place(x, meshes.ROWS), stats)
        assert jax.typeof(result[1].w_enc) == jax.typeof(split.w_enc)
        return result


@pytest.mark.parametrize(
    ("kind", "shape", "some"),
    [
        *(("batch_topk", shape, some) for shape in (None, (2, 4)) for some in (1, B)),
        ("matryoshka", (2, 4), 1),
        ("random", None, 1),
        *(pytest.param("batch_topk", shape, 1, marks=pytest.mark.long) for shape in ((1, 8), (8, 1))),
        *(pytest.param("random", shape, B, marks=pytest.mark.long) for shape in ((2, 4), (8, 1))),
        *(pytest.param("matryoshka", shape, B, marks=pytest.mark.long) for shape in (None, (1, 8))),
    ],
    ids=str,
)
def test_objective_and_gradients_are_the_oracle_on_every_mesh(kind, shape, some, monkeypatch):
    """Rows with too short a list are searched again by themselves; where at most one in B is, all are."""
    monkeypatch.setattr(encode, "SOME", some)
    sae, x, stats = make(kind), rows(), statistics(kind)
    want = expected(kind, sae, x, stats)
    (loss, outcome), gradients = value_and_gradient(sae, x, stats) if shape is None else on_mesh(shape, sae, x, stats)
    if shape is None:
        assert int(outcome.metrics["widened"]) > 1, "the case should reach the wider search of all rows or some"
    assert int(outcome.metrics["saturated"]) == 0
    np.testing.assert_allclose(loss, want.loss, rtol=1e-5)
    np.testing.assert_allclose(outcome.y_hat, want.x_hat_BD, rtol=1e-4, atol=1e-4)
    assert float(outcome.l0) == K
    np.testing.assert_array_equal(outcome.counters.silent, want.silent_F)
    np.testing.assert_allclose(outcome.assigned["threshold"], want.least, rtol=1e-5)
    for name, gradient in want.gradients.items():
        np.testing.assert_allclose(getattr(gradients, name), gradient, rtol=1e-4, atol=1e-4, err_msg=name)
    assert float(gradients.threshold) == 0
    if kind == "random":
        mean_square = 0.99 * np.asarray(stats.counters.extra["mean_square"]) + 0.01 * (want.z_BF**2).mean(0)
        np.testing.assert_allclose(outcome.counters.extra["mean_square"], mean_square, rtol=1e-5)


@pytest.mark.parametrize("kind", ["batch_topk", "matryoshka"])
def test_the_oracle_gradients_are_finite_differences(kind):
    sae, x = make(), rows(spread=1)
    weights = {name: np.asarray(getattr(sae, name), np.float64) for name in NAMES}

    def result(weights):
        silent, masks = np.zeros(F), prefixes(kind, statistics())
        return oracle.objective(np.float64(x), *weights.values(), K, 0.7, silent, WINDOW, 0.0, K_AUX, masks)

    gradients, rng = result(weights).gradients, np.random.default_rng(2)
    for name, value in weights.items():
        step = 1e-6 * rng.standard_normal(value.shape)
        if name == "w_dec":  # the oracle's gradient has no component along the rows: neither may the step
            step -= (step * value).sum(1, keepdims=True) * value
        up, down = (result({**weights, name: value + sign * step}).loss for sign in (1, -1))
        np.testing.assert_allclose((up - down) / 2, (gradients[name] * step).sum(), rtol=1e-4, err_msg=name)


def test_the_threshold_is_a_running_mean():
    selection = batch_topk.BatchSelection(jnp.float32(0), jnp.int32(0), jnp.int32(0))
    config = batch_topk.Config(n_latents=F, k=K, threshold_decay=0.75)
    outcome, threshold, seen = base.Outcome(jnp.zeros(()), jnp.zeros(()), statistics().counters, {}), jnp.float32(0), []
    for step, least in enumerate([5.0, 7.0, 1.0, 2.0, 6.0, 11.0]):
        selection = selection.replace(threshold=jnp.float32(least))
        after = batch_topk.with_threshold(outcome, threshold, selection, jnp.int32(step), config)
        threshold = after.assigned["threshold"]
        seen.append(float(threshold))
    # Means of 1, 2, 3, 4 batches; from there a quarter of each new one.
    np.testing.assert_allclose(seen, [5, 6, 13 / 3, 3.75, 4.3125, 5.984375], rtol=1e-6)


@pytest.mark.parametrize("kind", ["batch_topk", "matryoshka"])
def test_a_row_on_its_own_gets_what_exceeds_the_threshold(kind):
    sae, x = make(kind), rows()
    w_enc, b_enc, w_dec, b_dec = (np.asarray(getattr(sae, name), np.float64) for name in NAMES)
    pre = (x - b_dec) @ w_enc.T + b_enc
    z = np.where(pre > 0.5, pre, 0)
    code = sae.encode(x)
    dense = np.zeros((B, F))
    np.add.at(dense, (np.arange(B)[:, None], code.indices), code.values)
    np.testing.assert_allclose(dense, z, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(sae(x), z @ w_dec + b_dec, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(sae(x), sae.decode(code), rtol=1e-4, atol=1e-3)
    alone = sae.encode(x[3:4])
    np.testing.assert_allclose(np.sort(alone.values[0])[::-1][:4], np.sort(z[3])[::-1][:4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("module", "setting"),
    [
        (batch_topk, {"threshold_decay": 1.0}),
        (batch_topk, {"k": 0}),
        (matryoshka, {"prefixes": (0.5, 0.75)}),
        (matryoshka, {"prefixes": (0.5, 0.5, 1.0)}),
        (matryoshka, {"prefixes": (0.001, 1.0)}),
        (matryoshka, {"prefixes": (1.0,)}),
        (matryoshka, {"random_prefixes": 1}),
    ],
    ids=str,
)
def test_bad_settings_are_refused(module, setting):
    with pytest.raises(UsageError, match=f"sae.{next(iter(setting))}"):
        module.Config(**{"n_latents": F, "k": K, **setting})


@pytest.mark.long
def test_after_training_rows_on_their_own_have_k_latents_on_average():
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((40, D))
    z = rng.random((4096, 40)) * (rng.random((4096, 40)) < 0.06)
    planted, n = np.float32(z @ directions + 0.5), 128
    config = batch_topk.Config(n_latents=F, k=K, dtype="float32")
    train = TrainConfig(steps=300, batch_size=n, lr=3e-3, dead_after_tokens=4000)
    with jax.numpy_dtype_promotion("standard"):  # optax
        state = jax.jit(lambda s: initial(config, train, s))(init.sample_statistics(planted, "none"))
        step, hparams = Step(config, train), hyperparameters(train, config)
        for t in range(train.steps):
            x = planted[np.random.default_rng(t).permutation(len(planted))[:n]]
            state, metrics = step(state, hparams, base.Batch(x, x))
            assert float(metrics["l0"]) == pytest.approx(K, abs=1e-6)
    assert (np.asarray(state.sae.encode(planted).values) > 0).sum(1).mean() == pytest.approx(K, rel=0.05)
