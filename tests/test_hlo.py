"""The reader of compiled programs sees the arrays that are there."""

import jax
import jax.numpy as jnp

from tests.hlo import largest_array


def test_the_largest_array_of_a_program_is_found():
    def f(x, w):
        return (jnp.tanh(x @ w.T) @ w).sum()

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((32, 4), (64, 4))]
    assert largest_array(jax.jit(jax.grad(f, 1)).lower(*shapes).compile().as_text()) == 32 * 64


def test_every_type_of_array_counts():
    assert largest_array("%a = bf16[2,3]{1,0} x(pred[5], s32[], f8e4m3fn[<=7,2], (f32[9], u8[3,3,2]))") == 18
