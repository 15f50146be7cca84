"""Examples against plain loops: the table, the strongest, the samples, the windows, token purity."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_jax.analysis import examples
from sae_jax.types import UserError

N_SEQ, N_POS, N_TOKENS = 5, 6, 4
SEQUENCES = np.random.default_rng(7).integers(0, N_TOKENS, (N_SEQ, N_POS)).astype(np.int32)


@st.composite
def codes(draw, n_latents=7):
    """A dense matrix with few distinct values (so that ties happen), rows out of order and some missing."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dense = rng.choice([0, 0, 0, 0.5, 1, 1.5, 2, 3.25], size=(N_SEQ * N_POS, n_latents)).astype(np.float32)
    dense[:, 2] = 0  # a dead latent
    place = rng.permutation(N_SEQ * N_POS)[: draw(st.integers(1, N_SEQ * N_POS))]
    return dense[place], SEQUENCES.ravel()[place], place // N_POS, place % N_POS, draw(st.integers(1, 9))


def sparse_blocks(dense, token, seq, pos, block):
    """Codes of the matrix: a slot for each latent in a random order, empty slots with any index."""
    n, n_latents = dense.shape
    order = np.argsort(np.random.default_rng(0).random((n, n_latents)), axis=1)
    values = np.take_along_axis(dense, order, axis=1)
    order[values == 0] = 0
    for low in range(0, n, block):
        yield tuple(x[low : low + block] for x in (order.astype(np.int32), values, seq * N_POS + pos))


def collected(drawn):
    return examples.collect(sparse_blocks(*drawn), drawn[0].shape[1], SEQUENCES)


def by_strength(drawn, latent):
    """All (value, seq, pos, token) of a latent, strongest first, then lowest place."""
    dense, token, seq, pos, _ = drawn
    rows = [(-dense[i, latent], seq[i], pos[i], token[i]) for i in range(len(dense)) if dense[i, latent] > 0]
    return [(-v, s, p, t) for v, s, p, t in sorted(rows)]


def triples(found):
    return list(zip(found.value, found.seq, found.pos, strict=True))


