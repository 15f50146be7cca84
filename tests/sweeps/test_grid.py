"""What a sweep plans: members of a grid, marks under budgets, shares and passes."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_jax.sweeps import grid
from sae_jax.sweeps.grid import SweepConfig
from sae_jax.types import UsageError


def test_every_combination_is_a_member_with_a_name_of_its_own():
    found = grid.cells(SweepConfig(grid=("sae.n_latents=256 512", "train.lr=1e-3 0.002", "site=resid_post.2")))
    assert [cell.name for cell in found] == [
        "n256-lr1e-3-resid_post.2",
        "n256-lr0.002-resid_post.2",
        "n512-lr1e-3-resid_post.2",
        "n512-lr0.002-resid_post.2",
    ]
    assert found[1].settings == {"sae.n_latents": 256, "train.lr": 0.002, "site": "resid_post.2"}
    assert grid.cells(SweepConfig()) == [("", {})]


def test_a_grid_of_a_recipe_says_the_same_as_its_words():
    words = grid.cells(SweepConfig(grid=("sae.k=16 32", "site='a.1 b.2' c", "sae.skip=True False")))
    settings = {"sae.k": [16, 32], "site": [["a.1", "b.2"], "c"], "sae.skip": [True, False]}
    values = grid.cells(SweepConfig(grid=settings))  # pyrefly: ignore (a mapping, as recipes give it)
    assert [cell.name for cell in words] == [cell.name for cell in values]
    assert words[0].name == "k16-a.1_b.2-True"
    assert words[0].settings == {"sae.k": 16, "site": "a.1 b.2", "sae.skip": True}
    assert values[0].settings == {"sae.k": 16, "site": ["a.1", "b.2"], "sae.skip": True}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"grid": ("sae.k",)}, "give a setting and different values"),
        ({"grid": ("sae.k=",)}, "give a setting and different values"),
        ({"grid": ("sae.k=4 4",)}, "give a setting a list of different values"),
        ({"grid": ("sae.k=4", "sae.k=8")}, "sae.k stands twice"),
        ({"compute": (0.0,)}, "sweep.compute=0.0 must be above 0"),
        ({"tokens": (float("inf"),)}, "sweep.tokens=inf must be above 0 and finite"),
        ({"min_tokens": 10, "max_tokens": 5}, "leave nothing between them"),
        ({"tolerance": 0.01}, "needs sweep.max_tokens"),
        ({"tolerance": 1.5, "max_tokens": 100}, "sweep.tolerance=1.5 must be above 0 and below 1"),
        ({"window": 0}, "sweep.window=0 must be at least 1"),
        ({"per_pass": 0}, "sweep.per_pass=0 must be at least 1"),
        ({"memory_gib": 0.0}, "sweep.memory_gib=0.0 must be above 0"),
    ],
)
def test_what_makes_no_sweep_is_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        grid.cells(SweepConfig(**settings))


def test_one_run_is_measured_at_every_budget():
    """1000 FLOP a token, 10 rows a step."""
    marks = grid.due(SweepConfig(compute=(1e3, 1e5, 1e6, 1e9), max_tokens=1e5, tokens=(500,)), 7, 10, 1000)
    assert marks == {10: 1e5, 50: None, 100: 1e6}
    assert grid.due(SweepConfig(), 7, 10, 1000) == {7: None}
    assert grid.due(SweepConfig(compute=(1e5, 1e6), min_tokens=200), 7, 10, 1000) == {100: 1e6}
    until_converged = SweepConfig(tolerance=0.01, window=100, max_tokens=350, tokens=(120,))
    assert list(grid.due(until_converged, 7, 10, 1000)) == [10, 12, 20, 30]


@given(st.lists(st.floats(0, 1e6), max_size=12), st.integers(1, 5))
def test_shares_are_all_of_the_work_once(costs, n):
    shares = [grid.share(costs, i, n) for i in range(n)]
    assert sorted(itertools.chain(*shares)) == list(range(len(costs)))
    loads = [sum(costs[piece] for piece in own) for own in shares]
    assert max(loads) - min(loads) <= max(costs, default=0) + 1e-6


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=12),
    st.integers(1, 200),
    st.one_of(st.none(), st.integers(1, 4)),
)
def test_a_pass_fits_into_memory(needs, room, most):
    n_bytes, beside = zip(*needs, strict=True)
    passes = grid.pack(n_bytes, beside, room, most)
    assert sorted(itertools.chain(*passes)) == list(range(len(needs)))
    for own in passes:
        assert len(own) <= (most or len(needs))
        fits = sum(n_bytes[p] for p in own) + max(beside[p] for p in own) <= room
        assert fits or len(own) == 1
