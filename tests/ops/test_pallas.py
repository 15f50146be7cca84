"""GPU kernels in interpret mode: exact selection with its tie rule, and sums that a numpy loop agrees with."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.ops import pallas_encode, pallas_sparse
from tests.oracles import topk as oracle

# Rows, width, latents, k, product dtype: one pass, then two; both with a last tile, a last row block and a depth that
# are not whole.
ONE_PASS = (5, 24, 1100, 3, jnp.float32)
TWO_PASSES = (18, 40, 8000, 2, jnp.bfloat16)
KINDS = ["distinct", "ties", "zeros", "negative", "excluded", "all excluded", "duplicates", "spread"]


@partial(jax.jit, static_argnums=3)
def block_topk(x_bD, w_FD, b_F, k):
    return pallas_encode.block_topk(x_bD, w_FD, b_F, k, interpret=True)


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
    """A row may choose a latent twice; many latents are chosen by none; one by every row."""
    rng = np.random.default_rng(1)
    index = rng.integers(0, 20, (7, 3)).astype(np.int32)
    index[:, 0] = 4
    index[2] = 9
    weight = rng.standard_normal((7, 3)).astype(np.float32)
    weight[3, 1] = 0
    table, rows = (np.asarray(jnp.asarray(rng.standard_normal((n, depth)), dtype), np.float64) for n in (40, 7))
    chosen, same = table[index], partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    index_BK, weight_BK = jnp.asarray(index), jnp.asarray(weight)
    table_FD, rows_BD = jnp.asarray(table, dtype), jnp.asarray(rows, dtype)

    same(pallas_sparse.gather_rows(index_BK, weight_BK, table_FD, interpret=True), (weight[:, :, None] * chosen).sum(1))
    same(
        pallas_sparse.sampled_products(index_BK, rows_BD, table_FD, interpret=True), (chosen * rows[:, None, :]).sum(-1)
    )
    expected = np.zeros((40, depth))
    np.add.at(expected, index, weight[:, :, None] * rows[:, None, :])
    same(pallas_sparse.scatter_rows(index_BK, weight_BK, rows_BD, 40, interpret=True), expected)


def test_pairs_of_a_compacted_list():
    """Rows without a pair, a row with many, and padding: weight 0, after the last row."""
    rng = np.random.default_rng(2)
    row = np.int32([0] * 11 + [2, 2, 5, 6, 6] + [9] * 3)
    n_rows, n_padding = 8, 3
    index = rng.integers(0, 30, row.size).astype(np.int32)
    weight = rng.standard_normal(row.size).astype(np.float32)
    weight[-n_padding:] = 0
    table, rows = (rng.standard_normal((n, 20)).astype(np.float32) for n in (30, 10))
    same = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    pairs = (jnp.asarray(row), jnp.asarray(index))

    gathered, scattered = np.zeros((10, 20)), np.zeros((30, 20))
    np.add.at(gathered, row, weight[:, None] * table[index])
    np.add.at(scattered, index, weight[:, None] * rows[row])
    table_FD, rows_BD, weight_P = jnp.asarray(table), jnp.asarray(rows), jnp.asarray(weight)
    same(pallas_sparse.gather_pairs(*pairs, weight_P, table_FD, n_rows, interpret=True), gathered[:n_rows])
    same(pallas_sparse.scatter_pairs(*pairs, weight_P, rows_BD, 30, interpret=True), scattered)
    same(pallas_sparse.products_pairs(*pairs, rows_BD, table_FD, interpret=True), (rows[row] * table[index]).sum(-1))