@given(codes())
def test_table_holds_every_activation_in_order_of_place(drawn):
    dense = drawn[0]
    table = collected(drawn)
    assert (table.n_rows, table.n_latents) == dense.shape
    np.testing.assert_array_equal(table.counts, (dense > 0).sum(0))
    np.testing.assert_allclose(table.density, (dense > 0).mean(0))
    for latent in range(dense.shape[1]):
        places, values = table.of_latent(latent)
        got = list(zip(places // N_POS, places % N_POS, SEQUENCES.ravel()[places], values, strict=True))
        assert got == sorted((s, p, t, v) for v, s, p, t in by_strength(drawn, latent))
    assert table.values.dtype == np.float32
    assert table.places.dtype == np.uint32


@given(codes(), st.integers(1, 8), st.sampled_from([1, 5, 10**6]))
def test_coactive_latents_are_those_of_the_matrix(drawn, n, n_pairs):
    is_active = drawn[0] > 0
    both = is_active.T.astype(int) @ is_active
    table = collected(drawn)
    assert table.n_pairs == (is_active.sum(1) ** 2).sum()
    latents = np.arange(table.n_latents)[::-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "_PAIRS", n_pairs)
        found = table.coactive(latents, n)
    for latent, others in zip(latents, found, strict=True):
        ranked = sorted((-both[latent, g], g) for g in range(table.n_latents) if g != latent and both[latent, g])
        assert list(zip(-others.counts, others.latents, strict=True)) == ranked[:n]
        either = [(is_active[:, latent] | is_active[:, g]).sum() for g in others.latents]
        np.testing.assert_allclose(others.jaccard, others.counts / np.array(either, float))


@given(codes(), st.integers(0, 8))
def test_top_is_the_head_of_a_full_sort(drawn, m):
    table = collected(drawn)
    for latent in range(table.n_latents):
        expected = [(v, s, p) for v, s, p, _ in by_strength(drawn, latent)]
        assert triples(table.top(latent, m)) == expected[:m]
        first_of_seq = [x for i, x in enumerate(expected) if x[1] not in [y[1] for y in expected[:i]]]
        assert triples(table.top(latent, m, one_per_sequence=True)) == first_of_seq[:m]


@given(codes(), st.integers(1, 4), st.integers(0, 3), st.sampled_from(["width", "count"]))
def test_samples_cover_the_range_and_lie_in_their_intervals(drawn, n_bins, per_bin, by):
    table = collected(drawn)
    for latent in range(table.n_latents):
        everything = [(v, s, p) for v, s, p, _ in by_strength(drawn, latent)]
        intervals = table.quantile_samples(latent, n_bins, per_bin, by=by, seed=3)
        assert len(intervals) == n_bins
        assert sum(i.count for i in intervals) == len(everything)
        for i in intervals:
            assert len(i.examples.value) == min(per_bin, i.count)
            assert len(set(triples(i.examples))) == len(i.examples.value)
            assert set(triples(i.examples)) <= set(everything)
            assert list(i.examples.value) == sorted(i.examples.value, reverse=True)
            inside = [v for v, _, _ in everything if i.low < v <= i.high or (by == "count" and v == i.low)]
            assert set(i.examples.value) <= set(inside)
            if by == "width":
                assert i.count == len(inside)
        if by == "count":
            sizes = [i.count for i in intervals]
            assert max(sizes) - min(sizes) <= 1
        again = table.quantile_samples(latent, n_bins, per_bin, by=by, seed=3)
        assert [triples(i.examples) for i in again] == [triples(i.examples) for i in intervals]


@given(codes(), st.integers(-8, 8), st.integers(1, 20))
def test_windows_read_the_matrix(drawn, start, length):
    dense, _, seq, pos, _ = drawn
    table = collected(drawn)
    text = np.zeros((N_SEQ, N_POS, dense.shape[1]), np.float32)
    text[seq, pos] = dense
    sequences = np.array([3, 0, 3], np.int32)
    starts = np.array([start, 0, start + 1], np.int32)
    for latent in range(dense.shape[1]):
        expected = [
            [text[s, p, latent] if 0 <= p < N_POS else 0 for p in range(a, a + length)]
            for s, a in zip(sequences, starts, strict=True)
        ]
        np.testing.assert_array_equal(table.windows(latent, sequences, starts, length), expected)


@given(codes(), st.integers(1, 8), st.integers(1, 30))
@settings(deadline=None)
def test_strongest_of_all_latents_dense_and_sparse(drawn, m, sort_block):
    dense, token, seq, pos, block = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "_SORT_BLOCK", sort_block)
        table = collected(drawn)
        found = table.strongest(m)
        order = np.lexsort((pos, seq))  # fed in order of place, both break ties alike
        fed = [x[order] for x in (dense, token, seq, pos)]
        blocks = (tuple(x[low : low + block] for x in fed) for low in range(0, len(dense), block))
        from_dense = examples.strongest_dense(blocks, m)
    for latent in range(table.n_latents):
        expected = by_strength(drawn, latent)[:m]
        got = zip(*(x[latent] for x in (found.value, found.seq, found.pos, found.token)), strict=True)
        assert list(got) == expected + [(0, -1, -1, -1)] * (m - len(expected))
    for field in ("value", "token", "seq", "pos"):
        np.testing.assert_array_equal(getattr(found, field), getattr(from_dense, field))


@given(codes(), st.integers(1, 8), st.sampled_from([0.5, 0.9, 1.0]), st.integers(1, 4))
def test_token_purity_counts_pure_latents(drawn, m, share, fewest):
    strongest = collected(drawn).strongest(m)
    pure = []
    for latent, got in enumerate(examples.top_token_share(strongest)):
        tokens = [t for _, _, _, t in by_strength(drawn, latent)[:m]]
        expected = max((tokens.count(t) / len(tokens) for t in tokens), default=0)
        assert got == pytest.approx(expected)
        if len(tokens) >= fewest:
            pure.append(expected >= share)
    purity = examples.token_purity(strongest, share, fewest)
    assert purity == pytest.approx(np.mean(pure)) if pure else np.isnan(purity)


def test_dense_features_below_zero_never_enter():
    values = np.array([[-1.0, 2.0], [-3.0, 0.0]], np.float32)
    found = examples.strongest_dense([(values, np.array([7, 8]), np.zeros(2, int), np.arange(2))], 2)
    np.testing.assert_array_equal(found.value, [[0, 0], [2, 0]])
    np.testing.assert_array_equal(found.token, [[-1, -1], [7, -1]])


def test_density_histogram_leaves_the_dead_out_and_has_fixed_edges():
    place = np.arange(100)
    indices = np.tile(np.array([[0, 1]], np.int32), (100, 1))
    values = np.ones((100, 2), np.float32)
    values[1:, 1] = 0
    table = examples.collect([(indices, values, place)], 3, np.zeros((10, 10), np.int32))
    counts, edges = table.density_histogram(4)
    np.testing.assert_array_equal(counts, [1, 0, 0, 1])
    np.testing.assert_allclose(edges, [-2, -1.5, -1, -0.5, 0])


def test_histogram_of_values_starts_at_zero():
    place = np.arange(4)
    values = np.array([[1.0], [2.0], [4.0], [4.0]], np.float32)
    table = examples.collect([(np.zeros((4, 1), np.int32), values, place)], 2, np.zeros((2, 3), np.int32))
    counts, edges = table.histogram(0, 4)
    np.testing.assert_array_equal(counts, [0, 1, 1, 2])
    np.testing.assert_array_equal(edges, [0, 1, 2, 3, 4])
    assert table.histogram(1, 4)[0].sum() == 0


@pytest.mark.parametrize(
    ("indices", "values", "place", "message"),
    [
        ([[0, 1]], [[1.0, np.nan]], [0], "not finite"),
        ([[0, 1]], [[1.0, -2.0]], [0], "negative"),
        ([[0, 9]], [[1.0, 1.0]], [0], "latent index 9 does not fit n_latents=4"),
        ([[0, -1]], [[1.0, 1.0]], [0], "does not fit"),
        ([[2, 2]], [[1.0, 1.0]], [0], "a latent comes twice"),
        ([[0, 1], [0, 1]], [[1.0, 1.0], [1.0, 1.0]], [3, 3], "the row at place 3 comes twice"),
    ],
)
def test_damaged_codes_are_refused(indices, values, place, message):
    block = (np.array(indices), np.array(values, np.float32), np.array(place))
    with pytest.raises(UserError, match=message):
        examples.collect([block], 4, np.zeros((2, 2), np.int32))


def test_a_row_of_an_earlier_block_is_refused():
    block = (np.array([[0]]), np.ones((1, 1), np.float32), np.array([3]))
    with pytest.raises(UserError, match="the row at place 3 comes twice"):
        examples.collect([block, block], 4, np.zeros((2, 2), np.int32))


def test_a_latent_out_of_range_is_refused():
    with pytest.raises(UserError, match="latent 3 does not exist; choose 0 to 2"):
        examples.collect([], 3, np.zeros((1, 1), np.int32)).of_latent(3)


def test_dense_without_rows_or_with_nan_is_refused():
    with pytest.raises(UserError, match="no rows"):
        examples.strongest_dense([])
    one = np.zeros(1, int)
    with pytest.raises(UserError, match="not a number"):
        examples.strongest_dense([(np.array([[np.nan]], np.float32), one, one, one)])
