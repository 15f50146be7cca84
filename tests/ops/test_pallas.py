"""GPU kernels, interpreted where there is no GPU: exact selection with its tie rule, and sums as numpy has them."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.ops import encode, pallas_encode, pallas_sparse, sparse, tuning
from tests.oracles import topk as oracle

INTERPRET = jax.default_backend() != "gpu"

# Rows, width, latents, k, product dtype: one pass, then two; both with a last tile, a last row block and a depth that
# are not whole.
ONE_PASS = (5, 24, 1100, 3, jnp.float32)
TWO_PASSES = (18, 40, 8000, 2, jnp.bfloat16)
KINDS = ["distinct", "ties", "zeros", "negative", "excluded", "all excluded", "duplicates", "spread"]


@partial(jax.jit, static_argnums=3)
def block_topk(x_bD, w_FD, b_F, k):
    return pallas_encode.block_topk(x_bD, w_FD, b_F, k, interpret=INTERPRET)


def problem(kind: str, n_rows: int, depth: int, n_latents: int):
    """Small whole numbers, whose products are exact in every dtype and order."""
    rng = np.random.default_rng(0)
    x = rng.integers(-2, 3, (n_rows, depth)).astype(np.float32)
    w = rng.integers(-1, 2, (n_latents, depth)).astype(np.float32)
    b = np.zeros(n_latents, np.float32)
    match kind:
        case "distinct":
            x, w = (rng.integers(-99, 100, m.shape).astype(np.float32) for m in (x, w))
        case "zeros":  # of both signs
            x[:], b = 0, rng.choice(np.float32([0.0, -0.0]), n_latents)
            w = -np.abs(w)
        case "negative":
            b -= 1000
        case "excluded":
            b[rng.random(n_latents) < 0.9] = -np.inf
        case "all excluded":
            b[1:] = -np.inf
        case "duplicates":
            w[n_latents // 2 :] = w[: n_latents - n_latents // 2]
        case "spread":  # every winner in one group, where the second pass must still find k groups
            b[-k_of(n_latents) :] = 10_000
    return x, w, b


def k_of(n_latents: int) -> int:
    return next(k for _, _, n, k, _ in (ONE_PASS, TWO_PASSES) if n == n_latents)


@pytest.mark.parametrize("sizes", [ONE_PASS, TWO_PASSES], ids=["one pass", "two passes"])
@pytest.mark.parametrize("kind", KINDS)
def test_selection_is_the_oracle(sizes, kind):
    n_rows, depth, n_latents, k, dtype = sizes
    x, w, b = problem(kind, n_rows, depth, n_latents)
    values, indices = block_topk(jnp.asarray(x, dtype), jnp.asarray(w, dtype), jnp.asarray(b), k)
    pre = x @ w.T + b
    expected = oracle.select(pre, k)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(pre, expected, 1))
    assert not np.signbit(np.asarray(values)[np.asarray(values) == 0]).any()


def test_not_a_number_is_chosen_first_so_that_the_loss_shows_it():
    n_rows, depth, n_latents, k, dtype = ONE_PASS
    x, w, b = problem("ties", n_rows, depth, n_latents)
    b[700] = -np.float32(np.nan)
    values, indices = block_topk(jnp.asarray(x, dtype), jnp.asarray(w, dtype), jnp.asarray(b), k)
    assert np.isnan(values[:, 0]).all()
    assert (np.asarray(indices)[:, 0] == 700).all()


@pytest.mark.parametrize(
    ("n_latents", "k", "dtypes", "reason"),
    [
        (64, 3, ("float32", "float32"), "32 latents for each of k=3"),
        (2**19 + 1, 4, ("float32", "float32"), "n_latents up to 524288, not 524289"),
        (2**19, 513, ("float32", "float32"), "k up to 512, not 513"),
        (1024, 2, ("float32", "bfloat16"), "two bf16 or two f32 inputs, not float32 and bfloat16"),
        (1024, 2, ("float16", "float16"), "two bf16 or two f32 inputs, not float16"),
    ],
)
def test_what_a_kernel_cannot_serve_is_left_to_xla(n_latents, k, dtypes, reason):
    x = jax.ShapeDtypeStruct((4, 8), dtypes[0])
    w = jax.ShapeDtypeStruct((n_latents, 8), dtypes[1])
    b = jax.ShapeDtypeStruct((n_latents,), "float32")
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(partial(pallas_encode.block_topk, k=k), x, w, b)


@pytest.mark.parametrize(("depth", "dtype"), [(300, jnp.float32), (16, jnp.bfloat16)])
def test_sums_and_products_of_chosen_rows(depth, dtype):
    """A row may choose a latent twice; many latents are chosen by none, one by every row.

    Most slots of one row are empty, and all of another; an empty slot names any latent, one outside too.
    """
    rng = np.random.default_rng(1)
    index = rng.integers(0, 20, (7, 11)).astype(np.int32)
    weight = rng.standard_normal(index.shape).astype(np.float32)
    index[:, 0], index[2] = 4, 9
    weight[3, 1:], weight[5] = 0, 0
    index[3, 3], index[5, 5] = -7, 99
    table, rows, before = (np.asarray(jnp.asarray(rng.standard_normal((n, depth)), dtype)) for n in (40, 7, 40))
    table64, rows64 = table.astype(np.float64), rows.astype(np.float64)
    chosen = table64[np.where(weight == 0, 0, index)]
    same = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)

    code = jnp.asarray(index), jnp.asarray(weight)
    same(pallas_sparse.gather_rows(*code, table, interpret=INTERPRET), (weight[:, :, None] * chosen).sum(1))
    products = (chosen * rows64[:, None, :]).sum(-1)
    same(pallas_sparse.sampled_products(*code, rows, table, interpret=INTERPRET), np.where(weight == 0, 0, products))
    before = before.astype(np.float32)
    added = before.astype(np.float64)
    row, slot = np.nonzero(weight)
    np.add.at(added, index[row, slot], weight[row, slot, None] * rows64[row])
    scattered = pallas_sparse.scatter_rows(jnp.asarray(before), *code, rows, interpret=INTERPRET)
    same(scattered, added)
    untouched = np.setdiff1d(np.arange(40), index[row, slot])
    np.testing.assert_array_equal(np.asarray(scattered)[untouched], before[untouched])


def test_the_ops_use_kernels_where_they_are_told_to(monkeypatch):
    """And the compiler's way for what no kernel serves: here, too many wanted."""
    calls = []

    def interpreted(module, name):
        kernel = getattr(module, name)

        def call(*args):
            result = kernel(*args, interpret=INTERPRET)
            calls.append(name)
            return result

        monkeypatch.setattr(module, name, call)

    interpreted(pallas_encode, "block_topk")
    for name in ("gather_rows", "scatter_rows", "sampled_products"):
        interpreted(pallas_sparse, name)
    x, w, b = (jnp.asarray(m) for m in problem("ties", *ONE_PASS[:3]))
    ways = tuning.TABLE["cpu"], replace(tuning.TABLE["cpu"], kernels=True, block_rows=8)
    results = []
    for way in ways:
        with tuning.using(way):
            values, indices = encode.largest(x, w, b, 3, jnp.float32)
            sums = sparse.gather_rows(indices, values, w)
            products = sparse.sampled_products(indices, values, x[:, None], w)
            added = sparse.scatter_rows(jnp.ones_like(w), indices, values, x[:, None])
            many = encode.largest(x, w, b, 40, jnp.float32)
        results.append((values, indices, sums, products, added, many))
    assert calls == ["block_topk", "gather_rows", "sampled_products", "scatter_rows"]
    jax.tree.map(np.testing.assert_array_equal, *results)
