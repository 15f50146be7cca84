"""The reader of compiled programs sees the arrays that are there."""

import jax
import jax.numpy as jnp
import pytest

from tests.hlo import collectives, largest_array


def test_the_largest_array_of_a_program_is_found():
    def f(x, w):
        return (jnp.tanh(x @ w.T) @ w).sum()

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((32, 4), (64, 4))]
    assert largest_array(jax.jit(jax.grad(f, 1)).lower(*shapes).compile().as_text()) == 32 * 64


def test_every_type_of_array_counts():
    assert largest_array("%a = bf16[2,3]{1,0} x(pred[5], s32[], f8e4m3fn[<=7,2], (f32[9], u8[3,3,2]))") == 18


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("{{0,1},{2,3}}", [{0, 1}, {2, 3}]),
        ("[2,2]<=[4]", [{0, 1}, {2, 3}]),
        ("[2,2]<=[2,2]T(1,0)", [{0, 2}, {1, 3}]),
        ("mesh['a'=2,'b'=1,'c'=2] {'c'}", [{0, 1}, {2, 3}]),
        ("mesh['a'=2,'b'=1,'c'=2] {'a'}", [{0, 2}, {1, 3}]),
        ("mesh['a'=2,'b'=1,'c'=2] {'a','c'}", [{0, 1, 2, 3}]),
    ],
)
def test_who_exchanges_what(groups, expected):
    line = f"  %x = (f32[], f32[8]{{0}}) all-reduce(%a, %b), channel_id=1, replica_groups={groups}, to_apply=%add"
    assert collectives(line) == [("(f32[], f32[8]{0})", expected)]
